"""What was submitted from here: a folder a submission below runs/jobs/, with code, script and logs."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dinokit.runtime.files import write_text

JOBS = Path("runs/jobs")  # from the folder where the command is given
NAME = "job.json"


@dataclass
class Record:
    """A submission."""

    jobs: list[str]  # SLURM's numbers; of an array NUMBER_0, NUMBER_1, ...
    commands: list[list[str]]  # behind `dinokit`, one a job, as given
    settings: list[str]  # what stood before --
    submitted: str
    folder: str = ""

    @property
    def number(self) -> str:
        """Of the job, or of the array."""
        return self.jobs[0].partition("_")[0]


def new_folder(name: str) -> Path:
    """A new folder for a submission, by its full path.

    Raises:
        OSError: if it cannot be made.
    """
    first = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for number in range(1000):
        folder = (JOBS / (f"{first}-{number}" if number else first)).absolute()
        with suppress(FileExistsError):  # two a second
            folder.mkdir(parents=True)
            return folder
    raise OSError(f"{JOBS} has a thousand folders {first}.")


def write(folder: Path, jobs: list[str], commands: list[list[str]], settings: list[str]) -> Record:
    """Put what was submitted on record."""
    record = Record(jobs, commands, settings, time.strftime("%Y-%m-%d %H:%M:%S"))
    values = {key: value for key, value in asdict(record).items() if key != "folder"}
    write_text(folder / NAME, json.dumps(values, indent=1))
    return record


def records() -> list[Record]:
    """All that was submitted from here, oldest first."""
    found = sorted(JOBS.glob(f"*/{NAME}"))
    return [Record(**json.loads(p.read_text(encoding="utf-8")), folder=str(p.parent)) for p in found]


def find(words: Sequence[str]) -> list[tuple[Record, list[str]]]:
    """Records, each with its jobs that are meant: by the number of a job, an array, a job of an array.

    Raises:
        LookupError: if one is not known here; it lists what is.
    """
    have = {number: record for record in records() for number in (record.number, *record.jobs)}
    for word in words:
        if word not in have:
            known = ", ".join(dict.fromkeys(record.number for record in have.values())) or "none"
            raise LookupError(
                f"No job {word} was submitted from here ({JOBS.absolute()}). There is: {known}."
            )
    return [
        (have[word], [job for job in have[word].jobs if word in (job, have[word].number)]) for word in words
    ]
