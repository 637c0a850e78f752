"""Features of a set that is not gone through yet, kept on disk, so that a process that was killed goes on.

They lie beside the cache's entry-to-be, a file for each minute and process; the entry takes their place.
"""

import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.files import atomic
from dinokit.runtime.signals import Stopped

EVERY = 60.0  # seconds between two files


class Halfway:
    """What this process has of a set.

    Args:
        entry: where all of it will lie.
        every: seconds between two files.
    """

    def __init__(self, entry: Path, every: float = EVERY) -> None:
        self._entry, self._every, self._number = entry, every, 0
        self._last = time.monotonic()
        self._new: list[Tensor] = []  # places that are in no file yet
        self._done = 0

    def take_up(self, x: Tensor, y: Tensor, seen: Tensor) -> int:
        """Fill in the rows of (N, W), (N,) and (N,) that were kept.

        Returns:
            How many of this process's images need not be looked at again.
        """
        done = 0
        while (kept := read(self._path(self._number))) is not None:
            tensors, about = kept
            places = tensors["places"].to(x.device)
            x[places], y[places], seen[places] = tensors["x"].to(x.device), tensors["y"].to(x.device), 1
            done, self._number = int(about["done"]), self._number + 1
        return done

    def add(self, places: Tensor, done: int, x: Tensor, y: Tensor) -> None:
        """Rows at `places` are there now; `done` of this process's images were looked at.

        Raises:
            OSError: if it is time for a file and it cannot be written.
        """
        self._new.append(places)
        self._done = done
        if time.monotonic() - self._last >= self._every:
            self._write(x, y)

    @contextmanager
    def kept(self, x: Tensor, y: Tensor) -> Iterator[None]:
        """Keep what is there when the block is left with Stopped.

        Raises:
            OSError: if it cannot be written.
        """
        try:
            yield
        except Stopped:
            self._write(x, y)
            raise

    def _write(self, x: Tensor, y: Tensor) -> None:
        if not self._new:
            return
        where = torch.cat(self._new)
        tensors = {"places": where.cpu(), "x": x[where].cpu(), "y": y[where].cpu()}
        write(self._path(self._number), tensors, {"done": str(self._done)})
        self._number, self._new, self._last = self._number + 1, [], time.monotonic()

    def _path(self, number: int) -> Path:
        return self._entry.with_name(f"{self._entry.stem}.{rank()}of{world_size()}.{number}.safetensors")


def forget(entry: Path) -> None:
    """Delete what was kept of a set on the way to `entry`."""
    for file in entry.parent.glob(f"{entry.stem}.*.safetensors"):
        file.unlink(missing_ok=True)


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """One file, with a checksum.

    Raises:
        OSError: if it cannot be written; it says what may be done.
    """
    about = {**about, "check": str(_check(tensors))}
    try:
        with atomic(path) as part:
            save_file(dict(tensors), part, about)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Features could not be kept in {path.parent}: {error}. Make room, set cache=ANOTHER_FOLDER, or "
            f"keep none with cache=null."
        ) from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What `write` wrote; None if it is not there or damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (tensors, about) if int(about["check"]) == _check(tensors) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _check(tensors: Mapping[str, Tensor]) -> int:
    done = 0
    for _, tensor in sorted(tensors.items()):
        content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        done = zlib.crc32(content, done)
    return done
