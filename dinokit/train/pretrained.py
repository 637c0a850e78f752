"""Weights from files that a run starts from.

`backbone.weights` fills the student's backbone, `teacher.start` its heads too (the next stage of training),
`teacher.gram.weights` the Gram teacher. Only a run's first step reads them: later its checkpoints have them.
The backbone filled by `backbone.weights` is saved as start.safetensors, to compare the run with its start.
"""

from dataclasses import replace
from pathlib import Path

from dinokit.config.load import Recipe, load_recipe, to_yaml
from dinokit.features.tokens import fingerprint
from dinokit.models import Backbone
from dinokit.runtime.distributed import rank
from dinokit.train import checkpoint
from dinokit.train.networks import read_network
from dinokit.train.student_teacher import NOT_AVERAGED, StudentTeacher
from dinokit.weights import fill, save_backbone

START = "start.safetensors"  # in the run's folder


def init_weights(recipe: Recipe, model: StudentTeacher, resumes: bool) -> Recipe:
    """Fill student, EMA and Gram teacher from what the recipe names, before the first step.

    From `backbone.weights`, the positional embedding is resampled to the backbone's own grid (weights.fill);
    heads stay as they are.

    Args:
        recipe: of the run; names backbone.weights, teacher.start or teacher.gram.
        model: new, on the CPU.
        resumes: whether the run has a checkpoint; then no weights are read.

    Returns:
        The recipe with the fingerprint of the filled backbone.

    Raises:
        LookupError, ValueError: as weights.fill, or if the weights are not those of the recipe's fingerprint.
    """
    if not resumes:
        if recipe.teacher.start:
            _start_from_run(recipe, model)
        if recipe.teacher.gram is not None and recipe.teacher.gram.weights:
            gram = model.gram_teacher.backbone
            fill(gram, recipe.teacher.gram.weights, tolerate=["mask_token"])
            model.ema.backbone.licence = model.ema.backbone.licence or gram.licence
    if not recipe.backbone.get("weights"):
        return recipe
    source = recipe.backbone["weights"]
    saved = Path(recipe.run.out) / "recipe.yaml"
    recorded = str(load_recipe(saved, of_run=True).backbone.get("fingerprint", "")) if saved.exists() else ""
    student, ema = model.student.backbone, model.ema.backbone
    if resumes:
        return _with_fingerprint(recipe, recorded)
    fill(student, source, tolerate=["mask_token"])
    ema.licence = student.licence or ema.licence  # of the weights: it holds for what is trained from them
    ema.load_state_dict(student.state_dict())
    filled = fingerprint(student)
    expected = recipe.backbone.get("fingerprint") or recorded
    if expected and expected != filled:
        raise ValueError(
            f"backbone.weights={source} gives a backbone of fingerprint {filled}, but the recipe was made "
            f"for {expected}: the file has changed, or the crops are of another size. Find the old file, or "
            f"choose another run.out and give backbone.fingerprint=null."
        )
    return _with_fingerprint(recipe, filled)


def save_start(out: Path, recipe: Recipe, backbone: Backbone) -> None:
    """Write the filled backbone, before the first step, into the run's folder."""
    if rank() == 0:
        save_backbone(out / START, backbone, recipe.architecture, to_yaml(recipe))


def _start_from_run(recipe: Recipe, model: StudentTeacher) -> None:
    """Student and EMA, with their heads, become the moving average of the run in `teacher.start`."""
    source = Path(recipe.teacher.start)
    latest = checkpoint.latest(source / "checkpoints") if source.is_dir() else None
    if latest is None:
        raise LookupError(
            f"teacher.start={source} is no folder of a run with a checkpoint, which has the heads: give such "
            "a run, or for a file of a backbone alone backbone.weights=FILE."
        )
    start = read_network(source, latest)
    state, model.ema.backbone.licence = start.state_dict(), start.backbone.licence
    for network in (model.student, model.ema):
        own = network.state_dict()
        wrong = [n for n in state if n not in own or own[n].shape != state[n].shape]
        wrong += [n for n in own if n not in state and not n.startswith(NOT_AVERAGED)]
        if wrong:
            raise ValueError(
                f"teacher.start={source} has another architecture than this recipe: {len(wrong)} tensors "
                f"differ, such as {wrong[0]}. Take backbone and heads of {source / 'recipe.yaml'}."
            )
        network.load_state_dict(state, strict=False)


def _with_fingerprint(recipe: Recipe, value: str) -> Recipe:
    return replace(recipe, backbone={**recipe.backbone, "fingerprint": value})
