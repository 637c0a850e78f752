"""What evaluators of a text alignment share: its vectors for the images of a source, and for classes.

N  images     C  classes     E  width of the common space     P  templates
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.language.aligned import Aligned
from dinokit.runtime.log import watch


def vectors_of(aligned: Aligned, source: Any, batch: int) -> tuple[Tensor, Tensor]:
    """The vectors of all images of a source, (N, E), and their labels, (N,) int64; both on the CPU."""
    rows, labels = [], []
    for items in batches(source, batch):
        rows.append(aligned.image([image for image, _ in items]).cpu())
        labels += [int(label) for _, label in items]
    return torch.cat(rows), torch.tensor(labels)


def batches(source: Any, batch: int) -> Iterator[list[tuple[Any, Any]]]:
    """The items of a source in lists of `batch`, with progress."""
    starts = range(0, len(source), batch)
    for start in watch(starts, len(starts), "images"):
        yield [source[index] for index in range(start, min(start + batch, len(source)))]


def class_words(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The words of classes: those given, or the names of the classes with spaces for underscores.

    Raises:
        ValueError: if there is another number of words than of classes.
    """
    if names and len(names) != len(classes):
        raise ValueError(
            f"names has {len(names)} words, but there are {len(classes)} classes: {', '.join(classes[:5])}"
            f"{' ...' if len(classes) > 5 else ''}. Give one for each, in this order."
        )
    return [name.replace("_", " ") for name in names or classes]


def of_classes(text: Callable[[list[str]], Tensor], words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The vectors of classes: the mean over templates, on the unit sphere again (CLIP, arXiv 2103.00020).

    Args:
        text: from P texts to vectors (P, E) on the unit sphere.
        words: of the classes.
        templates: with {} in place of the words.

    Returns:
        (C, E).
    """
    rows = [text([each.replace("{}", word) for each in templates]).mean(dim=0) for word in words]
    return F.normalize(torch.stack(rows), dim=1)
