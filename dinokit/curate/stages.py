"""Runs the stages of a curation; a finished stage is never run again.

The one rule for unfinished work: every file is written atomically, so it is complete or absent, and a stage
computes only the files that are absent. `done.json` is written last and marks the stage as finished.

    OUT/stages/NAME.KEY/...          the files of a stage
    OUT/stages/NAME.KEY/done.json    its inputs and figures

KEY is a hash of the settings and inputs that the result depends on, with the keys of the stages before it. So
changed settings start a new folder for this stage and the stages that depend on it, and for no other.
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

from dinokit.curate.settings import OLD_STAGES, STAGES
from dinokit.runtime.files import TEMPORARY, atomic, write_text

Log = Callable[[str], None]  # takes a line for the screen


@dataclass(frozen=True)
class Share:
    """This process's share of a stage: the shards number, number + of, number + 2 of, ..."""

    number: int = 0
    of: int = 1

    def shards(self, count: int) -> Iterator[int]:
        """The numbers of the shards to compute here, of `count`."""
        return iter(range(self.number, count, self.of))


@dataclass
class StageResult:
    """A stage that was run."""

    folder: Path
    key: str
    figures: dict[str, Any]


Compute = Callable[[Path, Share], dict[str, Any]]


@dataclass
class Stages:
    """The stages of one curation.

    Attributes:
        out: the folder of the curation.
        log: takes lines for the screen.
        until: the last stage to run.
        share: the share of that stage to compute; the stages before it must be finished.
    """

    out: Path
    log: Log
    until: str = STAGES[-1]
    share: Share = field(default_factory=Share)

    def run(
        self, name: str, inputs: dict[str, Any], compute: Compute, output: Path | None = None
    ) -> StageResult:
        """Run a stage, unless it is finished.

        Args:
            name: one of STAGES.
            inputs: everything that the result depends on; JSON must be able to hold it.
            compute: writes its share of the files into the folder that it is given. Returns figures for
                done.json; the figure `note`, a sentence, gets a line of its own.
            output: a file outside of the folder; without it the stage is not finished.

        Raises:
            ValueError: if a share of a later stage is asked for, and this stage is not finished.
        """
        key = hash_of(inputs)
        folder = self.out / "stages" / f"{name}.{key}"
        marker = folder / "done.json"
        if not marker.exists() or (output is not None and not output.exists()):
            share = f"part {self.share.number} of {self.share.of}" if self.share.of > 1 else ""
            if share and name != self.until:
                raise ValueError(
                    f"part= of the stage '{self.until}' needs the stage '{name}', which is not finished. "
                    f"First run the same command with stage={name} and without part."
                )
            start = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            self.log(f"{name} ... {share}")
            figures = compute(folder, self.share)
            if share:
                return StageResult(folder, key, {"part": share})
            figures = {**figures, "seconds": round(time.monotonic() - start, 2)}
            write_text(
                marker, json.dumps({"inputs": inputs, "figures": figures}, indent=1, default=str) + "\n"
            )
            self._remove_old(name, folder)
        figures = json.loads(marker.read_text(encoding="utf-8"))["figures"]
        self.log(f"{name}: {in_words({key: value for key, value in figures.items() if key != 'note'})}")
        if "note" in figures:
            self.log(f"    {figures['note']}")
        return StageResult(folder, key, figures)

    def _remove_old(self, name: str, current: Path) -> None:
        """Remove the stage's results of other settings, and temporary files of processes that were killed."""
        for each in (name, *(old for old, new in OLD_STAGES.items() if new == name)):
            for folder in current.parent.glob(f"{each}.*"):
                if folder != current:
                    shutil.rmtree(folder)
        for temporary in current.rglob(TEMPORARY):
            temporary.unlink(missing_ok=True)


def save(path: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> None:
    """Write one array to a .npy file, or named arrays to an .npz file, atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        if array is not None:
            np.save(file, array)
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes them for allow_pickle


def hash_of(inputs: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that depend on every input."""
    return sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:8]


def hash_of_array(array: np.ndarray) -> str:
    """Sixteen hexadecimal digits that depend on every number."""
    return sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def in_words(figures: Mapping[str, Any]) -> str:
    """Figures in one line: 'images 1,000, clusters 31'; a mapping stands in brackets."""
    return ", ".join(f"{str(key).replace('_', ' ')} {_value(value)}" for key, value in figures.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({in_words(value)})"
    return f"{value:,}" if isinstance(value, int) else str(value)
