"""Submits dinokit commands as jobs to a SLURM cluster; installed as dinokit.slurm.

A submission has a folder below runs/jobs/: a copy of the code, the batch script, logs, and its record.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from dinokit.config.load import run_dir_of
from dinokit.runtime.files import write_text

JOBS = Path("runs/jobs")  # below the folder in which the command is given
NAME = "job.json"
INSTALLED = {"site-packages", "dist-packages"}
TOP_LEVEL = ("configs", "eval", "slurm")  # packages of dinokit that are beside dinokit/ in a checkout


@dataclass
class Record:
    """A submission."""

    jobs: list[str]  # SLURM's numbers; of an array NUMBER_0, NUMBER_1, ...
    commands: list[list[str]]  # the words after `dinokit`, for each job
    settings: list[str]  # the words before --
    submitted: str
    folder: str = ""

    @property
    def number(self) -> str:
        """The number of the job, or of the array."""
        return self.jobs[0].partition("_")[0]


def new_folder(name: str) -> Path:
    """Make a new folder for a submission; returns its full path.

    Raises:
        OSError: if it cannot be made.
    """
    first = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for number in range(1000):
        folder = (JOBS / (f"{first}-{number}" if number else first)).absolute()
        with suppress(FileExistsError):  # of a submission in the same second
            folder.mkdir(parents=True)
            return folder
    raise OSError(f"{JOBS} has a thousand folders {first}.")


def write_record(folder: Path, jobs: list[str], commands: list[list[str]], settings: list[str]) -> Record:
    """Write job.json of a submission."""
    record = Record(jobs, commands, settings, time.strftime("%Y-%m-%d %H:%M:%S"))
    values = {key: value for key, value in asdict(record).items() if key != "folder"}
    write_text(folder / NAME, json.dumps(values, indent=1))
    return record


def read_records() -> list[Record]:
    """All submissions from the working folder, oldest first."""
    files = sorted(JOBS.glob(f"*/{NAME}"))
    return [Record(**json.loads(p.read_text(encoding="utf-8")), folder=str(p.parent)) for p in files]


def find_jobs(words: Sequence[str]) -> list[tuple[Record, list[str]]]:
    """Records, each with its selected jobs: by the number of a job, of an array, or of a job of an array.

    Raises:
        LookupError: if a number is not known here; the message lists the known ones.
    """
    have = {number: each for each in read_records() for number in (each.number, *each.jobs)}
    for word in words:
        if word not in have:
            known = ", ".join(dict.fromkeys(each.number for each in have.values())) or "none"
            raise LookupError(
                f"No job {word} was submitted from here ({JOBS.absolute()}). Known jobs: {known}."
            )
    return [
        (have[word], [job for job in have[word].jobs if word in (job, have[word].number)]) for word in words
    ]


def copy_code(target: Path, names: Iterable[str] = ()) -> None:
    """Copy dinokit, as it is imported here, into a folder for PYTHONPATH: later edits do not reach the job.

    Args:
        target: the folder.
        names: dotted names of modules that a recipe or command uses. Their packages are copied too, unless
            they are installed (and not editable) or do not exist.
    """
    _copy(_location("dinokit"), target / "dinokit")
    for name in TOP_LEVEL:
        location = _location(f"dinokit.{name}")
        if not (target / "dinokit" / name).exists():  # in a wheel they are inside dinokit/
            _copy(location, target / "dinokit" / name)
    for name in {name.split(".")[0] for name in names} - {"dinokit"} - sys.stdlib_module_names:
        package = _location(name)
        if package is not None and not INSTALLED & set(package.resolve().parts):
            _copy(package, target / package.name)


def copy_recipes(target: Path, commands: Sequence[Sequence[str]]) -> list[list[str]]:
    """Copy the YAML files in commands into a folder. Returns the commands with the paths of the copies.

    The recipe.yaml of a run is not copied, because it stands for the run in its folder.
    """
    copies: dict[str, str] = {}

    def replaced(word: str) -> str:
        key, equals, path = word.rpartition("=")
        if not path.endswith((".yaml", ".yml")) or not Path(path).is_file() or run_dir_of(Path(path)):
            return word
        if path not in copies:
            copy = target / str(len(copies)) / Path(path).name  # the file name is the name of the recipe
            copy.parent.mkdir(parents=True)
            copies[path] = str(shutil.copyfile(path, copy))
        return f"{key}{equals}{copies[path]}"

    return [[replaced(word) for word in words] for words in commands]


def dotted_names(values: object) -> set[str]:
    """Names of modules, such as my_package.gram, in nested settings: values of `name`, and keys."""
    if not isinstance(values, Mapping):
        return set()
    found = {str(x) for x in (*values, values.get("name")) if is_dotted(str(x))}
    return found.union(*(dotted_names(value) for value in values.values()))


def is_dotted(x: str) -> bool:
    """Whether a text can be the name of a module in a package."""
    return "." in x and all(word.isidentifier() for word in x.split("."))


def _location(name: str) -> Path | None:
    """The folder of a package, or the file of a module."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def _copy(location: Path | None, target: Path) -> None:
    assert location is not None, target
    if location.is_file():
        shutil.copy2(location, target)
    else:
        shutil.copytree(location, target, ignore=shutil.ignore_patterns("__pycache__"))
