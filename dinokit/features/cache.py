"""Caches features on disk: the next evaluation of the same backbone on the same images takes seconds.

An entry is a PartialResult that stays. Its name is a hash of everything that the features depend on: the
fingerprint of the backbone with its settings, the images (names, sizes and modification times of their files,
or what the source gives; a source without a stamp is never cached), the view of an image, the pooling, the
precision and the kind of device. Entries are written atomically; a damaged one is computed again. Above LIMIT
the entries that were unused for longest are deleted. The folder may be deleted at any time.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from dinokit.features.extract import Features
from dinokit.runtime.distributed import all_reduce_max, rank
from dinokit.runtime.partial import PartialResult

LAYOUT = 2  # of an entry; increase it whenever the meaning of features changes
LIMIT = 20 * 2**30  # bytes of all entries
FILES = (".features_*.pt", ".unfinished_*.pt", "*.safetensors")  # in the folder; the last are of old versions


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
    """Delete the files that were unused for longest until all are below LIMIT; `newest` stays."""
    assert newest.path is not None
    files = [file for pattern in FILES for file in newest.path.parent.glob(pattern) if file != newest.path]
    room = LIMIT - newest.path.stat().st_size
    for status, file in sorted(
        ((file.stat(), file) for file in files), key=lambda each: -each[0].st_mtime_ns
    ):
        room -= status.st_size
        if room < 0:
            file.unlink(missing_ok=True)
