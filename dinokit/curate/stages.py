"""Stages that leave files, and know by them whether they are done.

A stage's folder is OUT/stages/NAME.KEY, its key a hash of the settings and inputs that its result depends
on, the key of the stage before it among them. So changed settings begin a new folder, for this stage and
those that follow from it, and what they do not touch is found done:

    OUT/stages/dedup.3f6c0a94/done.json   what it found, written last: the stage is whole
    OUT/stages/dedup.3f6c0a94/...         its files, each whole or not there: a killed stage goes on with them
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.settings import STAGES
from dinokit.runtime.files import PARTS, atomic, write_text

Told = Callable[[str], None]


@dataclass(frozen=True)
class Share:
    """This process's part of a stage: shards number, number + of, ..."""

    number: int = 0
    of: int = 1

    def mine(self, count: int) -> Iterator[int]:
        """Of `count` shards, those to do here."""
        return iter(range(self.number, count, self.of))


@dataclass
class Done:
    """A finished stage."""

    folder: Path
    key: str
    figures: dict[str, Any]


Work = Callable[[Path, Share], dict[str, Any]]


@dataclass
class Stages:
    """The stages of one curation.

    Attributes:
        out: where they lie.
        told: takes a line for the screen.
        until: the stage to stop after.
        share: the part of that stage to do; the stages before it must be done.
    """

    out: Path
    told: Told
    until: str = STAGES[-1]
    share: Share = field(default_factory=Share)

    def do(self, name: str, inputs: dict[str, Any], work: Work, makes: Path | None = None) -> Done:
        """Do a stage, unless it is done.

        Args:
            name: one of STAGES.
            inputs: all that the result depends on, as JSON can hold it.
            work: fills the folder that it is given, with its share; returns figures for done.json, among
                which may be a `note`: a sentence of its own.
            makes: a file outside of that folder, without which the stage is not done.

        Raises:
            ValueError: if a part is asked for of a stage whose forerunner is not done.
        """
        key = key_of(inputs)
        folder = self.out / "stages" / f"{name}.{key}"
        marker = folder / "done.json"
        if not marker.exists() or (makes is not None and not makes.exists()):
            part = f"part {self.share.number} of {self.share.of}" if self.share.of > 1 else ""
            if part and name != self.until:
                raise ValueError(
                    f"A part of the stage '{self.until}' needs the stage '{name}', which is not done: first "
                    f"run the same command with stage={name} and without part."
                )
            begun = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            self.told(f"{name} ... {part}")
            figures = work(folder, self.share)
            if part:
                return Done(folder, key, {"part": part})
            figures = {**figures, "seconds": round(time.monotonic() - begun, 2)}
            said = {"inputs": inputs, "figures": figures}
            write_text(marker, json.dumps(said, indent=1, default=str) + "\n")
            self._clean(name, folder)
        figures = json.loads(marker.read_text(encoding="utf-8"))["figures"]
        self.told(f"{name}: {in_words({key: value for key, value in figures.items() if key != 'note'})}")
        if "note" in figures:
            self.told(f"    {figures['note']}")
        return Done(folder, key, figures)

    def _clean(self, name: str, keep: Path) -> None:
        """Remove this stage's results of other settings, and what a killed process left half written."""
        for old in keep.parent.glob(f"{name}.*"):
            if old != keep:
                shutil.rmtree(old)
        for part in keep.rglob(PARTS):
            part.unlink(missing_ok=True)


def save(path: Path, **arrays: np.ndarray) -> None:
    """Arrays into one .npz, or the array `only` into a .npy; whole or not there."""
    with atomic(path) as part, part.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, arrays["only"])
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes them for allow_pickle


def key_of(inputs: Mapping[str, Any]) -> str:
    """Eight digits that are others whenever an input is."""
    return sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:8]


def digest(array: np.ndarray) -> str:
    """Of an array's content."""
    return sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def in_words(figures: Mapping[str, Any]) -> str:
    """Figures on a line: spaces in their names, thousands apart, those of a mapping in brackets."""
    return ", ".join(f"{str(key).replace('_', ' ')} {_value(value)}" for key, value in figures.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({in_words(value)})"
    return f"{value:,}" if isinstance(value, int) else str(value)
