"""The tensors of any readable file in a backbone that is there already, of another image size perhaps."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dinokit.models import Backbone
from dinokit.models.vit import Config, interpolate_grid
from dinokit.weights.coverage import Coverage, compare, first
from dinokit.weights.reader import read, shapes


def fill(
    backbone: Backbone, source: str | Path, *, tolerate: Sequence[str] = (), heads: int | None = None
) -> Coverage:
    """Put the tensors of a file into a backbone, in place, wherever it is and whatever its mode.

    The positional embedding is resampled to the backbone's grid by the rule of the file's own backbone, so
    that the filled one says of an image of its size what that one would have said.

    Args:
        backbone: of the same architecture as the file's, but for its image size.
        source: a file, or a folder of a run, of Hugging Face or of timm.
        tolerate: names, or patterns such as 'blocks.*.gamma', that may be missing in the file (the backbone
            keeps its own) or left over in it. DINO's and timm's files have no 'mask_token'.
        heads: how many attention heads the file's backbone has, if it does not say.

    Returns:
        What was filled, what was not.

    Raises:
        LookupError: if there is no such file.
        ValueError: if the file is not readable, or anything that is not tolerated does not fit; then the
            backbone is as it was.
    """
    assert isinstance(backbone, nn.Module)
    file, found = read(source, heads=heads)
    own = backbone.state_dict()
    tensors, resampled = dict(found.tensors), ""
    if found.section.get("name") == "vit" and "pos_embed" in tensors and "pos_embed" in own:
        config = Config(**{key: value for key, value in found.section.items() if key != "name"})
        tensors["pos_embed"], resampled = _resample(tensors["pos_embed"], own["pos_embed"], config)
    done = compare(shapes(own), shapes(tensors))
    done.resampled = resampled
    problems = done.problems(tolerate)
    theirs, ours = found.section.get("heads"), _heads(backbone)
    if theirs and ours and theirs != ours:
        problems.append(f"heads: asked for {ours}, found {theirs}")
    if problems:
        raise ValueError(
            f"{file.path} ({found.format}) does not fit the backbone to fill: {first(problems)}. Make the "
            f"backbone like the file's, which dinokit models identify {file.path} describes, or name in "
            f"`tolerate` what may be missing or left over."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)
    return done


def _resample(position: Tensor, like: Tensor, config: Config) -> tuple[Tensor, str]:
    """A positional embedding (1, 1 + M * M, D) for the grid of `like`, and what was done, in words."""
    side, new = (round((x.shape[1] - 1) ** 0.5) for x in (position, like))
    if side == new or new**2 != like.shape[1] - 1:
        return position, ""
    grid = position[:, 1:].unflatten(1, (side, side))
    grid = interpolate_grid(grid, new, new, config.pos_offset, config.pos_antialias)
    whole = torch.cat([position[:, :1].float(), grid.flatten(1, 2)], dim=1)
    return whole, f"pos_embed resampled from {side} x {side} to {new} x {new}"


def _heads(backbone: nn.Module) -> int | None:
    block = next(iter(getattr(backbone, "blocks", [])), None)
    heads = getattr(getattr(block, "attn", None), "heads", None)
    return heads if isinstance(heads, int) else None
