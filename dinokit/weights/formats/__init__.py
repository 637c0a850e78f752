"""Formats of weights, one file each: those of other projects and our own.

A format that can be read defines

    read(file: Checkpoint, heads: int | None) -> StoredBackbone | None

It returns None if the file has another format. If the file has this format but its architecture cannot be
inferred, it raises ValueError with the second half of a sentence that starts with the name of the file.

One that can be written defines

    write(vit: VisionTransformer, out: Path, size: int | None) -> Exported

It writes to `out`, which does not exist, and opens the result with the library of the format. `size` is for
ONNX: the pixels of the images, or None for any multiple of the patch. It raises RuntimeError if a library is
not installed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import Tensor

from dinokit.models.vit import VisionTransformer
from dinokit.weights.architecture import infer_config


@dataclass
class Exported:
    """A backbone in another format, opened again by the library of that format."""

    command: str  # code that opens the file, which is called PATH in it
    # (b, C, h, w) -> class tokens (b, D), patches (b, N, D)
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    every_size: bool = False  # whether features must be equal where positions are resampled too
    notes: list[str] = field(default_factory=list)  # sentences: what the format has no place for


def section_of(vit: VisionTransformer) -> dict[str, object]:
    """The section `backbone` of a recipe that builds this vit."""
    config, _ = infer_config(vit.state_dict(), vit.heads)
    config.pos_offset, config.pos_antialias = vit.offset, vit.antialias
    return {"name": "vit", **asdict(config)}


def metadata_of(vit: VisionTransformer) -> dict[str, str]:
    """Metadata for values that other formats have no place for; load_backbone reads it."""
    return {"dinokit_backbone": json.dumps(section_of(vit)), "dinokit_input": json.dumps(asdict(vit.input))}
