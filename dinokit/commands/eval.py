"""dinokit eval EVALUATOR weights=FILE_OR_RUN [key=value ...]: evaluate frozen features, print JSON last.

Without train.* and test.*, the data that the weights were trained on is used, if it has labels. A source
given by its path alone is a folder with one sub-folder a class. backbone.name=NAME in place of weights=...
evaluates a backbone with the weights that its own code gives it. device is cpu, cuda or auto. Processes that
torchrun or srun started share the work, and the first one prints.

Ctrl-C saves the features and the training so far, and the same command resumes.

Each result is also added to results.jsonl in the run's folder, or in out=FOLDER; dinokit results shows them.
Features are cached in cache=FOLDER (or DINOKIT_CACHE, or ~/.cache/dinokit/features), so that the next
evaluator of the same weights and images does not compute them again; cache=null turns this off.

dinokit eval knn weights=runs/photos train.path=LABELLED/train test.path=LABELLED/test
dinokit eval knn backbone.name=pixels train.path=LABELLED/train test.path=LABELLED/test
dinokit eval all recipe=eval_scenes weights=runs/demo knn.k=[5,20]
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit import evaluation, results
from dinokit.commands import COMMON, Command, FailedError, _outcome, key_line, key_lines
from dinokit.commands._sentence import sentence
from dinokit.config import registry
from dinokit.config.load import parse_overrides, section_values
from dinokit.evaluation import EvalJob
from dinokit.runtime.files import printable

if TYPE_CHECKING:
    from dinokit.models import Backbone

OWN = {  # keys of the command itself
    "weights": "a file or a run to evaluate",
    "backbone": "in place of weights: backbone.name=NAME, as its own code makes it, and what that takes",
    "device": COMMON["device"],
    "out": "folder for results.jsonl, heads and unfinished work; the run's, if not given",
}
MULTI_PROCESS = RESUMES = True


def words() -> list[str]:
    return [*registry.names("eval"), "all"]


FAR = 3  # times the trained size, above which a warning is printed
PATIENCE = 60.0  # minutes that a process waits for the others


def run(command: Command) -> dict[str, Any]:
    jobs, recipe, own, cache = check(command)
    weights, out = own["weights"], own["out"]
    device = "auto" if own["device"] is None else str(own["device"])
    data = None
    if weights is not None and any(
        job.values[key] is None for job in jobs for key in evaluation.source_fields(job.name)
    ):
        data = evaluation.training_data(weights)
    for job in jobs:
        job.values = evaluation.with_data(job.name, job.values, data)
    folder = Path(out) if out else _folder_of(weights)
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.launch import process_group
    from dinokit.runtime.signals import stop_signals

    with process_group(pick_device(device), PATIENCE), stop_signals(between_items=True):
        return _evaluate_all(jobs, recipe, own, device, folder, cache, command.show)


def check(command: Command) -> tuple[list[EvalJob], str, dict[str, Any], bool]:
    """The jobs, the recipe that lists them, the command's own keys, and whether features are cached."""
    have = [*registry.names("eval"), "all"]
    name = command.one_word("evaluator", have)
    values = parse_overrides(command.settings)
    own = {key: values.pop(key, None) for key in OWN}
    if name != "all":
        registry.read_config("eval", name)
    if (own["weights"] is None) == (own["backbone"] is None):
        near = (registry.suggest(key, ["weights", "backbone"]) for key in values)
        raise ValueError(
            "Give either weights=FILE_OR_RUN or backbone.name=NAME (as its own code makes it)."
            f"{next(filter(None, near), '')}"
        )
    cache = "cache" not in values or values["cache"] is not None
    return *_jobs(name, values), own, cache


def _jobs(name: str, values: dict[str, Any]) -> tuple[list[EvalJob], str]:
    """The jobs, and the recipe that lists them."""
    if name != "all":
        return [EvalJob(name, name, section_values("eval", name, values, "", tuple(OWN)))], ""
    recipe = values.pop("recipe", None)
    if recipe is None:
        have = ", ".join(registry.recipe_names("eval"))
        raise ValueError(f"recipe must be given, as in recipe=NAME_OR_FILE; there is: {have}.")
    return evaluation.read_list(str(recipe), values), str(recipe)


def _named(section: Mapping[str, Any]) -> str:
    """A backbone without a file, in results: its name, and its model or its parts."""
    parts = [_named(each).removeprefix("backbone.name=") for each in section.get("of") or []]
    more = f"({', '.join(parts)})" if parts else f":{section['model']}" if section.get("model") else ""
    own = section.get("name") or section.get("weights")
    return f"backbone.name={own}{more}"


def _folder_of(weights: str | None) -> Path | None:
    """Where results of these weights go: their run, or the folder of their file."""
    if weights is None:
        return None
    path = Path(weights)
    return path if path.is_dir() else path.parent if path.is_file() else Path("runs") / path.name


def _evaluate_all(
    jobs: Sequence[EvalJob],
    recipe: str,
    own: Mapping[str, Any],
    device: str,
    folder: Path | None,
    cache: bool,
    show: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Run the jobs one after another and print their lines; a list that is stopped resumes after the last."""
    weights, section = own["weights"], own["backbone"]
    backbone = evaluation.load_evaluated(weights, section, device)
    about = {**evaluation.describe_evaluated(weights, backbone), "eval_recipe": recipe}
    name = weights or _named(section or {})
    from dinokit.features import device_of
    from dinokit.runtime.distributed import rank, world_size
    from dinokit.runtime.log import info
    from dinokit.runtime.partial import PartialResult

    settings = [(job.label, job.name, job.values) for job in jobs], about["fingerprint"]
    progress = PartialResult(folder if len(jobs) > 1 else None, "list", settings, device_of(backbone))
    lines: dict[str, dict[str, Any]] = progress.load() or {}
    if lines:
        info(f"resumes after {', '.join(lines)}; to evaluate these again, delete {progress.path}")
    failed: dict[str, Exception] = {}
    for job in jobs:
        try:
            if job.label not in lines:
                lines[job.label] = evaluate_job(job, backbone, name, about, folder, cache)
                progress.save(lines)
        except (ValueError, LookupError, OSError) as error:
            if len(jobs) == 1 or world_size() > 1:  # the other processes may not have failed, and would wait
                raise
            failed[job.label] = error
            print(printable(f"dinokit: {job.label}: {error}"), file=sys.stderr)
            continue
        if rank() == 0:
            line = lines[job.label]
            if text := sentence(job.name, job.values, line, backbone.channels, world_size()):
                print(text)
            show(lines[job.label])
    if failed:
        raise FailedError(
            f"{len(failed)} of {len(jobs)} evaluators failed: {', '.join(failed)}.",
            max(map(_outcome.exit_status, failed.values())),
        )
    progress.remove()
    return {"results": list(lines.values())} if len(jobs) > 1 or recipe else lines[jobs[0].label]


def evaluate_job(
    job: EvalJob, backbone: "Backbone", name: str, about: Mapping[str, Any], folder: Path | None, cache: bool
) -> dict[str, Any]:
    """Run one evaluation. Returns its line, which process 0 also adds to the results in `folder`.

    The job's cache, if it is to be used, and output folder are filled in. `name` is that of the backbone in
    the line, the path of weights; `folder` gets results, heads and unfinished work, None saves nothing.
    """
    from dinokit.features import device_of
    from dinokit.runtime.device import pick_precision
    from dinokit.runtime.distributed import cache_folder, rank
    from dinokit.runtime.launch import run_lock
    from dinokit.runtime.log import info

    keys, start = {f.name for f in fields(registry.read_config("eval", job.name))}, time.monotonic()
    if "cache" in keys and job.values["cache"] is None and cache:
        job.values["cache"] = str(cache_folder())
    if "out" in keys and folder is not None:
        # Many files may have their results in one folder, as a run's teachers do, but each has its own heads.
        file = f"{Path(name).stem}_" if Path(name).is_file() else ""
        job.values["out"] = str(folder / f"{file}{job.label}")
    trained, asked = backbone.input.size, int(job.values.get("size") or 0)
    if isinstance(trained, int) and asked > FAR * trained:
        info(
            f"{job.label}: size={asked}, but the backbone was trained on {trained} pixels: its "
            f"features may be poor at this size, and it takes long. To compare: size={trained}"
        )
    held = job.values.get("out") if "out" in keys else None
    with run_lock(Path(held), "out") if held else nullcontext():
        scores = evaluation.run_evaluator(job.name, job.values, backbone)
    measured = {
        "transform": evaluation.transform_of(job.values, backbone),
        "seconds": time.monotonic() - start,
    }
    if "precision" in keys:  # which one `auto` is depends on the machine
        measured["precision"] = pick_precision(job.values["precision"], device_of(backbone))
    line = results.record(job.name, name, scores, job.values, {**about, **measured})
    if folder is not None and rank() == 0:
        results.append(folder, line)
    return line


def describe(words: Sequence[str]) -> str:
    have = registry.names("eval")
    if words and words[0] == "all":
        return f"recipes: {', '.join(registry.recipe_names('eval'))}"
    if not words or (words[0] not in have and "." not in words[0]):
        return f"evaluators: {', '.join(have)}, or all; dinokit eval NAME --help lists the keys"
    own = [key_line(key, meaning) for key, meaning in OWN.items()]
    return "\n".join([f"keys of {words[0]}:", *own, *key_lines("eval", words[0], without=tuple(OWN))])
