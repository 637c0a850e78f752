"""dinokit eval EVALUATOR weights=FILE_OR_RUN [key=value ...]: evaluate frozen features, print JSON last.

Without train.* and test.*, the data that the weights were trained on is used, if it has labels. A source
given by its path alone is a folder with one sub-folder a class. backbone.name=NAME in place of weights=...
judges a backbone as its own code makes it. device=cpu, cuda or auto says where. Started by torchrun or
srun, the processes share the work, and the first one prints.

Ctrl-C keeps the features and the training that there is, and the same command goes on.

Each result is also added to results.jsonl in the run's folder, or in out=FOLDER; dinokit results shows them.
Features are kept in cache=FOLDER (or DINOKIT_CACHE, or ~/.cache/dinokit/features), so that the next evaluator
of the same weights and images need not make them again; cache=null keeps none.

dinokit eval knn weights=runs/photos train.path=LABELLED/train test.path=LABELLED/test
dinokit eval knn backbone.name=pixels train.path=LABELLED/train test.path=LABELLED/test
dinokit eval all recipe=eval_scenes weights=runs/demo knn.k=[5,20]
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit import evaluation, results
from dinokit.commands import Command
from dinokit.config import registry
from dinokit.config.help import key_line, key_lines
from dinokit.config.load import parse_overrides, section_values
from dinokit.evaluation import Planned

if TYPE_CHECKING:
    from dinokit.models import Backbone

OWN = {  # keys of the command itself
    "weights": "a file or a run: what is judged",
    "backbone": "in place of weights: backbone.name=NAME, as its own code makes it, and what that takes",
    "device": "cpu, cuda or auto",
    "out": "folder of results.jsonl, and of what an evaluator keeps; the run's, if not given",
}
MULTI_PROCESS = RESUMES = True
PATIENCE = 60.0  # minutes that a process waits for the others


def run(command: Command) -> None:
    plan, recipe, own, keep = check(command)
    weights, made, out = own["weights"], own["backbone"], own["out"]
    device = "auto" if own["device"] is None else str(own["device"])
    data = None
    if weights is not None and any(each.values[key] is None for each in plan for key in _sources(each)):
        data = evaluation.trained_on(weights)
    for each in plan:
        each.values = evaluation.with_data(each.name, each.values, data)
    folder = Path(out) if out else _folder_of(weights)
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.signals import stop_signals
    from dinokit.train.processes import joined

    with joined(pick_device(device), PATIENCE), stop_signals(between_items=True):
        _judge_all(plan, recipe, weights, made, device, folder, keep)


def check(command: Command) -> tuple[list[Planned], str, dict[str, Any], bool]:
    """What is to be done, the recipe that says so, the command's own keys, and whether features are kept."""
    have = [*registry.names("eval"), "all"]
    what = command.one_word("evaluator", have)
    values = parse_overrides(command.settings)
    own = {key: values.pop(key, None) for key in OWN}
    if what != "all":
        registry.read_config("eval", what)
    if (own["weights"] is None) == (own["backbone"] is None):
        near = (registry.suggest(key, ["weights", "backbone"]) for key in values)
        raise ValueError(
            "Give either weights=FILE_OR_RUN or backbone.name=NAME (as its own code makes it)."
            f"{next(filter(None, near), '')}"
        )
    keep = "cache" not in values or values["cache"] is not None
    return *_plan(what, values), own, keep


def _plan(what: str, values: dict[str, Any]) -> tuple[list[Planned], str]:
    """What is to be done, and the recipe that says so."""
    if what != "all":
        return [Planned(what, what, section_values("eval", what, values, "", tuple(OWN)))], ""
    recipe = values.pop("recipe", None)
    if recipe is None:
        there = ", ".join(registry.recipe_names("eval"))
        raise ValueError(f"recipe must be given, as in recipe=NAME_OR_FILE; there is: {there}.")
    return evaluation.read_list(str(recipe), values), str(recipe)


def _sources(each: Planned) -> dict[str, str]:
    return evaluation.source_fields(each.name)


def _folder_of(weights: str | None) -> Path | None:
    """Where results of these weights go: their run, or the folder of their file."""
    if weights is None:
        return None
    path = Path(weights)
    return path if path.is_dir() else path.parent if path.is_file() else Path("runs") / path.name


def _judge_all(
    plan: Sequence[Planned],
    recipe: str,
    weights: str | None,
    made: dict[str, Any] | None,
    device: str,
    folder: Path | None,
    keep: bool,
) -> None:
    backbone = evaluation.load_judged(weights, made, device)
    about = {**evaluation.describe_judged(weights, backbone), "eval_recipe": recipe}
    name = weights or f"backbone.name={(made or {})['name']}"
    from dinokit.commands._eval_list import Said
    from dinokit.runtime.distributed import rank, world_size

    failed, said = [], Said(folder, plan, about["fingerprint"])
    for each in plan:
        try:
            if each.label not in said.lines:
                said.add(each.label, judged(each, backbone, name, about, folder, keep))
        except (ValueError, LookupError, OSError) as error:
            if len(plan) == 1 or world_size() > 1:  # the others may not have failed, and would wait
                raise
            failed.append(each.label)
            print(f"dinokit: {each.label}: {error}", file=sys.stderr)
            continue
        if rank() == 0:
            print(json.dumps(said.lines[each.label]))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(plan)} evaluators could not judge: {', '.join(failed)}.")
    said.finish()


def judged(
    each: Planned, backbone: "Backbone", name: str, about: Mapping[str, Any], folder: Path | None, keep: bool
) -> dict[str, Any]:
    """Do one evaluation. Returns its line, which process 0 also adds to the results in `folder`.

    Args:
        each: what to do; its cache and its folder are filled in.
        backbone: what is judged.
        name: what the line calls it; of weights, their path.
        about: what the line says besides.
        folder: for results, heads and states to go on from; None keeps none.
        keep: whether features are kept where the evaluator does not say.
    """
    from dinokit.features import device_of
    from dinokit.runtime.device import pick_precision
    from dinokit.runtime.distributed import cache_folder, rank

    known, begun = {f.name for f in fields(registry.read_config("eval", each.name))}, time.monotonic()
    if "cache" in known and each.values["cache"] is None and keep:
        each.values["cache"] = str(cache_folder())
    if "out" in known and folder is not None:
        # Many files may have their results in one folder, as a run's teachers do; heads are of one each.
        file = f"{Path(name).stem}_" if Path(name).is_file() else ""
        each.values["out"] = str(folder / f"{file}{each.label}")
    scores = evaluation.run_evaluator(each.name, each.values, backbone)
    seen = {"transform": evaluation.transform_of(each.values, backbone), "seconds": time.monotonic() - begun}
    if "precision" in known:  # which one `auto` is depends on the machine
        seen["precision"] = pick_precision(each.values["precision"], device_of(backbone))
    line = results.record(each.name, name, scores, each.values, {**about, **seen})
    if folder is not None and rank() == 0:
        results.append(folder, line)
    return line


def describe(words: Sequence[str]) -> str:
    have = registry.names("eval")
    if words and words[0] == "all":
        return f"recipes: {', '.join(registry.recipe_names('eval'))}"
    if not words or words[0] not in have:
        return f"evaluators: {', '.join(have)}, or all; dinokit eval NAME --help lists the keys"
    own = [key_line(key, meaning) for key, meaning in OWN.items()]
    return "\n".join([f"keys of {words[0]}:", *own, *key_lines("eval", words[0], without=tuple(OWN))])
