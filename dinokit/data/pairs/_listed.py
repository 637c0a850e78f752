"""Depth data sets that come as a list of pairs: a line is the path of an image and that of its depth map."""

from pathlib import Path

from dinokit.data.pairs import Pairs
from dinokit.data.pairs._files import PairedFiles, from_list, parts, read_lines
from dinokit.data.pairs._maps import depth_maps


def listed(
    root: Path, images: str, maps: str, lists: tuple[str, str], split: str, scale: float, channels: int
) -> Pairs:
    """The pairs that the lists name.

    Args:
        root: folder of the data set; the lists lie in it.
        images: sub-folder that the images' paths begin in.
        maps: sub-folder that the maps' paths begin in.
        lists: the files for training and test.
        split: "train", "test", or "all".
        scale: stored units in a metre.
        channels: as backbone.channels.

    Raises:
        ValueError: if a list is not there or names no pair, or its first pair is not where it should be.
    """
    files = [root / name for name in parts(split, *lists)]
    lines = [line for file in files for line in read_lines(file)]
    pictures, targets = from_list(lines, " and ".join(map(str, files)))
    for path in (root / images / pictures[0], root / maps / targets[0]):
        if not path.is_file():
            raise ValueError(f"{files[0]} names {path}, which is not there: give the folder it lies below.")
    return PairedFiles(
        root / images, root / maps, pictures, targets, range(len(pictures)), depth_maps(scale), channels
    )
