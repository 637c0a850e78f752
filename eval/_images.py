"""Labelled images of evaluators: opens sources, computes or loads their features, and reads label files.

N  images     C  classes     W  columns of a row of features
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinokit.config import registry
from dinokit.config.registry import suggest
from dinokit.data.sources import ImageSource, images_stamp, shared_images
from dinokit.data.transforms import Transform
from dinokit.eval import ImageConfig, training_settings
from dinokit.features import (
    AllPatches,
    Features,
    Pooling,
    cached,
    device_of,
    extract,
    fingerprint,
    load_cached,
    spread,
)
from dinokit.heads.classifier import Classifier
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import broadcast, rank
from dinokit.runtime.log import info
from dinokit.runtime.partial import PartialResult

MARK = "_optimistic"  # ends the names of scores that flatter
LINEAR_GRID = Pooling(4, "mean")  # features of the linear grid, which contain the class token alone


def open_source(
    section: Mapping[str, Any] | None, key: str, backbone: Backbone, limit: int = 0, labelled: bool = True
) -> ImageSource:
    """The source of the section `key`, in the backbone's channels; `limit` images, drawn evenly; 0 is all.

    Raises:
        ValueError, LookupError: if it cannot be opened, or has no labels; the message names the key to set.
    """
    if not section or not section.get("name"):
        raise ValueError(f"{key}.name must be given; there is: {', '.join(registry.names('data.sources'))}.")
    if "channels" in section:
        section = {**section, "channels": backbone.channels}
    source: ImageSource = registry.build("data.sources", section)
    if labelled and not source.classes:
        hint = f"set {key}.labels=folders" if "labels" in section else "give images with labels"
        hint = f"set {key}.label to the column that has them" if "label" in section else hint
        raise ValueError(f"The {key} images ({key}.name={section['name']}) have no labels: {hint}.")
    if not len(source):
        raise ValueError(f"The {key} source ({key}.name={section['name']}) has no images.")
    return spread(source, limit)


def one_class(name: str) -> ValueError:
    """The error for images that are all of one class."""
    return ValueError(
        f"There is one class only, '{name}': nothing to distinguish. Give images of two classes or more; "
        f"in a folder, each folder directly below it is a class."
    )


def shared_classes(train: ImageSource, test: ImageSource) -> list[str]:
    """The classes, which must be the same in both sources.

    Raises:
        ValueError: if they differ, or there is only one.
    """
    a, b = list(train.classes), list(test.classes)
    if a == b:
        if len(a) < 2:
            raise one_class(a[0])
        return a
    only = {"train": set(a) - set(b), "test": set(b) - set(a)}
    difference = [f"only {split} has {first_five(sorted(names))}" for split, names in only.items() if names]
    raise ValueError(
        f"The classes of train ({len(a)}) and test ({len(b)}) are not the same: "
        f"{' and '.join(difference) or 'their order differs'}. Give both the same classes."
    )


def count_shared(cfg: Any, train: Any, test: Any, key: str = "test", train_key: str = "train") -> int:
    """How many images of `test` are images of `train` too, with overlap=allow; the two are sources.

    Raises:
        ValueError: with overlap=refuse, if there is one.
    """
    shared = broadcast(shared_images(train, test) if rank() == 0 else None)
    if shared and cfg.overlap == "refuse":
        raise ValueError(
            f"At least {len(shared)} of {len(test)} {key} images are {train_key} images too, such as "
            f"{test.name(shared[0])}: these would be found again, not recognised. Take them out, give other "
            f"images (of one data set {train_key}.split=train {key}.split=test), or set overlap=allow: "
            f"scores then are called optimistic."
        )
    if shared:
        info(f"{len(shared)} of {len(test)} {key} images are {train_key} images too: scores are optimistic")
    return len(shared)


def named_optimistic(
    scores: Mapping[str, float], shared: int, chosen_on_test: bool = False
) -> dict[str, float]:
    """The scores, marked by their names if test images were trained on, or settings were chosen on them."""
    plain = not (shared or chosen_on_test)
    marked = {
        key if plain or key.startswith(("images_", "queries")) or key.endswith(MARK) else key + MARK: value
        for key, value in scores.items()
    }
    return {**marked, **({"images_shared": shared} if shared else {})}


def first_five(names: Sequence[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


def image_sizes(cfg: ImageConfig, backbone: Backbone) -> tuple[int, int]:
    """The keys `resize` and `size`, in pixels."""
    size = cfg.size or backbone.input.size
    return cfg.resize or round(size * 256 / 224), size


def image_features(
    cfg: ImageConfig,
    key: str,
    backbone: Backbone,
    source: ImageSource,
    pooling: Pooling | AllPatches | None = None,
    transform: Transform | None = None,
    draw: int = 0,
    labelled: bool = True,
) -> Features:
    """Features of all images of a source, from the cache if they are in it.

    Args:
        cfg: sizes, precision, cache and loading.
        key: of the source's section, for messages.
        backbone: that sees the images.
        source: the images.
        pooling: how tokens become a row of features; None is the class token alone.
        transform: another view of an image in place of its centre crop.
        draw: the number of the draw, for a random `transform`.
        labelled: whether every image must have a label.

    Raises:
        ValueError: as `extract`; or if too many images cannot be read, or one has no label or one outside of
            the classes.
    """
    pooling = pooling or Pooling()
    resize, size = image_sizes(cfg, backbone)
    device = device_of(backbone)
    precision = pick_precision(cfg.precision, device)
    compute = partial(
        extract, backbone, source, resize, size, cfg.batch, cfg.workers, DTYPES[precision], pooling,
        transform, draw,
    )  # fmt: skip
    stamp = images_stamp(source) if cfg.cache else None
    if cfg.cache and stamp:
        view = (resize, size) if transform is None else (size, transform, draw)
        weights = fingerprint(backbone, settings=True)
        depends_on = weights, backbone.input, stamp, view, precision, device.type
        features = _from_linear_grid(cfg.cache, depends_on, backbone, pooling) or cached(
            cfg.cache, (*depends_on, pooling), device, lambda unfinished: compute(partial=unfinished)
        )
    else:
        features = compute()
    if transform is None:  # other views of the same images would repeat it
        report_unreadable(key, features.unreadable, len(source), cfg.max_unreadable)
    if labelled:
        _check_labels(features, key, len(source.classes))
    return features


def report_unreadable(key: str, names: Sequence[str], count: int, most: float) -> None:
    """Log which of `count` images cannot be read.

    Raises:
        ValueError: if they are more than a share of `most`: a score of the rest would be of other data.
    """
    if len(names) > most * count:
        raise ValueError(
            f"{len(names)} of the {count} {key} images cannot be read, more than max_unreadable={most:g}: "
            f"{first_five(names)}. Repair or remove them, or allow more, such as "
            f"max_unreadable={math.ceil(100 * len(names) / count) / 100:g}."
        )
    if names:
        info(f"{len(names)} of the {count} {key} images cannot be read, left out: {first_five(names)}.")


def _from_linear_grid(
    folder: str, depends_on: tuple[Any, ...], backbone: Backbone, pooling: Pooling | AllPatches
) -> Features | None:
    """Class tokens of the last block, from cached features of the linear grid; None if not cached."""
    if pooling != Pooling():
        return None
    features = load_cached(folder, (*depends_on, LINEAR_GRID), device_of(backbone))
    if features is not None:
        stop = LINEAR_GRID.blocks * backbone.width
        features.x = features.x[:, stop - backbone.width : stop].contiguous()
    return features


def _check_labels(features: Features, key: str, classes: int) -> None:
    missing = int((features.y < 0).sum())
    if missing:
        raise ValueError(
            f"{missing} of {len(features.y)} {key} images have no label: label them or take them out."
        )
    if int(features.y.max()) >= classes:
        label = int(features.y.max())
        raise ValueError(f"A {key} image has the label {label}, but there are {classes} classes, from 0 on.")


def split_images(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images to train on, and of a share of them that is held out, each ascending.

    Raises:
        ValueError: if one of the two would be empty.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = round(count * share)
    if not 0 < held_out < count:
        raise ValueError(
            f"held_out={share} of {count} training images leaves {count - held_out} to train on and "
            f"{held_out} to choose by: change held_out, or give more images."
        )
    return order[held_out:].sort().values, order[:held_out].sort().values


def save_classifier(
    cfg: Any, backbone: Backbone, weight: Tensor, bias: Tensor, classes: Sequence[str], pooling: Pooling,
    several: bool = False,
) -> None:  # fmt: skip
    """Write the classifier that an evaluator chose to cfg.out, for `dinokit predict`."""
    resize, size = image_sizes(cfg, backbone)
    found = Classifier(weight, bias, list(classes), pooling, resize, size, fingerprint(backbone), several)
    found.save(Path(cfg.out).expanduser())


def partial_result(cfg: Any, name: str, backbone: Backbone, *depends_on: object) -> PartialResult:
    """Where evaluator `name` saves its unfinished training: in cfg.out, by its settings and the weights."""
    key = (training_settings(cfg), fingerprint(backbone, settings=True), *depends_on) if cfg.out else None
    return PartialResult(cfg.out or None, name, key, device_of(backbone))


def readable_images(source: ImageSource, features: Features) -> list[int]:
    """The numbers of a source's images that could be read, in the order of the features."""
    unreadable = set(features.unreadable)
    return [i for i in range(len(source)) if not unreadable or source.name(i) not in unreadable]


def images_by_name(source: ImageSource, names: Sequence[str], path: str) -> list[int]:
    """The numbers of the images with these names, folders and suffixes aside.

    Raises:
        ValueError: if the source has no image of a name that `path` gives.
    """
    numbers = {_stem(source.name(i)): i for i in range(len(source))}
    missing = [name for name in names if _stem(name) not in numbers]
    if missing:
        raise ValueError(f"{path} names {len(missing)} images that do not exist: {first_five(missing)}.")
    return [numbers[_stem(name)] for name in names]


def _stem(name: str) -> str:
    last = re.split(r"/|: ", name)[-1]
    return last.rpartition(".")[0] if re.search(r"\.[A-Za-z]{3,4}$", last) else last


def read_json(path: str, key: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: if the file does not exist or is not JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{key}={path} cannot be read as JSON: {error}.") from None


def classes_in(table: Any, path: str) -> list[str]:
    """All classes in a table of several classes an image, sorted.

    Raises:
        ValueError: if it is not {image: [class, ...]}.
    """
    if not isinstance(table, Mapping) or not all(isinstance(row, list) for row in table.values()):
        raise ValueError(
            f"{path} should hold one JSON object, the name of each image with a list of classes."
        )
    words = {word for row in table.values() for word in row}
    numbers = all(isinstance(word, int) for word in words)
    return [str(word) for word in (sorted(words) if numbers else sorted(map(str, words)))]


def multi_hot(
    table: Any, source: ImageSource, images: Sequence[int], classes: Sequence[str], path: str
) -> Tensor:
    """The classes of the images with these numbers in a source, as a mask (len(images), C) bool.

    The table is {name of the image: [class, ...]}, by the end of its path or its file name; or a list of
    lists by the number that ends the file name, from 1, as in ImageNet-ReaL's file. A class in it is one of
    the names `classes`, or a number.

    Raises:
        ValueError: if an image or a class is not found.
    """
    number = {name: label for label, name in enumerate(classes)}
    mask = torch.zeros(len(images), len(classes), dtype=torch.bool)
    for row, image in enumerate(images):
        for word in _entry(table, source.name(image), path):
            label = word if isinstance(word, int) and str(word) not in number else number.get(str(word), -1)
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"{path} gives {source.name(image)} the class '{word}', which is not one of the "
                    f"{len(classes)} classes.{suggest(str(word), list(classes))}"
                )
            mask[row, label] = True
    return mask


def _entry(table: Any, name: str, path: str) -> list[Any]:
    """The classes that a table gives for the image of this name."""
    parts = re.split(r"/|: ", name)
    if isinstance(table, list):
        last = re.search(r"(\d+)\D*$", parts[-1].rpartition(".")[0])
        index = int(last[1]) - 1 if last else -1
        if not 0 <= index < len(table):
            raise ValueError(
                f"{path} lists {len(table)} images, and the name of {name} does not end in such a number."
            )
        return list(table[index])
    for start in range(len(parts)):
        row = table.get("/".join(parts[start:]))
        if row is not None:
            return list(row)
    raise ValueError(f"{path} has no entry for {name}; it names {', '.join(list(table)[:3])} ...")


def class_map(source: ImageSource, key: str, path: str, classes: Sequence[str]) -> list[int]:
    """For each class of the test set `key`, the number of the same one of `classes`, the training set's.

    `path` is a .npy or a JSON list of numbers or names, in the order of the set's classes, or a JSON object
    {class of the set: class of the training set}; or "" for classes of the same name.

    Raises:
        ValueError: if a class has no counterpart, or two have the same.
    """
    names, number = list(source.classes), {name: label for label, name in enumerate(classes)}
    table: Any = names
    if path.endswith(".npy"):
        table = np.load(Path(path).expanduser(), allow_pickle=False).tolist()
    elif path:
        table = read_json(path, f"maps.{key}")
    if isinstance(table, list) and len(table) != len(names):
        raise ValueError(f"maps.{key}: {path} maps {len(table)} classes, but the set has {len(names)}.")
    targets = [table.get(name) for name in names] if isinstance(table, Mapping) else table
    labels = [target if isinstance(target, int) else number.get(str(target), -1) for target in targets]
    for name, target, label in zip(names, targets, labels, strict=True):
        if not 0 <= label < len(classes):
            raise ValueError(
                f"also.{key}: its class '{name}' is not a class of the training images "
                f"(looked for '{target}').{suggest(str(target), list(classes))} Give maps.{key}, a file that "
                f"maps its classes."
            )
    if len(set(labels)) < len(labels):
        raise ValueError(f"also.{key}: two of its classes are the same class of the training images.")
    return labels
