"""The `.npy` files of one shard of features: all of them, or none that counts."""

import errno
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from dinokit.features.layout import RECORD, shard_path
from dinokit.features.npy import GrowingArray
from dinokit.runtime.files import atomic


class NpyShard:
    """Files of a shard as layout.py says; use it in a `with` block.

    Args:
        out: the store's folder.
        number: of the shard.
        rows: shape and type of a row of each token.
    """

    def __init__(self, out: Path, number: int, rows: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.out, self.number, self.rows = out, number, {**rows, "images": ((), RECORD)}

    def __enter__(self) -> "NpyShard":
        self.stack = ExitStack()
        self.files: dict[str, GrowingArray] = {}
        for token, (row, dtype) in self.rows.items():
            part = self.stack.enter_context(atomic(shard_path(self.out, token, self.number)))
            self.files[token] = self.stack.enter_context(GrowingArray(part, row, dtype))
        return self

    def append(self, arrays: dict[str, np.ndarray], records: np.ndarray, names: list[str]) -> None:
        """Rows of each token, and the RECORD of each image."""
        for token, array in {**arrays, "images": records}.items():
            self.files[token].append(array)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)


def in_words(error: OSError, out: Path, done: int, shards: int) -> OSError:
    """The error of a write, with what is kept and how to go on."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = "there is no room left" if full else str(error)
    return OSError(
        f"A shard of features could not be written to {out}: {why}. {done} of {shards} shards are done and "
        f"stay. {'Make room' if full else 'Mend that'}, and the same command goes on from there."
    )
