"""dinokit: train, evaluate and use self-supervised visual features."""

__version__ = "0.1.0"
