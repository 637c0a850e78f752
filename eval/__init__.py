"""Evaluators of frozen features, installed as dinokit.eval. A shelf: a file here is `dinokit eval NAME`.

A file defines `Config`, a dataclass, and

    evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]

which leaves the backbone as it was and returns one number a metric, in [0, 1] where it is a share. A field of
Config with metadata {"shelf": "data.sources", "split": "train" or "test"} is a source of images; inside a
training run, where it is not given, it is that split of the training data.
"""
