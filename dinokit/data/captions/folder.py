"""A folder of images, each with a text file of the same name beside it: one caption a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from dinokit.data.captions import joined
from dinokit.data.decode import ImageLike
from dinokit.data.files import ImageFiles
from dinokit.data.sources import folder
from dinokit.runtime.files import read_regular


@dataclass
class Config:
    path: str = "???"  # a.jpg and a.txt, b.png and b.txt; sub-folders too
    split: Literal["all", "train", "test"] = "all"  # by folders train/ and test/ or val/, else by a hash
    test_share: float = 0.1  # of images held out, if the folders name no splits
    channels: int = 3  # as backbone.channels


class Folder:
    classes: Sequence[str] = ()

    def __init__(self, cfg: Config) -> None:
        """Search the folder; texts are read when they are asked for.

        Raises:
            ValueError: if there is no such folder, no image in it, none in the split, or one without a text.
        """
        settings = folder.Config(cfg.path, "none", cfg.split, cfg.test_share, cfg.channels)
        self._source = cast(ImageFiles, folder.build(settings))
        paths = [self.file(index) for index in range(len(self._source))]
        missing = [path for path in paths if not path.with_suffix(".txt").is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(paths)} images have no text beside them, such as {missing[0]}: "
                f"write its captions, one a line, into {missing[0].with_suffix('.txt')}."
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return self._source[index][0], -1

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """One kind: the lines of the text.

        Raises:
            ValueError: if it has none, or is not UTF-8.
        """
        path = self.file(index).with_suffix(".txt")
        try:
            return [joined(read_regular(path).decode("utf-8-sig").splitlines(), str(path))]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}. Store it as UTF-8.") from None

    def file(self, index: int) -> Path:
        """The file of the image."""
        return self._source.file(index)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.file(index))


build = Folder
