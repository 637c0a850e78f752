"""Labels for images: by a classifier that an evaluator saved, or by the votes of similar labelled images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinokit.data.sources import ImageSource
from dinokit.eval.knn import vote
from dinokit.features import Features, Pooling, device_of, extract
from dinokit.heads.classifier import load_classifier
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.log import info

TEMP = 0.07  # of the votes, as in the evaluator knn


class Prediction(NamedTuple):
    """The likeliest class of an image; of one that cannot be read the label is "", and the probability 0."""

    file: str
    label: str
    probability: float


def predict(
    backbone: Backbone,
    source: ImageSource,
    head: str | Path = "",
    labelled: ImageSource | None = None,
    k: int = 20,
    batch: int = 64,
    workers: int = 0,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
) -> Iterator[Prediction]:
    """The label of each image, in the order of the source.

    Args:
        backbone: on the device to compute on.
        source: the images.
        head: of dinokit.heads.classifier, a file or the folder that has it.
        labelled: in place of a head: images with classes, whose k nearest vote as in the evaluator knn; the
            probability is the share of the votes.
        k: neighbours.
        batch: images at a time.
        workers: processes that load images.
        precision: auto, fp32, bf16 or fp16.

    Raises:
        ValueError, LookupError: if neither or both are given, the head is of other weights, or no labelled
            image has a class.
    """
    if bool(head) == (labelled is not None):
        raise ValueError(
            "Give either a head (head=RUN/linear, which dinokit eval linear or logreg saves) or labelled "
            "images (labelled.path=FOLDER, one sub-folder a class)."
        )
    dtype = DTYPES[pick_precision(precision, device_of(backbone))]
    if labelled is None:
        classifier = load_classifier(head, backbone)
        size, resize, pooling, classes = (
            classifier.size, classifier.resize, classifier.pooling, classifier.classes,
        )  # fmt: skip
    else:
        size = backbone.input.size
        resize, pooling, classes = round(size * 256 / 224), Pooling(), list(labelled.classes)
        if not classes:
            raise ValueError("The labelled images have no labels: in a folder, one sub-folder is one class.")
        bank = extract(backbone, labelled, resize, size, batch, workers, dtype, pooling)
    features = extract(backbone, source, resize, size, batch, workers, dtype, pooling)
    if labelled is None:
        probabilities = classifier.probabilities(features.x)
    else:
        has_label = bank.y >= 0
        if without := int((~has_label).sum()):
            info(f"{without} of {len(bank.y)} labelled images have no label and do not vote.")
        probabilities = vote(features.x, bank.x[has_label], bank.y[has_label], k, TEMP, len(classes))
    yield from _named(source, features, probabilities, classes)


def _named(
    source: ImageSource, features: Features, probabilities: Tensor, classes: list[str]
) -> Iterator[Prediction]:
    best, labels = (x.tolist() for x in torch.max(probabilities, dim=1))
    rows, unreadable = iter(zip(best, labels, strict=True)), set(features.unreadable)
    for index in range(len(source)):
        name = source.name(index)
        if name in unreadable:
            yield Prediction(name, "", 0.0)
        else:
            probability, label = next(rows)
            yield Prediction(name, classes[label], probability)
