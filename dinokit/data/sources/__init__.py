"""Image sources: where images come from. A registry: a file here is a `data.name` in a recipe.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> ImageSource

Opening a source must be cheap, and it must pickle (loader processes receive a copy). A source with labels has
a field `split` in its Config, one of "all", "train", "test".
"""

from collections.abc import Sequence
from typing import Protocol

from dinokit.data.decode import ImageLike as ImageLike


class ImageSource(Protocol):
    """Images by number, in an order that never changes.

    Optional methods:

        stamp() -> str            changes whenever an image, a label or their order may have changed
                                  (dinokit.data.files.stamp_of helps); needed to cache features on disk
        file(index) -> Path       the file of an image, if each image is a file of its own
        stored(index) -> bytes    the content of the image file, alone or inside another file; needed for
                                  crops.decode=reduced
    """

    classes: Sequence[str]  # names by label; empty if the source has no labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The decoded image and its label, -1 without one.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...


def images_stamp(source: ImageSource) -> str | None:
    """A text that changes whenever an image of the source may have changed; None if the source has none."""
    stamp = getattr(source, "stamp", None)
    text = stamp() if stamp is not None else None
    return None if text is None else str(text)
