"""A `.npy` file that grows row by row, in whatever memory there is."""

from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib import format as npy


class GrowingArray:
    """Rows of one shape, appended to a file that is a whole `.npy` when the `with` block ends.

    Rows are written, not mapped: on a full disk a write raises OSError where a map would kill the process.
    """

    def __init__(self, path: Path, row: tuple[int, ...], dtype: np.dtype) -> None:
        self.row, self.dtype, self.count = row, dtype, 0
        self.file = path.open("w+b")
        self._header()

    def append(self, rows: np.ndarray) -> None:
        """Rows (m, *row) of the array's type."""
        assert rows.shape[1:] == self.row, (rows.shape, self.row)
        assert rows.dtype == self.dtype, (rows.dtype, self.dtype)
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def __enter__(self) -> "GrowingArray":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._header()  # numpy leaves room in it for the number of rows to grow
        finally:
            self.file.close()

    def _header(self) -> None:
        self.file.seek(0)
        description = npy.dtype_to_descr(self.dtype)
        shape = (self.count, *self.row)
        npy.write_array_header_1_0(self.file, {"descr": description, "fortran_order": False, "shape": shape})
