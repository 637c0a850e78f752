"""Features kept on disk, so that the next evaluator of the same backbone on the same images takes seconds.

An entry is a safetensors file named by a hash of all that features depend on: the weights and the settings of
the modules, the images (names, lengths and times of change of their files, or as the source says; a source
that says nothing is never cached), what is shown of an image, what is kept of the tokens, the precision and
the kind of device. It is whole or not there; a damaged one is made anew. Above LIMIT the entries that were
longest unused go. The folder may be deleted at any time. What was made of an entry when its process was
killed is taken up again (features/halfway.py).
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch

from dinokit.features.halfway import Halfway, forget, read, write
from dinokit.features.vectors import Features
from dinokit.runtime.distributed import all_reduce_max, rank

LAYOUT = 1  # of an entry; one more whenever features come to mean something else
LIMIT = 20 * 2**30  # bytes of all entries


def cached(
    folder: str | Path, depends_on: object, device: torch.device, make: Callable[[], Features]
) -> Features:
    """The features that `make` makes, from disk if they were made before.

    With several processes all must call this; a folder that only some of them see is of no use.

    Args:
        folder: of the entries.
        depends_on: all that decides what `make` makes; its repr() says it all.
        device: where the features go.
        make: makes them, the same in every process.

    Raises:
        OSError: if an entry cannot be written.
    """
    done = kept(folder, depends_on, device)
    if done is None:
        done, path = make(), _path(folder, depends_on)
        if rank() == 0:
            _write(path, done, depends_on)
            _make_room(path)
        all_reduce_max(torch.zeros((), device=device))  # what was kept on the way stays until all is there
        forget(path)
    return done


def kept(folder: str | Path, depends_on: object, device: torch.device) -> Features | None:
    """Features that were made before, or none if some process does not see them. As `cached`."""
    path = _path(folder, depends_on)
    done = _read(path)
    absent = torch.tensor(int(done is None), device=device)
    if int(all_reduce_max(absent)) or done is None:
        return None
    with suppress(OSError):  # of a folder that may only be read
        os.utime(path)
    return Features(done.x.to(device), done.y.to(device), done.unreadable)


def halfway(folder: str | Path, depends_on: object) -> Halfway:
    """Where `make` of `cached` may keep what it has, until it has all."""
    return Halfway(_path(folder, depends_on))


def _path(folder: str | Path, depends_on: object) -> Path:
    name = blake2b(repr((LAYOUT, depends_on)).encode(), digest_size=16).hexdigest()
    return Path(folder).expanduser() / f"{name}.safetensors"


def _read(path: Path) -> Features | None:
    """None if it is not there or damaged."""
    found = read(path)
    if found is None or not {"x", "y"} <= set(found[0]) or "unreadable" not in found[1]:
        return None
    return Features(found[0]["x"], found[0]["y"], list(json.loads(found[1]["unreadable"])))


def _write(path: Path, features: Features, depends_on: object) -> None:
    tensors = {"x": features.x.cpu().contiguous(), "y": features.y.cpu().contiguous()}
    about = {"unreadable": json.dumps(features.unreadable), "depends_on": repr(depends_on)}  # for people
    write(path, tensors, about)


def _make_room(newest: Path) -> None:
    """Delete the entries that were longest unused until the rest is below LIMIT; `newest` stays."""
    entries = [(file.stat(), file) for file in newest.parent.glob("*.safetensors") if file != newest]
    room = LIMIT - newest.stat().st_size
    for status, file in sorted(entries, key=lambda entry: -entry[0].st_mtime_ns):
        room -= status.st_size
        if room < 0:
            file.unlink(missing_ok=True)
