"""dinokit train RECIPE [key=value ...]: train a backbone, or resume the run in run.out.

RECIPE is a name in configs/ or the path of a YAML file. The same command resumes an interrupted run.

dinokit train scenes_cpu data.name=folder data.path=PHOTOS
dinokit train small_photos data.path=PHOTOS run.out=runs/photos
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinokit import evaluation
from dinokit.commands import Command
from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe

if TYPE_CHECKING:
    from dinokit.data.sources import ImageSource
    from dinokit.train.trainer import Evaluator

MULTI_PROCESS = RESUMES = True


def run(command: Command) -> None:
    word = command.one_word("recipe", registry.recipe_names())
    recipe = load_recipe(word, command.settings, evaluation.architecture)
    pretrain(recipe)


def describe(words: Sequence[str]) -> str:
    names = ", ".join(registry.recipe_names())
    return f"recipes: {names}\ndinokit show RECIPE prints every key with its value"


def pretrain(recipe: Recipe) -> str:
    """Train a recipe on its data with its evaluators. Returns the run's folder."""
    from dinokit.train import trainer

    source = registry.build("data.sources", recipe.data)
    return str(trainer.train(recipe, source, _evaluators(recipe, source)))


def _evaluators(recipe: Recipe, source: "ImageSource") -> list["Evaluator"]:
    from functools import partial

    from dinokit.runtime.distributed import launch
    from dinokit.train.trainer import Evaluator

    evaluators = []
    for name, section in recipe.evals.items():
        values = {key: value for key, value in section.items() if key != "every"}
        sources = evaluation.source_fields(name)
        unlabelled = evaluation.needs_labels(name) and not source.classes
        if any(values[key] is None for key in sources) and unlabelled:
            text = (
                f"evals.{name} is off: data.name={recipe.data['name']} gives no labels here. To evaluate "
                f"the run, give {' and '.join(f'evals.{name}.{key}.path' for key in sources)}."
            )
            if launch().rank == 0:
                print(text, file=sys.stderr)
            continue
        values = evaluation.with_data(name, values, recipe.data)
        if "max_unreadable" in values:  # an evaluator allows what the run allows
            values["max_unreadable"] = max(values["max_unreadable"], recipe.run.max_unreadable)
        if recipe.backbone.get("weights"):
            values = evaluation.with_initial_weights(name, values, f"{recipe.run.out}/start.safetensors")
        evaluators.append(Evaluator(name, section["every"], partial(evaluation.run_evaluator, name, values)))
    return evaluators
