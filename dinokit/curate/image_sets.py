"""Sets of images (pool, seeds, evaluation images), their embeddings on disk, and search by image in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dinokit.config import registry
from dinokit.curate.index import Searcher, Vectors, save
from dinokit.curate.settings import Embed, Index, Share
from dinokit.data.files import Names
from dinokit.data.sources import ImageLike, ImageSource, images_stamp
from dinokit.data.sources.memory import as_source
from dinokit.data.transforms import thumbnail
from dinokit.features import (
    Extraction,
    ExtractSpec,
    Subset,
    device_of,
    extract_to,
    fingerprint,
    open_store,
)
from dinokit.models import Backbone
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
        self._check_order(embeddings)

    def _check_order(self, embeddings: str) -> None:
        """Refuse given embeddings whose names are those of the images in another order."""
        if self.source is None or self._names is None:
            return
        for number in range(len(self.source)):
            image, name = self.source.name(number), self._names[number]
            if _file_name(image) == _file_name(name):
                continue
            if any(
                _file_name(self.source.name(other)) == _file_name(name) for other in range(len(self.source))
            ):
                raise ValueError(
                    f"{self.label}: the embeddings in {embeddings} are in another order than the images: "
                    f"number {number} is '{name}' there, and the image is '{image}'. Give the images as they "
                    f"were given to `dinokit extract`, with the same name and path."
                )
            return  # other names for what may be the same images

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


def _file_name(name: str) -> str:
    """The file name in the name of an image, which may have folders or a tar file before it."""
    return name.rsplit("/", 1)[-1].rsplit(": ", 1)[-1]


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


class ImageSearch:
    """Nearest images in stored embeddings, with their names and pictures."""

    def __init__(self, path: Path) -> None:
        """Open a store of features, or the folder of a curation.

        Raises:
            ValueError, LookupError: if it is neither, or the embeddings were given to the curation.
        """
        folder, cfg, index = path, Index(exact_below=1 << 62), path
        self._images: np.ndarray | None = None  # the number in the source of each row, where it differs
        stages = path / "stages"
        if stages.is_dir():
            index, settings = _finished_stage(stages, "index")
            embedded, _ = _finished_stage(stages, "embed")
            # If duplicates have weights of their own, the index is of their rows.
            embedded = next(r for r in (embedded / "pool.copies", embedded / "pool") if r.is_dir())
            folder = embedded / "store"
            if not folder.is_dir():
                raise ValueError(
                    f"The embeddings of the curation {path} were given to it. Search the store of features "
                    f"that they come from: index=STORE."
                )
            cfg = Index(**{key: value for key, value in settings.items() if key in vars(Index())})
            self._images = np.load(embedded / "rows.npy")
        elif not (path / "store.json").is_file():
            raise FileNotFoundError(
                f"index={path} has no features: give the folder that `dinokit extract` or `dinokit curate` "
                f"wrote, its out=."
            )
        self.store = open_store(folder)
        self.token = self.store.tokens[0]
        if len(self.store[self.token].shape) != 2:
            raise ValueError(f"{folder} has several layers or patches; search needs one vector an image.")
        self._rows = np.flatnonzero(self.store.valid)
        self._searcher = Searcher(Vectors(self.store.files(self.token), self._rows), index, cfg)
        self._names = Names.of(self.store.iter_names())
        self._source: ImageSource | None = None

    @property
    def weights(self) -> str:
        """Where the weights were that made the embeddings.

        Raises:
            ValueError: if the store does not say it, as one made by a backbone in memory.
        """
        if not self.store.about.get("weights"):
            raise ValueError(
                f"{self.store.out} does not say where the weights are that made it, as they were in memory: "
                f"give weights=FILE_OR_RUN (in Python model=)."
            )
        return str(self.store.about["weights"])

    def embed(self, backbone: Backbone, images: Any) -> np.ndarray:
        """(q, D) unit rows of images, as as_source() takes them, with the same transform as the index.

        Raises:
            FileNotFoundError: if a file does not exist.
            ValueError: if the index was made with other weights, or a file cannot be read.
        """
        about = self.store.about
        if fingerprint(backbone) != about["fingerprint"]:
            raise ValueError(
                f"These are not the weights that made the index, which were "
                f"{about.get('weights') or 'in memory'}: their features cannot be compared."
            )
        listed = images if isinstance(images, list | tuple) else [images]
        missing = [str(each) for each in listed if isinstance(each, str | Path) and not Path(each).exists()]
        if missing:
            raise FileNotFoundError(f"There is no image {', '.join(missing)}.")
        source = as_source(images, backbone.channels)
        for number in range(len(source)):
            source[number]  # raises the reader's error if it cannot be read
        transform = about["transform"]
        spec = ExtractSpec(
            (self.token,),
            about["layers"],
            transform["fit"],
            transform["size"],
            transform["resize"] or 0,
            "float32",
        )
        precision = DTYPES[pick_precision(about.get("precision", "auto"), device_of(backbone))]
        with TemporaryDirectory() as folder:
            features = extract_to(folder, backbone, source, spec, precision=precision)[self.token][:]
        return Vectors([features]).chunk(0, len(features))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(q, k) similarities, descending, and (q, k) numbers for name() and picture(); -1 for none."""
        return self._searcher.search(queries, min(k, len(self._rows)))

    def name(self, number: int) -> str:
        """The name of an image that was found."""
        return self._names[int(self._rows[number])]

    def picture(self, number: int) -> ImageLike | None:
        """An image that was found, or None if it can no longer be read."""
        section = self.store.about.get("data")
        if not section:
            return None  # the images were in the memory of another program
        if self._source is None:
            registry.check_from_file(section, self.store.out, "another store")
        try:
            if self._source is None:
                self._source = registry.build("data.sources", section)
            image = self._rows[number] if self._images is None else self._images[number]
            return self._source[int(image)][0]
        except (OSError, ValueError, IndexError, LookupError):
            return None


def _finished_stage(stages: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished stage, and its inputs."""
    for marker in sorted(stages.glob(f"{name}.*/done.json")):
        return marker.parent, json.loads(marker.read_text(encoding="utf-8"))["inputs"]
    raise ValueError(f"The curation in {stages.parent} has not finished its stage '{name}'.")


def contact_sheet(
    pictures: Sequence[tuple[ImageLike | None, str]], side: int = 192, columns: int = 6
) -> Image.Image:
    """Pictures with a caption below each; a grey square in place of None."""
    text = 16
    height = -(-len(pictures) // columns) * (side + text)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * side, height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(pictures):
        x, y = place % columns * side, place // columns * (side + text)
        tile = Image.new("RGB", (side, side), "#dddddd") if picture is None else thumbnail(picture, side - 4)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        while draw.textlength(caption) > side - 8:
            caption = f"{caption.removesuffix('...')[:-1]}..."
        draw.text((x + 4, y + side), caption, fill="black")
    return sheet
