"""Talks about images: questions and answers that a model learns from. A registry: a file is a layout.

A file defines `Config`, a dataclass, and

    build(cfg: Config) -> TalkSource

Opening checks everything that can be checked without decoding an image, because a training that fails at its
thousandth step has cost a night.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dinokit.data.decode import ImageLike

MARK = "<image>"  # stands in the text of a user's turn where an image is
VIDEO = "<video>"  # in files: where a video is, which becomes one mark for each frame that is shown


@dataclass(frozen=True)
class Turn:
    """One message of a talk."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Talk:
    """Images and what is said about them; the marks in the users' turns stand for the images, in order."""

    key: str  # names the record in errors
    images: tuple[ImageLike, ...]
    turns: tuple[Turn, ...]
    family: str = ""  # kind of question, where the source knows it


class TalkSource(Protocol):
    """Talks by number, in an order that never changes.

    Optional method:

        answers() -> Iterator[tuple[str, str]]   key and text of every answer that is known without its image;
                                                 a training looks for unknown words in them, else in the first
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Talk:
        """The talk, with its images decoded.

        Raises:
            OSError, ValueError: if an image cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """A digest of all that is learnt from: a run resumes with the talks that it began with."""
        ...


def check_turns(key: str, turns: Sequence[Turn], images: int) -> None:
    """Refuse a talk that no model could learn from.

    Args:
        key: of the record, for the error.
        turns: of the talk.
        images: how many it has.

    Raises:
        ValueError: if roles do not alternate from user to assistant, a text is empty, a mark stands outside
            of a user's turn, or there are not as many marks as images.
    """
    spoken = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in spoken]
    expected = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != expected or any(turn.role == "system" for turn in turns[1:]):
        raise ValueError(
            f"{key}: its turns are {', '.join(turn.role for turn in turns) or 'none'}; they must be user and "
            f"assistant by turns, begin with user and end with assistant. Repair or remove the record."
        )
    for number, turn in enumerate(turns, 1):
        if not turn.text.strip():
            raise ValueError(f"{key}: turn {number} ({turn.role}) has no text. Repair or remove the record.")
        if turn.role != "user" and MARK in turn.text:
            raise ValueError(
                f"{key}: turn {number} ({turn.role}) has {MARK}, which stands for an image and belongs in a "
                f"user's turn. Move or remove it."
            )
    marks = sum(turn.text.count(MARK) for turn in turns)
    if marks != images:
        raise ValueError(
            f"{key}: {marks} times {MARK} for {images} images. Write one {MARK} for each image"
            + (", or set marks=prepend." if not marks else ".")
        )
