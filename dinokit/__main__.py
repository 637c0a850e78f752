"""dinokit VERB [WHAT] [key=value ...]: train, judge and use self-supervised visual features.

dinokit train RECIPE      pretrain; RECIPE is a name in configs/ or the path of a YAML file
dinokit train scenes_cpu data.name=folder data.path=PHOTOS
dinokit train small_photos data.path=PHOTOS run.out=runs/photos
The same command goes on with a run that was interrupted.
dinokit eval EVALUATOR    judge frozen features; the last line printed is JSON
dinokit eval knn weights=runs/photos train.path=LABELLED/train test.path=LABELLED/test
dinokit eval knn backbone.name=pixels train.path=LABELLED/train test.path=LABELLED/test
dinokit show RECIPE       the whole recipe, its size, memory and learning rate; runs nothing
dinokit demo              pretrain on the built-in scenes, judge, print a table (minutes on a laptop)

dinokit VERB --help       what a verb takes            dinokit --version
--traceback               with any verb: show where in the code an error arose
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinokit.config import Recipe
    from dinokit.data.sources import Source
    from dinokit.train.loop import Evaluator


def train(what: str, overrides: Sequence[str]) -> None:
    """Dinokit train RECIPE [key=value ...]: pretrain, or go on with the run in run.out."""
    from dinokit.config import load_recipe

    recipe = load_recipe(what, overrides)
    pretrain(recipe)


def evaluate(what: str, overrides: Sequence[str]) -> None:
    """Dinokit eval EVALUATOR weights=FILE_OR_RUN [key=value ...]: judge frozen features.

    Without train.* and test.*, the data that the weights were trained on is used, if it has labels. A source
    given by its path alone is a folder with one sub-folder a class. backbone.name=NAME in place of
    weights=... judges a backbone without training. device=cpu, cuda or auto says where.
    """
    from dinokit import judge, shelves
    from dinokit.config import parse_overrides, section_values

    shelves.read_config("eval", what)
    values = parse_overrides(overrides)
    weights, untrained = values.pop("weights", None), values.pop("backbone", None)
    device = str(values.pop("device", "auto"))
    if (weights is None) == (untrained is None):
        raise ValueError(
            "Give either weights=FILE_OR_RUN or backbone.name=NAME (a backbone without training)."
        )
    values = section_values("eval", what, values, "")
    data = None
    if weights is not None and any(values[key] is None for key in judge.source_fields(what)):
        data = judge.trained_on(weights)
    values = judge.with_data(what, values, data)
    scores = judge.run_evaluator(what, values, judge.load_judged(weights, untrained, device))
    print(json.dumps({"eval": what, "weights": weights or f"untrained {untrained['name']}", **scores}))


def show(what: str, overrides: Sequence[str]) -> None:
    """Dinokit show RECIPE [key=value ...]: the recipe, every default filled in, and what it amounts to."""
    from dinokit.config import load_recipe, to_yaml

    recipe = load_recipe(what, overrides)
    from dinokit.train.plan import plan

    print(to_yaml(recipe, template=True))
    for key, value in plan(recipe).items():
        print(f"# {key}: {value}")


def demo(what: str, overrides: Sequence[str]) -> None:
    """Dinokit demo [key=value ...]: recipe scenes_cpu from start to end in runs/demo, judged by k-NN."""
    from dinokit import judge
    from dinokit.config import load_recipe

    if what:
        raise ValueError(f"dinokit demo takes no recipe, and was given '{what}'. Try: dinokit train {what}")
    recipe = load_recipe("scenes_cpu", ["run.out=runs/demo", *overrides])
    if "knn" not in recipe.evals:
        raise ValueError("dinokit demo needs evals.knn.")
    out = pretrain(recipe)
    import torch
    from rich.console import Console
    from rich.table import Table

    from dinokit.train.student_teacher import build_backbone

    torch.manual_seed(recipe.run.seed)
    trained = judge.load_judged(out, None, recipe.run.device)
    place = next(trained.parameters()).device
    pixels = {"name": "pixels", "size": recipe.crops.globals.size}
    judged = {
        "raw pixels, 16 x 16": judge.load_judged(None, pixels, recipe.run.device),
        "the same ViT, untrained": build_backbone(recipe).to(place).eval(),
        "your DINOv2": trained,
    }
    table = Table(
        "features",
        "k-NN top-1 (k=20)",
        title="Built-in scenes: ten shapes, test images never seen in training",
    )
    values = {key: value for key, value in recipe.evals["knn"].items() if key != "every"}
    values = judge.with_data("knn", values, recipe.data)
    for label, backbone in judged.items():
        table.add_row(label, f"{100 * judge.run_evaluator('knn', values, backbone)['top1@20']:.1f} %")
    Console().print(table)
    print(f"Weights: {out}/teacher.safetensors   curves: {out}/metrics.jsonl   recipe: {out}/recipe.yaml")
    print("Now your own: dinokit train small_photos data.path=PHOTOS run.out=runs/photos")


VERBS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "show": show,
    "demo": demo,
}


def pretrain(recipe: "Recipe") -> str:
    """Train a recipe on its data with its evaluators. Returns the run's folder."""
    from dinokit import shelves
    from dinokit.train import loop

    source = shelves.build("data.sources", recipe.data)
    return str(loop.train(recipe, source, _evaluators(recipe, source)))


def _evaluators(recipe: "Recipe", source: "Source") -> list["Evaluator"]:
    from functools import partial

    from dinokit import judge
    from dinokit.train.loop import Evaluator

    done = []
    for name, section in recipe.evals.items():
        values = {key: value for key, value in section.items() if key != "every"}
        sources = judge.source_fields(name)
        if any(values[key] is None for key in sources) and not source.classes:
            print(
                f"evals.{name} is off: data.name={recipe.data['name']} gives no labels here. To watch the "
                f"run by it, give {' and '.join(f'evals.{name}.{key}.path' for key in sources)}.",
                file=sys.stderr,
            )
            continue
        values = judge.with_data(name, values, recipe.data)
        done.append(Evaluator(name, section["every"], partial(judge.run_evaluator, name, values)))
    return done


def _help(verb: str | None, what: str | None) -> str:
    from dinokit import shelves

    if verb is None:
        return __doc__ or ""
    lines = [(VERBS[verb].__doc__ or "").replace("Dinokit", "dinokit", 1)]
    if verb == "eval" and what in shelves.names("eval"):
        lines.append(f"keys of {what}:")
        for f in fields(shelves.read_config("eval", what)):
            default = "" if f.default is MISSING else f" = {json.dumps(f.default, default=list)}"
            lines.append(f"    {f.name}{default}")
    elif verb == "eval":
        have = ", ".join(shelves.names("eval"))
        lines.append(f"evaluators: {have}; dinokit eval NAME --help lists the keys")
    elif verb != "demo":
        lines.append(f"recipes: {', '.join(shelves.recipe_names())}")
        lines.append("dinokit show RECIPE prints every key with its value")
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> tuple[str | None, str, list[str], set[str]]:
    """The verb, what it is about, the overrides and the flags of a command line."""
    from dinokit.shelves import suggest

    flags = {word for word in argv if word.startswith("-")}
    known = {"--help", "-h", "--version", "--traceback"}
    for flag in sorted(flags - known):
        near = suggest(flag, sorted(known))
        raise ValueError(f"There is no option {flag}.{near} Settings are given as key=value.")
    words = [word for word in argv if not word.startswith("-")]
    verb = words[0] if words else None
    if verb is not None and verb not in VERBS:
        raise LookupError(
            f"There is no verb '{verb}'.{suggest(verb, list(VERBS))} Verbs are: {', '.join(VERBS)}."
        )
    named = [word for word in words[1:] if "=" not in word]
    if len(named) > 1:
        raise ValueError(f"'{named[1]}' is not of the form key=value, and '{named[0]}' was given already.")
    return verb, named[0] if named else "", [word for word in words[1:] if "=" in word], flags


def _run(argv: Sequence[str]) -> None:
    verb, what, overrides, flags = _parse(argv)
    if "--version" in flags:
        from dinokit import __version__

        print(f"dinokit {__version__}")
    elif verb is None or flags & {"--help", "-h"}:
        print(_help(verb, what))
    elif not what and verb != "demo":
        raise ValueError(f"dinokit {verb} of what? {_help(verb, None)}")
    else:
        VERBS[verb](what, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit status: 0, or 2 if something was asked that cannot be done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        if "--traceback" in argv:
            raise
        print(f"dinokit: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dinokit: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
