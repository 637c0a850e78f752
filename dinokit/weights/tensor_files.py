"""Reads and writes files of tensors: safetensors, and what torch.save wrote. No code in a file is run."""

import json
import pickletools
import re
import warnings
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip file; pickles


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like a safetensors file."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path, values: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and the metadata.

    Args:
        path: of the file.
        values: False leaves the tensors on the device meta, which takes no time for a file of any size.

    Raises:
        ValueError: if the file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            read = file.get_tensor if values else partial(_without_values, file)
            return {name: read(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}. Copy or download it again.") from None


def _without_values(file: Any, name: str) -> Tensor:
    view = file.get_slice(name)
    dtype = TYPES.get(view.get_dtype(), torch.float32)
    return torch.empty(view.get_shape(), dtype=dtype, device="meta")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, with the metadata `format` that other readers expect.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from dinokit.runtime.files import atomic

    try:
        with atomic(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # save_file makes files that only their owner can read
            save_file(tensors, temporary, {"format": "pt", **metadata})
            temporary.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"The weights could not be written to {path}: {error}.") from None


def read_shards(index: Path, values: bool) -> dict[str, Tensor]:
    """The tensors of a model in several files, which `index` (JSON: `weight_map`) lists.

    Args:
        index: the file that lists the others, which are beside it.
        values: False leaves the tensors on the device meta.

    Raises:
        ValueError, LookupError: if the index is damaged, a file is missing, or a file is broken.
    """
    try:
        file_of: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(file_of.values()))
        assert all(Path(name).name == name for name in files)
    except (AssertionError, KeyError, TypeError, ValueError):
        raise ValueError(f"{index} is no index of a model in several files.") from None
    if not all(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{index} lists files that are no .safetensors, such as {files[0]}: not readable.")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise LookupError(f"{index} lists {len(files)} files; missing: {', '.join(missing)}.")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= read_safetensors(index.parent / name, values)[0]
    absent = sorted(set(file_of) - set(tensors))
    if absent:
        raise ValueError(
            f"{index} lists {len(absent)} tensors that none of its files has, such as {absent[0]}."
        )
    return tensors


def is_pickled(path: Path) -> bool:
    """Whether a file starts like one of torch.save."""
    with path.open("rb") as file:
        return file.read(4).startswith(MAGIC)


def read_pickled(path: Path, values: bool) -> Any:
    """The object that torch.save wrote: tensors and plain values.

    A Namespace is allowed too: DINO's full checkpoints store their arguments in one.

    Args:
        path: of the file.
        values: False leaves the tensors on the device meta.

    Raises:
        ValueError: if the file needs code, or is broken.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # errors are reported below
            return torch.load(
                path, map_location="cpu" if values else "meta", mmap=values and zipped, weights_only=True
            )
    except Exception as error:  # other bytes fail in many ways
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which contains code. dinokit reads tensors only: save the "
                f"state_dict() of the model that it was made from."
            ) from None
        named = re.search(r"GLOBAL (\S+)", str(error))
        imported = named[1] if named else "" if zipped else _first_global(path)
        if imported:
            raise ValueError(
                f"{path} is a pickle that would run code of its own: it imports '{imported}'. Nothing was "
                f"run. dinokit reads tensors and plain values: whoever made the file can save its "
                "state_dict()."
            ) from None
        raise ValueError(
            f"{path} starts like a file of torch.save, but cannot be read: it is truncated or damaged. Copy "
            f"or download it again."
        ) from None


def _first_global(path: Path) -> str:
    """The first name that a plain pickle would import, found without running it; '' if there is none."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for code, value, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    return str(value).replace(" ", ".")
                if code.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(value, str):
                    strings.append(value)
    except ValueError:  # it is truncated
        return ""
    return ""
