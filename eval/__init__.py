"""Evaluators of frozen features, installed as dinokit.eval. A registry: a file here is `dinokit eval NAME`.

A file defines `Config`, a dataclass, and

    evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]

which leaves the backbone as it was and returns one number a metric, in [0, 1] where it is a share. Scores
become a line of results.jsonl. Fields of Config:

- config.registry.source_field() makes a section of images, for training or test. Inside a training run, a
  section that is not given is that split of the training data.
- `cache`, None by default, gets a folder for features from the command line; `out` gets one for files.
- config.registry.only_if() makes a field that is read only with some values of others.

A Config may inherit from a base class in `_config.py`, which has the common fields. `_*.py` are helpers.
"""
