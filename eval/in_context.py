"""Segmentation by example: what an image and its mask mark, in another image (few-shot segmentation).

An episode is a class, `shots` images in which its objects are marked, and a query; other classes of the query
are background. Scores are those of few-shot work (HSNet, arXiv 2104.01538): the IoU of a class over all its
episodes, intersections over unions, and the mean over classes. For classes that a head has not seen, hold
them out of its training and give only them here, such as test.kinds=[blotches,speckle].

    D  width of the features     h, w  patches down and across     S  side of the canvas
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.predictions import Sampler
from dinokit.data.sampler import generator
from dinokit.eval._dense import labels_of_nearest
from dinokit.eval._images import named_optimistic
from dinokit.eval._objects import count_trained, open_objects
from dinokit.features import frozen
from dinokit.models import Backbone
from dinokit.runtime.distributed import gather_objects, rank, world_size
from dinokit.runtime.log import watch
from dinokit.segment.encoder import Encoder, Item, Items
from dinokit.segment.episodes import Episode, draw_episode, find_examples, labels_of, marked
from dinokit.segment.in_context import Examples, InContextHead
from dinokit.segment.losses import iou
from dinokit.segment.saved import SavedHead, load_head

SWAP = 13  # stream of random numbers, of the examples of another class
GIB = 1.0  # of images and features that are kept

SHOWN = ("rest", "the class of the example")  # in the pictures of a report

Segment = Callable[[Item, Examples], Tensor]  # -> (S, S) bool


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.objects", "test", labels=False)
    # knn: patches of the examples vote; prototype: the nearer mean; all: everything is the class
    method: Literal["trained", "knn", "prototype", "all"] = "trained"
    head: str = only_if("", method=("trained",))  # a head of dinokit train-head, or the folder of its run
    size: int = only_if(0, method=("knn", "prototype", "all"))  # of the canvas; 0: as the backbone's images
    shots: int = 1  # examples
    episodes: int = 200  # pairs of an example and a query, drawn from the images
    min_area: int = 60  # pixels of the image as stored; images with less of a class are not asked for it
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    k: int = only_if(30, method=("knn",))  # patches that vote
    temp: float = only_if(0.02, method=("knn",))  # a vote weighs softmax(cosine / temp)
    seed: int = 0  # of the episodes
    overlap: Literal["refuse", "allow"] = only_if(
        "refuse", method=("trained",)
    )  # images of the head's training
    out: str = ""  # folder for a few episodes with their truth and answer, which a report shows

    def __post_init__(self) -> None:
        check_at_least(self, size=0, shots=1, episodes=1, min_area=1, max_test=0, k=1)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """The scores over all episodes.

    Returns:
        'mIoU' of the asked classes, 'FB-IoU' (mean of foreground and background, classes pooled), 'swap': IoU
        with another class of the query when the examples show that, less its IoU when they show the first. 0
        means that the answer does not depend on the examples. 'episodes', 'images_test'.

    Raises:
        ValueError, LookupError: if the images or the head do not fit; the message names the key to set.
    """
    if cfg.method == "trained" and not cfg.head:
        raise ValueError(
            "head=RUN must be given: a head of kind in_context that dinokit train-head trained. Without "
            "one: method=knn, prototype or all."
        )
    source = open_objects(cfg.test, "test", backbone, cfg.max_test)
    with frozen(backbone), torch.no_grad():
        segment, encoder, about = method_of(cfg, backbone)
        shared = count_trained(cfg, about, source, backbone) if about else 0
        items = Items(source, encoder, GIB)
        numbers = range(rank(), cfg.episodes, world_size())
        shown = watch(numbers, len(numbers), "episodes")
        samples = Sampler(cfg.out, cfg.episodes, SHOWN)
        rows = [episode_row(cfg, items, segment, number, samples) for number in shown]
    samples.save()
    table = torch.tensor([row for each in gather_objects(rows) for row in each])
    found = named_optimistic(scores(table), shared)
    return {**found, "episodes": len(table), "images_test": len(source)}


def episode_row(cfg: Config, items: Items, segment: Segment, number: int, samples: Sampler) -> list[float]:
    """Numbers of an episode: class, intersection and union of class and of the rest, swap (NaN without)."""
    episode = draw_episode(items, cfg.shots, cfg.min_area, cfg.seed, number, stored=True)
    query, encoder = episode.query, items.encoder
    truth = labels_of(query, episode.label).to(encoder.device)
    inside = truth >= 0
    full = segment(query, marked(episode.examples, episode.label, encoder))
    answer = full[inside]
    _draw(samples, items, episode, number, truth, full)
    true = truth[inside] == 1
    row = [float(episode.label)]
    for a, b in ((answer, true), (~answer, ~true)):
        row += [float((a & b).sum()), float((a | b).sum())]
    return [*row, swap(cfg, items, segment, episode, number, answer, inside)]


def _draw(
    samples: Sampler, items: Items, episode: Episode, number: int, truth: Tensor, answer: Tensor
) -> None:
    """An example and the query beside each other; of the example, the truth is the question."""
    example, query = episode.examples[0], episode.query
    asked = labels_of(example, episode.label).to(truth.device)
    predicted = torch.where(truth < 0, -1, answer.long())
    samples.add(
        number,
        f"{items.source.classes[episode.label]}, left: an example; right: {items.source.name(episode.index)}",
        torch.cat([example.canvas, query.canvas], dim=2),
        torch.cat([asked, truth], dim=1),
        torch.cat([torch.full_like(asked, -1), predicted], dim=1),
    )


def swap(
    cfg: Config, items: Items, segment: Segment, episode: Episode, number: int, answer: Tensor, inside: Tensor
) -> float:
    """What another class of the query gains on `answer` if the examples show it; NaN if there is none."""
    rng = generator(cfg.seed, number, 0, SWAP)
    other = episode.other
    found = (
        find_examples(items, other, cfg.shots, cfg.min_area, rng, episode.index, True) if other >= 0 else []
    )
    if not found:
        return float("nan")
    encoder, query = items.encoder, episode.query
    truth = labels_of(query, other).to(encoder.device)[inside] == 1
    swapped = segment(query, marked(found, other, encoder))[inside]
    return float(iou(swapped, truth) - iou(answer, truth))


def scores(table: Tensor) -> dict[str, float]:
    """Scores of rows as episode_row() makes them, (episodes, 6)."""
    labels, per_class = table[:, 0], []
    for label in labels.unique():
        rows = table[labels == label]
        per_class.append(rows[:, 1].sum() / rows[:, 2].sum().clamp(min=1))
    sides = [table[:, i].sum() / table[:, i + 1].sum().clamp(min=1) for i in (1, 3)]
    swaps = table[:, 5][~table[:, 5].isnan()]
    result = {"mIoU": float(torch.stack(per_class).mean()), "FB-IoU": float(torch.stack(sides).mean())}
    return {**result, "swap": float(swaps.mean())} if len(swaps) else result


def method_of(cfg: Config, backbone: Backbone) -> tuple[Segment, Encoder, SavedHead | None]:
    """The method, how it sees images, and of a head what its file says."""
    if cfg.method == "trained":
        module, encoder, about = load_head(cfg.head, backbone, "in_context")
        head = cast(InContextHead, module)

        def trained(item: Item, examples: Examples) -> Tensor:
            pixels = encoder.pixels(item.canvas[None])[0]
            return _to_canvas(head(item.features.float().to(encoder.device), pixels, examples), encoder.side)

        return trained, encoder, about
    encoder = Encoder(backbone, cfg.size)
    if cfg.method == "all":
        everything = torch.ones(encoder.side, encoder.side, dtype=torch.bool, device=encoder.device)
        return lambda item, _: everything, encoder, None

    def untrained(item: Item, examples: Examples) -> Tensor:
        h, w = item.features.shape[1:]
        x = F.normalize(item.features.float().flatten(1).T.to(encoder.device), dim=1)
        keys = F.normalize(examples.features, dim=1)
        if cfg.method == "knn":
            shares = labels_of_nearest(x, keys, examples.shares, cfg.k, cfg.temp)
        else:
            shares = x @ F.normalize(examples.shares.T @ keys, dim=1).T  # cosines with the mean of each class
        return _to_canvas(shares.T.unflatten(1, (h, w)), encoder.side)

    return untrained, encoder, None


def _to_canvas(logits: Tensor, side: int) -> Tensor:
    """(2, g, g) -> (S, S) bool: where the class has more than the rest."""
    full = F.interpolate(logits[None], (side, side), mode="bilinear", align_corners=False)[0]
    return full[1] > full[0]
