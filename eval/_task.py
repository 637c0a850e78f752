"""A task of classification: training and test images, their classes, and what is true of each image."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dinokit.data.sources import ImageSource
from dinokit.data.transforms import Transform
from dinokit.eval import _labelled, _truth
from dinokit.eval._scores import accepted_share, class_scores, mean_average_precision
from dinokit.features import Features, Pooling, device_of
from dinokit.models import Backbone


class Keys(Protocol):
    """The keys of a Config that say what the task is, beside those of _labelled.Keys."""

    train: dict[str, Any] | None
    test: dict[str, Any] | None
    also: dict[str, Any] | None  # further test sets, by name
    maps: dict[str, str]  # of these: file that maps classes
    labels: str  # JSON of several classes an image
    real: str  # JSON of the classes that are accepted
    max_train: int
    max_test: int


class Task:
    """What is to be told apart.

    Args:
        cfg: which data, and how they are seen.
        backbone: what sees them.
        reading: what is kept of its tokens.

    Raises:
        ValueError, LookupError: if the data do not fit together; the message names the key to set.
    """

    def __init__(self, cfg: Keys, backbone: Backbone, reading: Pooling) -> None:
        self.cfg, self.backbone, self.reading = cfg, backbone, reading
        _labelled.refuse_overlap(cfg.train, cfg.test)
        self.several = bool(cfg.labels)  # classes an image
        self.train = _labelled.open_source(cfg.train, "train", backbone, cfg.max_train, not self.several)
        self.test = _labelled.open_source(cfg.test, "test", backbone, cfg.max_test, not self.several)
        self.table = _truth.read_json(cfg.labels, "labels") if self.several else {}
        self.classes = (
            _truth.words_of(self.table, cfg.labels)
            if self.several
            else _labelled.shared_classes(self.train, self.test)
        )

    def features(
        self, key: str, source: ImageSource, cut: Transform | None = None, draw: int = 0
    ) -> Features:
        """Of the images of a source, each with a label unless images have several."""
        return _labelled.features_of(
            self.cfg, key, self.backbone, source, self.reading, cut, draw, not self.several
        )

    def target(self, source: ImageSource, features: Features) -> Tensor:
        """What is true of the images: (N,) int64, or (N, C) bool if they have several classes."""
        if not self.several:
            return features.y
        return self._sets(self.table, source, self.cfg.labels, features)

    def target_of(self, source: ImageSource) -> Callable[[Tensor, Tensor], Tensor]:
        """From the labels (b,) and the numbers (b,) of images to what is true of them."""
        if not self.several:
            return lambda labels, places: labels
        table = _truth.many_hot(self.table, source, range(len(source)), self.classes, self.cfg.labels)
        return lambda labels, places: table[places]

    def scores(self, classify: Callable[[Tensor], Tensor], test: Features, y: Tensor) -> dict[str, float]:
        """Of a classifier, from features (N, W) to logits (N, C), on all test sets."""
        logits = classify(test.x)
        if self.several:
            return {"mAP": mean_average_precision(logits, y)}
        scores = class_scores(logits, y)
        if self.cfg.real:
            table = _truth.read_json(self.cfg.real, "real")
            scores["real"] = accepted_share(logits, self._sets(table, self.test, self.cfg.real, test))
        for name, section in (self.cfg.also or {}).items():
            further = self._further(name, section, classify)
            scores |= {f"{name} {key}": value for key, value in further.items()}
        return scores

    def _further(
        self, name: str, section: Mapping[str, Any], classify: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Scores on another set, among whose classes alone is chosen."""
        source = _labelled.open_source(section, f"also.{name}", self.backbone)
        chosen = _truth.class_map(source, name, self.cfg.maps.get(name, ""), self.classes)
        done = self.features(f"also.{name}", source)
        return class_scores(classify(done.x)[:, chosen], done.y)

    def _sets(self, table: Any, source: ImageSource, path: str, features: Features) -> Tensor:
        places = _truth.kept_places(source, features)
        return _truth.many_hot(table, source, places, self.classes, path).to(device_of(self.backbone))


def split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of images to train on, and of a share of them that is held out, each in order.

    Raises:
        ValueError: if one of the two would be empty.
    """
    places = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = round(count * share)
    if not 0 < held < count:
        raise ValueError(
            f"held_out={share} of {count} training images leaves {count - held} to train on and {held} to "
            f"choose by: change held_out, or give more images."
        )
    return places[held:].sort().values, places[:held].sort().values
