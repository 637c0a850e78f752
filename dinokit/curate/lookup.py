"""Looking images up by an image: over what `dinokit extract` wrote, or over the pool of a curation."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dinokit.config import registry
from dinokit.curate.index import Searcher
from dinokit.curate.settings import Index
from dinokit.curate.vectors import Vectors
from dinokit.data.names import Names
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.data.sources._files import ImageFiles
from dinokit.features import ExtractSpec, extract_to, fingerprint, open_store
from dinokit.models import Backbone


class Lookup:
    """Embeddings on disk with their names and pictures.

    Attributes:
        weights: where those that made the embeddings were.
    """

    def __init__(self, path: Path) -> None:
        """Open a store of features, or the folder of a curation.

        Raises:
            ValueError, LookupError: if it is neither, or the curation's embeddings were given to it.
        """
        folder, cfg, index = path, Index(exact_below=1 << 62), path
        self._images: np.ndarray | None = None  # of each row the number in the source, where it differs
        stages = path / "stages"
        if stages.is_dir():
            index, said = _finished(stages, "index")
            embedded, _ = _finished(stages, "embed")
            # Where copies have weights of their own, the index is of their rows.
            role = next(r for r in (embedded / "pool.copies", embedded / "pool") if r.is_dir())
            folder = role / "store"
            if not folder.is_dir():
                raise ValueError(
                    f"The embeddings of the curation {path} were given to it: give the store of features "
                    f"that they are from as index=STORE."
                )
            cfg = Index(**{key: value for key, value in said.items() if key in vars(Index())})
            self._images = np.load(role / "rows.npy")
        elif not (path / "store.json").is_file():
            raise LookupError(
                f"index={path} holds no features: give the folder that `dinokit extract` or `dinokit curate` "
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
        """(q, D) unit rows of image files, made as those of the index were.

        Raises:
            LookupError: if a file is not there.
            ValueError: if the weights are others, or a file cannot be read.
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
            source[number]  # one that cannot be read is an error here, said by the reader
        cut = about["transform"]
        spec = ExtractSpec(
            (self.token,), about["layers"], cut["fit"], cut["size"], cut["resize"] or 0, "float32"
        )
        with TemporaryDirectory() as folder:
            made = extract_to(folder, backbone, source, spec)[self.token][:]
        return Vectors([made]).chunk(0, len(made))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(q, k) similarities, falling, and (q, k) numbers for name() and picture(); -1 for none."""
        return self._searcher.search(queries, min(k, len(self._rows)))

    def name(self, number: int) -> str:
        """Of an image that was found."""
        return self._names[int(self._rows[number])]

    def picture(self, number: int) -> ImageLike | None:
        """The image, or None if it is not to be had any more."""
        try:
            if self._source is None:
                self._source = registry.build("data.sources", self.store.about["data"])
            place = self._rows[number] if self._images is None else self._images[number]
            return self._source[int(place)][0]
        except (OSError, ValueError, IndexError, LookupError):
            return None


def _finished(stages: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished stage, and its inputs."""
    for marker in sorted(stages.glob(f"{name}.*/done.json")):
        return marker.parent, json.loads(marker.read_text(encoding="utf-8"))["inputs"]
    raise ValueError(f"The curation in {stages.parent} has not come to the end of the stage '{name}'.")
