"""Images with captions. A registry: a file here is a layout on disk.

A file defines `Config`, a dataclass with a field `split`, one of "all", "train", "test", and

    build(cfg: Config) -> CaptionSource

Opening must be cheap, and a CaptionSource must pickle.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from dinokit.data.decode import ImageLike


class CaptionSource(Protocol):
    """Images with captions by number, in an order that never changes.

    Optional methods:

        exchanged(index) -> tuple[str, str] | None   a caption of the image, and the same with the colours of
                                                     two things exchanged; None where it shows too few. Of a
                                                     video, the same with the opposite direction
        clip(index) -> Clip                          of a source of videos, whose images are the frames in the
                                                     middle: all frames (dinokit.data.clips)
    """

    classes: Sequence[str]  # none: it can stand in the place of a source of images

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        """The decoded image, and -1, as sources of images without labels have it.

        Raises:
            OSError, ValueError: if the image cannot be read.
        """
        ...

    def captions(self, index: int) -> Sequence[Sequence[str]]:
        """All captions of an image, by kind: a step of training draws a kind, then one of it.

        The first kind describes the whole image. None is empty.
        """
        ...

    def name(self, index: int) -> str:
        """What a person would look for on disk, for messages."""
        ...


def joined(captions: Sequence[Any], where: str) -> list[str]:
    """Captions with single spaces.

    Raises:
        ValueError: with `where`, if one is no text, or there is none with a word.
    """
    wrong = [each for each in captions if not isinstance(each, str)]
    found = [" ".join(each.split()) for each in captions if isinstance(each, str)]
    found = [each for each in found if each]
    if wrong or not found:
        what = f"{wrong[0]!r} is no caption" if wrong else "there is no caption with a word in it"
        raise ValueError(f"{where}: {what}. Write a text there, or leave the image out.")
    return found
