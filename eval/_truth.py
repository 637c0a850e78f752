"""Truths that are files of their own: images with several classes, and what the classes of another set are.

N  images     C  classes
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinokit.config.registry import suggest
from dinokit.data.sources import ImageSource
from dinokit.eval._labelled import few
from dinokit.features import Features


def kept_places(source: ImageSource, features: Features) -> list[int]:
    """The numbers of a source's images that could be read, in the order of the features."""
    lost = set(features.unreadable)
    return [i for i in range(len(source)) if not lost or source.name(i) not in lost]


def places_by_name(source: ImageSource, names: Sequence[str], path: str) -> list[int]:
    """The numbers of the images that are called so, but for their folders and suffixes.

    Raises:
        ValueError: if there is none for a name that `path` gives.
    """
    numbers = {_stem(source.name(i)): i for i in range(len(source))}
    missing = [name for name in names if _stem(name) not in numbers]
    if missing:
        raise ValueError(f"{path} names {len(missing)} images that are not there: {few(missing)}.")
    return [numbers[_stem(name)] for name in names]


def _stem(name: str) -> str:
    last = re.split(r"/|: ", name)[-1]
    return last.rpartition(".")[0] if re.search(r"\.[A-Za-z]{3,4}$", last) else last


def read_json(path: str, key: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if there is no such file or it is no JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path} cannot be read as JSON: {error}.") from None


def words_of(table: Any, path: str) -> list[str]:
    """The classes that a table of many classes an image names, sorted.

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


def many_hot(
    table: Any, source: ImageSource, places: Sequence[int], classes: Sequence[str], path: str
) -> Tensor:
    """Which classes each image has.

    Args:
        table: {name of the image: [class, ...]}, by the end of its path or its file name; or a list of lists
            by the number that ends the file name, from 1, as in ImageNet-ReaL's file.
        source: of the images.
        places: which of them.
        classes: names; a class in the table is a name or a number.
        path: of the table, for messages.

    Returns:
        (len(places), C) bool.

    Raises:
        ValueError: if an image or a class is not to be found.
    """
    number = {name: label for label, name in enumerate(classes)}
    done = torch.zeros(len(places), len(classes), dtype=torch.bool)
    for row, place in enumerate(places):
        for word in _entry(table, source.name(place), path):
            label = word if isinstance(word, int) and str(word) not in number else number.get(str(word), -1)
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"{path} gives {source.name(place)} the class '{word}', which is none of the "
                    f"{len(classes)}.{suggest(str(word), list(classes))}"
                )
            done[row, label] = True
    return done


def _entry(table: Any, name: str, path: str) -> list[Any]:
    """What a table says of the image of this name."""
    parts = re.split(r"/|: ", name)
    if isinstance(table, list):
        last = re.search(r"(\d+)\D*$", parts[-1].rpartition(".")[0])
        place = int(last[1]) - 1 if last else -1
        if not 0 <= place < len(table):
            raise ValueError(
                f"{path} lists {len(table)} images, and the name of {name} ends in no such number."
            )
        return list(table[place])
    for start in range(len(parts)):
        found = table.get("/".join(parts[start:]))
        if found is not None:
            return list(found)
    raise ValueError(f"{path} says nothing of {name}; it names {', '.join(list(table)[:3])} ...")


def class_map(source: ImageSource, key: str, path: str, classes: Sequence[str]) -> list[int]:
    """For each class of another test set, the class of the training set that it is.

    Args:
        source: of the other set.
        key: of its section, for messages.
        path: of a map, or "" for classes of the same name. A .npy or a JSON list of numbers or names, in the
            order of the set's classes, or a JSON object {its class: our class}.
        classes: names of the training set.

    Raises:
        ValueError: if a class has no counterpart, or two have the same.
    """
    own, number = list(source.classes), {name: label for label, name in enumerate(classes)}
    table: Any = own
    if path.endswith(".npy"):
        table = np.load(Path(path).expanduser(), allow_pickle=False).tolist()
    elif path:
        table = read_json(path, f"maps.{key}")
    if isinstance(table, list) and len(table) != len(own):
        raise ValueError(f"maps.{key}: {path} maps {len(table)} classes, but the set has {len(own)}.")
    targets = [table.get(name) for name in own] if isinstance(table, Mapping) else table
    done = [target if isinstance(target, int) else number.get(str(target), -1) for target in targets]
    for name, target, label in zip(own, targets, done, strict=True):
        if not 0 <= label < len(classes):
            raise ValueError(
                f"also.{key}: its class '{name}' is no class of the training images (looked for '{target}')."
                f"{suggest(str(target), list(classes))} Give maps.{key}, a file that maps its classes."
            )
    if len(set(done)) < len(done):
        raise ValueError(f"also.{key}: two of its classes are the same class of the training images.")
    return done
