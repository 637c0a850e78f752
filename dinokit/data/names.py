"""Millions of strings in two arrays."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

_AT_ONCE = 4096  # strings taken from the block in one piece when walking through all


@dataclass(frozen=True, eq=False)
class Names:
    """Strings by number, held as one block of UTF-8: a million paths cost their bytes and 8 more each.

    A list of as many Python strings would cost several times that, and a forked loader process would copy it
    bit by bit, because reading a Python object writes to its reference count.
    """

    blob: np.ndarray  # (bytes,) uint8, all strings end to end
    offsets: np.ndarray  # (n + 1,) int64, string i is blob[offsets[i]:offsets[i + 1]]

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Take the strings one by one; none of them is kept as an object."""
        blob, offsets = bytearray(), array("q", [0])
        for name in names:
            blob += encode(name)
            offsets.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # counts from the end if negative, and raises IndexError
        part = self.blob[self.offsets[index] : self.offsets[index + 1]]
        return part.tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            offsets = self.offsets[start : start + _AT_ONCE + 1]
            part = self.blob[offsets[0] : offsets[-1]].tobytes()
            for begin, end in pairwise((offsets - offsets[0]).tolist()):
                yield part[begin:end].decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """UTF-8, but for the bytes of a file name that are not text, which stay the bytes they are."""
    return name.encode("utf-8", "surrogateescape")
