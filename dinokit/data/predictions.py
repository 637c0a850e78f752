"""A few images of a test set with their truth and what was predicted, as one small file for a report.

h, w  of a saved picture     C  channels     H, W  of an image
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dinokit.data.transforms import thumbnail
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.files import atomic, read_regular

NAME = "predictions.npz"
SAMPLES, SIDE = 4, 224  # images that are saved, and pixels of their longer side
LARGEST = 4096  # pixels of a side of a picture in a file that is read


@dataclass
class Sample:
    """One test image, made smaller."""

    name: str
    image: NDArray[np.uint8]  # (h, w, 3)
    truth: NDArray[np.float32]  # (h, w): class ids, -1: not evaluated; or metres, 0: no reading
    predicted: NDArray[np.float32]  # (h, w)


@dataclass
class Predictions:
    """Samples of a test set, with the names of its classes by id; none: the maps are depths."""

    classes: list[str]
    samples: list[Sample] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write them to a file.

        Raises:
            OSError: if it cannot be written.
        """
        arrays = {
            f"{part}_{i}": getattr(sample, part).astype(kind)
            for i, sample in enumerate(self.samples)
            for part, kind in (("image", np.uint8), ("truth", np.float32), ("predicted", np.float32))
        }
        about = json.dumps({"classes": self.classes, "names": [sample.name for sample in self.samples]})
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, about=np.array(about), **arrays)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what save() wrote.

        Raises:
            ValueError: if it is damaged or something else.
            OSError: if it cannot be read.
        """
        data = read_regular(path)
        try:
            with np.load(BytesIO(data), allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                found = cls([str(name) for name in about["classes"]])
                for i, name in enumerate(about["names"]):
                    parts = [file[f"{part}_{i}"] for part in ("image", "truth", "predicted")]
                    found.samples.append(_checked(str(name), *parts))
        except (ValueError, KeyError, TypeError, BadZipFile, EOFError) as error:
            raise ValueError(f"{path} has no predictions that an evaluation wrote: {error}") from None
        return found


def _checked(name: str, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Sample:
    shape = truth.shape
    kinds = [part.dtype.name for part in (image, truth, predicted)]
    if kinds != ["uint8", "float32", "float32"] or predicted.shape != shape or image.shape != (*shape, 3):
        raise ValueError(f"the pictures of {name!r} do not fit together")
    if len(shape) != 2 or not all(0 < side <= LARGEST for side in shape):
        raise ValueError(f"the pictures of {name!r} have the shape {shape}")
    return Sample(name, image, truth, predicted)


class Sampler:
    """Keeps a few of the images that an evaluation sees, in process 0.

    Args:
        out: folder that gets the file; empty: nothing is kept.
        count: images of the test set; process 0 sees every world_size()-th.
        classes: their names by id; none for depths.
    """

    def __init__(self, out: str, count: int, classes: Sequence[str]) -> None:
        self.path = Path(out) / NAME if out and rank() == 0 else None
        self.predictions = Predictions(list(classes))
        seen = range(0, count, world_size())  # by process 0
        draw = random.Random(0)  # at even steps, images of one class only could lie
        parts = [seen[i * len(seen) // SAMPLES : (i + 1) * len(seen) // SAMPLES] for i in range(SAMPLES)]
        self.chosen = {draw.choice(part) for part in parts if part}

    def add(self, index: int, name: str, image: Tensor, truth: Tensor, predicted: Tensor) -> None:
        """Keep an image if it is one of the chosen.

        Args:
            index: in the test set.
            name: of the image.
            image: (C, H, W) uint8.
            truth: (H, W).
            predicted: (H, W), of the same kind.
        """
        if self.path is None or index not in self.chosen:
            return
        small = np.asarray(thumbnail(image.movedim(0, 2).numpy(), SIDE))
        rows, columns = (
            np.arange(new) * old // new for new, old in zip(small.shape[:2], truth.shape, strict=True)
        )
        maps = (x.float().cpu().numpy()[rows][:, columns] for x in (truth, predicted))
        self.predictions.samples.append(Sample(name, small, *maps))

    def save(self) -> None:
        """Write the file.

        Raises:
            OSError: if it cannot be written.
        """
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.predictions.save(self.path)
