"""Profiles: the resources that a job asks a cluster for, read from YAML files and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from dinokit.config.load import read_mapping, section_values
from dinokit.config.registry import check_at_least, find_yaml

YEAR = 8766.0  # hours


@dataclass
class Config:
    """The keys of a profile. An empty key is not given to SLURM, so the cluster's default holds."""

    partition: str = ""  # one, or several with commas
    account: str = ""
    qos: str = ""
    constraint: str = ""  # a feature that the nodes must have
    nodes: int = 1
    gpus: int = 0  # a node
    tasks: int = 0  # processes a node; 0: one a GPU for a command that can divide its work, else one
    cpus: int = 1  # a process
    memory: float = 0.0  # GB a node; 0: all memory of the node
    hours: float = 24.0  # after which SLURM ends the job
    notice: int = 120  # seconds before that when the job is asked to save
    restarts: int = 100  # how often the job is requeued after it had to stop; 0: never
    at_once: int = 0  # jobs of an array that run at a time; 0: no limit of ours
    venv: str = ""  # folder of the Python environment in the job; empty: the one of this process
    container: str = ""  # an image to run in, by apptainer
    setup: list[str] = field(default_factory=list)  # shell lines before the command
    # other options of sbatch: {mail-type: END, exclusive: true}
    sbatch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least(self, nodes=1, gpus=0, tasks=0, cpus=1, memory=0, notice=10, restarts=0, at_once=0)
        if not 0 < self.hours <= YEAR:
            raise ValueError(
                f"hours={self.hours:g}: a number of hours, such as 24 or 0.5. In YAML, "
                f"4:00:00 is a number of seconds; write 4."
            )
        if self.notice >= 60 * self.minutes:
            raise ValueError(
                f"notice={self.notice} seconds are all of hours={self.hours:g}: no time to work is left."
            )
        given = {**vars(self), **{f"sbatch.{key}": f"{key}{value}" for key, value in self.sbatch.items()}}
        for key, value in given.items():
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(
                    f"{key}={value!r} has a control character: it would become a line of the batch script."
                )
        if self.venv and self.container:
            raise ValueError("venv and container are given, but Python can be in only one of them.")

    @property
    def minutes(self) -> int:
        """The time limit in whole minutes, as SLURM wants it."""
        return math.ceil(self.hours * 60)


def profile_names() -> list[str]:
    """The profiles in slurm/profiles/, sorted."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def find_profile(profile: str) -> Path:
    """The file of a profile: a name in slurm/profiles/, or a path.

    Raises:
        LookupError: if there is no such profile; the message lists the profiles.
    """
    return find_yaml("profile", profile, profile_names(), _folder())


def load_profile(profile: str, changes: Mapping[str, Any]) -> Config:
    """Read a profile, and change keys by values from the command line.

    Raises:
        ValueError, LookupError: for an unknown profile or key, or a value that does not fit.
    """
    path = find_profile(profile)
    values = read_mapping(path, "profile", Config)
    try:
        section_values("slurm", "profile", _normalised(values), "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Config(**section_values("slurm", "profile", _normalised({**values, **changes}), ""))


def _normalised(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`setup` as a list; refuses hours that are not a number."""
    hours = values.get("hours")
    if isinstance(hours, str):
        raise ValueError(
            f"hours={hours}: a number of hours, such as 24 or 0.5. SLURM's 1-12:30:00 is hours=36.5."
        )
    setup = values.get("setup")
    return {**values, "setup": [setup]} if isinstance(setup, str) else values


def _folder() -> Traversable:
    return files("dinokit.slurm") / "profiles"
