"""A backbone file: safetensors that carries its architecture, its input and its recipe.

The header's metadata has the texts `dinokit` (the version that wrote the file), `backbone` (JSON: the
recipe's section, its `name` included), `input` (JSON: size, mean, std) and `recipe` (YAML). Nothing in a file
can be run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import dinokit
from dinokit import shelves
from dinokit.backbones import Backbone, Input
from dinokit.config import section_values
from dinokit.files import atomic

NAME = "teacher.safetensors"  # of the weights in a run's folder
LONGEST_HEADER = 100_000_000  # bytes: the format's own limit


def save_backbone(
    path: str | Path, backbone: Backbone, section: Mapping[str, Any], recipe_yaml: str = ""
) -> None:
    """Write a backbone so that `load_backbone` can rebuild it from this file alone.

    Args:
        path: of the new file, written whole or not at all.
        backbone: its parameters, buffers and `input` are kept.
        section: the recipe's section `backbone`: its `name`, and what it was built from.
        recipe_yaml: the recipe that trained it, for people.

    Raises:
        ValueError: if the section has no name.
        OSError: if the file cannot be written.
    """
    assert isinstance(backbone, nn.Module)
    if not section.get("name"):
        raise ValueError("The section of a backbone needs its `name`, or nobody could rebuild it.")
    metadata = {
        "format": "pt",  # what other readers of safetensors look for
        "dinokit": dinokit.__version__,
        "backbone": json.dumps(dict(section)),
        "input": json.dumps(asdict(backbone.input)),
        "recipe": recipe_yaml,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    try:
        with atomic(path) as part:
            part.touch()
            mode = part.stat().st_mode  # the writer below makes files that only their owner can read
            save_file(tensors, part, metadata)
            part.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"The weights could not be written to {path}: {error}.") from None


def load_backbone(source: str | Path) -> Backbone:
    """The frozen backbone in a file, or in a run's folder, on the CPU and in eval mode.

    A file names its backbone as a recipe does: a file of the shelf, or a module of an installed package.

    Raises:
        LookupError: if there is no such file; it lists what there is.
        ValueError: if the file is not one of ours, is broken, or its tensors do not fit the backbone that it
            names.
    """
    path = _locate(source)
    header = describe(path)
    backbone = _rebuild(path, header)
    assert isinstance(backbone, nn.Module)
    want = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    _check_fit(path, want, header["tensors"])
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}. Copy or download it again.") from None
    backbone.load_state_dict(tensors, strict=True)
    backbone.eval().requires_grad_(False)
    return backbone


def describe(path: str | Path) -> dict[str, Any]:
    """What the header of a backbone file, or of the one in a run's folder, says; no tensor is read.

    Returns:
        `dinokit`, `backbone`, `input`, `recipe`, as in the head of this module, and `tensors`: name to shape.

    Raises:
        LookupError, ValueError: as `load_backbone`.
    """
    path = _locate(path)
    header = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if "dinokit" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but dinokit did not write it: its header does not say which "
            f"backbone it belongs to. Other formats are not readable yet."
        )
    try:
        return {
            "dinokit": metadata["dinokit"],
            "backbone": dict(json.loads(metadata["backbone"])),
            "input": dict(json.loads(metadata["input"])),
            "recipe": metadata.get("recipe", ""),
            "tensors": {name: tuple(entry["shape"]) for name, entry in header.items()},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The header of {path} is damaged: {error!r}. Copy or download it again.") from None


def _rebuild(path: Path, header: Mapping[str, Any]) -> Backbone:
    section = dict(header["backbone"])
    name = str(section.pop("name", ""))
    if not all(part.isidentifier() for part in name.split(".")):  # never the path of a file that would be run
        raise ValueError(f"The header of {path} names the backbone '{name}', which is no name of a backbone.")
    try:
        values = section_values("backbones", name, section, "backbone")  # its tuples left JSON as lists
        backbone: Backbone = shelves.build("backbones", {"name": name, **values})
    except (LookupError, ValueError) as error:
        old, new = header["dinokit"], dinokit.__version__
        text = f"{path}, written by dinokit {old}, cannot be rebuilt by dinokit {new}: {error}"
        raise type(error)(text) from None
    try:
        size, mean, std = (header["input"][key] for key in ("size", "mean", "std"))
        backbone.input = Input(int(size), tuple(map(float, mean)), tuple(map(float, std)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The header of {path} is damaged: `input`: {error!r}.") from None
    if not len(mean) == len(std) == backbone.channels:
        raise ValueError(
            f"The header of {path} is damaged: `input` has {len(mean)} means and {len(std)} deviations, but "
            f"the backbone takes {backbone.channels} channels."
        )
    return backbone


def _check_fit(path: Path, want: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{name}: asked for {shape}, absent" for name, shape in want.items() if name not in have]
    wrong += [f"{name}: not asked for, found {shape}" for name, shape in have.items() if name not in want]
    wrong += [
        f"{name}: asked for {shape}, found {have[name]}"
        for name, shape in want.items()
        if name in have and have[name] != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        listed = "; ".join(wrong[:5])
        raise ValueError(f"The tensors in {path} do not fit the backbone that it names: {listed}{more}.")


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        if (path / NAME).is_file():
            return path / NAME
        have = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f" Give the path of one that is: {', '.join(have)}." if have else ""
        raise LookupError(f"There is no {NAME} in the folder {path}.{hint}")
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise LookupError(f"There is no file {path}, and no folder {path.parent} (looked from {Path.cwd()}).")
    have = sorted(p.name for p in path.parent.iterdir())
    weights = [name for name in have if name.endswith(".safetensors")]
    hint = f" Weights there: {', '.join(weights[:10])}." if weights else ""
    raise LookupError(f"There is no file {path}.{shelves.suggest(path.name, have)}{hint}")


def _read_header(path: Path) -> dict[str, Any]:
    """Names, types, shapes and places of the tensors, checked against the length of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # the format: this number, so much JSON, the tensors
        start = file.read(1)
        if size < 9 or start != b"{" or length > LONGEST_HEADER:
            kind = "an empty file" if size == 0 else "not a safetensors file"
            raise ValueError(f"{path} is {kind}. Only .safetensors files of dinokit are readable yet.")
        text = start + file.read(length - 1)
    try:
        header = json.loads(text) if len(text) == length else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        need = 8 + length + max(ends, default=0)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file: its header describes no tensors.") from None
    if size < need:
        raise ValueError(f"{path} is cut off: {size} bytes of at least {need}. Copy or download it again.")
    return dict(header)
