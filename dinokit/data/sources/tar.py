"""Images in .tar files, without unpacking them.

All headers are read when the source is opened, one for each member (about 80 seconds for a million images
with labels); then an image costs one read at a known position, in any order. A file `KEY.cls` beside
`KEY.jpg`, or `KEY.json` with "label" or "cls", gives the label, as in WebDataset.
"""

import json
import os
import tarfile
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from dinokit.data.decode import SUFFIXES, ImageLike, decode, suffix
from dinokit.data.files import Names, report_left_out, shards, stamp_of, wrong_kind
from dinokit.data.sources import Categorical, choose_split, class_ids, splits_of_files
from dinokit.runtime.files import open_regular

_LABEL = 1 << 20  # bytes that are read of a label file
_BLOCK = 1 << 24  # bytes read at a time
_OPEN = 128  # files that a process has open at the same time; systems allow about a thousand


@dataclass
class Config:
    path: str = "???"  # a .tar, a folder of them, a glob, shard-{000..011}.tar, {a,b}.tar, or A.tar::B.tar
    split: Literal["all", "train", "test"] = "all"  # by files named train and test or val, else by a hash
    test_share: float = 0.1  # of images held out, if the files name no splits
    channels: int = 3  # as backbone.channels
    max_pixels: int = 89_478_485  # of an image; one with more is unreadable
    orient: Literal["exif", "stored"] = "exif"  # turn images upright by EXIF, or leave them as stored


class Tar:
    def __init__(self, cfg: Config, text: str = "") -> None:
        """Read the headers.

        Args:
            cfg: the settings.
            text: a suffix such as .txt, of the texts beside the images that text() reads; then there are no
                labels.

        Raises:
            ValueError: if there is no such file, one is compressed or damaged, there is no image, or none in
                the split; or if a key has two texts.
        """
        self._files = shards(cfg.path, ".tar")
        self._channels, self.max_pixels, self.orient = cfg.channels, cfg.max_pixels, cfg.orient
        index = _Index(text)
        self._members = Names.of(
            name for number, file in enumerate(self._files) for name in index.read(number, file)
        )
        if not len(self._members):
            raise ValueError(f"path='{cfg.path}': {len(self._files)} tar file(s) without an image.")
        report_left_out(cfg.path, index.others, f"images or {text} files" if text else "images")
        self._shards, self._offsets, self._sizes = index.positions()
        self._texts, self._lengths = np.array(index.texts, np.int64), np.array(index.lengths, np.int64)
        self.classes: Sequence[str]
        self.classes, self._labels = class_ids(index.labels.codes, index.labels.words)
        named = None if cfg.split == "all" else (self._shards, splits_of_files(self._files))
        hashed = (
            f"{self._files[shard].name}/{name}"
            for shard, name in zip(self._shards, self._members, strict=True)
        )
        self._rows = choose_split(cfg.split, cfg.test_share, hashed, len(self._members), named, cfg.path)
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # by shard, in the order of their last use

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        data, name, label = self.stored(index), self.name(index), int(self._labels[self._rows[index]])
        return decode(data, name, self._channels, max_pixels=self.max_pixels, orient=self.orient), label

    def stored(self, index: int) -> bytes:
        """The content of the member.

        Raises:
            OSError: if it is cut short.
        """
        row = self._rows[index]
        return self._read(index, int(self._offsets[row]), int(self._sizes[row]))

    def text(self, index: int) -> bytes:
        """The content of the text beside the image; none if there is no such member.

        Raises:
            OSError: if it is cut short.
        """
        return self._read(index, int(self._texts[self._rows[index]]), self.text_size(index))

    def text_size(self, index: int) -> int:
        """The bytes of the text beside the image; 0 if there is none."""
        return int(self._lengths[self._rows[index]])

    def _read(self, index: int, place: int, size: int) -> bytes:
        data = os.pread(self._open(int(self._shards[self._rows[index]])), size, place)
        if len(data) < size:
            raise OSError(
                f"{self.name(index)} is cut short: the file ends after {len(data)} of its {size} bytes."
            )
        return data

    def stored_size(self, index: int) -> int:
        """The bytes of the member."""
        return int(self._sizes[self._rows[index]])

    def name(self, index: int) -> str:
        """The file and the member."""
        row = self._rows[index]
        return f"{self._files[self._shards[row]]}: {self._members[row]}"

    def stamp(self) -> str:
        """A stamp of the files and of the members of the split."""
        settings = self._channels, list(self.classes), self.orient
        return stamp_of(self._files, settings, self._rows, self._labels)

    def _open(self, shard: int) -> int:
        """A descriptor of the file. Forked processes can share it: pread() does not move its position."""
        if shard not in self._descriptors:
            if len(self._descriptors) == _OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._files[shard], os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():  # none if __init__ failed
            os.close(descriptor)


build = Tar


class _Index:
    """The positions of the images in all files, in columns, and of the texts of a suffix beside them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.texts, self.lengths = array("q"), array("q")  # first bytes and sizes; of no text both are 0
        self.labels = Categorical()
        self.others: Counter[str] = Counter()  # members of other suffixes
        self._shards, self._offsets, self._sizes = array("i"), array("q"), array("q")

    def read(self, shard: int, file: Path) -> Iterator[str]:
        """Index the images of one file; yields their names."""
        labels: dict[str, str] = {}  # by key
        names: list[str] = []
        texts: dict[str, tuple[int, int]] = {}  # by key
        try:
            with open_regular(file) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
                for member in _members(tar):
                    kind = suffix(member.name)
                    if not member.isreg() or member.issparse():
                        self.others["links and sparse files"] += not member.isdir()
                    elif kind in SUFFIXES:
                        names.append(member.name)
                        self._shards.append(shard)
                        self._offsets.append(member.offset_data)
                        self._sizes.append(member.size)
                    elif self.text and kind == self.text:
                        _add_text(texts, member, member.name[: -len(kind)])
                    elif not self.text and kind in (".cls", ".json"):
                        content = tar.extractfile(member)
                        assert content is not None, member.name
                        labels[member.name[: -len(kind)]] = _label(content.read(_LABEL), kind, member.name)
                    else:
                        self.others[kind] += 1
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise _tar_error(file, error) from error
        for name in names:
            folder, slash, base = name.rpartition("/")
            stem, key = name[: name.rfind(".")], folder + slash + base.partition(".")[0]
            self.labels.add(labels.get(stem, labels.get(key, "")))
            if self.text:
                place, size = texts.get(stem, texts.get(key, (0, 0)))
                self.texts.append(place)
                self.lengths.append(size)
        yield from names

    def positions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) each: the number of the file, the first byte, how many bytes."""
        return (
            np.array(self._shards, np.int32),
            np.array(self._offsets, np.int64),
            np.array(self._sizes, np.int64),
        )


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    library: Any = tar
    last, end = "", -1
    while (member := tar.next()) is not None:
        library.members = []  # else it would store an object for each
        if library.offset <= end:  # a negative size: the library would read the same members for ever
            raise ValueError(f"behind its member {last} follows one of a negative size")
        last, end = member.name, library.offset
        if not Path(member.name).name.startswith("."):
            yield member

    _check_end(library.fileobj, library.offset, last)


def _check_end(file: IO[bytes], end: int, last: str) -> None:
    """Refuse anything but a short tail of zeros behind the last member: the library passes over the rest.

    Raises:
        ValueError: with the member before it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(end)
    zeros = end
    while block := file.read(_BLOCK):
        if block.strip(b"\0"):
            zeros += len(block) - len(block.lstrip(b"\0"))
            what = "it is damaged there" if zeros == end else "archives were joined, or it is damaged there"
            raise ValueError(
                f"behind its member {last} follow {size - end} bytes that are no members: {what}"
            )
        zeros += len(block)
    # Archives are padded to a multiple of 10,240 bytes or a larger power of two, behind two blocks of 512.
    if size == end or zeros - end >= max(10_240, size & -size) + 1024:
        what = f"{size - end:,} bytes of zeros" if size > end else "no end mark"
        raise ValueError(f"behind its member {last} follows {what}: later members are lost")


def _add_text(texts: dict[str, tuple[int, int]], member: tarfile.TarInfo, key: str) -> None:
    if key in texts:
        raise ValueError(f"its member {member.name} is there twice")
    texts[key] = member.offset_data, member.size


def _label(content: bytes, kind: str, name: str) -> str:
    if kind == ".cls":
        return content.decode().strip()
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"its member {name} is not JSON: {error}") from None
    label = values.get("label", values.get("cls")) if isinstance(values, dict) else None
    return "" if label is None else str(label)


def _tar_error(file: Path, error: Exception) -> ValueError:
    with file.open("rb") as head:
        magic = head.read(6)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    for start, tool in packed.items():
        if magic.startswith(start):
            return ValueError(
                f"{file} is compressed, so single images in it cannot be read. Decompress it with: {tool} -d"
            )
    if file.suffix.lower() != ".tar":
        return wrong_kind(file, "a .tar file")
    return ValueError(f"{file} is damaged or cut short: {error}")
