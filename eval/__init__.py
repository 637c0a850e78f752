"""Evaluators of frozen features, installed as dinokit.eval. A registry: a file here is `dinokit eval NAME`.

A file defines `Config`, a dataclass, and

    evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]

which leaves the backbone as it was and returns one number a metric, in [0, 1] where it is a share. Scores
become a line of results.jsonl. Fields of Config:

- config.registry.source_field() makes a section of images, for training or test. Inside a training run, a
  section that is not given is that split of the training data.
- `cache`, None by default, gets a folder for features from the command line; `out` gets one for files.
- config.registry.only_if() makes a field that is read only with some values of others.

A Config may inherit from a base class below, which has the common fields. This file imports nothing heavy:
settings are checked before torch is loaded. `_*.py` are helpers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dinokit.config.registry import check_at_least, source_field

# Settings that do not change what is trained, so a training that was stopped resumes under other values.
NOT_TRAINED = ("cache", "out", "save_every", "workers", "test", "max_test", "max_unreadable", "overlap")


@dataclass
class ImageConfig:
    """Evaluators of whole images."""

    test: dict[str, Any] | None = source_field("data.sources", "test")
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    size: int = 0  # pixels; 0: the size that the backbone was trained on
    resize: int = 0  # pixels of the shorter side before the centre crop; 0: 256 / 224 of `size`
    batch: int = 256  # images, for the backbone
    workers: int = -1  # loader processes; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_unreadable: float = 0.01  # share of a set's images that may be unreadable: they are left out
    cache: str | None = None  # folder for features, for the next evaluator; none: features are not saved

    def __post_init__(self) -> None:
        check_at_least(self, max_test=0, size=0, resize=0, batch=1, max_unreadable=0)


@dataclass
class ClassificationConfig(ImageConfig):
    """Evaluators that classify images, and learn from labelled ones."""

    train: dict[str, Any] | None = source_field("data.sources", "train")
    max_train: int = 0  # images, drawn evenly from the set; 0: all
    overlap: Literal["refuse", "allow"] = "refuse"  # test images among those of train; allowed: _optimistic

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_train=0)


@dataclass
class DenseConfig:
    """Evaluators of images with a map of classes or depths."""

    train: dict[str, Any] | None = source_field("data.dense", "train")
    test: dict[str, Any] | None = source_field("data.dense", "test")
    max_train: int = 0  # images, drawn evenly from the set; 0: all
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    overlap: Literal["refuse", "allow"] = "refuse"  # test images among those of train; allowed: _optimistic
    resize: int = 0  # pixels of the shorter side, for training and test; 0: as stored
    # folder for the trained head, a few predictions, and an unfinished training, which resumes
    out: str = ""
    seed: int = 0
    workers: int = -1  # loader processes; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training

    def __post_init__(self) -> None:
        check_at_least(self, max_train=0, max_test=0, resize=0, seed=0)


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates without a place for the class.

    Raises:
        ValueError: naming the first.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        what = f"'{wrong[0]}' has no {{}}" if wrong else "there is none"
        raise ValueError(f"templates: {what}. One is a text with {{}} in place of the class, as 'a {{}}'.")


def training_settings(cfg: Any) -> dict[str, Any]:
    """The settings of an evaluator that decide what is trained."""
    return {key: value for key, value in asdict(cfg).items() if key not in NOT_TRAINED}
