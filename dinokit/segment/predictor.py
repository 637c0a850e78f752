"""Masks of objects in one image, from prompts: `Predictor`, and masks of everything in it.

    predictor = Predictor.load(weights="runs/demo", head="runs/head")
    predictor.set_image("photo.jpg")
    answer = predictor.predict(points=[(120, 80)])
    answer = predictor.refine([(40, 60)], signs=[0])  # the same object without what is there

All numbers that go in and all masks that come out are in pixels of the image as decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from dinokit.data.decode import as_image
from dinokit.data.objects.rle import Rle, encode
from dinokit.models import Backbone
from dinokit.segment.encoder import Encoder
from dinokit.segment.promptable import Answer, Embedded, PromptableHead
from dinokit.segment.prompts import (
    UP,
    Frame,
    Prompt,
    Strokes,
    boxes_of,
    check_box,
    check_points,
    empty_prompt,
    mask_logits,
    stroke_mask,
    stroke_points,
)
from dinokit.segment.released import Sam
from dinokit.segment.saved import load_both
from dinokit.segment.unified import UnifiedHead, as_words, read_phrase, shares_of

AT_ONCE = 64  # prompts that the decoder sees at a time

Points = Sequence[Sequence[float]] | np.ndarray


@dataclass
class Masks:
    """The answer to a prompt: one mask, or several with the likeliest first."""

    masks: np.ndarray  # (A, H, W) bool
    quality: np.ndarray  # (A,): the IoU that the head expects of each
    logits: Tensor  # (A, g, g) on the canvas, to be given back as `mask`
    words: tuple[str, ...] = ()  # of a unified head: those that fit the single answer, the likeliest first


@dataclass
class Found:
    """One object that everything() found."""

    mask: np.ndarray  # (H, W) bool
    rle: Rle
    box: tuple[int, int, int, int]  # edges x0, y0, x1, y1
    quality: float
    stability: float  # IoU of the mask at a threshold above and at one below
    point: tuple[float, float]  # the prompt


class Predictor:
    """A backbone and a promptable or unified head, or SAM, with one image at a time.

    Args:
        head: in eval mode.
        encoder: of the images, with the backbone.
    """

    def __init__(self, head: PromptableHead | UnifiedHead | Sam, encoder: Encoder | Sam) -> None:
        self.head, self.encoder = head, encoder
        self._image: tuple[Embedded, Frame] | None = None
        self._prompt: Prompt | None = None
        self._last: Tensor | None = None

    @classmethod
    def load(cls, weights: str | Path | Backbone, head: str | Path = "", device: str = "auto") -> Self:
        """Load a backbone and the head that was trained on it, or a released SAM.

        Args:
            weights: whatever load_backbone() reads, or a backbone; without a head, a folder with a SAM as
                transformers writes it.
            head: a file of dinokit train-head, or its run's folder.
            device: as run.device.

        Raises:
            ValueError, LookupError: if there are no such files, or the head is of other weights.
        """
        if not head and not isinstance(weights, Backbone):
            sam = Sam(weights, device)
            return cls(sam, sam)
        module, encoder = load_both(weights, head, device, "promptable")
        return cls(cast(PromptableHead | UnifiedHead, module), encoder)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image.

        Raises:
            ValueError: if there is none yet.
        """
        _, frame = self._embedded()
        return frame.height, frame.width

    @torch.no_grad()
    def set_image(self, image: Any) -> None:
        """Take an image: a path, bytes of a file, a Pillow image, an array (H, W, C) or a tensor (C, H, W).

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        features, pixels, frame = self.encoder.encode(as_image(image, self.encoder.channels))
        self._image = self.head.embed(features[None], pixels), frame
        self._prompt = self._last = None

    def predict(
        self,
        points: Points = (),
        signs: Sequence[int] | np.ndarray = (),
        box: Sequence[float] | np.ndarray | None = None,
        mask: Tensor | np.ndarray | None = None,
        several: bool = False,
        strokes: Strokes | None = None,
        text: str = "",
        region: tuple[Any, Any] | None = None,
    ) -> Masks:
        """The mask of one object; of a text or a region, of all objects that fit.

        Args:
            points: (x, y) each, in pixels; several points are one object.
            signs: 1 on the object, 0 beside it; empty: all are on it.
            box: x0, y0, x1, y1 around it, edges.
            mask: of the object so far: logits of an earlier answer (1, g, g), or (H, W) bool.
            several: three masks, the likeliest first; for a prompt that fits more than one object.
            strokes: on the object: (H, W) bool, a line [(x, y), (x, y), ...], or several lines. For a head
                that is not unified they become points, as stroke_points() says.
            text: words for what to mark, for a unified head that knows them.
            region: for a unified head, another image as of set_image() and a mask (H, W) bool in it, for what
                looks like that here.

        Raises:
            ValueError: if there is no image, no prompt, one outside the image, or one that the head does not
                take; it says which.
        """
        embedded, frame = self._embedded()
        others = any(each is not None for each in (box, mask, region)) or bool(text)
        if not (len(points) or others or strokes is not None):
            raise ValueError("Give a prompt: points, a box, a mask, strokes, a text or a region.")
        drawn = None if strokes is None else stroke_mask(strokes, (frame.height, frame.width))
        if isinstance(self.head, UnifiedHead):
            prompt = self._as_prompt(points, signs, box, mask, frame, others or drawn is not None)
            prompt = self._with_more(self.head, prompt, frame, drawn, text, region)
        elif text or region is not None:
            raise ValueError(
                f"{'text' if text else 'region'}: this head takes none. Give a unified one, which "
                f"dinokit train-head head_unified_scenes trains"
                f"{'; dinokit segment has align=RUN for text as well' if text else ''}."
            )
        else:
            on_strokes = [] if drawn is None else stroke_points(drawn).tolist()
            prompt = self._as_prompt(points, signs, box, mask, frame, others or drawn is not None)
            if on_strokes:
                more = self._as_prompt(on_strokes, (), None, None, frame, True)
                prompt = _with_points_of(prompt, more)
        return self._answer(embedded, frame, prompt, several)

    def refine(self, points: Points, signs: Sequence[int] | np.ndarray = (), several: bool = False) -> Masks:
        """The last mask, of several the first, corrected by further points; as predict().

        Raises:
            ValueError: if nothing was predicted yet, or a point is outside the image.
        """
        embedded, frame = self._embedded()
        if self._prompt is None or self._last is None:
            raise ValueError("There is no mask to refine yet: call predict() first.")
        if not len(points):
            raise ValueError("refine() needs at least one point.")
        new, before = self._as_prompt(points, signs, None, self._last, frame, True), self._prompt
        prompt = replace(_with_points_of(before, new), masks=new.masks)
        return self._answer(embedded, frame, prompt, several)

    def _embedded(self) -> tuple[Embedded, Frame]:
        if self._image is None:
            raise ValueError("There is no image yet: call set_image() first.")
        return self._image

    def _as_prompt(
        self,
        points: Points,
        signs: Sequence[int] | np.ndarray,
        box: Sequence[float] | np.ndarray | None,
        mask: Tensor | np.ndarray | None,
        frame: Frame,
        others: bool,
    ) -> Prompt:
        """Check points, box and mask, and put them on the canvas; `others`: there is more than points."""
        size, device = (frame.height, frame.width), self.encoder.device
        places = [[float(number) for number in point] for point in points]
        given = [float(sign) for sign in signs] or [1.0] * len(places)
        check_points(places, size)
        if len(given) != len(places) or set(given) - {0, 1}:
            raise ValueError(
                f"signs={list(signs)}: give one for each of the {len(places)} points, 1 on the object or 0 "
                f"beside it."
            )
        if places and not any(given) and not others:
            raise ValueError("All points have sign 0: give one on the object, a box or a mask as well.")
        prompt = empty_prompt(torch.zeros(1, dtype=torch.int64, device=device))
        prompt.points = frame.points_to_canvas(torch.tensor(places).view(-1, 2))[None].to(device)
        prompt.signs = torch.tensor([given], device=device).long()
        if box is not None:
            edges = [float(edge) for edge in box]
            check_box(edges, size)
            prompt.boxes = frame.boxes_to_canvas(torch.tensor([edges])).to(device)
        if mask is not None:
            prompt.masks = self._mask_prompt(mask, frame).to(device)
        return prompt

    def _mask_prompt(self, mask: Tensor | np.ndarray, frame: Frame) -> Tensor:
        """Logits of an earlier answer, or a mask of the image, on the decoder's grid: (1, 1, g, g)."""
        embedded, _ = self._embedded()
        grid = (UP * embedded.cells.shape[2], UP * embedded.cells.shape[3])
        x = torch.as_tensor(mask)
        if x.dtype == torch.bool:
            if tuple(x.shape) != (frame.height, frame.width):
                raise ValueError(
                    f"The mask has {_pixels(x)} pixels, the image {frame.width} x {frame.height}: they must "
                    f"be of one size."
                )
            return mask_logits(frame.mask_to_canvas(x)[None], grid)
        if x.ndim != 3 or len(x) != 1 or tuple(x.shape[1:]) != grid:
            raise ValueError(
                f"mask: give the `logits` of an answer with one mask, (1, {grid[0]}, {grid[1]}), or a mask "
                f"of booleans of the image's size; this has the shape {tuple(x.shape)} and type {x.dtype}."
            )
        return x[None].float()

    @torch.no_grad()
    def _with_more(
        self,
        head: UnifiedHead,
        prompt: Prompt,
        frame: Frame,
        strokes: np.ndarray | None,
        text: str,
        region: tuple[Any, Any] | None,
    ) -> Prompt:
        """The prompt with what only a unified head takes."""
        embedded, device = self._embedded()[0], self.encoder.device
        grid = (embedded.cells.shape[2], embedded.cells.shape[3])
        if strokes is not None:
            on_canvas = frame.mask_to_canvas(torch.from_numpy(strokes.copy()))
            prompt = replace(prompt, strokes=shares_of(on_canvas[None], grid).to(device))
        if text:
            prompt = replace(
                prompt, words=as_words(read_phrase(text, head.words), head.words)[None].to(device)
            )
        if region is not None:
            features, _, other = self.encoder.encode(as_image(region[0], self.encoder.channels))
            mask = torch.as_tensor(np.asarray(region[1]))
            if mask.dtype != torch.bool or tuple(mask.shape) != (other.height, other.width) or not mask.any():
                raise ValueError(
                    f"region: its mask is booleans of its image's size, {other.width} x {other.height}, and "
                    f"marks something; this one has {_pixels(mask)} pixels and type {mask.dtype}."
                )
            shares = shares_of(other.mask_to_canvas(mask)[None], grid).to(device)
            prompt = replace(prompt, region=head.refer(head.decoder.neck(features[None]), shares))
        return prompt

    @torch.no_grad()
    def _answer(self, embedded: Embedded, frame: Frame, prompt: Prompt, several: bool) -> Masks:
        answer = self.head(embedded, prompt)
        rows = torch.zeros(1, dtype=torch.int64, device=self.encoder.device)
        if several and answer.logits.shape[1] > 1:
            rows = 1 + answer.quality[0, 1:].argsort(descending=True)
        logits = answer.logits[0, rows]
        self._prompt, self._last = prompt, logits[:1]
        masks = (frame.from_canvas(logits) > 0).cpu().numpy()
        return Masks(masks, answer.quality[0, rows].cpu().numpy(), logits, _likely(self.head, answer))

    @torch.no_grad()
    def everything(
        self, side: int = 16, quality: float = 0.5, stability: float = 0.6, overlap: float = 0.7,
        min_area: int = 16,
    ) -> list[Found]:  # fmt: skip
        """Masks of all objects, by a grid of points (SAM, arXiv 2304.02643, appendix B); the best first.

        Args:
            side: points across and down the long side of the image.
            quality: masks that the head expects a lower IoU of are left out.
            stability: likewise, of the IoU of the mask at logit 1 and at logit -1.
            overlap: of two masks whose boxes have a larger IoU the better one stays.
            min_area: pixels; smaller masks are left out.

        Raises:
            ValueError: if there is no image.
        """
        embedded, frame = self._embedded()
        points = _grid(frame, side)
        prompt = empty_prompt(torch.zeros(len(points), dtype=torch.int64, device=self.encoder.device))
        on_canvas = frame.points_to_canvas(points).to(self.encoder.device)
        prompt = prompt.with_points(on_canvas, torch.ones(len(points), dtype=torch.int64))
        found: list[Found] = []
        for start in range(0, len(points), AT_ONCE):
            answer: Answer = self.head(embedded, prompt.rows(slice(start, start + AT_ONCE)))
            logits, expected = answer.logits[:, 0], answer.quality[:, 0]
            steady = _stability(logits)
            for row in ((expected >= quality) & (steady >= stability)).nonzero().flatten().tolist():
                mask = frame.from_canvas(logits[row : row + 1]).cpu()[0] > 0
                if mask.sum() < min_area:
                    continue
                x0, y0, x1, y1 = boxes_of(mask[None])[0].int().tolist()
                x, y = points[start + row].tolist()
                scores = float(expected[row]), float(steady[row])
                found.append(Found(mask.numpy(), encode(mask.numpy()), (x0, y0, x1, y1), *scores, (x, y)))
        if not found:
            return []
        boxes, best = torch.tensor([f.box for f in found]).float(), torch.tensor([f.quality for f in found])
        return [found[i] for i in nms(boxes, best, overlap).tolist()]


def _grid(frame: Frame, side: int) -> Tensor:
    """Points (n, 2) at equal distances, `side` of them along the long side."""
    step = max(frame.height, frame.width) / side
    x, y = (
        (torch.arange(max(1, round(n / step))) + 0.5) * n / max(1, round(n / step)) - 0.5
        for n in (frame.width, frame.height)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2).clamp(min=0)


def _stability(logits: Tensor, offset: float = 1.0) -> Tensor:
    """The IoU of each mask (M, g, g) at `offset` above 0 and below it; 0 for one that is empty at both."""
    high, low = ((logits > threshold).flatten(1).sum(dim=1) for threshold in (offset, -offset))
    return high / low.clamp(min=1)


def _with_points_of(prompt: Prompt, more: Prompt) -> Prompt:
    """A prompt with the points of another one after its own."""
    points = torch.cat([prompt.points, more.points], dim=1)
    return replace(prompt, points=points, signs=torch.cat([prompt.signs, more.signs], dim=1))


def _likely(head: Any, answer: Answer) -> tuple[str, ...]:
    """The words that fit the single answer rather than not, the likeliest first."""
    if answer.words is None:
        return ()
    order = answer.words[0].argsort(descending=True).tolist()
    return tuple(head.words[i] for i in order if answer.words[0, i] > 0)


def _pixels(mask: Tensor) -> str:
    return " x ".join(str(n) for n in reversed(mask.shape))
