"""SPair-71k as it is delivered (Min et al., arXiv 1908.10543), and data in the same layout.

JPEGImages/CATEGORY/IMAGE.jpg, PairAnnotation/{trn,val,test}/PAIR.json, and the names of the pairs in
Layout/{large,small}/{trn,val,test}.txt. Images of a pair show two objects of a category.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dinokit.data.decode import ImageLike, decode
from dinokit.data.files import check_below, existing
from dinokit.data.pairs import Pair
from dinokit.runtime.files import read_regular

FOLDERS = {"train": "trn", "val": "val", "test": "test"}


@dataclass
class Config:
    path: str = "???"  # the folder SPair-71k
    layout: Literal["large", "small"] = "large"  # large: all 12,234 pairs of the test split
    split: Literal["train", "val", "test"] = "test"
    channels: int = 3  # as backbone.channels


class SPair:
    def __init__(self, cfg: Config) -> None:
        """Read the list of pairs.

        Raises:
            ValueError: if it does not exist, or is empty.
        """
        self._root, self._channels, split = existing(cfg.path), cfg.channels, FOLDERS[cfg.split]
        self._annotations = self._root / "PairAnnotation" / split
        listed = self._root / "Layout" / cfg.layout / f"{split}.txt"
        if not listed.is_file():
            raise ValueError(
                f"path='{self._root}' is not laid out as SPair-71k: there is no "
                f"{listed.relative_to(self._root)}. It lists the pairs, one a line; "
                f"PAIR.json is in PairAnnotation/{split}, the images are in JPEGImages/CATEGORY."
            )
        self._names = listed.read_text(encoding="utf-8").split()
        if not self._names:
            raise ValueError(f"{listed} lists no pair.")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Pair:
        path = self._file(index)
        try:
            about = json.loads(read_regular(path))
            images = [f"{about['category']}/{about[key]}" for key in ("src_imname", "trg_imname")]
            points = np.array([about["src_kps"], about["trg_kps"]], np.float64)
            x0, y0, x1, y1 = (float(edge) for edge in about["trg_bndbox"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no annotation of a pair as SPair-71k has them: {error!r}.") from None
        points = points.reshape(2, 0, 2) if not points.size else points
        if points.ndim != 3 or points.shape[2] != 2 or max(x1 - x0, y1 - y0) <= 0:
            raise ValueError(f"{path}: src_kps and trg_kps must be lists of [x, y], trg_bndbox x0 y0 x1 y1.")
        for name in images:
            check_below(name, path)
        first, second = (self._image(self._root / "JPEGImages" / name) for name in images)
        return Pair(first, second, points, np.full(points.shape[1], max(x1 - x0, y1 - y0)))

    def name(self, index: int) -> str:
        """The path of the annotation."""
        return str(self._file(index))

    def _file(self, index: int) -> Path:
        return self._annotations / f"{self._names[index]}.json"

    def _image(self, path: Path) -> ImageLike:
        return decode(read_regular(path), str(path), self._channels, orient="stored")  # as the points


build = SPair
