"""How features lie on disk: what writer and reader of a store agree on.

    OUT/store.json            what was computed, of what, with which weights; written first
    OUT/names.txt             one name a line, in the order of the images (a line break in a name is a space)
    OUT/images/00000.npy      a shard's images: valid, label, rows and columns of the patch grid (RECORD)
    OUT/cls/00000.npy ...     a folder a token: shard k has the images k * S to (k + 1) * S

A shard is done when all its files are there; each is written whole or not at all.

    n  images of a shard     L  blocks asked for; no axis if it is one     D  width     R  registers
    N  patches an image      T  patches of all images of a shard

cls, mean (n, [L,] D); registers (n, R, [L,] D); patch (n, N, [L,] D), or (T, [L,] D) if the grids differ.
"""

from pathlib import Path

import numpy as np

FORMAT = "dinokit features 1"
TOKENS = ("cls", "mean", "patch", "registers")
RECORD = np.dtype([("valid", "?"), ("label", "<i4"), ("rows", "<i4"), ("columns", "<i4")])
MOST_IMAGES, SHARD_BYTES = 4096, 256 << 20  # of a shard; a killed run computes one of them again


def shard_path(out: Path, token: str, number: int) -> Path:
    """The file of a shard."""
    return out / token / f"{number:05d}.npy"


def shard_range(number: int, size: int, images: int) -> range:
    """The images of a shard."""
    return range(number * size, min((number + 1) * size, images))


def shard_size(bytes_an_image: int) -> int:
    """Images in a shard: a power of two, 4,096 or as many as make up to 256 MiB in its largest file."""
    most = max(min(SHARD_BYTES // max(bytes_an_image, 1), MOST_IMAGES), 1)
    return 1 << (int(most).bit_length() - 1)
