"""What a promptable head learns in a step: objects of some images, a first prompt for each, then clicks.

In each round a click goes to an error of the single answer, and its logits come back as a mask prompt (SAM,
arXiv 2304.02643, appendix A). The single answer is trained and carried on from the first round: at a small
budget the qualities, which SAM chooses by, are learnt last. Every random number is a function of (seed, step,
place), so neither a resumption nor the number of processes changes what is learnt.

    m  objects of an image     M  of all images of this process     R  rounds
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.sampler import generator, image_at
from dinokit.segment.encoder import Encoder, Item, Items
from dinokit.segment.losses import answer_loss, words_loss
from dinokit.segment.promptable import Embedded, PromptableHead
from dinokit.segment.prompts import BACKGROUND, FOREGROUND, PADDING, Prompt, boxes_of, empty_prompt
from dinokit.segment.recipe import Config, Losses, Prompts
from dinokit.segment.unified import UnifiedHead

STREAM = 11  # of random numbers of a place
ATTEMPTS = 50  # images tried for one that has an object
NOISE, MOST_NOISE = 0.1, 20.0  # of a box: share of its side, and pixels of the canvas at most (SAM)


@dataclass
class Sample:
    """One image of a step."""

    canvas: Tensor  # (C, S, S) uint8
    features: Tensor  # (D, h, w) float16
    truth: Tensor  # (m, S, S) bool
    image: Tensor  # (m, S, S) bool, False in the padding
    draws: Tensor  # (m, R) in [0, 1), of the clicks
    noise: Tensor  # (m, 4) normal, of the boxes
    boxed: Tensor  # (m,) bool: those whose first prompt has a box
    clicked: Tensor  # (m,) bool: those whose first prompt has a click
    index: int  # of the image
    numbers: list[int]  # of the objects, m of them


def objects_on_canvas(item: Item, min_area: int) -> list[int]:
    """The numbers of the objects of an image that have `min_area` pixels or more on the canvas."""
    return item.objects.chosen(max(1, round(min_area / item.frame.scale**2)))


def draw_sample(items: Items, cfg: Prompts, seed: int, step: int, batch: int, place: int) -> Sample:
    """The image and the random numbers of a place of a step.

    Raises:
        ValueError: if none of many images has an object that is large enough.
    """
    rng = generator(seed, step, place, STREAM)
    index = image_at(seed, step * batch + place, len(items))
    for _ in range(ATTEMPTS):
        item = items[index]
        chosen = objects_on_canvas(item, cfg.min_area)
        if chosen:
            break
        index = int(rng.integers(len(items)))
    else:
        raise ValueError(
            f"None of {ATTEMPTS} images, such as {items.source.name(index)}, has an object of "
            f"prompts.min_area={cfg.min_area} pixels on the canvas: lower it, or give a larger size."
        )
    order = rng.permutation(len(chosen))
    numbers = [chosen[order[k % len(chosen)]] for k in range(cfg.objects)]
    draws, noise = rng.random((cfg.objects, cfg.rounds)), rng.standard_normal((cfg.objects, 4))
    boxed = rng.random(cfg.objects) < cfg.box
    truth, image = torch.stack([item.mask(number) for number in numbers]), torch.zeros_like(item.canvas[:1])
    height, width = item.frame.shape
    image[:, :height, :width] = 1
    return Sample(
        item.canvas, item.features, truth, image.bool().expand_as(truth),
        torch.from_numpy(draws.astype(np.float32)), torch.from_numpy(noise.astype(np.float32)),
        torch.from_numpy(boxed), torch.from_numpy(~boxed), index, numbers,
    )  # fmt: skip


@dataclass
class Batch:
    """The samples of a step together, on the device of the head."""

    embedded: Embedded
    truth: Tensor  # (M, S, S) bool
    image: Tensor  # (M, S, S) bool
    draws: Tensor  # (M, R)
    prompt: Prompt  # the first one: clicks and boxes


def as_batch(head: PromptableHead | UnifiedHead, encoder: Encoder, samples: list[Sample]) -> Batch:
    """Embed the images of samples and put their first clicks and boxes together."""
    device, m = encoder.device, len(samples[0].truth)
    canvases = torch.stack([s.canvas for s in samples])
    features = torch.stack([s.features for s in samples]).to(device).float()
    truth, image, draws, noise, boxed, clicked = (
        torch.cat([getattr(s, key) for s in samples]).to(device)
        for key in ("truth", "image", "draws", "noise", "boxed", "clicked")
    )
    prompt = empty_prompt(torch.arange(len(samples), device=device).repeat_interleave(m))
    points, signs = first_clicks(truth, draws[:, 0])
    prompt = prompt.with_points(points, torch.where(clicked, signs, PADDING))
    boxes = noisy_boxes(boxes_of(truth), noise, encoder.side)
    prompt = replace(prompt, boxes=torch.where(boxed[:, None], boxes, prompt.boxes))
    return Batch(head.embed(features, encoder.pixels(canvases)), truth, image, draws, prompt)


def rounds_loss(
    head: PromptableHead | UnifiedHead, batch: Batch, losses: Losses, names: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, a sum over objects and rounds, and sums of what the log shows.

    Args:
        head: in training.
        batch: with the first prompts.
        losses: their weights.
        names: (M, V) of the objects, as of words_loss(), if the head gives names.
    """
    prompt, truth, rounds, side = batch.prompt, batch.truth, batch.draws.shape[1], batch.embedded.side
    total, logs = torch.zeros((), device=truth.device), {}
    for number in range(rounds):
        answer = head(batch.embedded, prompt)
        parts = answer_loss(answer, truth, losses, several=number == 0)
        total = total + parts.loss
        logs[f"iou_{number + 1}"] = parts.iou
        if number == 0:
            logs |= {"iou_best": parts.best, "quality_error": parts.quality_error}
        if names is not None:
            of_words = words_loss(answer.words, names)
            total = total + losses.words * of_words
            logs["words"] = of_words.detach()
        if number + 1 < rounds:
            carried = answer.logits[:, :1].detach()
            prompt = replace(prompt, masks=carried)
            predicted = F.interpolate(carried, (side,) * 2, mode="bilinear", align_corners=False)
            points, signs = next_clicks(truth, predicted[:, 0] > 0, batch.image, batch.draws[:, number + 1])
            prompt = prompt.with_points(points, signs)
    return total, {"loss": total.detach(), **logs}


class PromptableTask:
    """What training needs of a promptable head."""

    about: ClassVar[dict[str, Any]] = {}  # what its file says beside the sizes of the head

    def __init__(self, cfg: Config, items: Items) -> None:
        self.cfg, self.items = cfg, items
        self.head = PromptableHead(items.encoder.width, cfg.head, items.encoder.channels)

    def loss(self, step: int, places: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's part of the loss of a step, and of what the log shows: means over all objects."""
        cfg = self.cfg
        samples = [
            draw_sample(self.items, cfg.prompts, cfg.run.seed, step, cfg.optim.batch, place)
            for place in places
        ]
        batch = as_batch(self.head, self.items.encoder, samples)
        total, logs = rounds_loss(self.head, batch, cfg.losses)
        count = cfg.optim.batch * cfg.prompts.objects
        return total / count, {name: value / count for name, value in logs.items()}


# Simulated prompts: a click is a random pixel where the prediction is wrong. A missing pixel gets a positive
# click, one too many a negative one (SAM, appendix A).


def random_pixels(regions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A pixel of each region, uniformly.

    Args:
        regions: (M, H, W) bool.
        draws: (M,) in [0, 1).

    Returns:
        (M, 2) x and y; (M,) bool, False for an empty region.
    """
    flat = regions.flatten(1)
    counts = flat.sum(dim=1)
    rank = (draws.to(counts.device) * counts).floor().clamp(max=(counts - 1).clamp(min=0))
    place = ((flat.cumsum(dim=1) - 1 == rank[:, None]) & flat).int().argmax(dim=1)
    width = regions.shape[2]
    return torch.stack([place % width, place // width], dim=1).float(), counts > 0


def first_clicks(truth: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A positive click in each object (M, H, W): points (M, 2) and signs (M,)."""
    points, _ = random_pixels(truth, draws)
    return points, torch.full((len(truth),), FOREGROUND, device=truth.device)


def next_clicks(truth: Tensor, predicted: Tensor, image: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A click on the error of each prediction; where there is none, a negative one beside the object.

    Args:
        truth: (M, H, W) bool.
        predicted: (M, H, W) bool.
        image: (M, H, W) bool, False in the padding, where nobody clicks.
        draws: (M,) in [0, 1).
    """
    points, wrong = random_pixels((truth ^ predicted) & image, draws)
    beside, _ = random_pixels(~truth & image, draws)
    points = torch.where(wrong[:, None], points, beside)
    x, y = points.long().unbind(dim=1)
    inside = truth[torch.arange(len(truth), device=truth.device), y, x]
    return points, torch.where(inside, FOREGROUND, BACKGROUND)


def noisy_boxes(boxes: Tensor, noise: Tensor, side: int) -> Tensor:
    """Boxes whose edges are moved by NOISE of their sides, at most MOST_NOISE pixels, inside the canvas.

    Args:
        boxes: (M, 4).
        noise: (M, 4), standard normal.
        side: of the canvas.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + (noise.to(boxes) * NOISE * sides).clamp(-MOST_NOISE, MOST_NOISE)
    moved = moved.clamp(0, side)
    low, high = torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])
    return torch.cat([low, torch.maximum(high, low + 1)], dim=1)
