"""Our own file: safetensors that carries its architecture, its input and its recipe.

The metadata has the texts `dinokit` (the version that wrote the file), `backbone` (JSON: the recipe's
section, its `name` included), `input` (JSON: size, mean, std) and `recipe` (YAML).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import dinokit
from dinokit.models import Backbone, Input
from dinokit.weights.checkpoint import Checkpoint
from dinokit.weights.found import Found
from dinokit.weights.safe import write_tensors


def read(file: Checkpoint, heads: int | None) -> Found | None:
    """Any backbone of a shelf, ours or another package's; the file says which.

    Raises:
        ValueError: if the header is damaged.
    """
    about = file.metadata
    if "dinokit" not in about:
        return None
    try:
        section = dict(json.loads(about["backbone"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header is damaged: `backbone`: {error!r}. Copy or download it again") from None
    try:
        shown = json.loads(about["input"])
        parts = int(shown["size"]), tuple(map(float, shown["mean"])), tuple(map(float, shown["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header is damaged: `input`: {error!r}. Copy or download it again") from None
    if heads and section.get("heads", heads) != heads:
        raise ValueError(f"it says that it has {section['heads']} heads, so heads={heads} cannot be right")
    version = about["dinokit"]
    return Found(
        f"dinokit {version}", file.tensors, section, Input(*parts), [], [], about.get("recipe", ""), version
    )


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
        "dinokit": dinokit.__version__,
        "backbone": json.dumps(dict(section)),
        "input": json.dumps(asdict(backbone.input)),
        "recipe": recipe_yaml,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    write_tensors(Path(path), tensors, metadata)
