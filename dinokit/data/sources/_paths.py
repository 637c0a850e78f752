"""Finding what a path means, and saying what is there instead."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dinokit.config import registry

_READERS = {".parquet": "parquet", ".tar": "tar", ".txt": "manifest", ".csv": "manifest"}


def existing(path: str) -> Path:
    """The path, if something is there.

    Raises:
        ValueError: if not; it names the nearest folder that is there, and what it holds.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    whole = found.absolute()
    parent = next(folder for folder in whole.parents if folder.is_dir())
    missing = whole.relative_to(parent).parts[0]
    have = sorted(item.name for item in parent.iterdir() if not item.name.startswith("."))
    raise ValueError(
        f"path='{path}': there is no such file or folder, looked for from {Path.cwd()}. The nearest folder "
        f"that is there is {parent}, which has no '{missing}'.{registry.suggest(missing, have)} "
        f"It holds: {_few(have)}."
    )


def wrong_kind(path: Path, wanted: str) -> ValueError:
    """The error for a path that another source reads; `wanted` is what this one reads."""
    other = "folder" if path.is_dir() else _READERS.get(path.suffix.lower(), "")
    kind = "a folder" if path.is_dir() else "a file"
    hint = f" For it, set name={other}." if other else ""
    return ValueError(f"path='{path}' is {kind}, but {wanted} is read here.{hint}")


def nothing_found(path: Path, wanted: Iterable[str], others: Counter[str]) -> ValueError:
    """The error for a folder that holds only files with the suffixes `others`."""
    if not others:
        return ValueError(f"path='{path}' holds no file at all; looked for {', '.join(wanted)}.")
    found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(6))
    readers = sorted({_READERS[suffix] for suffix in others if suffix in _READERS})
    hint = f" For those, set name={' or '.join(readers)}." if readers else ""
    return ValueError(f"path='{path}' holds no {', '.join(wanted)}; there is: {found}.{hint}")


def shards(path: str, suffix: str) -> list[Path]:
    """The files that `path` means: a file, a folder of them, a glob, or a range like part-{000..011}.tar.

    Raises:
        ValueError: if there is none, or one of a range is missing.
    """
    ranged = list(_spread(path))
    if len(ranged) > 1:
        missing = [name for name in ranged if not Path(name).expanduser().is_file()]
        if missing:
            raise ValueError(
                f"path='{path}' means {len(ranged)} files; {len(missing)} are missing: {_few(missing)}."
            )
        return [Path(name).expanduser() for name in ranged]
    whole = Path(path).expanduser()
    if any(mark in path for mark in "*?[") and not whole.exists():
        found = sorted(Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))))
        found = [file for file in found if file.is_file()]
        if not found:
            raise ValueError(f"path='{path}' fits no file, looked for from {Path.cwd()}.")
        return found
    one = existing(path)
    if not one.is_dir():
        return [one]
    inside = [file for file in one.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(one))]
    found = sorted(file for file in inside if file.suffix.lower() == suffix)
    if not found:
        raise nothing_found(one, [suffix], Counter(file.suffix.lower() for file in inside))
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _spread(path: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        yield path
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _spread(f"{path[: match.start()]}{number:0{len(first)}}{path[match.end() :]}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
