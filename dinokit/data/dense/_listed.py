"""Depth data sets that come as a list of pairs: a line is the path of an image and that of its depth map."""

from pathlib import Path
from typing import Literal, Protocol

from dinokit.data.dense import DenseSource
from dinokit.data.dense._files import PairedFiles, from_list, parts, read_lines
from dinokit.data.dense._maps import depth_maps


class Listed(Protocol):
    """The keys of such a data set."""

    path: str  # folder of the data set; the lists lie in it
    images: str  # sub-folder that the images' paths begin in
    maps: str  # sub-folder that the depth maps' paths begin in
    train: str  # list; a line is IMAGE DEPTH and what follows
    test: str
    depth_scale: float  # stored units in a metre
    split: Literal["all", "train", "test"]
    channels: int  # as backbone.channels


def listed(cfg: Listed) -> DenseSource:
    """The pairs that the lists name.

    Raises:
        ValueError: if a list is not there or names no pair, or its first pair is not where it should be.
    """
    root = Path(cfg.path).expanduser()
    files = [root / name for name in parts(cfg.split, cfg.train, cfg.test)]
    lines = [line for file in files for line in read_lines(file)]
    pictures, targets = from_list(lines, " and ".join(map(str, files)))
    for path in (root / cfg.images / pictures[0], root / cfg.maps / targets[0]):
        if not path.is_file():
            raise ValueError(f"{files[0]} names {path}, which is not there: give the folder it lies below.")
    return PairedFiles(
        root / cfg.images, root / cfg.maps, pictures, targets,
        range(len(pictures)), depth_maps(cfg.depth_scale), cfg.channels,
    )  # fmt: skip
