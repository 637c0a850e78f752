"""Computes one feature vector for each image of a source, in the order of the source, and caches them.

A cache entry is a PartialResult that stays: the next evaluation of the same backbone on the same images takes
seconds. Its name is a hash of everything that the features depend on: the fingerprint of the backbone with
its settings, the images (names, sizes and modification times of their files, or what the source gives; a
source without a stamp is never cached), the view of an image, the pooling, the precision and the kind of
device. Entries are written atomically; a damaged one is computed again. Above LIMIT the entries that were
unused for longest are deleted. The folder may be deleted at any time.

N  images that could be read     W  numbers in a vector: the width D for one class token
"""

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.data.loader import image_loader
from dinokit.data.sampler import RangeSampler
from dinokit.data.sources import ImageLike, ImageSource, images_stamp
from dinokit.data.transforms import CenterCrop, Transform, to_tensor
from dinokit.features.tokens import AllPatches, Pooling, device_of, frozen, normalised
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_max, all_reduce_sum, rank, world_size
from dinokit.runtime.files import TEMPORARY
from dinokit.runtime.log import watch
from dinokit.runtime.partial import PartialResult
from dinokit.runtime.signals import Stopped

CLASS_TOKEN = Pooling()
SAVE_SECONDS = 60.0  # between two saves of unfinished work
LAYOUT = 2  # of an entry; increase it whenever the meaning of features changes
LIMIT = 20 * 2**30  # bytes of all entries
CHECKED = 4096  # rows of features that are checked at a time
WRITING = 3600.0  # seconds since its last change in which an unfinished file may belong to a living process
# In the folder; safetensors are of old versions, and the last are of processes that were killed.
FILES = (".features_*.pt", ".unfinished_*.pt", "*.safetensors", TEMPORARY)


@dataclass
class Features:
    """Feature vectors of a source, on the device of the backbone; the same in every process."""

    x: Tensor  # (N, W) float32, after the final norm, not scaled to unit length
    y: Tensor  # (N,) int64 labels, -1 without one
    unreadable: list[str]  # names of the images that could not be read; they have no row


class Subset:
    """The images of a source at `indices`, in that order."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return self.source[self.indices[index]]

    def name(self, index: int) -> str:
        """The name of the image in the source."""
        return self.source.name(self.indices[index])

    def __getattr__(self, name: str) -> Any:
        if name not in ("file", "stored", "stored_size"):  # the optional methods, if the source has them
            raise AttributeError(name)
        method = getattr(self.source, name)
        return lambda index: method(self.indices[index])

    def stamp(self) -> str | None:
        """The stamp of the source with a hash of the indices; None if the source has no stamp."""
        stamp = images_stamp(self.source)
        indices = blake2b(repr(list(self.indices)).encode(), digest_size=16).hexdigest()
        return None if stamp is None else f"{stamp} {indices}"


def spread(source: ImageSource, count: int) -> ImageSource:
    """A subset of `count` images: one drawn from each of `count` equal ranges, the same in every call.

    A fixed step could select one class only, where classes alternate. 0, or more than the source has, selects
    all images.
    """
    return Subset(source, spread_places(len(source), count)) if 0 < count < len(source) else source


def spread_places(n: int, count: int) -> list[int]:
    """The places among `n` that spread() selects."""
    if not 0 < count < n:
        return [*range(n)]
    draw = random.Random(0)
    return [draw.randrange(i * n // count, (i + 1) * n // count) for i in range(count)]


def extract(
    backbone: Backbone,
    source: ImageSource,
    resize: int,
    size: int,
    batch: int = 256,
    workers: int = 0,
    precision: torch.dtype | None = None,
    pooling: Pooling | AllPatches = CLASS_TOKEN,
    cut: Transform | None = None,
    draw: int = 0,
    partial: PartialResult | None = None,
) -> Features:
    """One feature vector for the centre crop, or another view, of each image. The backbone does not change.

    With several processes all must call this; each computes its share, and all get all features.

    Args:
        backbone: on the device to compute on.
        source: images, with or without labels.
        resize: pixels of the shorter side before the centre crop.
        size: pixels, the side of the crop; a multiple of the backbone's patch.
        batch: images at a time.
        workers: loader processes.
        precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.
        pooling: how tokens become a vector.
        cut: another view of an image in place of the centre crop, (C, size, size).
        draw: the number of the draw, for a random `cut`.
        partial: where to save finished rows every minute, and from which to resume.

    Raises:
        ValueError: if the size or the channels do not fit the backbone, no image can be read, or a feature is
            not finite.
        OSError: if `partial` cannot be written.
    """
    if size < 1 or size % backbone.patch:
        raise ValueError(f"size={size} is not a multiple of the backbone's patch, {backbone.patch} pixels.")
    if resize < size:
        raise ValueError(f"resize={resize} leaves no crop of size={size}: it must be at least as large.")
    device = device_of(backbone)
    share = range(rank(), len(source), world_size())  # disjoint, so that the sum over processes is complete
    rows = _Rows(len(source), pooling.width(backbone), device, partial)
    order = RangeSampler([share[rows.processed :]], batch, draw)
    batches = image_loader(source, cut or CenterCrop(resize, size), order, workers)
    finished = math.ceil(rows.processed / batch)
    try:
        with frozen(backbone), torch.inference_mode():
            for images in watch(batches, finished + len(order), "features", finished):
                vectors = rows.x[:0]
                if images.groups:
                    crops = normalised(backbone, images.images.to(device))
                    with torch.autocast(device.type, precision, enabled=precision is not None):
                        vectors = pooling(backbone, crops)
                valid = images.valid
                rows.add(images.indices[valid], vectors, images.labels[valid], len(valid))
    except Stopped:
        rows.save()
        raise
    return rows.gather(source, precision)


class _Rows:
    """Rows of all images; zeros where this process has computed none.

    Attributes:
        processed: images of this process's share that were shown to the backbone or could not be read.
    """

    def __init__(self, count: int, width: int, device: torch.device, partial: PartialResult | None) -> None:
        self.x = torch.zeros(count, width, device=device)
        self.y, self.valid = torch.zeros(2, count, dtype=torch.int64, device=device)
        self.processed = self._saved = 0
        self._partial = partial or PartialResult(None, "features", None)
        for piece in self._partial.load_pieces():
            if piece.get("start") != self.processed:
                break  # another command did the same work: rows in between would be missing
            self._set(piece["indices"].to(device), piece["x"], piece["y"])
            self.processed = self._saved = piece["processed"]
        self._unsaved: list[Tensor] = []
        self._saved_at = time.monotonic()

    def add(self, indices: Tensor, x: Tensor, y: Tensor, processed: int) -> None:
        """Rows of the readable images among the next `processed`; saves if SAVE_SECONDS have passed."""
        indices = indices.to(self.x.device)
        self._set(indices, x, y)
        self.processed += processed
        self._unsaved.append(indices)
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Append the rows since the last save to the partial result."""
        if self._unsaved:
            at = torch.cat(self._unsaved)
            rows = {"indices": at.cpu(), "x": self.x[at].cpu(), "y": self.y[at].cpu()}
            self._partial.append({**rows, "start": self._saved, "processed": self.processed})
        self._unsaved, self._saved, self._saved_at = [], self.processed, time.monotonic()

    def gather(self, source: ImageSource, precision: torch.dtype | None) -> Features:
        """The rows of all processes, without those of unreadable images."""
        x, y, valid = all_reduce_sum(self.x), all_reduce_sum(self.y), all_reduce_sum(self.valid) > 0
        unreadable = [source.name(int(i)) for i in (~valid).nonzero()]
        if len(unreadable) == len(source):
            raise ValueError(f"None of the {len(source)} images can be read{_first_reason(source)}.")
        x, y = (x[valid], y[valid]) if unreadable else (x, y)
        for rows in x.split(CHECKED):  # a copy of all of them may not fit into memory
            check_finite(rows, precision)
        return Features(x, y, unreadable)

    def _set(self, indices: Tensor, x: Tensor, y: Tensor) -> None:
        device = self.x.device
        self.x[indices], self.y[indices], self.valid[indices] = x.to(device), y.to(device), 1


def check_finite(x: Tensor, precision: torch.dtype | None, what: str = "images") -> None:
    """Raise ValueError if features (n, ...) of n images, or of n of `what`, are not finite."""
    broken = int((~x.flatten(1).isfinite()).any(dim=1).sum())
    if broken:
        hint = " or float16 is too narrow for them: try precision=bf16" if precision == torch.float16 else ""
        raise ValueError(
            f"Features of {broken} of {len(x)} {what} are not finite: the weights are broken{hint}."
        )


def _first_reason(source: ImageSource) -> str:
    try:
        image, _ = source[0]
        to_tensor(image)
    except (OSError, ValueError) as error:
        return f": {str(error).rstrip('.')}"
    return ""


def cached(
    folder: str | Path,
    depends_on: object,
    device: torch.device,
    compute: Callable[[PartialResult], Features],
) -> Features:
    """The features that `compute` gives, from the cache if they are in it.

    With several processes all must call this and see the same folder.

    Args:
        folder: of the entries.
        depends_on: everything that decides the features; its repr() is hashed.
        device: where the features go.
        compute: computes them, the same in every process; it may save unfinished work in its argument.

    Raises:
        OSError: if an entry cannot be written.
    """
    features = load_cached(folder, depends_on, device)
    if features is None:
        unfinished, entry = (_result(folder, name, depends_on, device) for name in ("unfinished", "features"))
        features = compute(unfinished)
        x, y = features.x.cpu().contiguous(), features.y.cpu().contiguous()
        entry.save({"x": x, "y": y, "unreadable": features.unreadable, "depends_on": repr(depends_on)})
        if rank() == 0:
            _delete_unused(entry)
        all_reduce_max(torch.zeros((), device=device))  # the partial result stays until the entry is written
        unfinished.remove()
    return features


def load_cached(folder: str | Path, depends_on: object, device: torch.device) -> Features | None:
    """Features from the cache; None if some process cannot read them. Arguments as of `cached`."""
    entry = _result(folder, "features", depends_on, device)
    state = entry.load()
    if state is None or entry.path is None:
        return None
    with suppress(OSError):  # the folder may be read-only
        os.utime(entry.path)
    return Features(state["x"], state["y"], state["unreadable"])


def _result(folder: str | Path, name: str, depends_on: object, device: torch.device) -> PartialResult:
    advice = "Free some space, set cache=ANOTHER_FOLDER, or cache nothing with cache=null."
    return PartialResult(folder, name, (LAYOUT, depends_on), device, advice)


def _delete_unused(newest: PartialResult) -> None:
    """Delete the files that were unused for longest until all are below LIMIT; `newest` stays.

    Other processes write and delete here too: a file may vanish, and one that is being written stays.
    """
    assert newest.path is not None
    found: dict[Path, os.stat_result] = {}
    for file in (file for pattern in FILES for file in newest.path.parent.glob(pattern)):
        with suppress(FileNotFoundError):
            found[file] = file.stat()
    room, now = LIMIT, time.time()
    for file, status in sorted(found.items(), key=lambda each: (each[0] != newest.path, -each[1].st_mtime)):
        room -= status.st_size
        written = file.match(TEMPORARY) and now - status.st_mtime < WRITING
        if room < 0 and file != newest.path and not written:
            file.unlink(missing_ok=True)
