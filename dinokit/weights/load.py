"""Loads a backbone from a file of any readable format, fills an existing one, and describes files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinokit
from dinokit import models
from dinokit.config import registry
from dinokit.models import Backbone, Input
from dinokit.models import dinov3 as dinov3_model
from dinokit.models.vit import Config, VisionTransformer, interpolate_grid
from dinokit.weights.architecture import StoredBackbone, other_model
from dinokit.weights.checkpoint import Checkpoint, open_checkpoint
from dinokit.weights.formats import (
    dinov2,
    dinov3,
    huggingface,
    huggingface_dinov3,
    native,
    timm,
    timm_any,
    timm_convnext,
    timm_dinov3,
)

# The first that accepts a file.
READERS = (
    native.read, huggingface_dinov3.read, huggingface.read, dinov3.read, timm.read, dinov2.read,
    timm_dinov3.read, timm_convnext.read, timm_any.read,
)  # fmt: skip

# Backbones whose state_dict() is all that they have: values that will be replaced are not drawn, which takes
# seconds for ViT-g, and what a damaged header names does not fill the memory before it is compared.
ON_META = ("vit", "dinov3", "timm_vit", "timm_convnext")

Shape = tuple[int, ...]


@dataclass
class Coverage:
    """Which tensors of a backbone a file fills, by names and shapes."""

    total: int  # tensors of the backbone
    missing: dict[str, Shape]  # in the backbone, not in the file
    left_over: dict[str, Shape]  # in the file, not in the backbone
    misshapen: dict[str, tuple[Shape, Shape]]  # in the backbone, in the file
    resampled: str = ""  # what was changed in the positional embedding

    @property
    def complete(self) -> bool:
        """Whether all tensors match."""
        return not (self.missing or self.left_over or self.misshapen)

    def __str__(self) -> str:
        parts = [f"{self.total - len(self.missing) - len(self.misshapen)} of {self.total} tensors"]
        if self.complete:
            parts.append("nothing missing, nothing left over")
        kinds: dict[str, Mapping[str, object]] = {
            "missing": self.missing,
            "left over": self.left_over,
            "of another shape": self.misshapen,
        }
        parts += [f"{len(names)} {what}: {_first(names, 6, ', ')}" for what, names in kinds.items() if names]
        return "; ".join([*parts, self.resampled] if self.resampled else parts)

    def problems(self, tolerate: Sequence[str] = ()) -> list[str]:
        """Tensors that do not match, with both shapes, without the tolerated names.

        Names may be patterns such as '*.gamma'. A different shape is never tolerated.
        """
        absent = {name: f"asked for {shape}, absent" for name, shape in self.missing.items()}
        absent |= {name: f"not asked for, found {shape}" for name, shape in self.left_over.items()}
        problems = [
            f"{name}: {text}"
            for name, text in absent.items()
            if not any(fnmatch(name, pattern) for pattern in tolerate)
        ]
        return problems + [f"{name}: asked for {a}, found {b}" for name, (a, b) in self.misshapen.items()]


def load_backbone(
    source: str | Path, *, heads: int | None = None, partial: bool = False, trust: Sequence[str] = (),
    stored_periods: bool = False,
) -> Backbone:  # fmt: skip
    """The frozen backbone in a file, or in a folder, on the CPU and in eval mode.

    A file of dinokit contains the recipe section of its backbone; one of DINO, DINOv2, timm or Hugging Face
    becomes a `vit`, one of DINOv3 a `dinov3` or `timm_convnext`, whose architecture is inferred from the
    tensors. A folder of any other model of timm becomes a `timm_any`.

    Args:
        source: a file, or a folder of a run, of Hugging Face or of timm.
        heads: the number of attention heads, for a file that does not contain it.
        partial: accept missing and additional tensors; missing ones are initialised at random.
        trust: packages whose modules the file may name as its backbone; they are imported.
        stored_periods: take the periods of DINOv3's rotary positions as its own file has them, as its own
            code does; else they are computed in float32, as in timm and transformers.

    Raises:
        LookupError: if there is no such file; it lists the weights that exist.
        ValueError: if the file has no readable format, is broken, or its tensors do not fit the backbone,
            or it has no periods of its own.
    """
    registry.trust(*trust)
    file, stored = read(source, heads=heads)
    if stored_periods:
        if not stored.alternatives:
            raise ValueError(
                f"stored_periods=True, but {file.path} ({stored.format}) has no periods of rotary positions "
                f"other than those that dinokit computes. Leave it out; it is for DINOv3's own files."
            )
        stored.tensors.update({name: value.float() for name, value in stored.alternatives.items()})
    backbone = build(file.path, stored)
    fit = coverage(backbone, stored.tensors)
    problem = refusal(file.path, stored, fit, partial)
    if problem:
        raise ValueError(problem)
    if fit.missing:
        backbone = build(file.path, stored, meta=False)
    have = backbone.state_dict()
    tensors = {name: _copy(value, have[name]) for name, value in stored.tensors.items() if name in have}
    backbone.load_state_dict(tensors, strict=not fit.missing, assign=True)
    backbone.licence = stored.licence
    return backbone.eval().requires_grad_(False)


def describe(source: str | Path, *, heads: int | None = None) -> dict[str, Any]:
    """Describe a file, or the one in a folder, without reading tensors. `heads` is as for load_backbone.

    Returns:
        `dinokit`, the version that wrote it, or ''; `format`, its name; `backbone`, the section of a recipe;
        `input`: size, mean, std; `recipe`, YAML or ''; `tensors`: name to shape.

    Raises:
        LookupError, ValueError: as `load_backbone`.
    """
    _, stored = read(source, heads=heads, values=False)
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
    if type(backbone).__name__ == "TimmAny":  # not imported: it needs timm
        file, stored = _as_timm(source, backbone)
    else:
        file, stored = read(source, heads=heads)
    own = backbone.state_dict()
    tensors, resampled = dict(stored.tensors), ""
    if stored.section.get("name") == "vit" and "pos_embed" in tensors and "pos_embed" in own:
        config = Config(**{key: value for key, value in stored.section.items() if key != "name"})
        tensors["pos_embed"], resampled = _resample(tensors["pos_embed"], own["pos_embed"], config)
    fit = replace(coverage(backbone, tensors), resampled=resampled)
    problems = fit.problems(tolerate)
    theirs = stored.section.get("heads")
    if isinstance(backbone, VisionTransformer | dinov3_model.DINOv3) and theirs and theirs != backbone.heads:
        problems.append(f"heads: asked for {backbone.heads}, found {theirs}")
    if problems:
        raise ValueError(
            f"{file.path} ({stored.format}) does not fit the backbone to fill: {_first(problems)}. Give the "
            f"backbone the architecture of the file, which dinokit models identify {file.path} shows, or "
            f"name in `tolerate` what may be missing or left over."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)
    backbone.licence = stored.licence
    return fit


def build_section(section: Mapping[str, Any]) -> Backbone:
    """The backbone that a section `backbone` describes, filled from the files that it names.

    A section with `weights` and no `name` is the backbone in that file. With both, the mean and deviation of
    images are those of the file, and their size too where the section has none. Those of a `joined` may have
    weights each.

    Raises:
        LookupError, ValueError: if a backbone or a file does not exist, or they do not fit each other.
    """
    from dinokit.config.load import section_values

    name, weights = section.get("name"), section.get("weights")
    if name is None and weights:
        if more := ", ".join(f"backbone.{key}" for key in section if key not in ("name", "weights")):
            raise ValueError(
                f"{more}: without backbone.name, the backbone is the one of weights={weights}, as its file "
                f"has it. Remove it, or give backbone.name too."
            )
        return load_backbone(weights)
    if name is None:
        raise ValueError(f"backbone.name must be given; there is: {', '.join(registry.names('models'))}.")
    if "weights" in {item.name for item in fields(registry.read_config("models", name))}:
        weights = None  # it reads its own
    rest = {key: each for key, each in section.items() if key != "name" and (key != "weights" or not weights)}
    values = {"name": name, **section_values("models", name, rest, "backbone")}
    if name == "joined":
        from dinokit.models.joined import Joined

        if weights:
            raise ValueError("backbone.weights: those of a joined are given in each of backbone.of.")
        backbone: Backbone = Joined([build_section(each) for each in values["of"]])
    else:
        backbone = models.build(values)
    if weights:
        fill(backbone, weights, tolerate=["mask_token"])
        shown = _input(weights, backbone)
        backbone.input = replace(shown, size=backbone.input.size) if section.get("size") else shown
    return backbone.eval().requires_grad_(False)


def _input(source: str | Path, backbone: Backbone) -> Input:
    """The images of a file that the backbone has been filled from."""
    if type(backbone).__name__ == "TimmAny":
        return timm_any.input_of(open_checkpoint(source, False), backbone.input)
    file, stored = read(source, values=False)
    _check_channels(file.path, stored, backbone)
    return stored.input


def _as_timm(source: str | Path, backbone: Any) -> tuple[Checkpoint, StoredBackbone]:
    """A file of timm that need not say its model, which is that of the backbone to fill."""
    file = open_checkpoint(source)
    section = {"name": "timm_any", "model": backbone.model, **backbone.settings}
    try:
        timm_any.check_same(file, backbone.model, backbone.settings["args"], backbone.input)
        return file, timm_any.fitted(file, section)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be read: {error}.") from None


def read(
    source: str | Path, *, heads: int | None = None, values: bool = True
) -> tuple[Checkpoint, StoredBackbone]:
    """The content of a file, and the backbone that it was identified as.

    Args:
        source: a file or a folder.
        heads: as for load_backbone.
        values: False leaves the tensors on the device meta, which takes no time for a file of any size.

    Raises:
        LookupError, ValueError: as load_backbone, but tensors are not compared with a backbone yet.
    """
    file = open_checkpoint(source, values)
    try:
        stored = next((found for reader in READERS if (found := reader(file, heads)) is not None), None)
        if stored is not None and "dinokit_backbone" in file.metadata:
            stored = native.add_metadata(stored, file.metadata, heads)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be read: {error}.") from None
    if stored is None:
        some = ", ".join(list(file.tensors)[:3])
        raise ValueError(
            f"{file.path} contains no backbone that dinokit knows, but "
            f"{other_model(file.tensors) or 'something else'}: {len(file.tensors)} tensors such as {some}. "
            f"Readable are DINO, DINOv2 and DINOv3 in their own files, in those of timm and Hugging Face, "
            "and in ours."
        )
    return file, stored


def coverage(backbone: Backbone, tensors: dict[str, Tensor]) -> Coverage:
    """How the tensors of a file fit a backbone."""
    want, have = shapes(backbone.state_dict()), shapes(tensors)
    return Coverage(
        len(want),
        {name: shape for name, shape in want.items() if name not in have},
        {name: shape for name, shape in have.items() if name not in want},
        {name: (shape, have[name]) for name, shape in want.items() if have.get(name, shape) != shape},
    )


def shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    """Name to shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _first(names: Iterable[str], count: int = 5, separator: str = "; ") -> str:
    """The first few, and the number of the others."""
    names = list(names)
    more = [f"and {len(names) - count} more"] if len(names) > count else []
    return separator.join([*names[:count], *more])


def refusal(path: Path, stored: StoredBackbone, fit: Coverage, partial: bool = False) -> str:
    """Why load_backbone refuses the file; '' if it does not."""
    problems = fit.problems(["*"] if partial else [])
    if not problems:
        return ""
    what = "" if stored.version else other_model(stored.tensors)
    return (
        f"The tensors in {path} do not fit the backbone that it "
        f"{'names' if stored.version else 'seems to be'}: "
        f"{_first(problems)}.{f' It looks like {what}.' if what else ''}"
        f"{'' if fit.misshapen else ' With partial=True it is loaded as far as possible.'}"
    )


def build(path: Path, stored: StoredBackbone, meta: bool = True) -> Backbone:
    """The backbone of a file, without its values: those in ON_META on the device meta, others initialised.

    Raises:
        LookupError, ValueError: if it cannot be built.
    """
    section = dict(stored.section)
    name = str(section.pop("name", ""))
    if not all(part.isidentifier() for part in name.split(".")):  # never the path of a file that would be run
        raise ValueError(f"The header of {path} names the backbone '{name}', which is no name of a backbone.")
    registry.check_from_file(stored.section, path, "other weights")
    limits = {"depth": (len(stored.tensors), "tensors"), "channels": (len(stored.input.mean), "means")}
    for key, (most, what) in limits.items():  # building more could take hours, or all memory
        if isinstance(section.get(key), int) and section[key] > most:
            raise ValueError(
                f"The header of {path} is damaged: it has {key}={section[key]}, and the file has {most} "
                f"{what}."
            )
    try:
        with torch.device("meta" if meta and name in ON_META else "cpu"):
            if name == "vit":
                backbone: Backbone = VisionTransformer(Config(**section))
            elif name == "dinov3":
                backbone = dinov3_model.DINOv3(dinov3_model.Config(**section))
            else:
                # It needs omegaconf, which users of torch.hub may lack.
                from dinokit.config.load import section_values

                values = section_values("models", name, section, "backbone")  # JSON has made its tuples lists
                backbone = models.build({"name": name, **values})
    except (LookupError, TypeError, ValueError) as error:
        old, new = stored.version, dinokit.__version__
        by = f", written by dinokit {old}," if old else ""
        text = f"{path}{by} cannot be rebuilt by dinokit {new}: {error}"
        raise (LookupError if isinstance(error, LookupError) else ValueError)(text) from None
    _check_channels(path, stored, backbone)
    backbone.input = stored.input
    return backbone


def _check_channels(path: Path, stored: StoredBackbone, backbone: Backbone) -> None:
    channels = len(stored.input.mean), len(stored.input.std)
    if channels != (backbone.channels,) * 2:
        raise ValueError(
            f"The header of {path} is damaged: `input` has {channels[0]} means and {channels[1]} deviations, "
            f"but the backbone takes {backbone.channels} channels."
        )


def _copy(value: Tensor, like: Tensor) -> Tensor:
    """A copy in memory: a memory-mapped tensor would change with the file."""
    return value.to(like.dtype, copy=True).contiguous()


def _resample(position: Tensor, like: Tensor, config: Config) -> tuple[Tensor, str]:
    """A positional embedding (1, 1 + M * M, D) for the grid of `like`, and a description of the change."""
    side, new = (round((x.shape[1] - 1) ** 0.5) for x in (position, like))
    if side == new or new**2 != like.shape[1] - 1:
        return position, ""
    grid = position[:, 1:].unflatten(1, (side, side))
    grid = interpolate_grid(grid, new, new, config.pos_offset, config.pos_antialias)
    resampled = torch.cat([position[:, :1].float(), grid.flatten(1, 2)], dim=1)
    return resampled, f"pos_embed resampled from {side} x {side} to {new} x {new}"
