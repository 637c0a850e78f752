"""Principal components of patch features: as colours, and as a foreground apart from the background.

The first component separates objects from background in features of a trained backbone (DINOv2, arXiv
2304.07193, section 7.5).

h, w  patches down and across     D  width of features     n  patches of all images
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dinokit.config.values import first_line
from dinokit.runtime.files import atomic, read_regular
from dinokit.viz.draw import Picture, to_pictures

CLIPPED = 0.02  # share of the values of a principal component that may lie outside its colours, at each end
FITTED = 100_000  # patches that principal components are fitted to, at most
COHERENT = 0.25  # least coherence() of a mask that shows objects
BASIS = "pca_basis.safetensors"  # in a run's folder: the principal components of its pictures
FADED = 0.5  # of the contrast that other components would give, below which those of a run are replaced
SAME_COLOURS = "The same feature has the same colour in every picture of this run."
NOT_KEPT = "Later pictures of this run may have other colours, because those of this one could not be saved"


@dataclass
class Components:
    """Principal axes of rows, and the range of the coordinates along each."""

    mean: Tensor  # (D,)
    axes: Tensor  # (D, count)
    low: Tensor  # (count,)
    high: Tensor  # (count,)

    @classmethod
    def fit(cls, x: Tensor, count: int = 3) -> Self:
        """Those of rows x (n, D) float32, the strongest first."""
        mean = x.mean(dim=0)
        centred = x - mean
        fitted = centred[:: len(x) // FITTED + 1]
        _, vectors = torch.linalg.eigh(fitted.T @ fitted)  # by eigenvalue, the largest last
        axes = vectors[:, -count:].flip(1)
        # An axis has no sign itself.
        axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        y = fitted @ axes
        low, high = (torch.quantile(y, q, dim=0) for q in (CLIPPED, 1 - CLIPPED))
        return cls(mean, axes, low, high)

    def coordinates(self, x: Tensor) -> Tensor:
        """The coordinates of rows (n, D): (n, count)."""
        return (x - self.mean) @ self.axes

    def shares(self, x: Tensor) -> Tensor:
        """Coordinates of rows (n, D) as shares of their range, clipped to [0, 1]: (n, count)."""
        return ((self.coordinates(x) - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)


@dataclass
class Basis:
    """Principal components by which features of images are coloured; the same ones make pictures comparable.

    The sign of the first component has no meaning: the foreground is the side that has fewer of the patches
    at the edges of the images that the basis was fitted to.
    """

    every: Components  # of all patches
    front: Components  # of those in the foreground
    sign: float  # of the first component in the foreground

    @classmethod
    def fit(cls, features: Sequence[Tensor]) -> Self:
        """The components of the features (h, w, D) of images, of all together."""
        flat = _flat(features)
        every = Components.fit(flat)
        first = every.coordinates(flat)[:, 0]
        positive = _unflat(first > 0, features)
        edges = torch.cat([torch.cat([m[0], m[-1], m[:, 0], m[:, -1]]) for m in positive])
        sign = -1.0 if edges.float().mean() > 0.5 else 1.0
        front = flat[sign * first > 0]
        return cls(every, Components.fit(front) if len(front) > 3 else every, sign)

    def masks(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Which patches (h, w) of features (h, w, D) are foreground, by the sign of the first component."""
        return _unflat(self.sign * self.every.coordinates(_flat(features))[:, 0] > 0, features)

    def colours(self, features: Sequence[Tensor], foreground: bool = False) -> list[Picture]:
        """The first three components of features (h, w, D) as red, green and blue: (h, w, 3).

        With `foreground` the background is black, and the colours are those of the components of the rest.
        """
        flat = _flat(features)
        shares = (self.front if foreground else self.every).shares(flat)
        if foreground:
            shares *= torch.cat([mask.flatten() for mask in self.masks(features)])[:, None]
        return [to_pictures(part.movedim(2, 0)[None])[0] for part in _unflat(shares, features)]

    def separates(self, features: Sequence[Tensor]) -> bool:
        """Whether the foreground of features (h, w, D) consists of areas, not of single patches."""
        return coherence(self.masks(features)) > COHERENT

    def contrast(self, features: Sequence[Tensor]) -> float:
        """Mean standard deviation of the colours of features (h, w, D), of 0 to 1: 0 is one colour."""
        return float(self.every.shares(_flat(features)).std(dim=0).mean())

    def save(self, path: str | Path) -> None:
        """Write it to a file of safetensors.

        Raises:
            OSError: if it cannot be written.
        """
        parts = {"every": self.every, "front": self.front}
        tensors = {
            f"{name}.{key}": x.contiguous() for name, part in parts.items() for key, x in vars(part).items()
        }
        with atomic(path) as temporary:
            temporary.write_bytes(save({**tensors, "sign": torch.tensor(self.sign)}))

    @classmethod
    def load(cls, path: str | Path, width: int) -> Self:
        """Read what save() wrote.

        Args:
            path: the file.
            width: D of the features that it is for.

        Raises:
            ValueError: if it is damaged or something else, or for features of another width.
            OSError: if it cannot be read.
        """
        shapes = {"mean": (width,), "axes": (width, 3), "low": (3,), "high": (3,)}
        data = read_regular(path)
        try:
            tensors = load(data)
            found = {
                name: {key: tensors[f"{name}.{key}"].float() for key in shapes} for name in ("every", "front")
            }
            sign = float(tensors["sign"])
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} has no principal components that viz pca or a report wrote ({error}). Give another "
                f"file, or one that does not exist yet."
            ) from None
        wrong = [
            x.shape for part in found.values() for key, x in part.items() if tuple(x.shape) != shapes[key]
        ]
        if wrong:
            raise ValueError(
                f"{path} has principal components for features of another width than {width}: it was made "
                f"with another backbone. Give another file, or one that does not exist yet."
            )
        return cls(Components(**found["every"]), Components(**found["front"]), sign)


def run_basis(features: Sequence[Tensor], path: Path) -> tuple[Basis, str]:
    """The components for pictures of a run's features (h, w, D), and in words where they are from.

    Those of its first pictures are in the file `path`, so that the colours of two checkpoints are comparable.
    If they no longer show anything of these features, they are replaced.
    """
    new = Basis.fit(features)
    try:
        basis = Basis.load(path, features[0].shape[2])
    except FileNotFoundError:
        text = SAME_COLOURS
    except (OSError, ValueError):
        text = (
            f"The colours are new: {path}, which has those of earlier pictures, is damaged or for features "
            f"of another width, and was replaced. Earlier pictures have other colours."
        )
    else:
        if basis.contrast(features) >= FADED * new.contrast(features):
            return basis, SAME_COLOURS
        text = (
            "The colours are new: the features have changed so much that those of earlier pictures of this "
            "run show little. Earlier pictures have other colours."
        )
    try:
        new.save(path)
    except OSError as error:  # a run in a folder that cannot be written has its picture all the same
        return new, f"{NOT_KEPT}: {first_line(error)}."
    return new, text


def coherence(masks: Sequence[Tensor]) -> float:
    """How much more often adjacent patches of masks (h, w) agree than by chance: noise 0, uniform areas 1."""
    pairs = [torch.cat([(m[1:] == m[:-1]).flatten(), (m[:, 1:] == m[:, :-1]).flatten()]) for m in masks]
    share = float(torch.cat([m.flatten() for m in masks]).float().mean())
    by_chance = share**2 + (1 - share) ** 2
    return (float(torch.cat(pairs).float().mean()) - by_chance) / max(1 - by_chance, 1e-9)


def _flat(features: Sequence[Tensor]) -> Tensor:
    """Features (h, w, D) as rows (n, D) float32."""
    return torch.cat([x.flatten(0, 1) for x in features]).float()


def _unflat(rows: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Rows (n, ...) of the patches of features as (h, w, ...) of each image."""
    parts = rows.split([x.shape[0] * x.shape[1] for x in features])
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(parts, features, strict=True)]
