"""Any file of weights as tensors by name, whatever wrote it, before anybody asks what they mean."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dinokit.weights.locate import KINDS, NAME, OTHERS, locate
from dinokit.weights.pickled import is_pickled, read_pickled
from dinokit.weights.safe import is_safetensors, read_header, read_shards, read_tensors

WRAPPERS = ("teacher", "state_dict", "model")  # keys under which training code keeps the weights to use


@dataclass
class Checkpoint:
    """What a file holds, by its own names."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # the texts in a safetensors file
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside it
    processor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json beside it
    wrapper: str = ""  # the key that the tensors were under, if any
    beside: list[str] = field(default_factory=list)  # the keys of what was there besides


def open_checkpoint(source: str | Path, values: bool = True) -> Checkpoint:
    """Read a file, or the one in a folder.

    Args:
        source: a file, or a folder of a run, of Hugging Face or of timm.
        values: False leaves the tensors on the device meta, which takes no time, however large the file.

    Raises:
        LookupError: if there is no such file; it lists what there is.
        ValueError: if it holds no tensors, is broken, or would run code.
    """
    path = locate(source)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file.")
    config, processor = (
        _read_json(path.parent / name) if path.name in OTHERS else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    if path.name.endswith(".index.json"):
        return Checkpoint(path, read_shards(path, values), {}, config, processor)
    if is_safetensors(path):
        header, metadata = read_header(path)
        return Checkpoint(path, read_tensors(path) if values else header, metadata, config, processor)
    if not is_pickled(path):
        raise ValueError(_what_else(path))
    wrapper, tensors, beside = _unwrap(path, read_pickled(path, values))
    return Checkpoint(path, tensors, {}, config, processor, wrapper, beside)


def _unwrap(path: Path, data: Any) -> tuple[str, dict[str, Tensor], list[str]]:
    """The key under which the tensors are, the tensors, and what else is there."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds one {type(data).__name__}, not tensors by name: save a state_dict().")
    for wrapper in ("", *WRAPPERS):
        inner = data.get(wrapper) if wrapper else data
        if isinstance(inner, Mapping):
            tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
            if any(tensor.ndim for tensor in tensors.values()):
                beside = [str(key) for key in data if key != wrapper and str(key) not in tensors]
                return wrapper, tensors, beside
    raise ValueError(
        f"{path} holds no tensors by name, alone or under {', '.join(WRAPPERS)}; its keys are: "
        f"{', '.join(str(key) for key in list(data)[:10])}."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}. Copy or download it again.") from None


def _what_else(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    text = "".join(start.decode("utf-8", "replace").split())
    what = {b"\x89HDF": "it is a file of HDF5, perhaps of Keras", b"GGUF": "it is a language model in GGUF"}
    kind = what.get(start[:4], f"it is a text that begins with {start!r}" if text.isprintable() else "")
    if path.suffix == ".onnx":
        kind = "it is a graph of ONNX, which dinokit writes but does not read"
    return (
        f"{path} is not a safetensors file, nor one of torch.save{f': {kind}' if kind else ''}. Readable are "
        f"{', '.join(KINDS)}, and folders with {NAME} or {OTHERS[0]}."
    )
