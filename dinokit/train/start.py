"""What a run begins with: weights that are there already, put into student and teacher before the first step.

Only a run's first step reads the file. What it gave is kept in the run as `start.safetensors`, so the run
goes on, and can be compared with its beginning, whatever becomes of the file.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from dinokit.config import Recipe, load_recipe, to_yaml
from dinokit.features import fingerprint
from dinokit.train import checkpoint
from dinokit.train.student_teacher import Network
from dinokit.weights import fill, save_backbone

NAME = "start.safetensors"  # of the filled backbone in the run's folder


def begins(recipe: Recipe) -> bool:
    """Whether the run in `run.out` has no step yet to go on from."""
    return checkpoint.latest(Path(recipe.run.out) / "checkpoints") is None


def fill_from_weights(recipe: Recipe, student: Network, average: Network) -> Recipe:
    """Put `backbone.weights` into the backbones of student and average, if the run begins with any.

    The positional embedding is resampled to the backbone's own grid (weights.fill); heads stay as they are.
    A run that goes on is left alone.

    Returns:
        The recipe, with the fingerprint of what was filled in.

    Raises:
        LookupError, ValueError: as weights.fill, or if the weights are not those of the recipe's fingerprint.
    """
    source = recipe.backbone.get("weights")
    if not source:
        return recipe
    kept = _kept_fingerprint(recipe)
    if not begins(recipe):
        return _with(recipe, kept)
    fill(student.backbone, source, tolerate=["mask_token"])
    assert isinstance(average.backbone, nn.Module)
    assert isinstance(student.backbone, nn.Module)
    average.backbone.load_state_dict(student.backbone.state_dict())
    found = fingerprint(student.backbone)
    wanted = recipe.backbone.get("fingerprint") or kept
    if wanted and wanted != found:
        raise ValueError(
            f"backbone.weights={source} gives a backbone of fingerprint {found}, but the recipe was made for "
            f"{wanted}: the file has changed, or the crops are of another size. Find the old file, or choose "
            f"another run.out and leave backbone.fingerprint out."
        )
    return _with(recipe, found)


def keep_start(out: Path, recipe: Recipe, student: Network) -> None:
    """Write the backbone that a run begins with into its folder, if it was filled from weights."""
    if recipe.backbone.get("weights") and begins(recipe):
        save_backbone(out / NAME, student.backbone, recipe.architecture, to_yaml(recipe))


def _kept_fingerprint(recipe: Recipe) -> str:
    saved = Path(recipe.run.out) / "recipe.yaml"
    return str(load_recipe(saved).backbone.get("fingerprint", "")) if saved.exists() else ""


def _with(recipe: Recipe, found: str) -> Recipe:
    return replace(recipe, backbone={**recipe.backbone, "fingerprint": found})
