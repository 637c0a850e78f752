"""Caches features on disk: the next evaluation of the same backbone on the same images takes seconds.

An entry is a safetensors file. Its name is a hash of everything that the features depend on: the fingerprint
of the backbone with its settings, the images (names, sizes and modification times of their files, or what the
source gives; a source without a stamp is never cached), the view of an image, the pooling, the precision and
the kind of device. Entries are written atomically; a damaged one is computed again. Above LIMIT the entries
that were unused for longest are deleted. The folder may be deleted at any time.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinokit.features.extract import Features
from dinokit.runtime.distributed import all_reduce_max, rank
from dinokit.runtime.files import atomic
from dinokit.runtime.partial import PartialResult

LAYOUT = 1  # of an entry; increase it whenever the meaning of features changes
LIMIT = 20 * 2**30  # bytes of all entries
ADVICE = "Free some space, set cache=ANOTHER_FOLDER, or cache nothing with cache=null."


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
        path = _path(folder, depends_on)
        partial = PartialResult(folder, "features", (LAYOUT, depends_on), advice=ADVICE)
        features = compute(partial)
        if rank() == 0:
            _write(path, features, depends_on)
            _delete_unused(path)
        all_reduce_max(torch.zeros((), device=device))  # the partial result stays until the entry is written
        partial.remove()
    return features


def load_cached(folder: str | Path, depends_on: object, device: torch.device) -> Features | None:
    """Features from the cache; None if some process cannot read them. Arguments as of `cached`."""
    path = _path(folder, depends_on)
    features = _read(path)
    missing = torch.tensor(int(features is None), device=device)
    if int(all_reduce_max(missing)) or features is None:
        return None
    with suppress(OSError):  # the folder may be read-only
        os.utime(path)
    return Features(features.x.to(device), features.y.to(device), features.unreadable)


def _path(folder: str | Path, depends_on: object) -> Path:
    name = blake2b(repr((LAYOUT, depends_on)).encode(), digest_size=16).hexdigest()
    return Path(folder).expanduser() / f"{name}.safetensors"


def _write(path: Path, features: Features, depends_on: object) -> None:
    tensors = {"x": features.x.cpu().contiguous(), "y": features.y.cpu().contiguous()}
    metadata = {
        "unreadable": json.dumps(features.unreadable),
        "depends_on": repr(depends_on),  # for people
        "check": str(_checksum(tensors)),
    }
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(f"Features could not be saved in {path.parent}: {error}. {ADVICE}") from None


def _read(path: Path) -> Features | None:
    """None if the entry is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in ("x", "y")}
        if int(metadata["check"]) != _checksum(tensors):
            return None
        return Features(tensors["x"], tensors["y"], list(json.loads(metadata["unreadable"])))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        checksum = zlib.crc32(content, checksum)
    return checksum


def _delete_unused(newest: Path) -> None:
    """Delete the files that were unused for longest until all are below LIMIT; `newest` stays."""
    files = [*newest.parent.glob("*.safetensors"), *newest.parent.glob(".features_*.pt")]
    entries = [(file.stat(), file) for file in files if file != newest]
    room = LIMIT - newest.stat().st_size
    for status, file in sorted(entries, key=lambda entry: -entry[0].st_mtime_ns):
        room -= status.st_size
        if room < 0:
            file.unlink(missing_ok=True)
