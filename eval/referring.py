"""Objects that words, or a region of another image, ask for: referring segmentation by a unified head.

A phrase is words out of the name of an object's class, as "red" of "red disc"; it asks for all objects of the
image that have these words. A region is an object of another image, and asks for all objects of its class.
Some phrases fit nothing, and their answer is empty (as in gRefCOCO, arXiv 2306.00968). Scores are over
phrases, at the size of the image as stored.

    M  phrases of an image     H, W  of the image     g  side of the grid of answers
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.predictions import Sampler
from dinokit.data.sampler import generator
from dinokit.eval._images import named_optimistic
from dinokit.eval._objects import count_trained, open_objects
from dinokit.features import frozen, spread_places
from dinokit.models import Backbone
from dinokit.runtime.distributed import gather_objects, rank, world_size
from dinokit.runtime.log import watch
from dinokit.segment.encoder import Encoder, Item, Items
from dinokit.segment.episodes import find_examples
from dinokit.segment.losses import iou
from dinokit.segment.prompts import empty_prompt
from dinokit.segment.saved import SavedHead, load_head
from dinokit.segment.unified import (
    Phrase,
    UnifiedHead,
    as_words,
    draw_absent,
    draw_phrase,
    fitting,
    mean_cell,
    names_of,
    shares_of,
    vocabulary,
)

STREAM = 15  # of random numbers, of the phrases of an image
GIB = 1.0  # of images and features that are kept
SHOWN = ("rest", "what is asked for")  # in the pictures of a report


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.objects", "test", labels=False)
    # largest, random, all: objects by their true masks; prototype: patches nearer to the region than to the
    # rest of its image
    method: Literal["trained", "largest", "random", "all", "prototype"] = "trained"
    head: str = only_if("", method=("trained",))  # a head of kind unified, or the folder of its run
    size: int = only_if(0, method=("prototype",))  # of the canvas; 0: as the backbone's images
    kind: Literal["text", "region", "both"] = "text"  # what asks
    # words of a phrase: some of the name, or all, so that text, region and both ask for the same objects
    words: Literal["some", "all"] = only_if("some", kind=("text", "both"))
    max_test: int = 200  # images, drawn evenly from the set; 0: all
    # pixels of the image as stored; smaller objects are not asked for, and smaller answers are empty
    min_area: int = 24
    seed: int = 0  # of the phrases
    overlap: Literal["refuse", "allow"] = only_if(
        "refuse", method=("trained",)
    )  # images of the head's training
    out: str = ""  # folder for a few images with the truth and the answer of a phrase, which a report shows

    def __post_init__(self) -> None:
        check_at_least(self, size=0, max_test=0, min_area=1, seed=0)
        if self.method == "prototype" and self.kind == "text":
            raise ValueError("method=prototype compares with a region: set kind=region or kind=both.")


@dataclass
class Asked:
    """One question about an image."""

    phrase: Phrase  # empty: a region alone asks
    region: tuple[Item, int] | None  # another image, and the number of its object
    meant: list[int]  # numbers of the objects of the answer


Answers = Callable[[Item, Sequence[Asked], np.random.Generator], Tensor]  # -> (M, H, W) bool


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """The scores of a head or of a baseline.

    Returns:
        Of phrases that fit an object 'cIoU' (intersections over unions, summed over all), 'mIoU' (mean over
        phrases), 'P@0.5' (share with an IoU of 0.5 or more), 'target' (share with an answer that is not
        empty), 'swap': share of the exchanges of a phrase for one about other objects of the image after
        which the answer is nearer to those. An answer that never changes has 0.5 at most. Of phrases that
        fit nothing 'no target': share with an empty answer. 'phrases', 'images_test'.

    Raises:
        ValueError, LookupError: if images or head do not fit; the message names the key to set.
    """
    if cfg.method == "trained" and not cfg.head:
        raise ValueError(
            "head=RUN must be given: a head of kind unified that dinokit train-head trained. Without one: "
            "method=largest, random, all or prototype."
        )
    source = open_objects(cfg.test, "test", backbone, 0)  # all: regions are of any of them
    if not vocabulary(source.classes):
        raise ValueError("The objects of the test images have no classes, whose names the phrases are from.")
    with frozen(backbone), torch.no_grad():
        answers, encoder, about = method_of(cfg, backbone, source.classes)
        shared = count_trained(cfg, about, source, backbone) if about else 0
        items = Items(source, encoder, GIB)
        rows: list[list[float]] = []
        places = spread_places(len(source), cfg.max_test)
        samples = Sampler(cfg.out, len(places), SHOWN)
        numbers = range(rank(), len(places), world_size())
        for place in watch(numbers, len(numbers), "test images"):
            index = places[place]
            item, rng = items[index], generator(cfg.seed, index, 0, STREAM)
            asked = questions(cfg, items, index, rng)
            if asked:
                found = answers(item, asked, rng).cpu()
                truth = torch.stack([_union(item, each.meant) for each in asked])
                rows += image_scores(found, truth, cfg.min_area)
                what = " ".join(asked[0].phrase) or "a region of another image"
                _draw(samples, item, place, f"{what}: {source.name(index)}", truth[0], found[0])
    samples.save()
    together = [row for each in gather_objects(rows) for row in each]
    if not together:
        raise ValueError(
            f"No test image has an object of min_area={cfg.min_area} pixels with a class: lower it."
        )
    return {**named_optimistic(scores(together), shared), "images_test": len(places)}


def questions(cfg: Config, items: Items, index: int, rng: np.random.Generator) -> list[Asked]:
    """What an image is asked: for each object a phrase, a region or both, and a phrase that fits nothing."""
    item, classes = items[index], items.source.classes
    labels, names = item.objects.labels, names_of(item.objects.labels, classes)
    found: list[Asked] = []
    for number in item.objects.chosen(cfg.min_area):
        if not names[number]:
            continue
        phrase = draw_phrase(names[number], rng) if cfg.words == "some" else names[number]
        if cfg.kind == "text":
            found.append(Asked(phrase, None, fitting(phrase, names)))
            continue
        other = find_examples(items, labels[number], 1, cfg.min_area, rng, index, True)
        if other:
            alike = [i for i, label in enumerate(other[0].objects.labels) if label == labels[number]]
            largest = max(alike, key=lambda i: other[0].objects.rles[i].area)
            meant = [i for i, label in enumerate(labels) if label == labels[number]]
            found.append(Asked(phrase if cfg.kind == "both" else (), (other[0], largest), meant))
    absent = draw_absent(names, classes, rng) if found and cfg.kind == "text" else ()
    return [*found, Asked(absent, None, [])] if absent else found


def image_scores(found: Tensor, truth: Tensor, min_area: int) -> list[list[float]]:
    """For each answer (M, H, W) bool: intersection, union, 1 with a target, 1 if empty, exchanges, good ones.

    An answer is exchanged for each answer about other objects; it is good if it is nearer to those.
    """
    a, b = found.flatten(1), truth.flatten(1)
    a = a & (a.sum(dim=1, keepdim=True) >= min_area)
    between = iou(a[:, None], b[None])  # of each answer with each truth
    target, rows = b.any(dim=1), []
    for i in range(len(a)):
        others = [j for j in range(len(a)) if target[i] and target[j] and not (b[i] & b[j]).any()]
        good = sum(bool(between[i, i] > between[i, j]) for j in others)
        both, either = float((a[i] & b[i]).sum()), float((a[i] | b[i]).sum())
        rows.append([both, either, float(target[i]), float(not a[i].any()), float(len(others)), float(good)])
    return rows


def scores(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Scores of rows as image_scores() makes them."""
    table = torch.tensor(rows, dtype=torch.float64)
    fits, absent = table[table[:, 2] > 0], table[table[:, 2] == 0]
    result: dict[str, float] = {}
    if len(fits):
        each = fits[:, 0] / fits[:, 1]
        result |= {"cIoU": float(fits[:, 0].sum() / fits[:, 1].sum()), "mIoU": float(each.mean())}
        result |= {"P@0.5": float((each >= 0.5).double().mean()), "target": float(1 - fits[:, 3].mean())}
        if fits[:, 4].sum():
            result["swap"] = float(fits[:, 5].sum() / fits[:, 4].sum())
    if len(absent):
        result["no target"] = float(absent[:, 3].mean())
    return {**result, "phrases": float(len(table))}


def method_of(
    cfg: Config, backbone: Backbone, classes: Sequence[str]
) -> tuple[Answers, Encoder, SavedHead | None]:
    """The method, how it sees images, and of a head what its file says.

    Raises:
        ValueError: if the head knows none of the words of the classes.
    """
    if cfg.method != "trained":
        return {"prototype": prototype}.get(cfg.method, by_truth(cfg)), Encoder(backbone, cfg.size), None
    module, encoder, about = load_head(cfg.head, backbone, "unified")
    head = cast(UnifiedHead, module)
    missing = [word for word in vocabulary(classes) if word not in head.words]
    if missing and cfg.kind != "region":
        raise ValueError(
            f"{cfg.head} does not know the words {', '.join(missing[:5])} of the classes of the test images. "
            f"It knows: {', '.join(head.words)}. Give images with those, or kind=region."
        )

    def trained(item: Item, asked: Sequence[Asked], _: np.random.Generator) -> Tensor:
        device = encoder.device
        embedded = head.embed(item.features[None].to(device).float(), encoder.pixels(item.canvas[None]))
        prompt = empty_prompt(torch.zeros(len(asked), dtype=torch.int64, device=device))
        if cfg.kind != "region":
            prompt.words = torch.stack([as_words(each.phrase, head.words) for each in asked]).to(device)
        others = [each.region for each in asked if each.region is not None]
        if others:
            cells = head.decoder.neck(torch.stack([other.features for other, _ in others]).to(device).float())
            prompt.region = head.refer(cells, _shares(others, cells))
        return item.frame.from_canvas(head(embedded, prompt).logits[:, 0]) > 0

    return trained, encoder, about


def by_truth(cfg: Config) -> Answers:
    """A baseline that answers every question about an image with the true masks of the same objects."""

    def answers(item: Item, asked: Sequence[Asked], rng: np.random.Generator) -> Tensor:
        chosen = item.objects.chosen(cfg.min_area)
        largest = max(chosen, key=lambda number: item.objects.rles[number].area)
        named = {"largest": lambda: [largest], "all": lambda: chosen}
        draw = named.get(cfg.method, lambda: [chosen[int(rng.integers(len(chosen)))]])
        return torch.stack([_union(item, draw()) for _ in asked])

    return answers


def prototype(item: Item, asked: Sequence[Asked], _: np.random.Generator) -> Tensor:
    """Patches whose cosine with the mean of the region is larger than with that of the rest of its image."""
    others = [each.region for each in asked if each.region is not None]
    device = item.encoder.device
    cells = torch.stack([other.features for other, _ in others]).to(device).float()
    shares = _shares(others, cells)
    means = torch.stack([mean_cell(cells, shares), mean_cell(cells, 1 - shares)], dim=1)  # (M, 2, D)
    x = F.normalize(item.features.to(device).float(), dim=0)
    cosines = torch.einsum("mkd,dhw->mkhw", F.normalize(means, dim=2), x)
    return item.frame.from_canvas(cosines[:, 0] - cosines[:, 1]) > 0


def _shares(others: Sequence[tuple[Item, int]], cells: Tensor) -> Tensor:
    """The shares of the patches of other images that their objects cover, (M, h, w)."""
    masks = torch.stack([other.mask(number) for other, number in others]).to(cells.device)
    return shares_of(masks, (cells.shape[2], cells.shape[3]))


def _union(item: Item, numbers: Sequence[int]) -> Tensor:
    """The pixels of objects, (H, W) bool, as stored."""
    mask = np.zeros(item.objects.size, bool)
    for number in numbers:
        mask |= item.objects.mask(number)
    return torch.from_numpy(mask)


def _draw(samples: Sampler, item: Item, place: int, title: str, truth: Tensor, found: Tensor) -> None:
    canvas = item.frame.mask_to_canvas
    samples.add(place, title, item.canvas, canvas(truth).float(), canvas(found).float())
