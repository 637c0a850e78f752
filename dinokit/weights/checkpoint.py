"""Opens any file of weights as tensors by name: finds the file, reads it, and unwraps the weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dinokit.config.registry import suggest
from dinokit.weights.tensor_files import (
    is_pickled,
    is_safetensors,
    read_pickled,
    read_safetensors,
    read_shards,
)

NAME = "teacher.safetensors"  # of the weights in the folder of a run
FOREIGN_NAMES = (  # of the weights in a folder of Hugging Face or timm, by priority
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("teacher", "state_dict", "model")  # keys under which training code stores the weights


@dataclass
class Checkpoint:
    """The content of a file, by its own names."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside it
    processor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json beside it
    wrapper: str = ""  # the key that contained the tensors, if any
    other_keys: list[str] = field(default_factory=list)


def locate(source: str | Path) -> Path:
    """The file of weights at the path `source`, or in the folder `source`.

    Raises:
        LookupError: if there is none; it lists the weights that exist.
        ValueError: if the folder is a diffusion pipeline.
    """
    path = Path(source)
    if path.is_dir():
        for name in (NAME, *FOREIGN_NAMES):
            if (path / name).is_file():
                return path / name
        if (path / "model_index.json").is_file():
            raise ValueError(
                f"{path} is a pipeline of the library diffusers: it generates images, and is no DINO "
                "backbone."
            )
        have = _weights_in(path)
        hint = f" Give the path of one that is: {', '.join(have)}." if have else ""
        raise LookupError(
            f"There is no {NAME} in the folder {path}, nor {' or '.join(FOREIGN_NAMES[:3])}.{hint}"
        )
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise LookupError(f"There is no file {path}, and no folder {path.parent} (looked from {Path.cwd()}).")
    weights = _weights_in(path.parent)
    hint = f" Weights in its folder: {', '.join(weights[:10])}." if weights else ""
    similar = suggest(path.name, sorted(p.name for p in path.parent.iterdir()))
    raise LookupError(f"There is no file {path}.{similar}{hint}")


def open_checkpoint(source: str | Path, values: bool = True) -> Checkpoint:
    """Read a file, or the one in a folder.

    Args:
        source: a file, or a folder of a run, of Hugging Face or of timm.
        values: False leaves the tensors on the device meta, which takes no time for a file of any size.

    Raises:
        LookupError: if there is no such file; it lists the weights that exist.
        ValueError: if it contains no tensors, is broken, or would run code.
    """
    path = locate(source)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file.")
    config, processor = (
        _read_json(path.parent / name) if path.name in FOREIGN_NAMES else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    if path.name.endswith(".index.json"):
        return Checkpoint(path, read_shards(path, values), {}, config, processor)
    if is_safetensors(path):
        return Checkpoint(path, *read_safetensors(path, values), config, processor)
    if not is_pickled(path):
        raise ValueError(_not_readable(path))
    wrapper, tensors, other_keys = _unwrap(path, read_pickled(path, values))
    return Checkpoint(path, tensors, {}, config, processor, wrapper, other_keys)


def _weights_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))


def _unwrap(path: Path, data: Any) -> tuple[str, dict[str, Tensor], list[str]]:
    """The key that contains the tensors, the tensors, and the other keys."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{path} contains one {type(data).__name__}, not tensors by name: save a state_dict()."
        )
    for wrapper in ("", *WRAPPERS):
        inner = data.get(wrapper) if wrapper else data
        if isinstance(inner, Mapping):
            tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
            if any(tensor.ndim for tensor in tensors.values()):
                other_keys = [str(key) for key in data if key != wrapper and str(key) not in tensors]
                return wrapper, tensors, other_keys
    raise ValueError(
        f"{path} contains no tensors by name, neither at the top nor under {', '.join(WRAPPERS)}; its keys "
        f"are: {', '.join(str(key) for key in list(data)[:10])}."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}. Copy or download it again.") from None


def _not_readable(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    text = "".join(start.decode("utf-8", "replace").split())
    known = {b"\x89HDF": "it is a file of HDF5, perhaps of Keras", b"GGUF": "it is a language model in GGUF"}
    kind = known.get(start[:4], f"it is a text that begins with {start!r}" if text.isprintable() else "")
    if path.suffix == ".onnx":
        kind = "it is a graph of ONNX, which dinokit writes but does not read"
    return (
        f"{path} is not a safetensors file, nor one of torch.save{f': {kind}' if kind else ''}. Readable are "
        f"{', '.join(SUFFIXES)}, and folders with {NAME} or {FOREIGN_NAMES[0]}."
    )
