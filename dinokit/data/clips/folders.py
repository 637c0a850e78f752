"""Clips in folders, one a class: CLASS/clip.mp4, or CLASS/clip/*.png with a file for each frame.

With folders `train` and `test` (or `val`), these are the splits. Otherwise every `held_out`th clip of a class
is a test clip. What is no clip is left out, and the log says how many files of which kind; hidden files and
folders are ignored.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.config.registry import check_at_least
from dinokit.data.clip_files import clip_at
from dinokit.data.clips import Clip, Clips, natural, split_of
from dinokit.data.decode import suffix
from dinokit.data.files import report_left_out

SPLITS = {"train": ("train", "training"), "test": ("test", "val", "validation")}


@dataclass
class Config:
    path: str = "???"  # a folder with one folder a class, or with folders train and test that have these
    held_out: int = 5  # without folders train and test: every so many-th clip of a class is for the test
    split: Literal["auto", "train", "test"] = (
        "auto"  # auto: that of the section train or test; elsewhere test
    )

    def __post_init__(self) -> None:
        check_at_least(self, held_out=2)


def build(cfg: Config) -> Clips:
    """The clips of a split, in the natural order of their names.

    Raises:
        ValueError: if there is no such folder, no class in it, or a class without clips.
    """
    root = Path(cfg.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"path={cfg.path} is not a folder (looked from {Path.cwd()}).")
    names = {folder.name.lower(): folder for folder in root.iterdir() if folder.is_dir()}
    parts = {
        split: next((names[word] for word in words if word in names), None) for split, words in SPLITS.items()
    }
    given = [split for split, folder in parts.items() if folder is not None]
    if len(given) == 1:
        missing = "test" if given == ["train"] else "train"
        raise ValueError(f"{root} has a folder for {given[0]}, and none for {missing}: give both, or none.")
    top = parts[split_of(cfg.split)] or root
    classes = [entry for entry in _entries(top) if entry.is_dir()]
    others = [entry for entry in _entries(top) if not entry.is_dir()]
    if given:
        others += [entry for entry in _entries(root) if entry not in parts.values()]
    if not classes:
        raise ValueError(
            f"{top} has no folders: clips are expected as {top}/CLASS/clip.mp4, or {top}/CLASS/clip/*.png."
        )
    clips: list[Clip] = []
    for label, folder in enumerate(classes):
        paths = _entries(folder)
        found_at = {path: clip for path in paths if (clip := clip_at(path, label)) is not None}
        found = list(found_at.values())
        others += [path for path in paths if path not in found_at]
        if not found:
            raise ValueError(
                f"{folder} has no clips: a clip is a video file or a folder of images, and it has "
                f"{len(paths)} other entries."
            )
        if not given:
            test = [i % cfg.held_out == cfg.held_out - 1 for i in range(len(found))]
            found = [
                clip
                for clip, held in zip(found, test, strict=True)
                if held == (split_of(cfg.split) == "test")
            ]
        clips += found
    if not clips:
        raise ValueError(
            f"{root} has fewer than held_out={cfg.held_out} clips in every class, so none is for the test: "
            f"lower held_out, or make folders train and test."
        )
    kinds = Counter("folder without images" if path.is_dir() else suffix(path.name) for path in others)
    report_left_out(top, kinds, "clips")
    return Clips(tuple(folder.name for folder in classes), clips)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, in the natural order of names, without hidden files and folders."""
    found = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(found, key=lambda entry: natural(entry.name))
