"""A unified head: one decoder for clicks, boxes, masks, strokes, regions of another image, and words.

After SEEM (arXiv 2304.06718) in small: the decoder is that of the promptable head, and every further prompt
is tokens for it. Strokes and regions are the patches under them; those of another image come without their
places, as what they show counts and not where. The patches under the last answer are the memory of rounds.
Of a region and of words the likeness with each patch of the image is added to the patches (as SegIC does with
examples, arXiv 2311.14671): attention alone would have to find it first. Every answer has names: how likely
each word fits it. With no such prompt and without memory the head is the promptable one.

    M  prompts     R  regions     m  patches of a region     c  width     h, w  patches down and across
    V  words that the head knows     E  width of their vectors
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config.registry import suggest
from dinokit.segment.promptable import Answer, Embedded, PromptableHead
from dinokit.segment.prompts import Prompt
from dinokit.segment.recipe import Head, Unified

STROKE, MEMORY, REGION, TEXT = range(4)  # kinds of tokens
FILLERS = frozenset(("a", "an", "the", "thing", "things"))  # that a text may have and that say nothing
ATTEMPTS = 20  # to draw a phrase that nothing fits

Phrase = tuple[str, ...]


def shares_of(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks on the canvas (R, S, S) -> the share of each patch that they cover, (R, h, w)."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), grid)[:, 0]


def sample_cells(cells: Tensor, shares: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The patches under each region, evenly drawn in the order of rows if there are more than `most`.

    A patch is under it if it is covered half as much as the one that is covered most: so a thin stroke and an
    object smaller than a patch have patches too. Nothing is random, so a prompt has one answer.

    Args:
        cells: (R, c, h, w).
        shares: (R, h, w) in [0, 1]; 0 everywhere for no region.
        most: m.

    Returns:
        (R, m, c) patches; (R, m) bool, False for padding; (R, m) their numbers in the grid.
    """
    flat = shares.flatten(1)
    inside = (flat >= flat.amax(dim=1, keepdim=True) / 2) & (flat > 0)
    count, rank = inside.sum(dim=1, keepdim=True), torch.arange(most, device=cells.device)
    order = inside.int().argsort(dim=1, descending=True, stable=True)  # those inside first, row by row
    rank = torch.where(count > most, rank * count // most, rank.expand(len(flat), -1))
    places = order.gather(1, rank.clamp(max=flat.shape[1] - 1))
    rows = cells.flatten(2).transpose(1, 2)
    found = rows.gather(1, places[:, :, None].expand(-1, -1, rows.shape[2]))
    return found, torch.arange(most, device=cells.device) < count, places


def mean_cell(cells: Tensor, shares: Tensor) -> Tensor:
    """The mean of patches (R, c, h, w) weighted with shares (R, h, w): (R, c)."""
    total = shares.sum(dim=(1, 2)).clamp(min=1e-6)
    return torch.einsum("rchw,rhw->rc", cells, shares) / total[:, None]


class UnifiedHead(nn.Module):
    """Features of images and prompts of any kind -> masks and their names.

    Args:
        features: D.
        config: sizes of the decoder.
        more: sizes of the rest.
        words: that it knows.
        channels: of the images.
        vectors: (V, E) of the words, which are not trained then; None: they are learned.
    """

    def __init__(
        self,
        features: int,
        config: Head,
        more: Unified,
        words: Sequence[str] = (),
        channels: int = 3,
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.more, self.words = PromptableHead(features, config, channels), more, tuple(words)
        c, width = config.width, more.embedding if vectors is None else vectors.shape[1]
        first = torch.randn(len(self.words), width) if vectors is None else vectors.clone()
        self.table = nn.Parameter(first, requires_grad=vectors is None)
        self.kinds = nn.Parameter(torch.randn(4, c))
        self.seen, self.compared = nn.Linear(c, c), nn.Linear(c, c)
        self.text = nn.Linear(width, c)
        self.likeness = nn.Parameter(torch.randn(2, c))  # of a region, of a text
        self.name = nn.Linear(c, width)
        self.scale, self.bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-2.0))

    def embed(self, patches: Tensor, images: Tensor) -> Embedded:
        """As PromptableHead.embed()."""
        return self.decoder.embed(patches, images)

    def refer(self, cells: Tensor, shares: Tensor) -> Tensor:
        """Regions of images as the `region` of prompts: (R, c, h, w) and (R, h, w) -> (R, m + 1, c).

        The last one is their mean; NaN is padding.
        """
        found, used, _ = sample_cells(cells, shares, self.more.samples)
        found = found.masked_fill(~used[:, :, None], math.nan)
        return torch.cat([found, mean_cell(cells, shares)[:, None]], dim=1)

    def forward(self, embedded: Embedded, prompt: Prompt) -> Answer:
        """The answers to M prompts; each is independent of the others."""
        parts, cells = [self.decoder.prompts(prompt, embedded.side)], embedded.cells[prompt.image]
        dense = torch.zeros_like(cells[:, :, :1, :1])
        if prompt.strokes is not None:
            parts.append(self._own(cells, prompt.strokes, self.more.samples, STROKE))
        if prompt.masks is not None and self.more.memory:
            covered = shares_of(prompt.masks[:, 0] > 0, (cells.shape[2], cells.shape[3]))
            parts.append(self._own(cells, covered, self.more.memory, MEMORY))
        if prompt.region is not None:
            given, region = ~prompt.region.isnan().any(dim=2), prompt.region.nan_to_num()
            parts.append((self.seen(region[:, :-1]) + self.kinds[REGION], given[:, :-1]))
            mean = self.compared(region[:, -1])
            dense = dense + self._like(embedded, prompt, mean, given[:, -1]) * self._direction(0)
        if prompt.words is not None:
            given, vectors = prompt.words.any(dim=1), self.text(self.phrases(prompt.words))
            parts.append(((vectors + self.kinds[TEXT])[:, None], given[:, None]))
            dense = dense + self._like(embedded, prompt, vectors, given) * self._direction(1)
        tokens, used = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        answer = self.decoder.decode(embedded, prompt, tokens, used, dense)
        assert answer.tokens is not None
        return replace(answer, words=self.names(answer.tokens[:, 0]))

    def phrases(self, words: Tensor) -> Tensor:
        """The vectors of phrases (M, V): the mean direction of their words, (M, E) of length 1; else 0."""
        return F.normalize(words @ F.normalize(self.table, dim=1), dim=1)

    def names(self, tokens: Tensor) -> Tensor:
        """How well each word fits answers with the tokens (M, c): logits (M, V)."""
        cosines = F.normalize(self.name(tokens), dim=1) @ F.normalize(self.table, dim=1).T
        return cosines * self.scale.exp() + self.bias

    def _own(self, cells: Tensor, shares: Tensor, most: int, kind: int) -> tuple[Tensor, Tensor]:
        """Tokens (M, m, c), with their places, of regions of the image itself, and which are no padding."""
        found, used, places = sample_cells(cells, shares, most)
        grid = self.decoder.prompts.grid(*cells.shape[2:])
        return self.seen(found) + grid[places] + self.kinds[kind], used

    def _like(self, embedded: Embedded, prompt: Prompt, vectors: Tensor, given: Tensor) -> Tensor:
        """The cosine of vectors (M, c) with the patches of their images, 0 if none is given: (M, 1, h, w)."""
        patches = F.normalize(self.compared(embedded.cells.permute(0, 2, 3, 1)), dim=3)[prompt.image]
        cosines = torch.einsum("mhwc,mc->mhw", patches, F.normalize(vectors, dim=1))
        return torch.where(given[:, None, None], cosines, 0.0)[:, None]

    def _direction(self, kind: int) -> Tensor:
        return self.likeness[kind][None, :, None, None]


# The words of an object are those of the name of its class, as "red" and "disc" of "red disc". A phrase is
# some words, in any order; it asks for all objects that have all of them.


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
