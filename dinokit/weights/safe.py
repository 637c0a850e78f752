"""The format safetensors: names, shapes and places of tensors as JSON, then their bytes. Nothing can run."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST_HEADER = 100_000_000  # bytes: the format's own limit
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one does."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, by name, without their values (on the device meta), and the texts beside them.

    Raises:
        ValueError: if the file is no safetensors file, or is cut off.
    """
    header = _read_json(path)
    metadata = header.pop("__metadata__", {})
    return {
        name: torch.empty(entry["shape"], dtype=TYPES.get(entry["dtype"], torch.float32), device="meta")
        for name, entry in header.items()
    }, dict(metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors, by name.

    Raises:
        ValueError: if the file is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}. Copy or download it again.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all; `format` joins the metadata, which other readers look for.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from dinokit.runtime.files import atomic

    try:
        with atomic(path) as part:
            part.touch()
            mode = part.stat().st_mode  # the writer below makes files that only their owner can read
            save_file(tensors, part, {"format": "pt", **metadata})
            part.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"The weights could not be written to {path}: {error}.") from None


def read_shards(index: Path, values: bool) -> dict[str, Tensor]:
    """The tensors of a model that is spread over files, which `index` (JSON: `weight_map`) lists.

    Args:
        index: of the files beside it.
        values: False leaves the tensors on the device meta.

    Raises:
        ValueError, LookupError: if the index is none, a file is not there, or a file is broken.
    """
    try:
        place: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(place.values()))
        assert all(Path(name).name == name for name in files)
    except (AssertionError, KeyError, TypeError, ValueError):
        raise ValueError(f"{index} is no index of a model in several files.") from None
    if not all(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{index} lists files that are no .safetensors, such as {files[0]}: not readable.")
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise LookupError(f"{index} lists {len(files)} files; not there: {', '.join(absent)}.")
    done: dict[str, Tensor] = {}
    for name in files:
        header, _ = read_header(index.parent / name)
        done |= read_tensors(index.parent / name) if values else header
    lost = sorted(set(place) - set(done))
    if lost:
        raise ValueError(f"{index} lists {len(lost)} tensors that none of its files has, such as {lost[0]}.")
    return done


def _read_json(path: Path) -> dict[str, Any]:
    """The header, checked against the length of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # the format: this number, so much JSON, the tensors
        if length > LONGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file: it has no header.")
        text = file.read(length)
    need = 8 + length
    if size < need:
        raise ValueError(f"{path} is cut off: {size} bytes of at least {need}. Copy or download it again.")
    try:
        header: dict[str, Any] = dict(json.loads(text))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        need += max((entry["data_offsets"][1] for entry in entries), default=0)
        assert all(isinstance(entry["shape"], list) and "dtype" in entry for entry in entries)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a safetensors file: its header describes no tensors.") from None
    if size < need:
        raise ValueError(f"{path} is cut off: {size} bytes of at least {need}. Copy or download it again.")
    return header
