"""dinokit export weights=FILE to=FORMAT out=PATH: write a backbone in the format of another library.

to=timm     out=FOLDER: timm.create_model('local-dir:FOLDER', pretrained=True); or out=X.safetensors
to=hf       out=FOLDER: AutoModel.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
to=dinov2   out=X.pth: the layout of the official files, of DINO's for a vit without LayerScale
to=onnx     out=X.onnx: a graph from images to cls and patches; size=N fixes the images' size

The command loads the new file with that library, compares the features and prints the largest difference.
It replaces an older file at out only after that.

dinokit export weights=runs/photos to=timm out=photos_timm
dinokit export weights=runs/photos to=onnx out=photos.onnx
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, key_lines
from dinokit.config import registry
from dinokit.config.load import parse_overrides, section_values
from dinokit.config.registry import check_at_least, suggest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dinokit.models import Backbone

COMPARED = 24  # images whose preprocessing is compared
TARGETS = ["timm", "hf", "dinov2", "onnx"]


@dataclass
class Config:
    weights: str = "???"  # a file, or a folder of a run, of Hugging Face or of timm
    to: str = "???"  # timm, hf, dinov2 or onnx
    out: str = "???"  # the file or folder to write
    size: int = 0  # pixels of the images, for to=onnx; 0: any multiple of the patch
    images: str = ""  # folder of photographs to compare preprocessing on; empty: training data
    heads: int = 0  # of attention, if the file does not say

    def __post_init__(self) -> None:
        check_at_least(self, size=0, heads=0)
        if self.to not in TARGETS:
            near = suggest(self.to, TARGETS)
            raise ValueError(f"There is no format to={self.to}.{near} There is: {', '.join(TARGETS)}.")
        if self.size and self.to != "onnx":
            raise ValueError(f"size={self.size} is for to=onnx; to={self.to} writes a model of any size.")


def run(command: Command) -> dict[str, Any]:
    command.no_words(" Give weights=FILE to=FORMAT out=PATH.")
    cfg = Config(**section_values("commands", "export", parse_overrides(command.settings), ""))
    out = Path(cfg.out)
    file = cfg.to in ("dinov2", "onnx") or (cfg.to == "timm" and out.suffix == ".safetensors")
    if out.is_dir() if file else out.is_file():
        have, new = ("folder", "file") if file else ("file", "folder")
        raise ValueError(f"out={out} is a {have}, but to={cfg.to} writes a {new}: give another out.")
    from dinokit.runtime.launch import locked, refuse_locked
    from dinokit.weights import load_backbone
    from dinokit.weights.formats import export

    backbone = load_backbone(cfg.weights, heads=cfg.heads or None)
    with locked([(out.absolute().with_name(f".{out.name}.lock"), False)]) as who:
        refuse_locked(f"out={out}", who)
        lines = []
        for line in export(backbone, cfg.to, out, cfg.size or None, _images(cfg, backbone)):
            print(line)
            lines.append(line)
    return {"out": cfg.out, "to": cfg.to, "notes": lines}


def _images(cfg: Config, backbone: "Backbone") -> Iterator[tuple["Image.Image", "Tensor"]]:
    """Images to compare preprocessing on: of cfg.images, else of the training data or the built-in scenes."""
    from PIL import Image

    from dinokit import evaluation
    from dinokit.data.transforms import center_crop
    from dinokit.features import normalised

    if backbone.channels != 3:
        return
    section: Any = {"name": "folder", "path": cfg.images}
    if not cfg.images:
        section = {"name": "scenes", "size": 96, "count": COMPARED}
        with suppress(ValueError, LookupError):  # the data are elsewhere, or of a package that is not trusted
            section = evaluation.training_data(cfg.weights) or section
    source, size = registry.build("data.sources", section), backbone.input.size
    for i in range(min(COMPARED, len(source))):
        image = source[i * len(source) // min(COMPARED, len(source))][0]
        if isinstance(image, Image.Image):
            pixels = center_crop(image, round(size * 256 / 224), size)
            yield image, normalised(backbone, pixels[None])[0]


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "export")])
