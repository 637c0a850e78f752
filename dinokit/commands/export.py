"""dinokit export weights=FILE to=FORMAT out=PATH: write a backbone in the format of another library.

to=timm     out=FOLDER: timm.create_model('local-dir:FOLDER', pretrained=True); or out=X.safetensors
to=hf       out=FOLDER: AutoModel.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
to=dinov2   out=X.pth: the layout of the official files, of DINO's for a vit without LayerScale
to=onnx     out=X.onnx: a graph from images to cls and patches; size=N fixes the images' size

The command loads the new file with that library, compares the features and prints the largest difference.
It replaces an older file at out only after that. weights is a file, or a folder of a run, of Hugging Face or
of timm. heads=N gives the number of attention heads if the file does not.

dinokit export weights=runs/photos to=timm out=photos_timm
dinokit export weights=runs/photos to=onnx out=photos.onnx
"""

from pathlib import Path
from typing import Any

from dinokit.commands import Command
from dinokit.config.load import parse_overrides
from dinokit.config.registry import suggest

TARGETS = ["timm", "hf", "dinov2", "onnx"]
KEYS = ["weights", "to", "out", "size", "heads"]


def run(command: Command) -> None:
    command.no_words(" Give weights=FILE to=FORMAT out=PATH.")
    values = parse_overrides(command.settings)
    for key in values:
        if key not in KEYS:
            raise ValueError(f"There is no key '{key}'.{suggest(key, KEYS)} There is: {', '.join(KEYS)}.")
    for key in KEYS[:3]:
        if not values.get(key):
            raise ValueError(f"{key} must be given: dinokit export weights=FILE to=FORMAT out=PATH.")
    to, out, size = str(values["to"]), Path(str(values["out"])), _whole("size", values.get("size"))
    if to not in TARGETS:
        raise ValueError(f"There is no format to={to}.{suggest(to, TARGETS)} There is: {', '.join(TARGETS)}.")
    if size is not None and to != "onnx":
        raise ValueError(f"size={size} is for to=onnx; what to={to} writes takes images of any size.")
    file = to in ("dinov2", "onnx") or (to == "timm" and out.suffix == ".safetensors")
    if out.is_dir() if file else out.is_file():
        have, new = ("folder", "file") if file else ("file", "folder")
        raise ValueError(f"out={out} is a {have}, but to={to} writes a {new}: give another out.")
    heads = _whole("heads", values.get("heads"))
    from dinokit.weights import load_backbone
    from dinokit.weights.formats import export

    for line in export(load_backbone(str(values["weights"]), heads=heads), to, out, size):
        print(line)


def _whole(key: str, value: Any) -> int | None:
    if value is not None and not (isinstance(value, int) and value > 0):
        raise ValueError(f"{key}={value} must be a whole number, 1 or more.")
    return value
