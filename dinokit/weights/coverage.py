"""Compares the tensors of a file with those of a backbone: names and shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

Shape = tuple[int, ...]


@dataclass
class Coverage:
    """Which tensors of a backbone a file fills."""

    total: int  # tensors of the backbone
    missing: dict[str, Shape] = field(default_factory=dict)  # in the backbone, not in the file
    left_over: dict[str, Shape] = field(default_factory=dict)  # in the file, not in the backbone
    misshapen: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # in the backbone, in the file
    resampled: str = ""  # what was changed in the positional embedding

    @property
    def complete(self) -> bool:
        """Whether all tensors match."""
        return not (self.missing or self.left_over or self.misshapen)

    def __str__(self) -> str:
        filled = self.total - len(self.missing) - len(self.misshapen)
        parts = [f"{filled} of {self.total} tensors"]
        if self.complete:
            parts.append("nothing missing, nothing left over")
        parts += [
            f"{len(names)} {what}: {_some(list(names))}"
            for what, names in (
                ("missing", self.missing), ("left over", self.left_over), ("of another shape", self.misshapen)
            )
            if names
        ]  # fmt: skip
        return "; ".join([*parts, self.resampled] if self.resampled else parts)

    def problems(self, tolerate: Sequence[str] = ()) -> list[str]:
        """Tensors that do not match, with both shapes, without the tolerated names.

        Names may be patterns such as '*.gamma'. A different shape is never tolerated.
        """
        wrong = [
            f"{name}: asked for {shape}, absent"
            for name, shape in self.missing.items()
            if not any(fnmatch(name, pattern) for pattern in tolerate)
        ]
        wrong += [
            f"{name}: not asked for, found {shape}"
            for name, shape in self.left_over.items()
            if not any(fnmatch(name, pattern) for pattern in tolerate)
        ]
        return wrong + [
            f"{name}: asked for {want}, found {have}" for name, (want, have) in self.misshapen.items()
        ]


def compare(want: Mapping[str, Shape], have: Mapping[str, Shape]) -> Coverage:
    """The Coverage of a backbone with tensors `want` by a file with tensors `have`."""
    return Coverage(
        len(want),
        {name: shape for name, shape in want.items() if name not in have},
        {name: shape for name, shape in have.items() if name not in want},
        {name: (shape, have[name]) for name, shape in want.items() if name in have and have[name] != shape},
    )


def first(problems: Sequence[str], count: int = 5) -> str:
    """The first few problems, and the number of the others."""
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
