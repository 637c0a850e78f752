"""Data sets of torchvision by their names: CIFAR10, Food101, EuroSAT, Flowers102 ..., in the layout on disk.

Those with labels of one class an image have classes. The size and channels of images are handled as those of
a folder.
"""

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import ImageLike
from dinokit.data.files import stamp_of
from dinokit.data.sources import choose_split
from dinokit.data.sources.memory import Memory

SPLITS = {  # values of a data set's own argument `split`, in the order of preference
    "train": ("train", "trainval", "train-standard"),
    "test": ("test", "val", "valid"),
}
PICKLES = ("LSUN", "LSUNClass")  # they run a pickle that lies beside the images
# Where data sets keep the name of their own folder; only base_folder is relative to the argument `root`.
FOLDERS = (
    "raw_folder", "_base_folder", "_data_path", "_data_dir", "_size_root", "split_folder", "base_folder",
    "root",
)  # fmt: skip
FAKE = ("FakeData", "DatasetFolder", "VisionDataset")


@dataclass
class Config:
    path: str = "???"  # the argument `root` of the data set
    dataset: str = "???"  # its name in torchvision.datasets
    split: Literal["all", "train", "test"] = "all"  # as the data set names them, else by a hash
    test_share: float = 0.1  # of images held out, if the data set has no splits
    options: dict[str, Any] = field(default_factory=dict)  # more arguments of the data set
    download: bool = False
    channels: int = 3  # as backbone.channels


class TorchVision:
    """A data set, or both of its splits one after the other.

    Raises:
        LookupError: if torchvision has no such data set.
        ValueError: if it is not in the folder, or takes other options.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        kind = _class(cfg.dataset)
        wanted = ("train", "test") if cfg.split == "all" else (cfg.split,)
        arguments = [_split_argument(kind, split) for split in wanted]
        named = bool(arguments[0]) and not set(arguments[0][0]) & set(cfg.options)
        # Without splits of its own, or with one that the options select, there is one data set.
        sets = [_open(cfg, kind, tries) for tries in (arguments if named else [[{}]])]
        self._parts = [
            Memory(each, cfg.channels, title=f"{cfg.dataset}{f' {split}' if named else ''}")
            for split, each in zip(wanted, sets, strict=False)
        ]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.classes: Sequence[str] = self._parts[0].classes
        self._rows = choose_split(
            "all" if named else cfg.split, cfg.test_share, self._all_names(), int(self._starts[-1]), None,
            cfg.dataset,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        part, row = self._place(int(self._rows[index]))
        return part[row]

    def name(self, index: int) -> str:
        """The data set, its split and the number of the image, from 0."""
        part, row = self._place(int(self._rows[index]))
        return part.name(row)

    def stamp(self) -> str:
        """A stamp of all files below the folder of the data set, its settings, and the rows of the split."""
        files = sorted({file for part in self._parts for file in _files(part.items, self.cfg.path)})
        settings = self.cfg.dataset, self.cfg.options, self.cfg.channels, list(self.classes)
        return stamp_of(files, (*settings, [part.title for part in self._parts]), self._rows)

    def _place(self, row: int) -> tuple[Memory, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._parts[part], row - int(self._starts[part])

    def _all_names(self) -> Iterator[str]:
        return (part.name(row) for part in self._parts for row in range(len(part)))


build = TorchVision


def _class(name: str) -> Any:
    from torchvision import datasets  # noqa: PLC0415 - a second that only this source needs

    if name in PICKLES:
        raise LookupError(
            f"torchvision's {name} runs a pickle that lies beside the images, so dinokit does not open it. "
            f"Write the images as files or .tar, and set name=folder or name=tar."
        )
    have = [each for each in datasets.__all__ if each not in (*FAKE, *PICKLES)]
    if name not in have:
        raise LookupError(
            f"torchvision.datasets has no '{name}'.{suggest(name, have)} dataset is one of its classes, "
            f"such as CIFAR10, Food101 or EuroSAT."
        )
    return getattr(datasets, name)


def _files(opened: Any, root: str) -> Iterator[Path]:
    """The files of a data set: those below its own folder, if it names one, else all below its root."""
    top = Path(root).expanduser()
    own = [(name, getattr(opened, name)) for name in FOLDERS if hasattr(opened, name)]
    places = [top / place if name == "base_folder" else Path(place) for name, place in own]
    folder = next((place for place in places if place.is_dir()), top)
    return (Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _split_argument(kind: Any, split: str) -> list[dict[str, Any]]:
    """The arguments that may select a split, the likeliest first; none if the data set has no splits."""
    parameters = inspect.signature(kind.__init__).parameters
    if "train" in parameters:
        return [{"train": split == "train"}]
    key = next((key for key in ("split", "image_set") if key in parameters), None)
    return [{key: word} for word in SPLITS[split]] if key else []


def _open(cfg: Config, kind: Any, tries: list[dict[str, Any]]) -> Any:
    parameters = inspect.signature(kind.__init__).parameters
    more = {"download": cfg.download} if "download" in parameters else {}
    first = ""
    for selected in tries:
        try:
            return kind(str(Path(cfg.path).expanduser()), **selected, **more, **cfg.options)
        except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
            first = first or (str(error).strip() or type(error).__name__).splitlines()[0]
    hint = " download=true fetches it." if "download" in parameters and not cfg.download else ""
    raise ValueError(
        f"torchvision's {cfg.dataset} cannot be opened in path='{cfg.path}' (looked from {Path.cwd()}): "
        f"{first.rstrip('.')}.{hint} options={{...}} gives it further arguments."
    )
