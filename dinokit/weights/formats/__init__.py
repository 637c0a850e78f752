"""Formats of weights, one file each: those of other projects and ours. export() writes one and compares it.

A format that can be read defines

    read(file: Checkpoint, heads: int | None) -> StoredBackbone | None

It returns None if the file has another format. If the file has this format but its architecture cannot be
inferred, it raises ValueError with the second half of a sentence that starts with the name of the file.

One that can be written defines

    write(backbone, out: Path, size: int | None) -> Exported

for the backbones that WRITERS names.

It writes to `out`, which does not exist, and opens the result with the library of the format. `size` is for
ONNX: the pixels of the images, or None for any multiple of the patch. It raises RuntimeError if a library is
not installed.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinokit.models import Backbone
from dinokit.models.vit import ConvStem, VisionTransformer
from dinokit.runtime.files import aside, remove
from dinokit.weights.architecture import infer_config

if TYPE_CHECKING:
    from PIL import Image  # not needed to load a backbone

# By the kind of backbone, and the word for people: the file here that writes it.
WRITERS = {
    "VisionTransformer": {"timm": "timm", "hf": "huggingface", "dinov2": "dinov2", "onnx": "onnx"},
    "TimmViT": {"timm": "timm", "onnx": "onnx"},
    "DINOv3": {"timm": "timm_dinov3", "hf": "huggingface_dinov3", "dinov3": "dinov3", "onnx": "onnx"},
    "TimmConvNeXt": {"timm": "timm_convnext", "hf": "huggingface_convnext"},
}
SAME_IMAGE = 0.999  # cosine of class tokens, where two libraries prepare an image alike
TOLERANCE = 1e-4  # of a difference, relative to the largest value: another order of float32 sums


@dataclass
class Exported:
    """A backbone in another format, opened again by the library of that format."""

    command: str  # code that opens the file, which is called PATH in it
    # (b, C, h, w) -> class tokens (b, D), patches (b, N, D)
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    every_size: bool = False  # whether features must be equal where positions are resampled too
    prepare: Callable[["Image.Image"], Tensor] | None = None  # that library's own preprocessing: (C, s, s)
    notes: list[str] = field(default_factory=list)  # sentences: what the format has no place for


def section_of(vit: Any) -> dict[str, object]:
    """The section `backbone` of a recipe that builds this vit, dinov3 or timm_convnext."""
    if not isinstance(vit, VisionTransformer):
        name = "dinov3" if type(vit).__name__ == "DINOv3" else "timm_convnext"
        return {"name": name, **asdict(vit.config)}
    config, _ = infer_config(vit.state_dict(), vit.heads)
    config.pos_offset, config.pos_antialias = vit.offset, vit.antialias
    return {"name": "vit", **asdict(config)}


def metadata_of(vit: Backbone) -> dict[str, str]:
    """Metadata for values that other formats have no place for; load_backbone reads it."""
    licence = {"licence": vit.licence} if vit.licence else {}
    section, shown = json.dumps(section_of(vit)), json.dumps(asdict(vit.input))
    return {"dinokit_backbone": section, "dinokit_input": shown, **licence}


def export(
    backbone: Backbone, to: str, out: str | Path, size: int | None = None,
    images: "Iterable[tuple[Image.Image, Tensor]]" = (),
) -> Iterator[str]:  # fmt: skip
    """Write a backbone; yields sentences about the files and the difference of the features.

    An existing `out` is replaced after the new one was opened and compared, and stays if anything fails.

    Args:
        backbone: a vit, dinov3, timm_vit or timm_convnext, in eval mode; WRITERS has the formats of each.
        to: timm, hf, dinov2, dinov3 or onnx.
        out: a file to write; for hf, and for timm unless it ends in .safetensors, a folder.
        size: pixels of the images that an ONNX graph takes; None: any multiple of the patch.
        images: photographs, each with its pixels (C, s, s) as dinokit shows them to the backbone: features of
            these are compared with those of what the other library's own preprocessing makes.

    Raises:
        ValueError: if the backbone is another one, the format has no such vit, or the exported one gives
            other features; it is then in the folder `out`.wrong.
        RuntimeError: if a library is not installed; it says what to install.
        OSError: if the files cannot be written.
    """
    kind = type(backbone).__name__
    if kind not in WRITERS:
        raise ValueError(
            f"A `vit`, `dinov3`, `timm_vit` or `timm_convnext` can be exported, and this backbone is a "
            f"{kind}{f' ({backbone.frozen_only})' if backbone.frozen_only else ''}. In Python "
            f"torch.onnx.export takes a module that calls it and returns tensors: docs/extend.md."
        )
    if to not in WRITERS[kind]:
        formats = " and ".join(f"to={word}" for word in WRITERS[kind])
        model = f" ({backbone.model})" if hasattr(backbone, "model") else ""
        raise ValueError(f"A {kind}{model} can be exported with {formats}, not {to}.")
    if kind == "TimmViT" and to == "onnx":
        size = size or _stored_size(backbone)
    if kind == "VisionTransformer" and isinstance(backbone.patch_embed, ConvStem) and to != "onnx":
        raise ValueError(
            f"No model of to={to} has convolutions before the blocks (backbone.stem=conv). Export it with "
            "to=onnx, or train with backbone.stem=linear."
        )
    out = Path(out)
    with aside(out) as folder:
        write = import_module(f"dinokit.weights.formats.{WRITERS[kind][to]}").write
        exported: Exported = write(backbone, folder / out.resolve().name, size)
        try:
            comparisons = list(_compare(backbone, exported, [size] if size else _two_sizes(backbone)))
            comparisons += _compare_preprocessing(backbone, exported, images)
        except ValueError as error:
            wrong = out.resolve().with_name(f"{out.resolve().name}.wrong")
            remove(wrong)
            folder.rename(wrong)
            raise ValueError(f"{error} It lies in {wrong}; {out} was not changed.") from None
    yield f"Written: {out}"
    yield from comparisons
    yield from exported.notes
    yield f"Open it with: {exported.command.replace('PATH', str(out))}"


def _compare(vit: Backbone, exported: Exported, sizes: list[int]) -> Iterator[str]:
    for size in sizes:
        gap, largest = _difference(vit, exported, size)
        text = f"Largest difference at {size} x {size} pixels: {gap:.1e} (values up to {largest:.2g})."
        if gap <= TOLERANCE * max(largest, 1.0):
            yield text
        elif size == sizes[0] or exported.every_size:
            raise ValueError(f"The exported backbone does not give the features of the backbone. {text}")
        else:
            yield f"{text} There the positional embedding is resampled, by another rule than the vit's."


def _compare_preprocessing(
    vit: Backbone, exported: Exported, images: "Iterable[tuple[Image.Image, Tensor]]"
) -> Iterator[str]:
    cosines = []
    if exported.prepare is None:
        return
    for image, ours in images:
        theirs = exported.prepare(image)
        with torch.inference_mode():
            a, b = (vit([x[None]], [None])[0].cls[0] for x in (ours, theirs))
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
    if cosines:
        same = min(cosines) >= SAME_IMAGE
        yield (
            f"Cosine of class tokens of {len(cosines)} images, prepared by dinokit and by that library: mean "
            f"{sum(cosines) / len(cosines):.4f}, worst {min(cosines):.4f}."
            f"{'' if same else ' It resizes or cuts images otherwise: prepare them as dinokit does.'}"
        )


def _two_sizes(vit: Backbone) -> list[int]:
    """Pixels: the size of the stored grid, where positions are not resampled, and another."""
    stored = _stored_size(vit)
    shown = vit.input.size if vit.input.size % vit.patch == 0 else stored
    return [stored, shown if shown != stored else vit.patch * max(round(0.7 * stored / vit.patch), 1)]


def _stored_size(vit: Any) -> int:
    """Pixels of an image whose grid the positional embedding stores; without one, of the shown images."""
    if isinstance(vit, VisionTransformer):
        return vit.side * vit.patch
    grid = getattr(getattr(vit, "net", None), "patch_embed", None)
    return grid.img_size[0] if grid is not None else -(-vit.input.size // vit.patch) * vit.patch


def _difference(vit: Backbone, other: Exported, size: int) -> tuple[float, float]:
    """The largest difference of class tokens and patches, and the largest value, on two random images."""
    images = torch.randn(2, vit.channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = vit([images], [None])[0]
        pairs = list(zip((tokens.cls, tokens.patches), other.forward(images), strict=True))
    return (
        max(float((a - b.reshape(a.shape)).abs().max()) for a, b in pairs),
        max(float(a.abs().max()) for a, _ in pairs),
    )
