"""Trains the model of dinokit.language.imagine on captioned boards, by transformers' Trainer; measures it."""

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.data.scenes.captioned import CELLS, COLOURS, HUES, SHAPES, Board, CaptionedWorld
from dinokit.data.scenes.sentences import describe
from dinokit.features import dense, last_blocks
from dinokit.language import needed
from dinokit.language.imagine import GRID, Decoder, Imagine
from dinokit.language.trainer import training_arguments
from dinokit.models import Backbone

Say = Callable[[str], None]  # is given lines about the progress
ENCODED = 256  # images that the backbone is shown at a time
# The middle of each colour of the boards, in [0, 1]; the hues are those of the boards, the rest is ours.
WHITE, BLACK = (0.95, 0.95, 0.95), (0.06, 0.06, 0.06)


@dataclass
class Scenes:
    """Boards with what is said of them, their pixels and their embeddings."""

    boards: list[Board]
    captions: list[str]
    pixels: Tensor  # (n, 3, S, S) uint8
    embeddings: Tensor  # (n, 16, D), as the backbone gives them


def encode(
    backbone: Backbone, split: str, count: int, size: int, seed: int, distinct: bool = False
) -> Scenes:
    """`count` boards of one or two things, `size` pixels wide; `distinct`: no two with the same caption.

    Raises:
        ValueError: if more different captions are asked for than a split has.
    """
    if distinct and count > caption_count(split):
        raise ValueError(
            f"{count:,} boards with different captions are asked for, and the split {split} has "
            f"{caption_count(split):,}: ask for fewer (test= of dinokit imagine eval)."
        )
    world = CaptionedWorld(size, seed, split, things=(1, 2))
    found: dict[object, Board] = {}
    for index in itertools.count():
        if len(found) == count:
            break
        board = world.board(index)
        found.setdefault(describe(board) if distinct else index, board)
    boards = list(found.values())
    images = np.stack([world.draw(board).image for board in boards])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Scenes(boards, [describe(board) for board in boards], pixels, embed(backbone, pixels))


def caption_count(split: str) -> int:
    """How many different captions the boards of one or two things have: ordered pairs in sets of cells."""

    def of(kinds: int) -> int:  # of thing, by colour and outline
        return CELLS * kinds + math.comb(CELLS, 2) * kinds * (kinds - 1)

    every, novel = len(COLOURS) * len(SHAPES), len(COLOURS)  # a colour has one outline that is novel
    return of(every) - of(every - novel) if split == "novel" else of(every - novel)


def embed(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Images (n, 3, S, S) uint8 -> features of a backbone on the CPU, averaged to 4 x 4: (n, 16, D)."""
    last, found = last_blocks(backbone, 1), []
    for chunk in pixels.split(ENCODED):
        maps = dense(backbone, chunk, last)[0].patches
        found.append(F.adaptive_avg_pool2d(maps, GRID).flatten(2).transpose(1, 2))
    return torch.cat(found)


class _Drawing(nn.Module):
    """The decoder with its loss, as a Trainer calls it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, embeddings: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.l1_loss(self.decoder(embeddings), pixels.float() / 255)}


def fit(model: nn.Module, collate: Any, count: int, settings: Mapping[str, Any], say: Say) -> float:
    """Train by transformers' Trainer, with AdamW and a cosine after a twentieth of warm-up; the mean loss.

    `collate` makes a batch from numbers below `count`; `settings` are further TrainingArguments.
    """
    transformers = needed("transformers")
    needed("accelerate")

    class Lines(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                say(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            "auto",
            output_dir=folder, lr_scheduler_type="cosine", warmup_steps=settings["max_steps"] // 20,
            weight_decay=0.01, save_strategy="no", logging_steps=0.05, report_to=[], disable_tqdm=True,
            remove_unused_columns=False,
            **settings,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, collate, range(count), callbacks=[Lines()])
        trainer.remove_callback(transformers.PrinterCallback)
        return float(trainer.train().training_loss)


def train(
    model: Imagine, scenes: Scenes, steps: tuple[int, int], settings: Mapping[str, Any], say: Say
) -> dict[str, float]:
    """The decoder on true embeddings, then frozen; then the language model, half of it writing, half reading.

    `steps` are of the decoder and of the language model; `settings` as of fit().
    """
    model.mean.copy_(scenes.embeddings.mean(dim=(0, 1)))
    model.std.copy_(scenes.embeddings.std(dim=(0, 1)).clamp_min(1e-6))
    rows = model.standardised(scenes.embeddings)

    def pairs(numbers: Sequence[int]) -> dict[str, Tensor]:
        return {"embeddings": rows[list(numbers)], "pixels": scenes.pixels[list(numbers)]}

    def sequences(numbers: Sequence[int]) -> dict[str, Tensor]:
        writes = [place % 2 == 0 for place in range(len(numbers))]
        captions = [scenes.captions[i] for i in numbers]
        return {**model.tokens(captions, writes), "embeddings": rows[list(numbers)]}

    say("the decoder, from embeddings to pixels")
    drawing = fit(_Drawing(model.decoder), pairs, len(rows), {**settings, "max_steps": steps[0]}, say)
    model.decoder.requires_grad_(False)
    say("the language model")
    loss = fit(model, sequences, len(rows), {**settings, "max_steps": steps[1]}, say)
    model.to("cpu")
    return {"loss_decoder": drawing, "loss": loss}


def prototypes() -> Tensor:
    """(8, 3): the middle of each of the world's colours."""
    ramps = np.abs((HUES[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    hues = 0.85 * (1 - 0.85 * (1 - np.clip(ramps, 0, 1)))
    return torch.tensor(np.concatenate([hues, [WHITE, BLACK]]), dtype=torch.float32)


def read_cells(images: Tensor) -> tuple[Tensor, Tensor]:
    """What a drawing shows, from its pixels alone: no network is asked.

    Args:
        images: (b, 3, S, S) in [0, 1].

    Returns:
        For each of the nine cells, row by row: the place in COLOURS that is nearest to the mean of its middle
        (b, 9), and how far that mean is from the ground, the median of the image (b, 9).
    """
    side = images.shape[2]
    half, middles = max(side // 16, 1), [round((k + 0.5) * side / 3) for k in range(3)]
    spans = [slice(middle - half, middle + half) for middle in middles]
    cells = [images[:, :, down, across].mean(dim=(2, 3)) for down in spans for across in spans]
    means = torch.stack(cells, dim=1)  # (b, 9, 3)
    ground = images.flatten(2).median(dim=2).values[:, None]
    return torch.cdist(means, prototypes()[None]).argmin(dim=2), (means - ground).norm(dim=2)


def drawn_right(images: Tensor, boards: Sequence[Board]) -> dict[str, float]:
    """Shares of the things of boards whose colour, and whose cell, a template matcher finds in drawings."""
    colours, strength = read_cells(images)
    colour, place, count = 0, 0, 0
    for board, found, strong in zip(boards, colours.tolist(), strength, strict=True):
        cells = set(strong.topk(len(board.things)).indices.tolist())
        for thing in board.things:
            colour += found[thing.cell] == thing.colour
            place += thing.cell in cells
            count += 1
    return {"colour": colour / count, "place": place / count}


def recall(predicted: Tensor, true: Tensor, of: Sequence[int] | None = None) -> float:
    """R@1 by cosine among all true embeddings (n, 16, D): of all predictions, or of those numbered `of`."""
    a, b = (F.normalize(x.flatten(1), dim=1) for x in (predicted, true))
    hits = (a @ b.T).argmax(dim=1) == torch.arange(len(a))
    return float((hits if of is None else hits[list(of)]).float().mean())


def evaluate(model: Imagine, scenes: Scenes, trained: Scenes) -> dict[str, float]:
    """Figures of scenes with different captions, and of the baselines that must fail."""
    true, n = model.standardised(scenes.embeddings), len(scenes.boards)
    made = model.imagine(scenes.captions)
    shuffled = model.imagine([scenes.captions[(i + n // 2) % n] for i in range(n)])
    left = torch.cat([torch.zeros_like(true[:, :1]), true[:, :-1]], dim=1)
    with torch.inference_mode():
        forced = model.teacher_forced(scenes.captions, true)
        images, again, swapped = (model.decoder(x).clamp(0, 1) for x in (made, true, shuffled))
    pixels, mean = scenes.pixels / 255, trained.pixels.float().mean(dim=0) / 255
    seen, read = set(trained.captions), model.read(true)
    new = [i for i, caption in enumerate(scenes.captions) if caption not in seen]
    scores = {
        "recall": recall(made, true), "recall teacher forced": recall(forced, true),
        "recall copy left": recall(left, true), "recall shuffled captions": recall(shuffled, true),
        "chance": 1 / n,
        "new captions": len(new) / n, "recall new captions": recall(made, true, new) if new else 0.0,
        "psnr": _psnr(again, pixels), "psnr mean image": _psnr(mean.expand_as(pixels), pixels),
        "captions read": sum(a == b for a, b in zip(read, scenes.captions, strict=True)) / n,
    }  # fmt: skip
    named = {"photograph": pixels, "decoded": again, "drawn": images, "drawn shuffled": swapped}
    for name, pictures in named.items():
        scores |= {f"{key} {name}": value for key, value in drawn_right(pictures, scenes.boards).items()}
    return scores


def _psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, of all pixels together."""
    return float(-10 * torch.log10(F.mse_loss(a, b)))
