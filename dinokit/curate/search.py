"""Searches similar images: in a store that `dinokit extract` wrote, or in the pool of a curation."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dinokit.config import registry
from dinokit.curate.image_sets import thumbnail
from dinokit.curate.index import Searcher, Vectors
from dinokit.curate.settings import Index
from dinokit.data.files import ImageFiles, Names
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.features import ExtractSpec, extract_to, fingerprint, open_store
from dinokit.models import Backbone


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
            raise LookupError(
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
        """Where the weights were that made the embeddings."""
        return str(self.store.about["weights"])

    def embed(self, backbone: Backbone, files: Sequence[str]) -> np.ndarray:
        """(q, D) unit rows of image files, with the same transform as the index.

        Raises:
            LookupError: if a file does not exist.
            ValueError: if the index was made with other weights, or a file cannot be read.
        """
        about = self.store.about
        if fingerprint(backbone) != about["fingerprint"]:
            raise ValueError(
                f"These are not the weights that made the index, which were {self.weights}: their features "
                f"cannot be compared."
            )
        missing = [file for file in files if not Path(file).is_file()]
        if missing:
            raise LookupError(f"There is no image {', '.join(missing)}.")
        source = ImageFiles(Path.cwd(), Names.of(files), range(len(files)), None, [], backbone.channels)
        for number in range(len(files)):
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
        with TemporaryDirectory() as folder:
            features = extract_to(folder, backbone, source, spec)[self.token][:]
        return Vectors([features]).chunk(0, len(features))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(q, k) similarities, descending, and (q, k) numbers for name() and picture(); -1 for none."""
        return self._searcher.search(queries, min(k, len(self._rows)))

    def name(self, number: int) -> str:
        """The name of an image that was found."""
        return self._names[int(self._rows[number])]

    def picture(self, number: int) -> ImageLike | None:
        """An image that was found, or None if it can no longer be read."""
        try:
            if self._source is None:
                self._source = registry.build("data.sources", self.store.about["data"])
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
