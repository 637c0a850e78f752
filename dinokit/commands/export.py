"""dinokit export weights=FILE to=FORMAT out=PATH: write a backbone in the format of another library.

to=timm     out=FOLDER: timm.create_model('local-dir:FOLDER', pretrained=True); or out=X.safetensors
to=hf       out=FOLDER: AutoModel.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
to=dinov2   out=X.pth: the layout of the official files, of DINO's for a vit without LayerScale
to=dinov3   out=X.pth: the layout of DINOv3's official files, for a backbone dinov3
to=onnx     out=X.onnx: a graph from images to cls and patches; size=N fixes the images' size

The command loads the new file with that library, compares the features and prints the largest difference.
It replaces an older file at out only after that. Folders get a model card, README.md, with recipe, results,
licence and limits; push=USER/NAME uploads the folder to Hugging Face. A run of a timm_vit can be written for
timm and onnx, one of a dinov3 for timm, hf, dinov3 and onnx, one of a timm_convnext for timm and hf.

dinokit export weights=runs/photos to=timm out=photos_timm
dinokit export weights=runs/photos to=hf out=photos_hf push=marie/photos-vits16 licence=apache-2.0
dinokit export weights=runs/photos to=onnx out=photos.onnx
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, _card, key_lines
from dinokit.config import registry
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least, suggest
from dinokit.config.values import with_source
from dinokit.runtime.files import CHECKSUMS

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dinokit.models import Backbone

COMPARED = 24  # images whose preprocessing is compared
TARGETS = ["timm", "hf", "dinov2", "dinov3", "onnx"]
FOLDERS = ["timm", "hf"]  # that have a model card


@dataclass
class Config:
    weights: str = "???"  # a file, or a folder of a run, of Hugging Face or of timm
    to: str = "???"  # timm, hf, dinov2, dinov3 or onnx
    out: str = "???"  # the file or folder to write
    size: int = 0  # pixels of the images, for to=onnx; 0: any multiple of the patch
    images: str = ""  # photographs to compare preprocessing on; empty: training data
    heads: int = 0  # of attention, if the file does not say
    push: str = ""  # USER/NAME on the hub of Hugging Face, for a folder of hf or timm
    public: bool = False  # whether a new repository can be seen by everybody
    licence: str = ""  # for the model card, as the hub spells it, such as apache-2.0

    def __post_init__(self) -> None:
        check_at_least(self, size=0, heads=0)
        if self.to not in TARGETS:
            near = suggest(self.to, TARGETS)
            raise ValueError(f"There is no format to={self.to}.{near} There is: {', '.join(TARGETS)}.")
        if self.size and self.to != "onnx":
            raise ValueError(f"size={self.size} is for to=onnx; to={self.to} writes a model of any size.")
        if self.push and (self.to not in FOLDERS or self.out.endswith(".safetensors")):
            raise ValueError("push= uploads a folder: to=hf, or to=timm with a folder as out.")


def run(command: Command) -> dict[str, Any]:
    command.no_words(" Give weights=FILE to=FORMAT out=PATH.")
    cfg = Config(**checked_values(Config, parse_overrides(command.settings)))
    lines = []
    for line in export(cfg):
        print(line)
        lines.append(line)
    return {"out": cfg.out, "to": cfg.to, "notes": lines}


def export(cfg: Config, given: "Backbone | None" = None) -> Iterator[str]:
    """Write the backbone of cfg.weights, or the given one, and the model card; yields sentences about it."""
    out = Path(cfg.out)
    file = cfg.to in ("dinov2", "dinov3", "onnx") or (cfg.to == "timm" and out.suffix == ".safetensors")
    if out.is_dir() if file else out.is_file():
        have, new = ("folder", "file") if file else ("file", "folder")
        raise ValueError(f"out={out} is a {have}, but to={cfg.to} writes a {new}: give another out.")
    names = {path.name for path in out.iterdir() if path.name[0] != "."} if out.is_dir() else set()
    if names and not names & {CHECKSUMS, "model.safetensors"}:
        raise ValueError(
            f"out={out} has files that no export wrote, such as {min(names)}, and those of the same "
            f"names, as README.md, would be replaced. Choose another out."
        )
    if cfg.push:
        _card.check_push(cfg.push)
    from dinokit.runtime.launch import locked, refuse_locked
    from dinokit.weights import formats, load_backbone

    backbone = given if given is not None else load_backbone(cfg.weights, heads=cfg.heads or None)
    with locked([(out.absolute().with_name(f".{out.name}.lock"), False)]) as who:
        refuse_locked(f"out={out}", who)
        yield from formats.export(backbone, cfg.to, out, cfg.size or None, _images(cfg, backbone))
        if cfg.to in FOLDERS and not file:
            yield _write_card(cfg, backbone, given is None)
        if cfg.push:
            yield f"Uploaded: {_card.push(out, cfg.push, cfg.public)}"


def _write_card(cfg: Config, backbone: "Backbone", has_file: bool) -> str:
    from dinokit import results
    from dinokit.hub import LICENCE
    from dinokit.runtime.files import write_text
    from dinokit.weights import describe

    about = {"format": "in memory", "recipe": ""}
    lines: list[dict[str, Any]] = []
    if has_file:
        about = describe(cfg.weights, heads=cfg.heads or None)
        folder = Path(cfg.weights)
        lines = results.read([folder], needed=False)[0] if folder.is_dir() else []
    released = about["format"].startswith(("DINO,", "DINOv2"))
    licence = cfg.licence or backbone.licence or (LICENCE.lower() if released else "")
    path = Path(cfg.out) / "README.md"
    write_text(path, _card.card(cfg.to, cfg.push or cfg.out, backbone, about, lines, licence))
    return f"Model card: {path}" + ("" if licence else "; it states no licence: licence=NAME adds one.")


def _images(cfg: Config, backbone: "Backbone") -> Iterator[tuple["Image.Image", "Tensor"]]:
    """Images to compare preprocessing on: of cfg.images, else of the training data or the built-in scenes."""
    from PIL import Image

    from dinokit import evaluation
    from dinokit.data.transforms import center_crop
    from dinokit.features import normalised

    if backbone.channels != 3:
        return
    source = None
    if cfg.images:
        source = registry.build("data.sources", with_source({"path": cfg.images}))
    elif cfg.weights:
        with suppress(ValueError, LookupError):  # the data are elsewhere, or of a package that is not trusted
            section = evaluation.training_data(cfg.weights)
            source = registry.build("data.sources", section) if section else None
    if source is None:
        source = registry.build("data.sources", {"name": "scenes", "size": 96, "count": COMPARED})
    size = backbone.input.size
    for i in range(min(COMPARED, len(source))):
        image = source[i * len(source) // min(COMPARED, len(source))][0]
        if isinstance(image, Image.Image):
            pixels = center_crop(image, round(size * 256 / 224), size)
            yield image, normalised(backbone, pixels[None])[0]


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "export")])
