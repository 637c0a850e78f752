"""Data sets of the library `datasets` of Hugging Face: on disk, or by name.

    path=FOLDER                 what save_to_disk() wrote, or a folder of Parquet or image files of such a set
    path=USER/NAME              a data set of the hub, which is downloaded into the library's cache once

Images are stored files or arrays; their size and channels are handled as those of a folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinokit.config.registry import suggest
from dinokit.data.decode import ImageLike, as_image, decode
from dinokit.data.files import stamp_of
from dinokit.data.sources import choose_split, class_ids, whole_labels

INSTALL = "pip install datasets"


@dataclass
class Config:
    path: str = "???"  # a folder on disk, or USER/NAME on the hub
    subset: str = ""  # of a data set that has several
    image: str = ""  # column; empty: the first that holds images, else the one called image
    label: str = "label"  # column; may be missing, and "" ignores it
    split: Literal["all", "train", "test"] = "all"  # by the names of its splits, else by a hash
    test_share: float = 0.1  # of images held out, if there are no splits for training and for testing
    channels: int = 3  # as backbone.channels
    max_pixels: int = 89_478_485  # of an image; one with more is unreadable
    orient: Literal["exif", "stored"] = "exif"  # turn images upright by EXIF, or leave them as stored


class HuggingFace:
    """A data set as a source.

    Args:
        cfg: settings.
        data: a Dataset or DatasetDict that is open already, in place of cfg.path.

    Raises:
        ValueError: if `datasets` is missing, there is no such data set, column or split.
    """

    def __init__(self, cfg: Config, data: Any = None) -> None:
        self.cfg, library = cfg, _library()
        opened = _open(cfg, library) if data is None else data
        parts = dict(opened) if isinstance(opened, dict) else {"": opened}
        parts = {str(name): part for name, part in parts.items()}
        self._image = _image_column(cfg, next(iter(parts.values())), library)
        self._parts = [_undecoded(part, self._image, library) for part in parts.values()]
        self._names = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.classes, self._labels = self._read_labels()
        words = [name.partition("[")[0] for name in self._names]
        named = np.repeat(np.arange(len(words)), np.diff(self._starts)), words
        self._rows = choose_split(
            cfg.split, cfg.test_share, self._all_names(), int(self._starts[-1]),
            named if len(words) > 1 else None, cfg.path,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        value, name, label = self._value(index), self.name(index), int(self._labels[self._rows[index]])
        cfg = self.cfg
        if isinstance(value, bytes):
            return decode(value, name, cfg.channels, max_pixels=cfg.max_pixels, orient=cfg.orient), label
        return as_image(value, cfg.channels, name), label

    def stored(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            ValueError: if the column has arrays, or there is no image.
        """
        value = self._value(index)
        if not isinstance(value, bytes):
            raise ValueError(f"{self.name(index)} is an array and no file: set crops.decode=whole.")
        return value

    def name(self, index: int) -> str:
        """The data set, the split and the row in it, counted from 0."""
        return self._name(int(self._rows[index]))

    def stamp(self) -> str | None:
        """A stamp of the library's files, the columns and the rows; None if the data are in memory only."""
        files = [Path(file["filename"]) for part in self._parts for file in part.cache_files]
        if not all(part.cache_files for part in self._parts):
            return None
        settings = self._image, self.cfg.channels, list(self.classes), self.cfg.orient
        return stamp_of(files, settings, self._rows, self._labels)

    def _value(self, index: int) -> Any:
        """The bytes of an image file, or an array or a list of rows."""
        row = int(self._rows[index])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._parts[part][row - int(self._starts[part])][self._image]
        if isinstance(value, dict):
            value = value["bytes"] or (Path(value["path"]).read_bytes() if value.get("path") else None)
        if value is None:
            raise ValueError(f"{self.name(index)} has no image.")
        return np.asarray(value) if isinstance(value, list) else value

    def _name(self, row: int) -> str:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        words = [self.cfg.path, self._names[part], "row", str(row - self._starts[part])]
        return " ".join(filter(None, words))

    def _all_names(self) -> Iterator[str]:
        return (self._name(row) for row in range(int(self._starts[-1])))

    def _read_labels(self) -> tuple[Sequence[str], np.ndarray]:
        column, have = self.cfg.label, self._parts[0].column_names
        if not column or column not in have:
            if column and column != "label":
                raise ValueError(_no_column(self.cfg, column, have, "label"))
            return [], np.full(int(self._starts[-1]), -1, np.int32)
        feature = self._parts[0].features[column]
        values = [value for part in self._parts for value in part[column]]
        if names := getattr(feature, "names", None):
            return list(names), np.array([-1 if value is None else int(value) for value in values], np.int32)
        if str(getattr(feature, "dtype", "")).startswith("float"):
            values = whole_labels(np.array(values, np.float64), column, self.cfg.path).tolist()
        words = ["" if value is None else str(value) for value in values]
        union = list(dict.fromkeys(words))
        number = {word: code for code, word in enumerate(union)}
        return class_ids(np.array([number[word] for word in words], np.int64), union)


build = HuggingFace


def _library() -> Any:
    try:
        return import_module("datasets")
    except ModuleNotFoundError:
        raise ValueError(
            f"Data sets of Hugging Face are read by `datasets`, which is not installed: {INSTALL}"
        ) from None


def _open(cfg: Config, library: Any) -> Any:
    folder = Path(cfg.path).expanduser()
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            return library.load_from_disk(str(folder))
        return library.load_dataset(str(folder) if folder.is_dir() else cfg.path, cfg.subset or None)
    except Exception as error:  # the library, its downloads and its file systems raise all kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"path='{cfg.path}' is no folder that save_to_disk() wrote (looked from {Path.cwd()}), and "
            f"`datasets` cannot open it: {first.rstrip('.')}. Give such a folder, or USER/NAME of the hub, "
            f"with subset= if it has several."
        ) from None


def _image_column(cfg: Config, part: Any, library: Any) -> str:
    have = list(part.column_names)
    images = [name for name, feature in part.features.items() if isinstance(feature, library.Image)]
    column = cfg.image or next(iter(images), "image")
    if column not in have:
        raise ValueError(_no_column(cfg, column, have, "image"))
    return column


def _no_column(cfg: Config, column: str, have: Sequence[str], key: str) -> str:
    near = suggest(column, list(have))
    return f"{cfg.path} has no column '{column}'.{near} It has: {', '.join(have)}. Set {key}=COLUMN."


def _undecoded(part: Any, column: str, library: Any) -> Any:
    """The data set with images as files: dinokit decodes them as those of a folder."""
    if isinstance(part.features[column], library.Image):
        part = part.cast_column(column, library.Image(decode=False))
    return part.with_format(None)
