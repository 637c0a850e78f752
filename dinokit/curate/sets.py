"""A set of images that takes part in a curation: a source, embeddings that are given, or both."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from dinokit import shelves
from dinokit.curate.vectors import Vectors
from dinokit.data.names import Names, encode
from dinokit.data.sources import Picture, Source
from dinokit.features import open_store
from dinokit.features.layout import shard_path


class ImageSet:
    """Images by number, with whatever is known of them.

    Attributes:
        label: 'pool', 'seeds.NAME' or 'against.NAME'.
        source: where the pictures are; None if embeddings alone were given.
        given: embeddings that were given, one a picture; None if they are to be computed.
    """

    def __init__(self, label: str, section: Mapping[str, Any] | None, embeddings: str, token: str) -> None:
        """Open it.

        Raises:
            ValueError, LookupError: if there is no such thing, or pictures and embeddings differ in number.
        """
        self.label, self.section = label, section
        self.source: Source | None = shelves.build("data.sources", section) if section else None
        self.given: Vectors | None = None
        self._names: Names | None = None
        self._files: list[Path] = []
        if embeddings:
            self._read(Path(embeddings).expanduser(), token)
        assert self.source is not None or self.given is not None, label
        if self.source is not None and self.given is not None and len(self.source) != len(self.given):
            raise ValueError(
                f"{label}: there are {len(self.source)} images, but {len(self.given)} embeddings in "
                f"{embeddings}; they must be of the same images in the same order."
            )

    def __len__(self) -> int:
        return len(self.source if self.source is not None else self.given or ())

    def name(self, number: int) -> str:
        """What the manifest calls an image."""
        if self.source is not None:
            return self.source.name(number)
        return self._names[number] if self._names is not None else f"row {number}"

    def picture(self, number: int) -> Picture:
        """The image.

        Raises:
            OSError, ValueError: if it cannot be read, or there are no pictures.
        """
        if self.source is None:
            raise ValueError(f"{self.label} has embeddings alone.")
        return self.source[number][0]

    def stamp(self) -> dict[str, Any]:
        """What tells this set from another: its settings, its names, and the files of given embeddings."""
        names = sha256()
        if self.source is not None:
            for number in range(len(self.source)):
                names.update(encode(self.source.name(number)) + b"\n")
        status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files]
        return {
            "section": self.section,
            "images": len(self),
            "names": names.hexdigest()[:16],
            "files": status,
        }

    def _read(self, path: Path, token: str) -> None:
        if (path / "store.json").is_file():
            store = open_store(path)
            if token not in store.tokens:
                raise ValueError(f"{path} holds no '{token}' tokens, but: {', '.join(store.tokens)}.")
            shards = -(-len(store) // store.about["shard"])
            self._files = [shard_path(path, token, number) for number in range(shards)]
            self._names = Names.of(store.iter_names())
        elif path.is_dir():
            self._files = sorted(path.glob("*.npy"))
            self._names = _listed(path / "names.txt")
        else:
            self._files = [path]
            self._names = _listed(path.with_suffix(".txt"))
        if not self._files or not self._files[0].is_file():
            raise ValueError(
                f"{self.label}.embeddings='{path}': there are no embeddings; they are a .npy file, a folder "
                f"of such, or what `dinokit extract` wrote."
            )
        self.given = Vectors(self._files)
        if self._names is not None and len(self._names) != len(self.given):
            raise ValueError(f"{path}: {len(self._names)} names, but {len(self.given)} embeddings.")


def _listed(path: Path) -> Names | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return Names.of(line.removesuffix("\n") for line in file)


def rows_of(chosen: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Of the images chosen, those that are not bad; ascending."""
    return chosen[~bad]
