"""Videos with captions in a list: a CSV file with columns path and label, where the label is the caption.

The list is that of the clips `listed`: with start and end (seconds) and split if wanted; a path is a video
file or a folder of frames. A video with several captions has a line for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dinokit.data.captions import joined
from dinokit.data.clips import Clip, listed
from dinokit.data.decode import ImageLike


@dataclass
class Config:
    path: str = "???"  # a CSV file with a line of column names: path, label, and if wanted start, end, split
    split: Literal["all", "train", "test"] = "all"  # by the column split; without one all videos are in each


class Videos:
    classes: Sequence[str] = ()

    def __init__(self, cfg: Config) -> None:
        """Read the list; no video is opened.

        Raises:
            ValueError: if there is no such list, or a line of it is wrong; the message has its number.
        """
        found = listed.build(listed.Config(cfg.path, cfg.split))
        self._clips = {clip.name: clip for clip in found.clips}
        self._names = [*self._clips]
        self._captions: dict[str, list[str]] = {each: [] for each in self._names}
        for clip in found.clips:
            said = self._captions[clip.name]
            said += [text for text in joined([found.classes[clip.label]], clip.name) if text not in said]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The frame in the middle.

        Raises:
            OSError, ValueError: if the video cannot be read.
        """
        clip = self.clip(index)
        return clip.frames([len(clip) // 2])[0], -1

    def clip(self, index: int) -> Clip:
        """All frames."""
        return self._clips[self._names[index]]

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """One kind: those of the video."""
        return [self._captions[self._names[index]]]

    def name(self, index: int) -> str:
        """Its path, with its seconds where it is a part."""
        return self._names[index]


build = Videos
