"""Images with captions in .tar files, as WebDataset has them: KEY.jpg beside KEY.txt, or a field of KEY.json.

The files are read where they are, without unpacking, by the source of images `tar`, with its checks for
damage. A text is read when it is asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dinokit.config.registry import suggest
from dinokit.data.captions import joined
from dinokit.data.decode import ImageLike
from dinokit.data.sources import tar


@dataclass
class Config:
    path: str = "???"  # a .tar, a folder of them, a glob, shard-{000..011}.tar, {a,b}.tar, or A.tar::B.tar
    # of KEY.json, a text or a list of them, such as caption; empty: KEY.txt has the captions, one a line
    field: str = ""
    split: Literal["all", "train", "test"] = "all"  # by files named train and test or val, else by a hash
    test_share: float = 0.1  # of images held out, if the files name no splits
    channels: int = 3  # as backbone.channels


class Tar:
    classes: Sequence[str] = ()

    def __init__(self, cfg: Config) -> None:
        """Read the headers.

        Raises:
            ValueError: if there is no such file, one is compressed or damaged, there is no image, or an image
                has no text.
        """
        self._field, self._suffix = cfg.field, ".json" if cfg.field else ".txt"
        settings = tar.Config(cfg.path, cfg.split, cfg.test_share, cfg.channels)
        self._source = tar.Tar(settings, self._suffix)
        missing = [index for index in range(len(self)) if not self._source.text_size(index)]
        if missing:
            other = "set field=caption to read that field of KEY.json"
            other = other if self._suffix == ".txt" else "leave out field= to read KEY.txt"
            raise ValueError(
                f"{len(missing)} of {len(self)} images have no {self._suffix} beside them with something in "
                f"it, such as {self.name(missing[0])}: {other}, or leave these images out of the files."
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return self._source[index][0], -1

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """One kind: the lines of the text, or what the field has.

        Raises:
            ValueError: if it has none, or is not UTF-8 or JSON.
        """
        place = f"{self.name(index)}, {self._suffix}"
        try:
            text = self._source.text(index).decode("utf-8-sig")
            found: Any = json.loads(text) if self._field else text.splitlines()
        except (ValueError, RecursionError) as error:  # of UTF-8 and of JSON
            raise ValueError(
                f"{place} beside it cannot be read: {error}. Repair it, or leave the image out."
            ) from None
        if self._field:
            have = [*found] if isinstance(found, dict) else []
            if self._field not in have:
                raise ValueError(
                    f"{place}: there is no field '{self._field}'; there is: {', '.join(have) or 'none'}."
                    f"{suggest(self._field, have)} Give field= one that each image has."
                )
            found = found[self._field]
            found = found if isinstance(found, list) else [found]
        return [joined(found, place)]

    def name(self, index: int) -> str:
        """The file and the member of the image."""
        return self._source.name(index)


build = Tar
