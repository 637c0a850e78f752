"""Episodes of few-shot segmentation: a class, images in which its objects are marked, and a new image.

An episode is a function of (seed, step, place). All objects of the class are marked in an example; everything
else, objects of other classes too, is the rest. So the examples alone say what is asked for.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.sampler import generator, image_at
from dinokit.segment.encoder import Encoder, Item, Items
from dinokit.segment.in_context import Examples, InContextHead, label_shares
from dinokit.segment.losses import iou, mask_loss
from dinokit.segment.prompts import Frame
from dinokit.segment.recipe import Config

STREAM = 12  # of random numbers of a place
ATTEMPTS = 400  # images tried for one that shows the class


@dataclass
class Episode:
    """A question: where in the query is what the examples show?"""

    query: Item
    examples: list[Item]
    label: int  # the class
    other: int  # another class of the query; -1: there is none
    index: int  # of the query


def class_mask(item: Item, label: int) -> np.ndarray:
    """All objects of a class in an image, (H, W) bool."""
    numbers = [i for i, each in enumerate(item.objects.labels) if each == label]
    mask = np.zeros(item.objects.size, bool)
    for number in numbers:
        mask |= item.objects.mask(number)
    return mask


def classes_of(item: Item, min_area: int, stored: bool = False) -> list[int]:
    """The classes with `min_area` pixels or more in an image, of the canvas or as stored, ascending."""
    areas: dict[int, float] = {}
    for label, rle in zip(item.objects.labels, item.objects.rles, strict=True):
        areas[label] = areas.get(label, 0.0) + rle.area * (1.0 if stored else item.frame.scale**2)
    return sorted(label for label, area in areas.items() if label >= 0 and area >= min_area)


def draw_episode(
    items: Items, shots: int, min_area: int, seed: int, position: int, stored: bool = False
) -> Episode:
    """The episode at a position of the run: the query is the image there, the rest is random.

    Args:
        items: the images.
        shots: examples.
        min_area: pixels; an image with less of a class is not asked for it.
        seed: of the run.
        position: of the episode.
        stored: whether these are pixels as stored, so that methods with other canvases get the same episodes.

    Raises:
        ValueError: if no class is found in enough images.
    """
    rng = generator(seed, position, 0, STREAM)
    index = image_at(seed, position, len(items))
    for _ in range(ATTEMPTS):
        query = items[index]
        present = classes_of(query, min_area, stored)
        if present:
            order = rng.permutation(present).tolist()
            found = find_examples(items, order[0], shots, min_area, rng, index, stored)
            if found:
                return Episode(query, found, order[0], order[1] if len(order) > 1 else -1, index)
        index = int(rng.integers(len(items)))
    raise ValueError(
        f"No class has {min_area} pixels in {shots + 1} images of {len(items)}: give more images with "
        f"labelled objects, or a smaller min_area."
    )


def find_examples(
    items: Items, label: int, shots: int, min_area: int, rng: np.random.Generator, query: int, stored: bool
) -> list[Item]:
    """Other images that show a class; none if there are too few. Arguments as draw_episode()."""
    found: dict[int, Item] = {}
    for _ in range(ATTEMPTS):
        if len(found) == shots:
            return [*found.values()]
        index = int(rng.integers(len(items)))
        if index != query and index not in found and label in classes_of(items[index], min_area, stored):
            found[index] = items[index]
    return []


def labels_on_canvas(frame: Frame, ids: np.ndarray) -> Tensor:
    """(S, S) int64: the numbers of a map (H, W) of the image, or 1 in a mask; -1 beyond the image."""
    labels, (height, width) = torch.full((frame.side, frame.side), -1), frame.shape
    labels[:height, :width] = 0
    for number in range(1, int(ids.max()) + 1):
        labels[frame.mask_to_canvas(torch.from_numpy(ids == number))] = number
    return labels


def labels_of(item: Item, label: int) -> Tensor:
    """(S, S) int64: 1 on all objects of a class, 0 in the rest of the image, -1 beyond it."""
    return labels_on_canvas(item.frame, class_mask(item, label))


def as_examples(pairs: list[tuple[Tensor, Tensor]], classes: int, encoder: Encoder) -> Examples:
    """Features (D, h, w) with labels (S, S) each, as the patches that have a label."""
    rows, shares = [], []
    for features, labels in pairs:
        share, used = label_shares(labels, classes, encoder.backbone.patch)
        rows.append(features.float().flatten(1).T.to(encoder.device)[used.to(encoder.device)])
        shares.append(share[used].to(encoder.device))
    return Examples(torch.cat(rows), torch.cat(shares))


def marked(items: list[Item], label: int, encoder: Encoder) -> Examples:
    """Examples in which all objects of a class are marked."""
    return as_examples([(item.features, labels_of(item, label)) for item in items], 2, encoder)


class InContextTask:
    """What training needs of a head that segments by example."""

    about: ClassVar[dict[str, Any]] = {}  # what its file says beside the sizes of the head

    def __init__(self, cfg: Config, items: Items) -> None:
        self.cfg, self.items = cfg, items
        self.head = InContextHead(items.encoder.width, cfg.context, items.encoder.channels)

    def loss(self, step: int, places: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's part of the loss of a step, and of what the log shows: means over all episodes."""
        cfg, encoder = self.cfg, self.items.encoder
        total, reached = torch.zeros((), device=encoder.device), torch.zeros((), device=encoder.device)
        for place in places:
            position = step * cfg.optim.batch + place
            episode = draw_episode(
                self.items, cfg.context.shots, cfg.context.min_area, cfg.run.seed, position
            )
            query = episode.query
            logits = self.head(
                query.features.float().to(encoder.device),
                encoder.pixels(query.canvas[None])[0],
                marked(episode.examples, episode.label, encoder),
            )
            truth = labels_of(query, episode.label).to(encoder.device)
            full = F.interpolate(logits[None], truth.shape, mode="bilinear", align_corners=False)[0]
            inside = truth >= 0
            target = truth[inside] == 1
            difference = (full[1] - full[0])[inside]
            total = total + mask_loss(difference, target.float(), cfg.losses)
            reached = reached + iou(difference > 0, target)
        count = cfg.optim.batch
        return total / count, {"loss": total.detach() / count, "iou": reached / count}
