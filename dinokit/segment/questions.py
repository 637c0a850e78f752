"""What a unified head learns in a step: objects of some images, each asked for by prompts of one kind or two.

A click, a box, a stroke or a rough mask asks for one object. A region of another image asks for all objects
of its class, words for all objects whose names have them; of two kinds the answer is what both ask for. The
rounds after that are those of the promptable head. Every random number is a function of (seed, step, place).

    m  objects of an image     M  of all images of this process     V  words     R  regions of other images
"""

from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.sampler import generator
from dinokit.language.aligned import load_aligned
from dinokit.segment.encoder import Item, Items
from dinokit.segment.episodes import find_examples
from dinokit.segment.prompts import UP, mask_logits
from dinokit.segment.recipe import Config, Unified
from dinokit.segment.rounds import Sample, as_batch, draw_sample, rounds_loss
from dinokit.segment.unified import (
    UnifiedHead,
    as_words,
    draw_absent,
    draw_phrase,
    fitting,
    names_of,
    shares_of,
    vocabulary,
)

STREAM = 14  # of random numbers of a place
SHIFT = 2  # pixels of the canvas by which a rough mask is moved at most

SPATIAL = frozenset(("point", "box", "stroke", "mask"))  # kinds that ask for one object


@dataclass
class Region:
    """An object in another image."""

    row: int  # of the prompt, among those of its image
    features: Tensor  # (D, h, w) of the other image
    mask: Tensor  # (S, S) bool


@dataclass
class Question:
    """One image of a step, and what is asked of it."""

    sample: Sample  # with the masks of the answers
    strokes: Tensor  # (m, S, S) bool, empty where there is no stroke
    rough: Tensor  # (m,) bool: those with a rough mask
    moved: Tensor  # (m, S, S) bool, the rough masks
    words: Tensor  # (m, V)
    names: Tensor  # (m, V) of the answer, NaN where it has none
    regions: list[Region]


def draw_kinds(cfg: Unified, rng: np.random.Generator) -> set[str]:
    """One or two kinds of prompts."""
    kinds, odds = [*cfg.odds], np.array([*cfg.odds.values()], float)
    chosen = int(rng.choice(len(odds), p=odds / odds.sum()))
    found = {kinds[chosen]}
    odds[chosen] = 0
    if rng.random() < cfg.both and odds.sum():
        found.add(kinds[int(rng.choice(len(odds), p=odds / odds.sum()))])
    return found


def draw_question(items: Items, cfg: Config, known: list[str], step: int, place: int) -> Question:
    """The question of a place of a step. Raises as draw_sample().

    A click takes the place of a region where no other image has an object of the class.
    """
    seed, classes = cfg.run.seed, items.source.classes
    sample = draw_sample(items, cfg.prompts, seed, step, cfg.optim.batch, place)
    item, rng = items[sample.index], generator(seed, step, place, STREAM)
    labels, names = item.objects.labels, names_of(item.objects.labels, classes)
    m, truth, strokes = len(sample.numbers), sample.truth.clone(), torch.zeros_like(sample.truth)
    flags = {kind: torch.zeros(m, dtype=torch.bool) for kind in SPATIAL}
    words, named, regions = torch.zeros(m, len(known)), torch.full((m, len(known)), torch.nan), []
    for row, number in enumerate(sample.numbers):
        kinds: Set[str] = draw_kinds(cfg.unified, rng) - (set() if names[number] else {"region", "text"})
        if "region" in kinds:
            found = _region(items, labels[number], cfg.prompts.min_area, rng, sample.index, row)
            regions += [found] if found else []
            kinds = kinds if found else kinds - {"region"}
        kinds = kinds or {"point"}
        phrase = draw_phrase(names[number], rng) if "text" in kinds else ()
        if kinds == {"text"} and rng.random() < cfg.unified.absent:
            phrase = draw_absent(names, classes, rng) or phrase
        meant = [number]
        if not kinds & SPATIAL:
            alike = [i for i, label in enumerate(labels) if label == labels[number]]
            meant = alike if "region" in kinds else fitting(phrase, names)
            truth[row] = _union(item, meant)
        if "stroke" in kinds:
            strokes[row] = torch.from_numpy(random_stroke(truth[row].numpy(), rng))
        for kind in SPATIAL & kinds:
            flags[kind][row] = True
        words[row] = as_words(phrase, known)
        common = set.intersection(*(set(names[i]) for i in meant)) if meant else set()
        if common:
            named[row] = as_words(common, known)
    ways = rng.integers(-SHIFT, SHIFT + 1, (m, 2)).tolist()
    moved = torch.cat([shifted(mask[None], *way) for mask, way in zip(truth, ways, strict=True)])
    sample = replace(sample, truth=truth, boxed=flags["box"], clicked=flags["point"])
    return Question(sample, strokes, flags["mask"], moved, words, named, regions)


def shifted(masks: Tensor, down: int, right: int) -> Tensor:
    """Masks (m, S, S) moved by pixels; what leaves the canvas is lost. One that would be lost whole stays."""
    side, near, far = masks.shape[1], (max(down, 0), max(right, 0)), (max(-down, 0), max(-right, 0))
    moved = F.pad(masks, (near[1], far[1], near[0], far[0]))[:, far[0] :, far[1] :][:, :side, :side]
    return torch.where(moved.flatten(1).any(dim=1)[:, None, None], moved, masks)


def _union(item: Item, numbers: list[int]) -> Tensor:
    """The pixels of objects of an image, (S, S) bool on the canvas."""
    mask = torch.zeros(item.canvas.shape[1:], dtype=torch.bool)
    for number in numbers:
        mask |= item.mask(number)
    return mask


def _region(
    items: Items, label: int, min_area: int, rng: np.random.Generator, index: int, row: int
) -> Region | None:
    """An object of a class in another image than `index`."""
    found = find_examples(items, label, 1, min_area, rng, index, False)
    if not found:
        return None
    alike = [i for i, each in enumerate(found[0].objects.labels) if each == label]
    return Region(row, found[0].features, found[0].mask(alike[int(rng.integers(len(alike)))]))


def random_stroke(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random walk inside a mask (H, W) bool, as people scribble: 3 to 30 pixels long, 1 to 3 wide.

    Where it would leave the mask it turns; it is shorter where it cannot. An empty mask has an empty stroke.
    """
    stroke, pixels = np.zeros_like(mask), np.argwhere(mask)
    if not len(pixels):
        return stroke
    y, x = pixels[rng.integers(len(pixels))].astype(float)
    angle, width = rng.uniform(0, 2 * np.pi), int(rng.integers(1, 4))
    for _ in range(int(rng.integers(3, 31))):
        top, left = max(0, round(y) - (width - 1) // 2), max(0, round(x) - (width - 1) // 2)
        stroke[top : round(y) + width // 2 + 1, left : round(x) + width // 2 + 1] = True
        for turn in rng.normal(0, (0.4, 1.0, 2.0, 3.0)):
            down, right = y + np.sin(angle + turn), x + np.cos(angle + turn)
            inside = 0 <= round(down) < mask.shape[0] and 0 <= round(right) < mask.shape[1]
            if inside and mask[round(down), round(right)]:
                y, x, angle = down, right, angle + turn
                break
    return stroke & mask


class UnifiedTask:
    """What training needs of a unified head."""

    def __init__(self, cfg: Config, items: Items) -> None:
        """Make the head.

        Raises:
            ValueError, LookupError: if the objects have no classes to name them by, or `unified.align` is no
                run on the same weights.
        """
        self.cfg, self.items, encoder, more = cfg, items, items.encoder, cfg.unified
        self.known = vocabulary(items.source.classes)
        if not self.known and (more.text or more.region):
            raise ValueError(
                "The objects have no classes, by which words and regions ask for them: set unified.text=0 "
                "and unified.region=0, or give images whose objects have classes."
            )
        vectors = None
        if more.align:
            vectors = load_aligned(more.align, encoder.backbone).text(self.known).cpu()
            more = replace(more, embedding=vectors.shape[1])
        self.head = UnifiedHead(encoder.width, cfg.head, more, self.known, encoder.channels, vectors)
        sizes = {key: asdict(more)[key] for key in ("samples", "memory", "embedding")}
        self.about: dict[str, Any] = {"unified": sizes, "words": self.known}

    def loss(self, step: int, places: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's part of the loss of a step, and of what the log shows: means over all objects."""
        cfg, encoder = self.cfg, self.items.encoder
        asked = [draw_question(self.items, cfg, self.known, step, place) for place in places]
        batch = as_batch(self.head, encoder, [question.sample for question in asked])
        h, w = batch.embedded.cells.shape[2:]
        strokes, rough, moved, words, names = (
            torch.cat([getattr(question, key) for question in asked]).to(encoder.device)
            for key in ("strokes", "rough", "moved", "words", "names")
        )
        masks = mask_logits(moved, (UP * h, UP * w))
        masks = masks.masked_fill(~rough[:, None, None, None], torch.nan)
        prompt = replace(
            batch.prompt,
            masks=masks,
            strokes=shares_of(strokes, (h, w)),
            words=words,
            region=self._regions(asked),
        )
        total, logs = rounds_loss(self.head, replace(batch, prompt=prompt), cfg.losses, names)
        count = cfg.optim.batch * cfg.prompts.objects
        return total / count, {name: value / count for name, value in logs.items()}

    def _regions(self, asked: list[Question]) -> Tensor | None:
        """The regions of other images, as the prompts (M, m + 1, c) take them; None without any."""
        m, device = self.cfg.prompts.objects, self.items.encoder.device
        found = [(i * m + each.row, each) for i, question in enumerate(asked) for each in question.regions]
        if not found:
            return None
        features = torch.stack([each.features for _, each in found]).to(device).float()
        masks = torch.stack([each.mask for _, each in found]).to(device)
        cells = self.head.decoder.neck(features)
        regions = self.head.refer(cells, shares_of(masks, (cells.shape[2], cells.shape[3])))
        rows = torch.tensor([row for row, _ in found], device=device)
        return regions.new_full((len(asked) * m, *regions.shape[1:]), torch.nan).index_put((rows,), regions)
