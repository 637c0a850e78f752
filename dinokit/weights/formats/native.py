"""Our own format: safetensors with the architecture, the input and the recipe in the metadata.

The metadata contains the texts `dinokit` (the version that wrote the file), `backbone` (JSON: the recipe's
section, with its `name`), `input` (JSON: size, mean, std) and `recipe` (YAML).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dinokit
from dinokit.models import Backbone, Input
from dinokit.weights.architecture import StoredBackbone
from dinokit.weights.checkpoint import Checkpoint, write_tensors

LARGEST = 1 << 15  # pixels of an image's side, in a header
# Settings of a backbone that no tensor of another format shows.
UNSAID = (
    "heads", "pos_offset", "pos_antialias", "norm_eps", "rope_base", "rope_sides", "rope_shift",
    "rope_jitter", "rope_rescale", "rope_noise",
)  # fmt: skip


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """Any registered backbone, of dinokit or of another package; the file has its name.

    Raises:
        ValueError: if the header is damaged.
    """
    metadata = file.metadata
    if "dinokit" not in metadata:
        return None
    section, shown = _parse(metadata, "backbone", "input")
    if heads and section.get("heads", heads) != heads:
        raise ValueError(
            f"it has {section['heads']} heads according to its header, so heads={heads} cannot be right"
        )
    version = metadata["dinokit"]
    return StoredBackbone(
        f"dinokit {version}", file.tensors, section, shown, [], [], metadata.get("recipe", ""), version,
        metadata.get("licence", ""),
    )  # fmt: skip


def add_metadata(stored: StoredBackbone, metadata: Mapping[str, str], heads: int | None) -> StoredBackbone:
    """The backbone with the values that our exports put in metadata: their formats have no place for them.

    Raises:
        ValueError: if the header is damaged.
    """
    section, shown = _parse(metadata, "dinokit_backbone", "dinokit_input")
    added: dict[str, Any] = {key: section[key] for key in UNSAID if key in section}
    if heads:
        added["heads"] = heads
    licence = metadata.get("licence", "")
    return replace(stored, section={**stored.section, **added}, input=shown, notes=[], licence=licence)


def _parse(metadata: Mapping[str, str], section_key: str, input_key: str) -> tuple[dict[str, Any], Input]:
    key = section_key
    try:
        section = dict(json.loads(metadata[key]))
        key = input_key
        values = json.loads(metadata[key])
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        size = int(values["size"])
        if not (0 < size <= LARGEST and all(map(math.isfinite, mean)) and all(0 < x < math.inf for x in std)):
            raise ValueError(f"size {size}, mean {mean}, std {std}")  # noqa: TRY301 - named below
    except (KeyError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged: `{key}`: {error!r}. Copy or download it again") from None
    return section, Input(size, mean, std)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes of tensors on the CPU, which a file of weights records of its own."""
    total = sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_digest(file: Checkpoint) -> None:
    """Compare the tensors of a file, read with values, with the checksum in its metadata, if it has one.

    Raises:
        ValueError: if they differ.
    """
    recorded = file.metadata.get("sha256")
    if recorded is not None and recorded != digest(file.tensors):
        raise ValueError(
            f"{file.path} is damaged: its tensors do not match the checksum that it was written with."
        )


def save_backbone(
    path: str | Path, backbone: Backbone, section: Mapping[str, Any], recipe_yaml: str = ""
) -> None:
    """Write a backbone so that `load_backbone` can rebuild it from this file only.

    Args:
        path: of the new file, which is written atomically.
        backbone: its parameters, buffers and `input` are saved.
        section: the section `backbone` of the recipe: its `name` and settings.
        recipe_yaml: the recipe that trained it, for people.

    Raises:
        ValueError: if the section has no name.
        OSError: if the file cannot be written.
    """
    if not section.get("name"):
        raise ValueError(
            "The section of a backbone needs its `name`: without it the backbone cannot be rebuilt."
        )
    metadata = {
        "dinokit": dinokit.__version__,
        "backbone": json.dumps(dict(section)),
        "input": json.dumps(asdict(backbone.input)),
        "recipe": recipe_yaml,
    }
    if backbone.licence:
        metadata["licence"] = backbone.licence
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    metadata["sha256"] = digest(tensors)
    write_tensors(Path(path), tensors, metadata)
