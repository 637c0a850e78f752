"""Where images come from. A shelf: a file here is a `data.name` in a recipe.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> ImageSource

Opening a source must be cheap, and it must pickle (loader processes receive a copy). A source with labels has
a field `split` in its Config, one of "all", "train", "test".
"""

from collections.abc import Sequence
from typing import Protocol

from dinokit.data.decode import ImageLike as ImageLike


class ImageSource(Protocol):
    """Images by number, in an order that is the same every time.

    One whose features may be kept on disk has

        stamp() -> str

    which is another text whenever an image, a label or their order may be another (sources/_stamp.py helps).
    One whose images are files of their own has

        file(index) -> Path

    One whose images are files at all, alone or inside of others, has

        stored(index) -> bytes

    which is such a file, and without which crops.decode=reduced is refused.
    """

    classes: Sequence[str]  # names by label; empty if the source has no labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The image, decoded, and its label, -1 without one.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...
