"""What evaluators of whole images share: sources are opened, held against each other, and become features."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from dinokit.config import registry
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import Transform
from dinokit.features import (
    Features,
    Pooling,
    cached,
    device_of,
    extract,
    fingerprint,
    load_cached,
    spread,
)
from dinokit.features.fingerprint import images_stamp
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.log import info

WIDE = Pooling(4, "mean")  # what the linear grid keeps


class Keys(Protocol):
    """The keys of a Config that say how images become features."""

    size: int  # pixels; 0: what the backbone was trained on
    resize: int  # pixels of the shorter side before the centre is cut out; 0: 256 / 224 of `size`
    batch: int  # images, for the backbone
    workers: int
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    max_unreadable: float  # share of the images of a set
    cache: str | None  # folder; none: features are not kept


def refuse_overlap(train: Mapping[str, Any] | None, test: Mapping[str, Any] | None) -> None:
    """A test image among the training images would find itself.

    Raises:
        ValueError: if both sections are one data set, and their splits share images.
    """
    a, b = dict(train or {}), dict(test or {})
    splits = a.pop("split", "all"), b.pop("split", "all")
    if a and a == b and (splits[0] == splits[1] or "all" in splits):
        raise ValueError(
            f"`train` and `test` share images: they are the same data with train.split={splits[0]} and "
            f"test.split={splits[1]}. Set train.split=train test.split=test, or give another test.path."
        )


def open_source(
    section: Mapping[str, Any] | None, key: str, backbone: Backbone, limit: int = 0, labelled: bool = True
) -> ImageSource:
    """The source of a section, in the backbone's channels.

    Args:
        section: as checked.
        key: of the section, for messages.
        backbone: what will see the images.
        limit: images, drawn evenly; 0 is all.
        labelled: whether a source without labels is refused.

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
        raise ValueError(f"The {key} images ({key}.name={section['name']}) are none.")
    return spread(source, limit)


def one_class(name: str) -> ValueError:
    """The error for images that are all of one class."""
    return ValueError(
        f"There is one class only, '{name}': nothing to tell apart. Give images of two classes or more; "
        f"in a folder, each folder directly below it is a class."
    )


def shared_classes(train: ImageSource, test: ImageSource) -> list[str]:
    """The classes, which must be the same.

    Raises:
        ValueError: if they are not, or there is but one.
    """
    have, want = list(train.classes), list(test.classes)
    if have == want:
        if len(have) < 2:
            raise one_class(have[0])
        return have
    only = {"train": set(have) - set(want), "test": set(want) - set(have)}
    parts = [f"only {split} has {few(sorted(names))}" for split, names in only.items() if names]
    raise ValueError(
        f"The classes of train ({len(have)}) and test ({len(want)}) are not the same: "
        f"{' and '.join(parts) or 'their order differs'}. Give both the same classes."
    )


def few(names: Sequence[str]) -> str:
    """The first five, quoted."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


def sizes(cfg: Keys, backbone: Backbone) -> tuple[int, int]:
    """The keys `resize` and `size`, in pixels."""
    size = cfg.size or backbone.input.size
    return cfg.resize or round(size * 256 / 224), size


def features_of(
    cfg: Keys,
    key: str,
    backbone: Backbone,
    source: ImageSource,
    reading: Pooling,
    cut: Transform | None = None,
    draw: int = 0,
    labelled: bool = True,
) -> Features:
    """As `extract`, from the cache if it can be.

    Args:
        cfg: how.
        key: what the images are, for messages.
        backbone: what sees them.
        source: the images.
        reading: how tokens become a row of features.
        cut: what is shown of an image in place of its centre.
        draw: its number, for a `cut` that draws.
        labelled: whether every image must have a label.

    Raises:
        ValueError: as `extract`, if too many images cannot be read, or if one has no label, or one outside
            of the classes.
    """
    resize, size = sizes(cfg, backbone)
    device = device_of(backbone)
    precision = pick_precision(cfg.precision, device)
    make = partial(
        extract, backbone, source, resize, size, cfg.batch, cfg.workers, DTYPES[precision], reading, cut, draw
    )
    stamp = images_stamp(source) if cfg.cache else None
    if cfg.cache and stamp:
        view = (resize, size) if cut is None else (size, cut, draw)
        depends_on = fingerprint(backbone, settings=True), backbone.input, stamp, view, precision, device.type
        done = _from_wider(cfg.cache, depends_on, backbone, reading)
        entry = (*depends_on, reading)
        done = done or cached(cfg.cache, entry, device, lambda partly: make(partial=partly))
    else:
        done = make()
    if cut is None:  # other cuts of the same images would say the same
        tell_unreadable(key, done.unreadable, len(source), cfg.max_unreadable)
    if labelled:
        _check_labels(done, key, len(source.classes))
    return done


def tell_unreadable(key: str, names: Sequence[str], count: int, most: float) -> None:
    """Name those of `count` images that cannot be read.

    Raises:
        ValueError: if they are more than a share of `most`: a score of what is left would be of other data.
    """
    if len(names) > most * count:
        raise ValueError(
            f"{len(names)} of the {count} {key} images cannot be read, more than max_unreadable={most:g}: "
            f"{few(names)}. Mend or remove them, or allow more, such as "
            f"max_unreadable={math.ceil(100 * len(names) / count) / 100:g}."
        )
    if names:
        info(f"{len(names)} of the {count} {key} images cannot be read, left out: {few(names)}.")


def _from_wider(
    folder: str, depends_on: tuple[Any, ...], backbone: Backbone, reading: Pooling
) -> Features | None:
    """Class tokens of the last block, cut out of features of the linear grid if those were made before."""
    if reading != Pooling():
        return None
    done = load_cached(folder, (*depends_on, WIDE), device_of(backbone))
    if done is not None:
        done.x = done.x[:, (WIDE.blocks - 1) * backbone.width : WIDE.blocks * backbone.width].contiguous()
    return done


def _check_labels(done: Features, key: str, classes: int) -> None:
    bare = int((done.y < 0).sum())
    if bare:
        raise ValueError(f"{bare} of {len(done.y)} {key} images have no label: label them or take them out.")
    if int(done.y.max()) >= classes:
        raise ValueError(
            f"A {key} image has the label {int(done.y.max())}, but there are {classes} classes, from 0 on."
        )
