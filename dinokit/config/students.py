"""Recipes of several students of one frozen teacher: the section `students`, and the recipe of one of them.

The recipe of a student is the file without `students`, with the student's own sections over it, and then the
`key=value` overrides, which are for every student. It is a recipe of one student like any other, and trains
the same alone; dinokit/train/students.py trains all of them together.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinokit.config.recipe import Recipe

FOLDER = "students"  # in the folder of the whole job: run.out of the student NAME is OUT/students/NAME
OWN = ("share", "backbone", "heads", "optim")  # the keys of a student
OF_ALL = ("batch", "steps")  # keys of optim that no student has of its own
Merge = Callable[[dict[str, Any], Mapping[str, Any], str], None]


def take_student(values: dict[str, Any], changes: dict[str, Any], path: Path, merge: Merge) -> str:
    """Turn the values of a recipe of several students into those of the one that `changes` names.

    Args:
        values: of the file; without `students` afterwards, and with the student's sections in them.
        changes: overrides; without `student` and `students` afterwards.
        path: of the file, for messages.
        merge: merges a section into values, as overrides are.

    Returns:
        The student's name; empty for a recipe of one student.

    Raises:
        ValueError: if it has several students and none is named, or for a section that is none of a student.
        LookupError: if it has no such student.
    """
    name = str(changes.pop("student", None) or "")
    sections = _sections(values.pop("students", None), changes.pop("students", None), merge)
    if not sections:
        if name:
            raise ValueError(f"student={name}: {path} has no section `students`. Leave it out.")
        return ""
    names = ", ".join(sections)
    if not name:
        raise ValueError(
            f"{path} is for several students: {names}. `dinokit train` trains them together, in at least "
            f"{sum(section['share'] for section in sections.values())} processes; for one of them alone add "
            f"student={next(iter(sections))}."
        )
    if name not in sections:
        raise LookupError(f"student={name}: {path} has no such student. There is: {names}.")
    own = {key: section for key, section in sections[name].items() if key != "share"}
    merge(values, deepcopy(own), "")
    return name


def of_student(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the student's own name and folder.

    Raises:
        ValueError: if it has no frozen teacher.
    """
    if not recipe.teacher.frozen:
        raise ValueError("students learn from one frozen teacher: give teacher.frozen=FILE_OR_RUN.")
    out = Path(recipe.run.out) / FOLDER / name
    return replace(recipe, name=f"{recipe.name}_{name}", run=replace(recipe.run, out=str(out)))


def shares(values: Mapping[str, Any], changes: Mapping[str, Any], merge: Merge) -> dict[str, int]:
    """The share of the processes of each student, by name; {} for a recipe of one student.

    Raises:
        ValueError: as take_student().
    """
    sections = _sections(values.get("students"), changes.get("students"), merge)
    return {name: section["share"] for name, section in sections.items()}


def check_keep(recipe: Recipe) -> None:
    """Raise a ValueError if a recipe of students that are trained together keeps one checkpoint alone."""
    if recipe.run.keep < 2:
        raise ValueError(
            "run.keep=1: students resume together from a step that all of them have saved, and a stop may "
            "come when only some have saved the last one. Set run.keep=2 or more."
        )


def ranks_of(share: Mapping[str, int], world: int, batch: int) -> dict[str, range]:
    """The processes of each student, in the order of the recipe: in proportion to the shares.

    Args:
        share: of each student, by name.
        world: processes that were started.
        batch: images of a step, which each student's processes divide equally.

    Raises:
        ValueError: if the shares do not fit; it names numbers of processes that do.
    """
    total = sum(share.values())
    fitting = [
        n * total
        for n in range(1, batch // max(share.values()) + 1)
        if all(batch % (n * each) == 0 for each in share.values())
    ]
    if world not in fitting:
        listed = ", ".join(f"{name} {each}" for name, each in share.items())
        way = f"Start one of: {', '.join(map(str, fitting[:12]))}." if fitting else ""
        alone = f" To train one of them alone, add student={next(iter(share))}." if world == 1 else ""
        raise ValueError(
            f"{world} {'process' if world == 1 else 'processes'} cannot be shared as the recipe says "
            f"({listed}: a multiple of {total}; each student's processes divide optim.batch={batch}). "
            + (way or "No number does: change students.NAME.share or optim.batch.")
            + alone
        )
    ranks, first = {}, 0
    for name, each in share.items():
        ranks[name] = range(first, first + each * world // total)
        first = ranks[name].stop
    return ranks


def _sections(given: Any, changes: Any, merge: Merge) -> dict[str, dict[str, Any]]:
    """The checked section `students`, with overrides; each student with its share."""
    values: dict[str, Any] = {"students": deepcopy(given or {})}
    if changes is not None:
        merge(values, {"students": changes}, "")
    sections = values["students"] or {}
    if not isinstance(sections, Mapping):
        raise ValueError(f"students={sections}: it is a section with one section for each student.")
    return {
        str(name): _checked(str(name), section) for name, section in sections.items() if section is not None
    }


def _checked(name: str, section: Any) -> dict[str, Any]:
    key = f"students.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise ValueError(f"{key}: the name is one of a folder; use letters, digits, _ and -.")
    if not isinstance(section, Mapping):
        raise ValueError(f"{key}={section}: it is a section with the keys {_listed(OWN)}.")
    for other in section:
        if other not in OWN:
            raise ValueError(
                f"{key}.{other}: a student has {_listed(OWN)} of its own; everything else is one for all: "
                f"give {other} outside of `students`."
            )
    optim = section.get("optim") or {}
    for each in OF_ALL:
        if each in optim:
            raise ValueError(f"{key}.optim.{each}: the students share batches: give optim.{each} for all.")
    share = section.get("share", 1)
    if type(share) is not int or share < 1:
        raise ValueError(f"{key}.share={share}: it is a whole number, 1 or more.")
    return {**section, "share": share}


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
