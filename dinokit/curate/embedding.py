"""The stage `embed`: every set's embeddings, computed or given, with the number of each row's image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate.sets import ImageSet
from dinokit.curate.settings import Embed
from dinokit.curate.stages import Share, save
from dinokit.curate.vectors import Vectors
from dinokit.features import Extraction, ExtractSpec, Subset, fingerprint, open_store
from dinokit.runtime.device import DTYPES, pick_device, pick_precision
from dinokit.weights import load_backbone


@dataclass
class Embedded:
    """Rows on disk, and whose they are."""

    vectors: Vectors
    images: np.ndarray  # (m,) int64 the image of each row, ascending

    def only(self, wanted: np.ndarray) -> "Embedded":
        """The rows of images that are `wanted`, (n,) bool by image."""
        places = np.flatnonzero(wanted[self.images])
        return Embedded(self.vectors.at(places), self.images[places])


class Embedder:
    """A backbone and how it is shown images; loaded once it is needed."""

    def __init__(self, weights: str, cfg: Embed) -> None:
        self.weights, self.cfg = weights, cfg
        self._backbone: Any = None

    def stamp(self) -> dict[str, Any]:
        """What its embeddings depend on."""
        return {
            "fingerprint": fingerprint(self.backbone),
            "token": self.cfg.token,
            "size": self.cfg.size,
            "precision": self.cfg.precision,
        }

    @property
    def backbone(self) -> Any:
        """On the device."""
        if self._backbone is None:
            self._backbone = load_backbone(self.weights).to(pick_device(self.cfg.device))
        return self._backbone

    def write(self, one: ImageSet, places: np.ndarray, folder: Path, share: Share) -> None:
        """The embeddings of a set's images at `places`, or this process's part of them."""
        assert one.source is not None
        spec = ExtractSpec(tokens=(self.cfg.token,), size=self.cfg.size)
        metadata = {"weights": self.weights, "data": one.section, "precision": self.cfg.precision}
        source = Subset(one.source, places.tolist()) if len(places) < len(one) else one.source
        work = Extraction(folder, self.backbone, source, spec, metadata, clean=share.of == 1)
        precision = DTYPES[pick_precision(self.cfg.precision, pick_device(self.cfg.device))]
        work.run(self.cfg.batch, self.cfg.workers, precision, rank=share.number, world=share.of)


def embed(embedder: Embedder | None, one: ImageSet, places: np.ndarray, folder: Path, share: Share) -> int:
    """Leave rows.npy: the images of the set that have an embedding. Returns how many have none."""
    if one.given is not None:
        images = places[~one.given.at(places).broken()]
    else:
        assert embedder is not None
        embedder.write(one, places, folder / "store", share)
        if share.of > 1:
            return 0
        images = places[open_store(folder / "store").valid]
    save(folder / "rows.npy", only=images)
    return len(places) - len(images)


def embedded(one: ImageSet, places: np.ndarray, folder: Path, token: str) -> Embedded:
    """What embed() left.

    Raises:
        ValueError: if no image has an embedding.
    """
    images = np.load(folder / "rows.npy")
    if not len(images):
        raise ValueError(f"{one.label}: none of its {len(places)} images can be read, or has an embedding.")
    if one.given is not None:
        return Embedded(one.given.at(images), images)
    store = open_store(folder / "store")
    rows = np.flatnonzero(np.isin(places, images, assume_unique=True))
    return Embedded(Vectors(store.files(token), rows), images)
