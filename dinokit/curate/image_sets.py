"""Image sets of a curation (pool, seeds, evaluation images) and their embeddings, which stay on disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dinokit.config import registry
from dinokit.curate.index import Vectors, save
from dinokit.curate.settings import Embed, Share
from dinokit.data.files import Names
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.features import Extraction, ExtractSpec, Subset, fingerprint, images_stamp, open_store
from dinokit.runtime.device import DTYPES, pick_device, pick_precision
from dinokit.weights import load_backbone


def key_of(inputs: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that depend on every input."""
    return sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:8]


class ImageSet:
    """Images by number: a source of images, given embeddings, or both.

    Attributes:
        label: 'pool', 'seeds.NAME' or 'against.NAME'.
        source: the images; None if only embeddings were given.
        embeddings: given embeddings, one an image; None if they are to be computed.
    """

    def __init__(self, label: str, section: Mapping[str, Any] | None, embeddings: str, token: str) -> None:
        """Open the set.

        Raises:
            ValueError, LookupError: if it cannot be opened, or has not one embedding for each image.
        """
        self.label, self.section = label, section
        self.source: ImageSource | None = registry.build("data.sources", section) if section else None
        self.embeddings, self._names, self._files = _read_embeddings(label, embeddings, token)
        assert self.source is not None or self.embeddings is not None, label
        if (
            self.source is not None
            and self.embeddings is not None
            and len(self.source) != len(self.embeddings)
        ):
            raise ValueError(
                f"{label}: there are {len(self.source)} images, but {len(self.embeddings)} embeddings in "
                f"{embeddings}. They must be of the same images in the same order."
            )

    def __len__(self) -> int:
        images = self.source if self.source is not None else self.embeddings
        assert images is not None
        return len(images)

    def name(self, number: int) -> str:
        """The name of an image in the manifest."""
        if self.source is not None:
            return self.source.name(number)
        return self._names[number] if self._names is not None else f"row {number}"

    def picture(self, number: int) -> ImageLike:
        """The image.

        Raises:
            OSError, ValueError: if it cannot be read, or the set has only embeddings.
        """
        if self.source is None:
            raise ValueError(f"{self.label} has only embeddings, and no images.")
        return self.source[number][0]

    def stamp(self) -> dict[str, Any]:
        """Changes whenever an image or a given embedding may have changed."""
        images = images_stamp(self.source) if self.source is not None else None
        status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files]
        return {"section": self.section, "images": len(self), "stamp": images, "files": status}


def _read_embeddings(
    label: str, embeddings: str, token: str
) -> tuple[Vectors | None, Names | None, list[Path]]:
    """Given embeddings, the names of the images if there are any, and the files."""
    if not embeddings:
        return None, None, []
    path = Path(embeddings).expanduser()
    if (path / "store.json").is_file():
        store = open_store(path)
        if token not in store.tokens:
            raise ValueError(f"{path} has no '{token}' tokens, but: {', '.join(store.tokens)}.")
        files = store.files(token)
        return Vectors(files), Names.of(store.iter_names()), files
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"{label}.embeddings={embeddings}: there are no embeddings. Give a .npy file, a folder of .npy "
            f"files, or the folder that `dinokit extract` wrote."
        )
    vectors = Vectors(files)
    names = _read_names(path / "names.txt" if path.is_dir() else path.with_suffix(".txt"))
    if names is not None and len(names) != len(vectors):
        raise ValueError(f"{path}: {len(names)} names, but {len(vectors)} embeddings.")
    return vectors, names, files


def _read_names(path: Path) -> Names | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return Names.of(line.removesuffix("\n") for line in file)


@dataclass
class Embeddings:
    """Embeddings on disk, with the image of each row."""

    vectors: Vectors
    images: np.ndarray  # (m,) int64 the number of each row's image, ascending

    def only(self, mask: np.ndarray) -> "Embeddings":
        """The rows of the images in `mask`, (n,) bool by image."""
        rows = np.flatnonzero(mask[self.images])
        return Embeddings(self.vectors.select(rows), self.images[rows])


class Embedder:
    """A backbone and its settings; the weights are loaded when they are first needed."""

    def __init__(self, weights: str, cfg: Embed) -> None:
        self.weights, self.cfg = weights, cfg
        self._backbone: Any = None

    def stamp(self) -> dict[str, Any]:
        """Everything that the embeddings depend on."""
        return {
            "fingerprint": fingerprint(self.backbone),
            "token": self.cfg.token,
            "size": self.cfg.size,
            "precision": self.cfg.precision,
        }

    @property
    def backbone(self) -> Any:
        """The backbone, on its device."""
        if self._backbone is None:
            self._backbone = load_backbone(self.weights).to(pick_device(self.cfg.device))
        return self._backbone

    def extract(self, image_set: ImageSet, images: np.ndarray, folder: Path, share: Share) -> None:
        """Write the embeddings of some images of a set into a store, or this process's share of them."""
        assert image_set.source is not None
        spec = ExtractSpec(tokens=(self.cfg.token,), size=self.cfg.size)
        metadata = {"weights": self.weights, "data": image_set.section, "precision": self.cfg.precision}
        source = image_set.source
        if len(images) < len(image_set):
            source = Subset(source, images.tolist())
        work = Extraction(folder, self.backbone, source, spec, metadata, clean=share.of == 1)
        precision = DTYPES[pick_precision(self.cfg.precision, pick_device(self.cfg.device))]
        work.run(self.cfg.batch, self.cfg.workers, precision, rank=share.number, world=share.of)


def write_embeddings(
    embedder: Embedder | None, image_set: ImageSet, images: np.ndarray, folder: Path, share: Share
) -> int:
    """Write rows.npy, the images that have an embedding, and the embeddings if none were given.

    Returns:
        How many images have no embedding.
    """
    if image_set.embeddings is not None:
        embedded = images[~image_set.embeddings.select(images).without_direction()]
    else:
        assert embedder is not None
        embedder.extract(image_set, images, folder / "store", share)
        if share.of > 1:
            return 0
        embedded = images[open_store(folder / "store").valid]
    save(folder / "rows.npy", embedded)
    return len(images) - len(embedded)


def read_embeddings(image_set: ImageSet, images: np.ndarray, folder: Path, token: str) -> Embeddings:
    """Open what write_embeddings() wrote.

    Raises:
        ValueError: if no image has an embedding.
    """
    embedded = np.load(folder / "rows.npy")
    if not len(embedded):
        raise ValueError(f"{image_set.label}: none of its {len(images)} images has an embedding.")
    if image_set.embeddings is not None:
        return Embeddings(image_set.embeddings.select(embedded), embedded)
    store = open_store(folder / "store")
    rows = np.flatnonzero(np.isin(images, embedded, assume_unique=True))
    return Embeddings(Vectors(store.files(token), rows), embedded)


def thumbnail(picture: ImageLike, side: int) -> Image.Image:
    """An RGB image, no side longer than `side` pixels.

    Of more than three channels the first three are shown, of 16 bits the upper 8.
    """
    if not isinstance(picture, Image.Image):
        array = picture[..., :3] if picture.shape[2] >= 3 else picture[..., :1].repeat(3, axis=2)
        top = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
        picture = Image.fromarray((array.astype(np.float32) * (255 / top)).astype(np.uint8))
    return ImageOps.contain(picture.convert("RGB"), (side, side))
