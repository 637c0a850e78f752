"""Opens any file of weights as tensors by name: finds the file, reads it, and unwraps the weights.

It reads safetensors and what torch.save wrote, and writes safetensors. No code in a file is run.
"""

import json
import pickletools
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.config.registry import suggest
from dinokit.runtime.files import check_folder, read_regular

NAME = "teacher.safetensors"  # of the weights in the folder of a run
FOREIGN_NAMES = (  # of the weights in a folder of Hugging Face or timm, by priority
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("teacher", "state_dict", "model")  # keys under which training code stores the weights
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ZIP_END = b"PK\x05\x06" + bytes(18)  # the last record of a zip file; its last number is the size of a comment
MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip file; pickles


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
    if path.exists() and not path.is_dir():  # in this order: another process may make the folder in between
        return path
    if path.is_dir():
        for name in (NAME, *FOREIGN_NAMES):
            if (path / name).is_file():
                return path / name
        if (path / "model_index.json").is_file():
            raise ValueError(
                f"{path} is a pipeline of the library diffusers: it generates images, and is no DINO "
                "backbone."
            )
        have = _weights_in(path) or [str(each.parent) for each in sorted(path.glob(f"students/*/{NAME}"))]
        hint = f" Give the path of one that is: {', '.join(have)}." if have else ""
        raise LookupError(
            f"There is no {NAME} in the folder {path}, nor {' or '.join(FOREIGN_NAMES[:3])}.{hint}"
        )
    if not path.parent.is_dir():
        raise LookupError(f"There is no file {path}, and no folder {path.parent} (looked from {Path.cwd()}).")
    weights = _weights_in(path.parent)
    hint = f" Weights in its folder: {', '.join(weights[:10])}." if weights else ""
    if str(source).startswith(("dino_", "dinov2_", "dinov3_")) and path.suffix == "":
        hint += (
            f" If you mean a released model: give the path of its file, whose address "
            f"`dinokit models {path}` prints."
        )
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
    check_folder(path.parent)
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
        return dict(json.loads(read_regular(path)))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError, RecursionError) as error:
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as torch.save() does, for the official formats.

    Raises:
        OSError: if the file cannot be written.
    """
    with path.open("wb") as file:  # given a path, torch forgets why a file cannot be written
        torch.save({name: tensor.cpu().clone() for name, tensor in tensors.items()}, file)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
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
            save_file(dict(tensors), temporary, {"format": "pt", **metadata})
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
        file_of: dict[str, str] = dict(json.loads(read_regular(index))["weight_map"])
        files = sorted(set(file_of.values()))
        outside = [name for name in files if Path(name).name != name]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{index} is no index of a model in several files.") from None
    if outside or not files:
        raise ValueError(
            f"{index} is no index of a model in several files: "
            f"{f'it lists {outside[0]!r}, which is no file beside it' if outside else 'it lists none'}."
        )
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
    with path.open("rb") as start:
        zipped = start.read(4) == MAGIC[0]  # as torch.load decides it
    if zipped:
        _refuse_packed(path)
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
        raise ValueError(_damaged(path)) from None


def _damaged(path: Path) -> str:
    return (
        f"{path} starts like a file of torch.save, but cannot be read: it is truncated or damaged. Copy or "
        f"download it again."
    )


def _refuse_packed(path: Path) -> None:
    """Refuse an archive with compressed records: torch.save compresses nothing, and a few bytes can be many.

    Of an archive with other bytes before or behind it, torch could read another list of records than zipfile.

    Raises:
        ValueError: if it is such an archive, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        with path.open("rb") as file:
            file.seek(-len(ZIP_END), 2)
            end = file.read()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        raise ValueError(_damaged(path)) from None
    alone = end[:4] == ZIP_END[:4] and end[-2:] == ZIP_END[-2:] and records and not records[0].header_offset
    if not alone:
        raise ValueError(_damaged(path))
    # Only the code of TorchScript, which is refused later, may be compressed.
    tensors = [each for each in records if each.filename.split("/")[1:2] != ["code"]]
    if any(each.compress_type != zipfile.ZIP_STORED for each in tensors):
        raise ValueError(
            f"{path} is a compressed archive, which torch.save does not write. Load it in a container, and "
            f"save its state_dict() again."
        )


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
