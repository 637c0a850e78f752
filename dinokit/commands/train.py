"""dinokit train [RECIPE] [key=value ...]: train a backbone, or resume the run in run.out.

RECIPE is a name in configs/ or the path of a YAML file. Without one, recipe, crops, colours, batch and number
of steps are chosen for the images in data.path and for this machine, in as many minutes as `minutes=` says
(60 on a CPU, 120 on a GPU); each choice is printed with its reason, and what you give stays. The same command
resumes an interrupted run.

A recipe of several students trains all of them, each in its folder run.out/students/NAME, in as many
processes as their shares say; with student=NAME it trains that one alone.

With replay=STEP it trains nothing: it repeats that step of the run in run.out from the checkpoint before it,
and says which images made its losses or gradients not finite.

dinokit train data.path=PHOTOS minutes=60
dinokit train small_photos data.path=PHOTOS run.out=runs/photos
dinokit train small_photos data.path=PHOTOS run.out=runs/photos replay=1234
"""

import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit import evaluation
from dinokit.commands import RECIPE_KEYS, Command, FailedError, key_lines
from dinokit.commands._outcome import DATA, MEMORY, exit_status
from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe, read_mapping, student_shares
from dinokit.config.students import check_keep, ranks_of

if TYPE_CHECKING:
    from dinokit.data.sources import ImageSource
    from dinokit.models import Backbone
    from dinokit.runtime.trackers import Picture
    from dinokit.train.students import Students
    from dinokit.train.trainer import Callback, Evaluator

MULTI_PROCESS = RESUMES = True
SHORT = RECIPE_KEYS
FLAGS = {"--dry-run": "check everything, time a few steps, print what the run will be, and write nothing"}
words = registry.recipe_names


def run(command: Command) -> dict[str, Any]:
    replays = [text for text in command.settings if text.startswith("replay=")]
    command.settings = [text for text in command.settings if text not in replays]
    students = None if replays or "--dry-run" in command.flags else _students(command)
    recipe, seconds = recipe_and_speed(command)
    if replays:
        return _replay(recipe, replays[-1].partition("=")[2])
    if "--dry-run" in command.flags:
        return _dry_run(recipe)
    source = pretrain(recipe, seconds=seconds, students=students)
    write_report(recipe, students.first if students else 0)
    show_next(recipe, bool(source.classes))
    return result_of(recipe)


def _students(command: Command) -> "Students | None":
    """The students of a recipe, if it has several; the settings then choose the one of this process.

    Raises:
        ValueError, LookupError: as load_recipe(), for every student; or if the shares do not fit.
    """
    # minutes= is for a run without a recipe: recipe_and_speed() says so.
    if not command.words or any(text.startswith(("student=", "minutes=")) for text in command.settings):
        return None
    word = command.one_word("recipe", registry.recipe_names())
    share = student_shares(word, command.settings)
    if not share:
        return None
    from dinokit.runtime.distributed import launch

    ours = launch()
    every = [
        load_recipe(word, [*command.settings, f"student={name}"], evaluation.architecture) for name in share
    ]
    ranks = ranks_of(share, ours.world, every[0].optim.batch)
    name = next(name for name, numbers in ranks.items() if ours.rank in numbers)
    command.settings = [*command.settings, f"student={name}"]
    if ours.world == 1:
        return None
    check_keep(every[0])
    from dinokit.train.students import Students

    return Students(name, ranks)


def _replay(recipe: Recipe, number: str) -> dict[str, Any]:
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.files import printable
    from dinokit.train.not_finite import replay

    if not number.isdecimal():
        raise ValueError(f"replay={number}: it is the number of a step, from 1, as run.log names it.")
    found = replay(recipe, registry.build("data.sources", recipe.data), int(number))
    if launch().rank == 0:
        print("\n".join(map(printable, found.lines())))
    return asdict(found)


def _dry_run(recipe: Recipe) -> dict[str, Any]:
    from dinokit.runtime.device import pick_device
    from dinokit.train import resources
    from dinokit.train.run_dir import with_precision

    source: ImageSource = registry.build("data.sources", recipe.data)
    device = pick_device(recipe.run.device)
    recipe = with_precision(recipe, device)
    warnings = resources.warning(recipe, source, device)
    print("A few steps are timed; nothing is written.", file=sys.stderr)
    lines = resources.dry_run(recipe, source, device)
    for key, value in lines.items():
        print(f"{key}: {value}")
    print("\n".join(warnings))
    return {"plan": lines, "warnings": warnings}


def result_of(recipe: Recipe) -> dict[str, Any]:
    """What a run has come to, for --json: its files, its steps, and the last score of each evaluator."""
    from dinokit.runtime.log import read_records

    out = Path(recipe.run.out)
    scores = {key: value for record in read_records(out) for key, value in record.items() if "/" in key}
    weights, report = out / "teacher.safetensors", out / "report.html"
    files = {"weights": weights, "report": report if report.is_file() else None}
    done = (out / "teacher.safetensors").is_file()
    return {"out": out, **files, "steps": recipe.optim.steps, "finished": done, "scores": scores}


def recipe_of(command: Command, given: "ImageSource | None" = None) -> Recipe:
    """As recipe_and_speed(), without the speed."""
    return recipe_and_speed(command, given)[0]


def recipe_and_speed(command: Command, given: "ImageSource | None" = None) -> tuple[Recipe, float]:
    """The recipe that a command line names, with its settings; without a name one is chosen and printed.

    `given` are the images, in place of those of data.path. The second value is the seconds of a step, if they
    were measured to choose the number of steps, else 0.

    Raises:
        ValueError, LookupError: as load_recipe(), or if neither a recipe nor data.path is given.
    """
    settings = [text for text in command.settings if not text.startswith("minutes=")]
    minutes = [text for text in command.settings if text not in settings]
    values = dict(text.partition("=")[::2] for text in settings)
    if command.words or ("data.path" not in values and given is None):
        if minutes and command.words:
            raise ValueError(
                f"{minutes[0]} is for a run without a recipe; {command.words[0]} has optim.steps. "
                f"Leave one of the two out."
            )
        needed = "recipe" if command.words else "recipe, or data.path=FOLDER to have one chosen"
        word = command.one_word(needed, registry.recipe_names())
        return load_recipe(word, settings, evaluation.architecture), 0.0
    out = values.get("run.out") or f"runs/{Path(values.get('data.path', 'images')).resolve().stem}"
    most = _minutes(minutes[-1].partition("=")[2]) if minutes else 0.0
    if not (Path(out) / "recipe.yaml").is_file():
        return _chosen(settings, values, out, most, given)
    recipe = load_recipe(Path(out) / "recipe.yaml", settings, evaluation.architecture)
    if minutes:
        print(
            f"{out} was begun with optim.steps={recipe.optim.steps}, which stays; {minutes[-1]} is not used. "
            f"For a new run, give another run.out; with weights={out} it begins where that one is.",
            file=sys.stderr,
        )
    return recipe, 0.0


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < inf:
        raise ValueError(f"minutes={text}: it is a number above 0, such as minutes=60.")
    return minutes


def _chosen(
    settings: list[str], given: dict[str, str], out: str, minutes: float, images: "ImageSource | None"
) -> tuple[Recipe, float]:
    """The recipe that dinokit.train.choose finds for the images and this machine, and seconds of a step."""
    from dinokit.runtime.distributed import launch
    from dinokit.train import choose

    if launch().world > 1:
        raise ValueError(
            f"A recipe is chosen by one process, and {launch().world} were started. Write it to a file "
            f"first: dinokit show data.path={given.get('data.path', 'PHOTOS')} > mine.yaml; then train "
            f"mine.yaml."
        )
    print("Looking at the images, then timing a few steps ...", file=sys.stderr)
    choice, source = choose.choose(settings, given.get("run.device", "auto"), images)
    choice.set("run.out", out, "by the name of the images")
    choose.with_steps(choice, source, settings, minutes)
    for line in choice.lines(given):
        print(line, file=sys.stderr)
    recipe = load_recipe(choice.recipe, [*choice.settings(), *settings], evaluation.architecture)
    return recipe, choice.seconds


def describe(words: Sequence[str]) -> str:
    names = ", ".join(registry.recipe_names())
    lines = [f"recipes: {names}", "dinokit show RECIPE prints every key with its value"]
    for word in words:
        lines += _keys_of_modules(read_mapping(registry.find_recipe(word)))
    return "\n".join(lines)


def _keys_of_modules(values: Mapping[str, Any]) -> list[str]:
    """The keys of the modules of other packages that a recipe names."""
    sections = [("losses", name) for name in values.get("losses") or {}]
    sections += [("eval", name) for name in values.get("evals") or {}]
    for key, kind in (("backbone", "models"), ("data", "data.sources")):
        sections.append((kind, str((values.get(key) or {}).get("name", ""))))
    lines = []
    for kind, name in sections:
        if "." in name:
            lines += [f"keys of {name}:", *key_lines(kind, name)]
    return lines


def pretrain(
    recipe: Recipe,
    given: "ImageSource | None" = None,
    callbacks: "Sequence[Callback]" = (),
    seconds: float = 0.0,
    students: "Students | None" = None,
) -> "ImageSource":
    """Train a recipe on its data, or on those given, with its evaluators, into run.out. Returns the data.

    `seconds` of a step, if they were measured, become part of the plan in the run's folder. `students` are
    those of the job, if there are several; the recipe is that of this process's student.
    """
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.distributed import launch
    from dinokit.train import resources, trainer
    from dinokit.train.checkpoint import last_good
    from dinokit.train.run_dir import with_precision

    source: ImageSource = registry.build("data.sources", recipe.data) if given is None else given
    if not len(source):
        place = f" data.path={recipe.data['path']}" if recipe.data.get("path") else ""
        raise FailedError(f"data.name={recipe.data['name']}{place} gives no images.", DATA)
    draw, device = partial(_draw, recipe, source), pick_device(recipe.run.device)
    plan = None
    first = students.first if students else 0
    if launch().rank == first and not last_good(Path(recipe.run.out) / "checkpoints"):
        resolved = with_precision(recipe, device)
        plan = resources.planned(resolved, device, seconds)
        for line in resources.warning(resolved, source, device):
            print(line, file=sys.stderr)
    try:
        trainer.train(recipe, source, _evaluators(recipe, source), draw, callbacks, plan, students)
    except (RuntimeError, MemoryError) as error:
        if exit_status(error) != MEMORY:
            raise
        failed = FailedError(resources.out_of_memory(recipe, device, error), MEMORY)
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error
    return source


def _draw(recipe: Recipe, source: "ImageSource", backbone: "Backbone") -> "dict[str, Picture]":
    from dinokit import viz  # only trackers need pictures, and matplotlib takes a second to import

    return viz.progress(recipe, source, backbone)


def write_report(recipe: Recipe, first: int = 0) -> None:
    """Write the report of a finished run, unless run.report=false. The process `first` does it.

    A failure is printed, and is no error. A stop signal is none either: the run is complete, and a job that
    ended by the signal would be started again for nothing.
    """
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.signals import STOP_SIGNALS

    if not recipe.run.report or launch().rank != first:
        return
    before: dict[int, Any] = {number: signal.signal(number, _stop_writing) for number in STOP_SIGNALS}
    try:
        from dinokit import report

        print(f"report: {report.write_report([recipe.run.out], device=recipe.run.device)}")
    except Exception as error:  # the run is complete without it
        print(f"dinokit: the report was not written: {error or type(error).__name__}", file=sys.stderr)
    except KeyboardInterrupt:
        text = f"the report was not written: stopped. dinokit report {recipe.run.out} writes it"
        print(f"dinokit: {text}", file=sys.stderr)
        before = dict.fromkeys(before, signal.SIG_IGN)  # launchers and schedulers repeat their signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_writing(number: int, _: object) -> None:
    raise KeyboardInterrupt


def show_next(recipe: Recipe, has_labels: bool) -> None:
    """Print commands that use the result of a run on images with or without labels, with its paths."""
    from dinokit.runtime.distributed import launch

    if launch().rank:
        return
    out, data = recipe.run.out, recipe.data
    images = [f"data.{key}={data[key]}" for key in ("name", "path") if data.get(key)]
    conv = recipe.backbone.get("stem") == "conv"  # which no model of timm has
    export = ["to=onnx", f"out={out}/backbone.onnx"] if conv else ["to=timm", f"out={out}/timm"]
    labelled = ["train.path=LABELLED/train", "test.path=LABELLED/test"]  # one sub-folder a class
    names = [*recipe.losses, *recipe.evals, recipe.backbone["name"], data["name"]]
    own = sorted({name.partition(".")[0] for name in names if "." in name})  # packages that are not dinokit's
    trust = [f"--trust={','.join(own)}"] if own else []
    commands = [
        ["eval", "knn", f"weights={out}", *([] if "split" in data and has_labels else labelled)],
        ["extract", f"weights={out}", *images, f"out={out}/features"],
        ["export", f"weights={out}", *export],
        ["report", out],
    ]
    if "." in recipe.backbone["name"]:  # of another package: no format has it
        commands.pop(2)
    print("What next:")
    arguments = f"{out!r}, trust={own}" if own else repr(out)
    print(f"  import dinokit; backbone = dinokit.load_backbone({arguments})  # in Python")
    for words in commands:
        print(f"  dinokit {shlex.join([*words, *trust])}")


def _evaluators(recipe: Recipe, source: "ImageSource") -> list["Evaluator"]:
    from dinokit.runtime.distributed import launch
    from dinokit.train.health import Probe
    from dinokit.train.trainer import Evaluator

    evaluators = []
    for name, section in recipe.evals.items():
        values = {key: value for key, value in section.items() if key != "every"}
        sources = evaluation.source_fields(name)
        # Images in memory have no split for evaluation: these would be the images that are trained on.
        unlabelled = evaluation.needs_labels(name) and (recipe.data["name"] == "memory" or not source.classes)
        if any(values[key] is None for key in sources) and unlabelled:
            text = (
                f"evals.{name} is off: data.name={recipe.data['name']} gives no labelled test images. "
                f"To evaluate the run, give {' and '.join(f'evals.{name}.{key}.path' for key in sources)}."
            )
            if launch().rank == 0:
                print(text, file=sys.stderr)
            continue
        values = evaluation.with_data(name, values, recipe.data)
        if {"data.dense", "data.objects"} & evaluation.registries(name) and values.get("out") == "":
            values["out"] = f"{recipe.run.out}/{name}"  # the report shows predictions
        if "max_unreadable" in values:  # an evaluator allows what the run allows
            values["max_unreadable"] = max(values["max_unreadable"], recipe.run.max_unreadable)
        if recipe.backbone.get("weights"):
            values = evaluation.with_initial_weights(name, values, f"{recipe.run.out}/start.safetensors")
        evaluators.append(Evaluator(name, section["every"], partial(evaluation.run_evaluator, name, values)))
    if recipe.evals:  # also if they are off: this one needs no labels
        every = min(section["every"] for section in recipe.evals.values())
        evaluators.append(Evaluator("health", every, Probe(source)))
    return evaluators
