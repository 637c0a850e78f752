"""What a run begins with: a model, and weights that are there already, put into it before the first step.

Only a run's first step reads the file of weights. What it gave is kept in the run as `start.safetensors`, so
the run goes on, and can be compared with its beginning, whatever becomes of the file.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from dinokit.config.load import Recipe, load_recipe, to_yaml
from dinokit.features import fingerprint
from dinokit.models import Backbone
from dinokit.runtime.distributed import rank
from dinokit.train.distill import Distillation
from dinokit.train.student_teacher import StudentTeacher
from dinokit.weights import fill, save_backbone

NAME = "start.safetensors"  # of the filled backbone in the run's folder

Model = (
    StudentTeacher | Distillation
)  # each has student, average, forward(batch, ...), update_teacher(momentum)


def build_model(recipe: Recipe) -> Model:
    """What a step trains: a student with its own average as the teacher, or one with a frozen teacher."""
    return Distillation(recipe) if recipe.teacher.frozen else StudentTeacher(recipe)


def begin(recipe: Recipe, first: bool) -> tuple[Model, Recipe]:
    """The model of a run, on the CPU, with `backbone.weights` in student and average if the recipe names any.

    The positional embedding is resampled to the backbone's own grid (weights.fill); heads stay as they are.

    Args:
        recipe: of the run.
        first: whether the run has no step yet to go on from; otherwise no weights are read.

    Returns:
        The model, and the recipe with the fingerprint of what was filled in.

    Raises:
        LookupError, ValueError: as weights.fill, or if the weights are not those of the recipe's fingerprint.
    """
    model, source = build_model(recipe), recipe.backbone.get("weights")
    if not source:
        return model, recipe
    kept = _kept_fingerprint(recipe)
    if not first:
        return model, _with(recipe, kept)
    student, average = model.student.backbone, model.average.backbone
    fill(student, source, tolerate=["mask_token"])
    assert isinstance(average, nn.Module)
    assert isinstance(student, nn.Module)
    average.load_state_dict(student.state_dict())
    found = fingerprint(student)
    wanted = recipe.backbone.get("fingerprint") or kept
    if wanted and wanted != found:
        raise ValueError(
            f"backbone.weights={source} gives a backbone of fingerprint {found}, but the recipe was made for "
            f"{wanted}: the file has changed, or the crops are of another size. Find the old file, or choose "
            f"another run.out and leave backbone.fingerprint out."
        )
    return model, _with(recipe, found)


def keep_start(out: Path, recipe: Recipe, backbone: Backbone) -> None:
    """Write the backbone that a run begins with into its folder, if it was filled from weights."""
    if recipe.backbone.get("weights") and rank() == 0:
        save_backbone(out / NAME, backbone, recipe.architecture, to_yaml(recipe))


def _kept_fingerprint(recipe: Recipe) -> str:
    saved = Path(recipe.run.out) / "recipe.yaml"
    return str(load_recipe(saved).backbone.get("fingerprint", "")) if saved.exists() else ""


def _with(recipe: Recipe, found: str) -> Recipe:
    return replace(recipe, backbone={**recipe.backbone, "fingerprint": found})
