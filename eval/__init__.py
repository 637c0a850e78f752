"""Evaluators of frozen features, installed as dinokit.eval. A shelf: a file here is `dinokit eval NAME`.

A file defines `Config`, a dataclass, and

    evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]

which leaves the backbone as it was and returns one number a metric, in [0, 1] where it is a share. A field of
Config with metadata {"registry": "data.sources", "split": "train" or "test"} is a source of images; inside a
training run, where it is not given, it is that split of the training data. One with "optional" besides may
stay away; one with "many" is a section of sources by name. What evaluate returns becomes a line of
results.jsonl as it is. A field `cache`, None by default, is filled in by the command line with a folder for
features, and a field `out` with one for files. A field that is read only as others are is made by
registry.only_if(). `_name.py` is what evaluators share.
"""
