"""From a file of any readable format to a backbone: which format it is, which backbone, and how much fits."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dinokit
from dinokit.config import registry
from dinokit.models import Backbone, Input
from dinokit.models.vit import Config, VisionTransformer
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint
from dinokit.weights.coverage import Coverage, Shape, compare, first
from dinokit.weights.formats import dino, dinov2, huggingface, native, timm
from dinokit.weights.found import Found
from dinokit.weights.strangers import family

FORMATS = (native, huggingface, timm, dinov2, dino)  # no file is of two


def load_backbone(source: str | Path, *, heads: int | None = None, partial: bool = False) -> Backbone:
    """The frozen backbone in a file, or in a folder, on the CPU and in eval mode.

    A file of ours names its backbone as a recipe does; one of DINO, DINOv2, timm or Hugging Face is a `vit`,
    whose architecture is read off the tensors.

    Args:
        source: a file, or a folder of a run, of Hugging Face or of timm.
        heads: how many attention heads there are, for a file that does not say.
        partial: take a file that lacks tensors, or has others besides; what is lacking is drawn at random.

    Raises:
        LookupError: if there is no such file; it lists what there is.
        ValueError: if the file is of no readable format, is broken, or its tensors do not fit the backbone.
    """
    file, found = read(source, heads=heads)
    backbone = build(file.path, found)
    done = coverage(backbone, found)
    problem = refusal(file.path, found, done, partial)
    if problem:
        raise ValueError(problem)
    if done.missing:
        backbone = build(file.path, found, meta=False)
    assert isinstance(backbone, nn.Module)
    have = backbone.state_dict()
    tensors = {name: _own(value, have[name]) for name, value in found.tensors.items() if name in have}
    backbone.load_state_dict(tensors, strict=not done.missing, assign=True)
    backbone.eval().requires_grad_(False)
    return backbone


def read(source: str | Path, *, heads: int | None = None, values: bool = True) -> tuple[Checkpoint, Found]:
    """What is in a file.

    Args:
        source: as for load_backbone.
        heads: as for load_backbone.
        values: False leaves the tensors on the device meta, which takes no time, however large the file.

    Raises:
        LookupError, ValueError: as load_backbone, but nothing has been compared with a backbone yet.
    """
    file = open_checkpoint(source, values)
    try:
        found = next((done for form in FORMATS if (done := form.read(file, heads)) is not None), None)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be read: {error}.") from None
    if found is None:
        what = family(file.tensors)
        some = ", ".join(list(file.tensors)[:3])
        raise ValueError(
            f"{file.path} holds no backbone that dinokit knows, but {what or 'something else'}: "
            f"{len(file.tensors)} tensors such as {some}. Readable are DINO and DINOv2 in their own files, "
            f"in those of timm and Hugging Face, and in ours."
        )
    return file, _as_exported(file, found, heads)


def coverage(backbone: Backbone, found: Found) -> Coverage:
    """How the tensors that were found fit a backbone."""
    assert isinstance(backbone, nn.Module)
    return compare(shapes(backbone.state_dict()), shapes(found.tensors))


def describe(source: str | Path) -> dict[str, Any]:
    """What a file, or the one in a folder, holds; no tensor is read.

    Returns:
        `dinokit`, the version that wrote it, or ''; `format`, in words; `backbone`, the recipe's section;
        `input`: size, mean, std; `recipe`, YAML or ''; `tensors`: name to shape.

    Raises:
        LookupError, ValueError: as `load_backbone`.
    """
    _, found = read(source, values=False)
    return {
        "dinokit": found.version,
        "format": found.format,
        "backbone": found.section,
        "input": asdict(found.input),
        "recipe": found.recipe,
        "tensors": shapes(found.tensors),
    }


def shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    """Name to shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refusal(path: Path, found: Found, done: Coverage, partial: bool = False) -> str:
    """Why load_backbone does not take the file, in words; empty if it does."""
    problems = done.problems(["*"] if partial else [])
    if not problems:
        return ""
    holds = "names" if found.version else "seems to hold"
    what = "" if found.version else family(found.tensors)
    return (
        f"The tensors in {path} do not fit the backbone that it {holds}: {first(problems)}."
        f"{f' It looks like {what}.' if what else ''}"
        f"{'' if done.misshapen else ' With partial=True it is loaded as far as it goes.'}"
    )


def build(path: Path, found: Found, meta: bool = True) -> Backbone:
    """The backbone that was found, without its values; a vit on the device meta, or else drawn at random.

    Raises:
        LookupError, ValueError: if it cannot be built.
    """
    section = dict(found.section)
    name = str(section.pop("name", ""))
    if not all(part.isidentifier() for part in name.split(".")):  # never the path of a file that would be run
        raise ValueError(f"The header of {path} names the backbone '{name}', which is no name of a backbone.")
    try:
        backbone = _vit(section, meta) if name == "vit" else _of_a_shelf(name, section)
    except (LookupError, TypeError, ValueError) as error:
        old, new = found.version, dinokit.__version__
        by = f", written by dinokit {old}," if old else ""
        text = f"{path}{by} cannot be rebuilt by dinokit {new}: {error}"
        raise (LookupError if isinstance(error, LookupError) else ValueError)(text) from None
    channels = len(found.input.mean), len(found.input.std)
    if channels != (backbone.channels,) * 2:
        raise ValueError(
            f"The header of {path} is damaged: `input` has {channels[0]} means and {channels[1]} deviations, "
            f"but the backbone takes {backbone.channels} channels."
        )
    backbone.input = found.input
    return backbone


def _vit(section: dict[str, Any], meta: bool) -> Backbone:
    with torch.device("meta" if meta else "cpu"):  # what will be overwritten is not drawn: seconds for ViT-g
        return VisionTransformer(Config(**section))


def _of_a_shelf(name: str, section: dict[str, Any]) -> Backbone:
    from dinokit.config.load import (
        section_values,  # needs omegaconf, which readers of released files may lack
    )

    values = section_values("models", name, section, "backbone")  # its tuples left JSON as lists
    backbone: Backbone = registry.build("models", {"name": name, **values})
    return backbone


def _own(value: Tensor, like: Tensor) -> Tensor:
    """A copy: what a file is mapped into would change with the file."""
    return value.to(like.dtype, copy=True).contiguous()


def _as_exported(file: Checkpoint, found: Found, heads: int | None) -> Found:
    """What our writers leave in the metadata of other formats, which those cannot say themselves."""
    if "dinokit_backbone" not in file.metadata:
        return found
    try:
        section = dict(json.loads(file.metadata["dinokit_backbone"]))
        shown = json.loads(file.metadata["dinokit_input"])
        kept = {key: section[key] for key in ("heads", "pos_offset", "pos_antialias")}
        about = Input(int(shown["size"]), tuple(map(float, shown["mean"])), tuple(map(float, shown["std"])))
    except (KeyError, TypeError, ValueError) as error:
        text = f"The header of {file.path} is damaged: {error!r}. Copy or download it again."
        raise ValueError(text) from None
    if heads:
        kept["heads"] = heads
    return replace(found, section={**found.section, **kept}, input=about, notes=[])
