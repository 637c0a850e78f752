"""A set of images that takes part in a curation: a source, embeddings that are given, or both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinokit.config import registry
from dinokit.curate.vectors import Vectors
from dinokit.data.names import Names
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.features import open_store
from dinokit.features.fingerprint import images_stamp


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
        self.source: ImageSource | None = registry.build("data.sources", section) if section else None
        self.given, self._names, self._files = _read(label, embeddings, token)
        assert self.source is not None or self.given is not None, label
        if self.source is not None and self.given is not None and len(self.source) != len(self.given):
            raise ValueError(
                f"{label}: there are {len(self.source)} images, but {len(self.given)} embeddings in "
                f"{embeddings}; they must be of the same images in the same order."
            )

    def __len__(self) -> int:
        whole = self.source if self.source is not None else self.given
        assert whole is not None
        return len(whole)

    def name(self, number: int) -> str:
        """What the manifest calls an image."""
        if self.source is not None:
            return self.source.name(number)
        return self._names[number] if self._names is not None else f"row {number}"

    def picture(self, number: int) -> ImageLike:
        """The image.

        Raises:
            OSError, ValueError: if it cannot be read, or there are no pictures.
        """
        if self.source is None:
            raise ValueError(f"{self.label} has embeddings alone.")
        return self.source[number][0]

    def stamp(self) -> dict[str, Any]:
        """What is another whenever an image or a given embedding may be another."""
        images = images_stamp(self.source) if self.source is not None else None
        status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files]
        return {"section": self.section, "images": len(self), "stamp": images, "files": status}


def _read(label: str, embeddings: str, token: str) -> tuple[Vectors | None, Names | None, list[Path]]:
    """Given embeddings, the images' names if they are told, and the files."""
    if not embeddings:
        return None, None, []
    path = Path(embeddings).expanduser()
    if (path / "store.json").is_file():
        store = open_store(path)
        if token not in store.tokens:
            raise ValueError(f"{path} holds no '{token}' tokens, but: {', '.join(store.tokens)}.")
        files = store.files(token)
        return Vectors(files), Names.of(store.iter_names()), files
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"{label}.embeddings={embeddings}: there are no embeddings; they are a .npy file, a folder of "
            f"such, or what `dinokit extract` wrote."
        )
    vectors = Vectors(files)
    names = _listed(path / "names.txt" if path.is_dir() else path.with_suffix(".txt"))
    if names is not None and len(names) != len(vectors):
        raise ValueError(f"{path}: {len(names)} names, but {len(vectors)} embeddings.")
    return vectors, names, files


def _listed(path: Path) -> Names | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return Names.of(line.removesuffix("\n") for line in file)
