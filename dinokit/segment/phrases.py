"""Words of objects and phrases that ask for them.

The words of an object are those of the name of its class, as "red" and "disc" of "red disc". A phrase is some
words; it asks for all objects that have all of them. Their order says nothing.

    V  words that a head knows
"""

import re
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from dinokit.config.registry import suggest

FILLERS = frozenset(("a", "an", "the", "thing", "things"))  # that a text may have and that say nothing
ATTEMPTS = 20  # to draw a phrase that nothing fits

Phrase = tuple[str, ...]


def words_of(name: str) -> Phrase:
    """The words of a text, small: 'Red_disc' is red, disc."""
    return tuple(dict.fromkeys(word for word in re.split(r"[\W_]+", name.lower()) if word))


def vocabulary(classes: Sequence[str]) -> list[str]:
    """The words of all names, sorted."""
    return sorted({word for name in classes for word in words_of(name)})


def names_of(labels: Sequence[int], classes: Sequence[str]) -> list[Phrase]:
    """The words of objects with these labels; of one without a class, none."""
    return [words_of(classes[label]) if 0 <= label < len(classes) else () for label in labels]


def read_phrase(text: str, known: Sequence[str]) -> Phrase:
    """The words of a text that a head knows.

    Raises:
        ValueError: if it has another one, or none; it lists those that the head knows.
    """
    words = [word for word in words_of(text) if word in known or word not in FILLERS]
    if not known:
        raise ValueError("This head knows no words: the objects that it was trained on have no classes.")
    unknown = next((word for word in words if word not in known), "")
    if unknown or not words:
        what = f"the head does not know the word '{unknown}'" if unknown else "it has no word that says what"
        near = suggest(unknown, list(known))
        raise ValueError(f"text={text!r}: {what}.{near} It knows: {', '.join(known)}.")
    return tuple(words)


def as_words(phrase: Collection[str], known: Sequence[str]) -> Tensor:
    """(V,): 1 at the words of a phrase, 0 elsewhere."""
    return torch.tensor([float(word in phrase) for word in known])


def fitting(phrase: Phrase, names: Sequence[Phrase]) -> list[int]:
    """The numbers of the objects that have all words of a phrase."""
    return [number for number, words in enumerate(names) if phrase and set(phrase) <= set(words)]


def draw_phrase(words: Phrase, rng: np.random.Generator) -> Phrase:
    """Some of the words, one at least; each number of them is as likely."""
    order = rng.permutation(len(words))[: int(rng.integers(1, len(words) + 1))]
    return tuple(words[i] for i in sorted(order.tolist()))


def draw_absent(names: Sequence[Phrase], classes: Sequence[str], rng: np.random.Generator) -> Phrase:
    """A phrase out of the names of classes that fits none of the objects; empty if none is found."""
    for _ in range(ATTEMPTS):
        words = words_of(classes[int(rng.integers(len(classes)))])
        phrase = draw_phrase(words, rng) if words else ()
        if phrase and not fitting(phrase, names):
            return phrase
    return ()
