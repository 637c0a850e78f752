"""A text that changes when images do, without reading them: names, lengths and times of change of files.

A file that is changed keeps its stamp only if its length and its time of change, to the nanosecond, are kept.
"""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from dinokit.data.names import encode


def stamp_of(files: Iterable[Path], settings: object, *columns: np.ndarray | range | None) -> str:
    """The stamp of images in files.

    Args:
        files: all of them; one that is not there counts as such.
        settings: whatever else decides what an image of the source looks like; its repr() says it all.
        columns: numbers an image, such as labels.
    """
    done = blake2b(digest_size=16)
    for file in files:
        try:
            status = file.stat()
            known = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            known = "absent"
        done.update(encode(f"{file.absolute()}\0{known}\n"))
    done.update(repr(settings).encode())
    for column in columns:
        if column is not None:
            done.update(np.ascontiguousarray(column, np.int64).tobytes())
    return done.hexdigest()
