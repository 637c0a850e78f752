"""The commands of a submission, one a job, held against their verb and profile before anything is sent."""

import re
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from dinokit.commands import parse
from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe, parse_overrides

if TYPE_CHECKING:
    from dinokit.slurm.profile import Config

OWN = ("profile", "array", "after", "--dry-run")  # what is not a profile's, but submit's own
HOLES = ("{}", "{name}", "{number}")


def belongs_behind(settings: list[str], verb: str) -> str:
    """Where to put the first of the settings that is the command's, if there is one.

    It is not a profile's; nor is it nearly so, as node=2 is, unless a recipe has that very key.
    """
    recipe, keys = {item.name for item in fields(Recipe)}, profile_keys()
    for text in settings:
        key = _key(text)
        if key in recipe or (key not in keys and not get_close_matches(key, keys, n=1, cutoff=0.65)):
            return f" What is for dinokit {verb} stands behind --: -- {verb} ... {text}"
    return ""


def for_each(array: str | None, words: list[str]) -> list[list[str]]:
    """The command for each value of an array, or the command."""
    if array is None:
        return [words]
    if not any(hole in word for word in words for hole in HOLES):
        raise ValueError(f"array={array}, but the command has no {{}}: all its jobs would do the same.")
    if bounds := re.fullmatch(r"(\d+)-(\d+)", array):
        values = [str(n) for n in range(int(bounds[1]), int(bounds[2]) + 1)]
    elif any(mark in array for mark in "*?["):
        root = Path(array).anchor or "."
        values = sorted(str(path) for path in Path(root).glob(str(Path(array).relative_to(root))))
    else:
        values = [value for value in array.split(",") if value]
    if not values:
        raise ValueError(
            f"array={array} has no values: FROM-TO, A,B,C, or a pattern of files that are there."
        )
    return [[_filled(word, value, number) for word in words] for number, value in enumerate(values)]


def _filled(word: str, value: str, number: int) -> str:
    holes = dict(zip(HOLES, (value, Path(value).stem, str(number)), strict=True))
    return re.sub(r"{(name|number)?}", lambda found: holes[found[0]], word)


def shape(verb: str, profile: "Config") -> tuple[int, bool]:
    """Processes a node, and whether the command goes on where it stopped."""
    have = [name for name in registry.names("commands") if name != "submit"]
    if verb not in have:
        near = " Leave that word out." if verb == "dinokit" else registry.suggest(verb, have)
        raise LookupError(f"There is no verb '{verb}' to submit.{near} Verbs are: {', '.join(have)}.")
    module = registry.find("commands", verb)
    shares = getattr(module, "MULTI_PROCESS", False)
    tasks = profile.tasks or (profile.gpus if shares else 1) or 1
    if not shares and profile.nodes * tasks > 1:
        raise ValueError(
            f"dinokit {verb} works in one process, but nodes={profile.nodes} and tasks={tasks} ask for "
            f"{profile.nodes * tasks}, which would all do the same. Give nodes=1 tasks=1."
        )
    return tasks, getattr(module, "RESUMES", False)


def check(words: Sequence[str], profile: "Config", tasks: int) -> set[str]:
    """Say now what would else be said when the job starts. Returns the modules that the command names."""
    from dinokit.slurm.snapshot import dotted, is_dotted

    verb, rest = words[0], words[1:]
    module = registry.find("commands", verb)
    try:
        command = parse(verb, rest, list(getattr(module, "FLAGS", {})))
        named = dotted(parse_overrides(command.settings)) | set(filter(is_dotted, command.words))
        if verb == "train":
            recipe = load_recipe(command.one_word("recipe", registry.recipe_names()), command.settings)
            named |= dotted(vars(recipe))
            _check_batch(recipe, profile.nodes, tasks)
        elif hasattr(module, "check"):
            module.check(command)
    except ValueError as error:
        raise ValueError(f"{error}{_belongs_before(rest)}") from None
    return named


def _check_batch(recipe: Recipe, nodes: int, tasks: int) -> None:
    from dinokit.train.parts import parts_of_step

    try:
        parts_of_step(recipe, nodes * tasks)
    except ValueError as error:
        batch = recipe.optim.batch
        able = [n for n in range(1, 2 * nodes + 1) if batch % (n * tasks) == 0]
        each = f"{tasks} process{'es' if tasks > 1 else ''} a node"
        near = f" With {each}, nodes may be {', '.join(map(str, able))}." if able else ""
        raise ValueError(f"nodes={nodes} and {each}: {error}{near}") from None


def _belongs_before(words: Sequence[str]) -> str:
    """Where to put the first of the words behind -- that is for the job, if there is one."""
    own = [text for text in words if _key(text) in (*profile_keys(), *OWN)]
    return f" What is for the job stands before --: {own[0]} -- ..." if own else ""


def _key(text: str) -> str:
    return re.split(r"[.=]", text)[0]


def profile_keys() -> list[str]:
    """What a profile may say."""
    return [item.name for item in fields(registry.read_config("slurm", "profile"))]
