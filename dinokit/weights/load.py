"""Loads a backbone from a file of any readable format, fills an existing one, and describes files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dinokit
from dinokit import models
from dinokit.models import Backbone, Input
from dinokit.models.vit import Config, VisionTransformer, interpolate_grid
from dinokit.weights.architecture import StoredBackbone, other_model
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint
from dinokit.weights.coverage import Coverage, Shape, compare, first
from dinokit.weights.formats import dinov2, huggingface, native, timm

READERS = (
    native.read,
    huggingface.read,
    timm.read,
    dinov2.read,
    dinov2.read_dino,
)  # at most one accepts a file


def load_backbone(source: str | Path, *, heads: int | None = None, partial: bool = False) -> Backbone:
    """The frozen backbone in a file, or in a folder, on the CPU and in eval mode.

    A file of dinokit contains the recipe section of its backbone; one of DINO, DINOv2, timm or Hugging Face
    becomes a `vit`, whose architecture is inferred from the tensors.

    Args:
        source: a file, or a folder of a run, of Hugging Face or of timm.
        heads: the number of attention heads, for a file that does not contain it.
        partial: accept missing and additional tensors; missing ones are initialised at random.

    Raises:
        LookupError: if there is no such file; it lists the weights that exist.
        ValueError: if the file has no readable format, is broken, or its tensors do not fit the backbone.
    """
    file, stored = read(source, heads=heads)
    backbone = build(file.path, stored)
    fit = coverage(backbone, stored)
    problem = refusal(file.path, stored, fit, partial)
    if problem:
        raise ValueError(problem)
    if fit.missing:
        backbone = build(file.path, stored, meta=False)
    assert isinstance(backbone, nn.Module)
    have = backbone.state_dict()
    tensors = {name: _copy(value, have[name]) for name, value in stored.tensors.items() if name in have}
    backbone.load_state_dict(tensors, strict=not fit.missing, assign=True)
    backbone.eval().requires_grad_(False)
    return backbone


def describe(source: str | Path) -> dict[str, Any]:
    """Describe a file, or the one in a folder, without reading tensors.

    Returns:
        `dinokit`, the version that wrote it, or ''; `format`, its name; `backbone`, the section of a recipe;
        `input`: size, mean, std; `recipe`, YAML or ''; `tensors`: name to shape.

    Raises:
        LookupError, ValueError: as `load_backbone`.
    """
    _, stored = read(source, values=False)
    return {
        "dinokit": stored.version,
        "format": stored.format,
        "backbone": stored.section,
        "input": asdict(stored.input),
        "recipe": stored.recipe,
        "tensors": shapes(stored.tensors),
    }


def fill(
    backbone: Backbone, source: str | Path, *, tolerate: Sequence[str] = (), heads: int | None = None
) -> Coverage:
    """Copy the tensors of a file into a backbone, in place, on any device and in any mode.

    The positional embedding is resampled to the backbone's grid by the rule of the file's own backbone: both
    backbones give the same features for images of the new size.

    Args:
        backbone: of the same architecture as the file's, except for the image size.
        source: a file, or a folder of a run, of Hugging Face or of timm.
        tolerate: names, or patterns such as 'blocks.*.gamma', that may be missing in the file (the backbone
            keeps its own) or left over in it. DINO's and timm's files have no 'mask_token'.
        heads: the number of attention heads, for a file that does not contain it.

    Returns:
        Which tensors were filled.

    Raises:
        LookupError: if there is no such file.
        ValueError: if the file is not readable, or a tensor that is not tolerated does not fit; the backbone
            is then unchanged.
    """
    assert isinstance(backbone, nn.Module)
    file, stored = read(source, heads=heads)
    own = backbone.state_dict()
    tensors, resampled = dict(stored.tensors), ""
    if stored.section.get("name") == "vit" and "pos_embed" in tensors and "pos_embed" in own:
        config = Config(**{key: value for key, value in stored.section.items() if key != "name"})
        tensors["pos_embed"], resampled = _resample(tensors["pos_embed"], own["pos_embed"], config)
    fit = compare(shapes(own), shapes(tensors))
    fit.resampled = resampled
    problems = fit.problems(tolerate)
    theirs, ours = stored.section.get("heads"), _heads(backbone)
    if theirs and ours and theirs != ours:
        problems.append(f"heads: asked for {ours}, found {theirs}")
    if problems:
        raise ValueError(
            f"{file.path} ({stored.format}) does not fit the backbone to fill: {first(problems)}. Give the "
            f"backbone the architecture of the file, which dinokit models identify {file.path} shows, or "
            f"name in `tolerate` what may be missing or left over."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)
    return fit


def read(
    source: str | Path, *, heads: int | None = None, values: bool = True
) -> tuple[Checkpoint, StoredBackbone]:
    """The content of a file, and the backbone that it was identified as.

    Args:
        source: as for load_backbone.
        heads: as for load_backbone.
        values: False leaves the tensors on the device meta, which takes no time for a file of any size.

    Raises:
        LookupError, ValueError: as load_backbone, but tensors are not compared with a backbone yet.
    """
    file = open_checkpoint(source, values)
    try:
        stored = next((found for reader in READERS if (found := reader(file, heads)) is not None), None)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be read: {error}.") from None
    if stored is None:
        some = ", ".join(list(file.tensors)[:3])
        raise ValueError(
            f"{file.path} contains no backbone that dinokit knows, but "
            f"{other_model(file.tensors) or 'something else'}: {len(file.tensors)} tensors such as {some}. "
            f"Readable are DINO and DINOv2 in their own files, in those of timm and Hugging Face, and in "
            "ours."
        )
    return file, _as_exported(file, stored, heads)


def coverage(backbone: Backbone, stored: StoredBackbone) -> Coverage:
    """How the tensors of a file fit a backbone."""
    assert isinstance(backbone, nn.Module)
    return compare(shapes(backbone.state_dict()), shapes(stored.tensors))


def shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    """Name to shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refusal(path: Path, stored: StoredBackbone, fit: Coverage, partial: bool = False) -> str:
    """Why load_backbone refuses the file; '' if it does not."""
    problems = fit.problems(["*"] if partial else [])
    if not problems:
        return ""
    what = "" if stored.version else other_model(stored.tensors)
    return (
        f"The tensors in {path} do not fit the backbone that it "
        f"{'names' if stored.version else 'seems to be'}: "
        f"{first(problems)}.{f' It looks like {what}.' if what else ''}"
        f"{'' if fit.misshapen else ' With partial=True it is loaded as far as possible.'}"
    )


def build(path: Path, stored: StoredBackbone, meta: bool = True) -> Backbone:
    """The backbone of a file, without its values; a vit on the device meta, others initialised at random.

    Raises:
        LookupError, ValueError: if it cannot be built.
    """
    section = dict(stored.section)
    name = str(section.pop("name", ""))
    if not all(part.isidentifier() for part in name.split(".")):  # never the path of a file that would be run
        raise ValueError(f"The header of {path} names the backbone '{name}', which is no name of a backbone.")
    try:
        backbone = _vit(section, meta) if name == "vit" else _from_registry(name, section)
    except (LookupError, TypeError, ValueError) as error:
        old, new = stored.version, dinokit.__version__
        by = f", written by dinokit {old}," if old else ""
        text = f"{path}{by} cannot be rebuilt by dinokit {new}: {error}"
        raise (LookupError if isinstance(error, LookupError) else ValueError)(text) from None
    channels = len(stored.input.mean), len(stored.input.std)
    if channels != (backbone.channels,) * 2:
        raise ValueError(
            f"The header of {path} is damaged: `input` has {channels[0]} means and {channels[1]} deviations, "
            f"but the backbone takes {backbone.channels} channels."
        )
    backbone.input = stored.input
    return backbone


def _vit(section: dict[str, Any], meta: bool) -> Backbone:
    with torch.device(
        "meta" if meta else "cpu"
    ):  # values that will be replaced are not drawn: seconds for ViT-g
        return VisionTransformer(Config(**section))


def _from_registry(name: str, section: dict[str, Any]) -> Backbone:
    from dinokit.config.load import (
        section_values,  # needs omegaconf, which readers of released files may lack
    )

    values = section_values("models", name, section, "backbone")  # JSON has made its tuples lists
    return models.build({"name": name, **values})


def _copy(value: Tensor, like: Tensor) -> Tensor:
    """A copy in memory: a memory-mapped tensor would change with the file."""
    return value.to(like.dtype, copy=True).contiguous()


def _as_exported(file: Checkpoint, stored: StoredBackbone, heads: int | None) -> StoredBackbone:
    """Adds what our writers put into the metadata of other formats, which have no place for it."""
    if "dinokit_backbone" not in file.metadata:
        return stored
    try:
        section = dict(json.loads(file.metadata["dinokit_backbone"]))
        trained_with = json.loads(file.metadata["dinokit_input"])
        added = {key: section[key] for key in ("heads", "pos_offset", "pos_antialias")}
        mean, std = (tuple(map(float, trained_with[key])) for key in ("mean", "std"))
        shown = Input(int(trained_with["size"]), mean, std)
    except (KeyError, TypeError, ValueError) as error:
        text = f"The header of {file.path} is damaged: {error!r}. Copy or download it again."
        raise ValueError(text) from None
    if heads:
        added["heads"] = heads
    return replace(stored, section={**stored.section, **added}, input=shown, notes=[])


def _resample(position: Tensor, like: Tensor, config: Config) -> tuple[Tensor, str]:
    """A positional embedding (1, 1 + M * M, D) for the grid of `like`, and a description of the change."""
    side, new = (round((x.shape[1] - 1) ** 0.5) for x in (position, like))
    if side == new or new**2 != like.shape[1] - 1:
        return position, ""
    grid = position[:, 1:].unflatten(1, (side, side))
    grid = interpolate_grid(grid, new, new, config.pos_offset, config.pos_antialias)
    resampled = torch.cat([position[:, :1].float(), grid.flatten(1, 2)], dim=1)
    return resampled, f"pos_embed resampled from {side} x {side} to {new} x {new}"


def _heads(backbone: nn.Module) -> int | None:
    block = next(iter(getattr(backbone, "blocks", [])), None)
    heads = getattr(getattr(block, "attn", None), "heads", None)
    return heads if isinstance(heads, int) else None
