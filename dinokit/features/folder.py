"""The folder of a store: begun once, and from then on held against what it was begun with."""

import json
from collections.abc import Iterable
from filecmp import cmp
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dinokit.runtime.files import PARTS, atomic, write_text

FREE = ("weights", "data", "dinokit")  # where things lay, and who wrote; what they were is held elsewhere


def begin(out: Path, about: dict[str, Any], names: Iterable[str], clean: bool) -> None:
    """Write store.json and names.txt, or hold them against what is there.

    Args:
        out: the store's folder.
        about: what store.json shall say.
        names: of the images, in order.
        clean: whether to remove what a killed process left half written; not while others write.

    Raises:
        ValueError: if the folder holds something else, or features of other settings or other images.
    """
    saved = out / "store.json"
    # Looked at first: another process, which begins now as well, writes store.json before all else but names.
    known = {"names.txt", saved.name}
    strange = out.exists() and any(not p.match(PARTS) and p.name not in known for p in out.iterdir())
    if saved.exists():
        _compare(out, json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(about)))
    elif strange:
        raise ValueError(f"out={out} is not empty and holds no features. Choose another folder.")
    with atomic(out / "names.txt") as part:
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{name.replace(chr(10), ' ')}\n" for name in names)
        if saved.exists() and not cmp(part, out / "names.txt", shallow=False):
            raise ValueError(f"out={out} {_first_difference(out / 'names.txt', part)} Choose another out.")
    if not saved.exists():
        write_text(saved, json.dumps(about, indent=1) + "\n")
    if clean:
        for part in out.rglob(PARTS):
            part.unlink(missing_ok=True)


def _compare(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in FREE
    ]
    if changed:
        raise ValueError(
            f"out={out} holds features of other settings: {'; '.join(changed)}. Choose another out, or give "
            f"the old settings to go on."
        )


def _first_difference(old: Path, new: Path) -> str:
    with old.open("rb") as a, new.open("rb") as b:
        for number, (was, now) in enumerate(zip_longest(a, b)):
            if was != now:
                words = [
                    "absent" if line is None else f"'{line.decode(errors='replace').rstrip()}'"
                    for line in (was, now)
                ]
                return f"was begun with other images: number {number} was {words[0]}, now {words[1]}."
    return "has other names."
