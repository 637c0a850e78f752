"""What torch.save wrote: .pth, .pt, .bin, .ckpt. Tensors and plain values come in, and no code ever runs."""

import pickletools
import re
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip file; pickles


def is_pickled(path: Path) -> bool:
    """Whether a file begins as one does."""
    with path.open("rb") as file:
        return file.read(4).startswith(MAGIC)


def read_pickled(path: Path, values: bool) -> Any:
    """What was saved.

    A Namespace is let in besides tensors: DINO's full checkpoints keep their arguments in one.

    Args:
        path: of the file.
        values: False leaves the tensors on the device meta.

    Raises:
        ValueError: if the file asks for code, or is broken.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what fails says so by itself
            return torch.load(
                path, map_location="cpu" if values else "meta", mmap=values and zipped, weights_only=True
            )
    except Exception as error:  # bytes that are no pickle fail in any way
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which holds code. dinokit reads tensors alone: save the "
                f"state_dict() of the model that it was made from."
            ) from None
        named = re.search(r"GLOBAL (\S+)", str(error))
        asked = named[1] if named else "" if zipped else _first_global(path)
        if asked:
            raise ValueError(
                f"{path} is a pickle that would run code of its own: it asks for '{asked}'. Nothing was run. "
                f"dinokit reads tensors and plain values: whoever made the file can save its state_dict()."
            ) from None
        raise ValueError(
            f"{path} begins like a file of torch.save, but cannot be read: it is cut off or damaged. Copy or "
            f"download it again."
        ) from None


def _first_global(path: Path) -> str:
    """The first name that a plain pickle would import, found by reading it as a list; '' without one."""
    words: list[str] = []
    try:
        with path.open("rb") as file:
            for code, value, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    return str(value).replace(" ", ".")
                if code.name == "STACK_GLOBAL":
                    return ".".join(words[-2:])
                if isinstance(value, str):
                    words.append(value)
    except ValueError:  # it is cut off
        return ""
    return ""
