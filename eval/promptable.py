"""Masks of objects from clicks and boxes, by a head that `dinokit train-head` trained, or by a baseline.

Clicks are simulated without random numbers: the first is the pixel deepest inside the object, each further
one the deepest pixel of the larger error (RITM, arXiv 2102.06583). Scores are means over objects, at the size
of the image as stored. 'mIoU@j': IoU after j clicks (SAM, arXiv 2304.02643, section 7.1); 'NoC@t': clicks
until the IoU is t %, at most `clicks`.

    m  objects of an image     H, W  of the image     n  clicks
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.decode import ImageLike
from dinokit.data.objects import Objects, ObjectSource, ndimage
from dinokit.data.predictions import Sampler
from dinokit.data.transforms import to_tensor, to_uint8
from dinokit.eval._images import count_shared, named_optimistic
from dinokit.eval._objects import count_trained, open_objects
from dinokit.features import frozen
from dinokit.models import Backbone
from dinokit.runtime.distributed import gather_objects, rank, world_size
from dinokit.runtime.log import watch
from dinokit.segment.losses import iou
from dinokit.segment.promptable import Answer, Embedded, PromptableHead
from dinokit.segment.prompts import BACKGROUND, FOREGROUND, PADDING, Frame, boxes_of, empty_prompt
from dinokit.segment.saved import load_head

SHOWN = (1, 2, 3, 5)  # clicks whose mIoU is a score
TARGETS = (80, 85, 90)  # per cent, of NoC
TOLERANCES = (10, 20, 30, 45, 60, 80, 110)  # grey levels that flood is tried with
DRAWN = 12  # objects of an image that a report shows
APART = 3.0  # pixels between two clicks in the same object

Masks = np.ndarray  # (m, H, W) bool


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.objects", "test", labels=False)
    # images to fit a baseline to; by default the training split of `test`
    train: dict[str, Any] | None = source_field(
        "data.objects", "train", optional=True, labels=False, only_if={"method": ("blob", "flood")}
    )
    # blob: a disc; flood: similar colours around the click; box: all of it; ellipse: the largest in the box
    method: Literal["trained", "blob", "flood", "box", "ellipse"] = "trained"
    head: str = only_if("", method=("trained",))  # a head of dinokit train-head, or the folder of its run
    max_test: int = 200  # images, drawn evenly from the set; 0: all
    max_train: int = only_if(100, method=("blob", "flood"))  # likewise
    min_area: int = 24  # pixels of the image as stored; smaller objects are not asked for
    clicks: int = only_if(20, method=("trained", "blob", "flood"))  # the most for an object
    # training images among the test images
    overlap: Literal["refuse", "allow"] = only_if("refuse", method=("trained", "blob", "flood"))
    out: str = ""  # folder for a few images with their truth and masks, which a report shows

    def __post_init__(self) -> None:
        check_at_least(self, max_test=0, max_train=0, min_area=1, clicks=max(SHOWN))


class Method(Protocol):
    """Answers prompts on one image at a time."""

    def image(self, image: ImageLike) -> None:
        """Take an image."""

    def click(self, points: np.ndarray, signs: np.ndarray, rows: np.ndarray) -> tuple[Masks, np.ndarray]:
        """Masks after n clicks each, and expected IoUs (m,), NaN if there are none.

        Args:
            points: (m, n, 2) pixels, x and y.
            signs: (m, n).
            rows: (m,) numbers of the objects among those of the image.
        """

    def box(self, boxes: np.ndarray) -> Masks:
        """Masks for boxes (m, 4)."""


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """The scores of a head or of a baseline.

    Returns:
        'mIoU@1', '@2', '@3', '@5', 'NoC@80', '@85', '@90', 'failed@90' (share of objects that never reach
        it), 'same object' (IoU of the masks of two clicks in one object), 'other objects' (of the masks of
        two objects of an image), 'mIoU box'; of a head 'quality error' (mean difference of expected and
        reached IoU at one click). 'objects_test', 'images_test'.

    Raises:
        ValueError, LookupError: if the images or the head do not fit; the message names the key to set.
    """
    if cfg.method == "trained" and not cfg.head:
        raise ValueError(
            "head=RUN must be given: a head that dinokit train-head trained. Without one: method=blob, "
            "flood, box or ellipse."
        )
    source = open_objects(cfg.test, "test", backbone, cfg.max_test)
    shared = 0
    method: Method
    with frozen(backbone):
        if cfg.method == "trained":
            method = Trained(cfg.head, backbone)
            shared = count_trained(cfg, method.about, source, backbone)
        else:
            train = None
            if cfg.method in ("blob", "flood"):
                section = cfg.train or {**(cfg.test or {}), "split": "train"}
                train = open_objects(section, "train", backbone, cfg.max_train)
                shared = count_shared(cfg, train, source)
            method = baseline(cfg, train)
        rows: dict[str, list[float]] = {}
        samples = Sampler(cfg.out, len(source), ("rest", *(f"object {n + 1}" for n in range(DRAWN))))
        numbers = range(rank(), len(source), world_size())
        for index in watch(numbers, len(numbers), "test images"):
            image, objects = source[index]
            chosen = objects.chosen(cfg.min_area)
            if chosen:
                method.image(image)
                truth = np.stack([objects.mask(number) for number in chosen])
                found, masks = image_scores(cfg, method, truth)
                for name, values in found.items():
                    rows.setdefault(name, []).extend(values)
                pixels = to_uint8(to_tensor(image)[0])
                samples.add(index, source.name(index), pixels, numbered(truth), numbered(masks))
    samples.save()
    together: dict[str, list[float]] = {}
    for each in gather_objects(rows):
        for name, values in each.items():
            together.setdefault(name, []).extend(values)
    if not together:
        raise ValueError(f"No test image has an object of min_area={cfg.min_area} pixels: lower it.")
    count = len(next(iter(together.values())))
    scores = {name: float(np.mean(values)) for name, values in together.items() if values}
    return {**named_optimistic(scores, shared), "objects_test": count, "images_test": len(source)}


def image_scores(cfg: Config, method: Method, truth: Masks) -> tuple[dict[str, list[float]], Masks]:
    """The scores of each object of an image, by name, and its mask after one click, or of its box."""
    scores: dict[str, list[float]] = {}
    if cfg.method in ("trained", "box", "ellipse"):
        in_box = method.box(boxes_of(torch.from_numpy(truth)).double().numpy())
        scores["mIoU box"] = overlaps(in_box, truth).tolist()
        if cfg.method != "trained":
            return scores, in_box
    curve, first, quality = click_curve(method, truth, cfg.clicks)
    scores |= {f"mIoU@{j}": curve[:, j - 1].tolist() for j in SHOWN}
    for target in TARGETS:
        reached = curve >= target / 100
        clicks = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, cfg.clicks)
        scores[f"NoC@{target}"] = clicks.tolist()
    scores["failed@90"] = (~(curve >= 0.9).any(axis=1)).astype(float).tolist()
    if not np.isnan(quality).any():
        scores["quality error"] = np.abs(quality - curve[:, 0]).tolist()
    scores["same object"] = same_object(method, truth, first)
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    scores["other objects"] = [float(overlaps(first[i : i + 1], first[j : j + 1])[0]) for i, j in pairs]
    return scores, first


def numbered(masks: Masks) -> torch.Tensor:
    """(H, W): the number, from 1, of the mask at each pixel, among the first DRAWN; 0 where there is none."""
    ids = torch.zeros(masks.shape[1:])
    for number, mask in reversed([*enumerate(masks[:DRAWN], 1)]):
        ids[torch.from_numpy(mask)] = number
    return ids


def click_curve(method: Method, truth: Masks, most: int) -> tuple[np.ndarray, Masks, np.ndarray]:
    """IoUs (m, most) after each click, the masks of the first, and the qualities expected of these (m,).

    An object whose IoU is the largest target gets no more clicks after those whose mIoU is shown.
    """
    m = len(truth)
    points, signs = np.zeros((m, 0, 2)), np.zeros((m, 0), np.int64)
    predicted, clicked = np.zeros_like(truth), np.zeros_like(truth)
    curve, first, quality = np.zeros((m, most)), predicted, np.zeros(m)
    for j in range(most):
        rows = np.arange(m)
        if j >= max(SHOWN):
            curve[:, j] = curve[:, j - 1]
            rows = np.flatnonzero(curve[:, j] < max(TARGETS) / 100)
        if not len(rows):
            continue
        new, sign = np.zeros((m, 1, 2)), np.full((m, 1), PADDING)
        for row in rows:
            click = deepest_click(truth[row], predicted[row], clicked[row])
            if click is not None:
                x, y, sign[row, 0] = click
                new[row, 0], clicked[row, y, x] = (x, y), True
        points, signs = np.concatenate([points, new], axis=1), np.concatenate([signs, sign], axis=1)
        predicted[rows], expected = method.click(points[rows], signs[rows], rows)
        curve[rows, j] = overlaps(predicted[rows], truth[rows])
        if j == 0:
            first, quality = predicted.copy(), expected
    return curve, first, quality


def depth_inside(mask: np.ndarray) -> np.ndarray:
    """The distance of each pixel of a mask (H, W) to the nearest other pixel, or to the image's edge."""
    depth = np.zeros(mask.shape)
    if (
        mask.any()
    ):  # a small object in a large image: nothing beyond its box can be nearer than the box's edge
        x0, y0, x1, y1 = boxes_of(torch.from_numpy(mask)[None])[0].int().tolist()
        ring = np.pad(mask[y0:y1, x0:x1], 1)
        depth[y0:y1, x0:x1] = ndimage().distance_transform_edt(ring)[1:-1, 1:-1]
    return depth


def deepest_click(
    truth: np.ndarray, predicted: np.ndarray, clicked: np.ndarray | None = None
) -> tuple[int, int, int] | None:
    """The next click on a prediction, as (x, y, sign); None if no pixel is wrong.

    It is positive if the missing part is strictly the deeper one. Of equally deep pixels it is the first, row
    by row.

    Args:
        truth: (H, W) bool.
        predicted: (H, W) bool; nothing, for the first click.
        clicked: (H, W) bool, pixels that have been clicked, which are not clicked again.
    """
    missing, extra = truth & ~predicted, predicted & ~truth
    depths = [depth_inside(part) for part in (missing, extra)]
    if clicked is not None:
        depths = [np.where(clicked, 0, depth) for depth in depths]
    positive = depths[0].max() > depths[1].max()
    depth = depths[0] if positive else depths[1]
    if not depth.max():
        return None
    y, x = divmod(int(depth.argmax()), depth.shape[1])
    return x, y, FOREGROUND if positive else BACKGROUND


def same_object(method: Method, truth: Masks, first: Masks) -> list[float]:
    """IoU of the mask of the deepest click in an object and that of another click in it."""
    points = np.zeros((len(truth), 1, 2))
    for row, mask in enumerate(truth):
        depth = depth_inside(mask)
        y, x = divmod(int(depth.argmax()), mask.shape[1])
        rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
        far: np.ndarray = np.hypot(rows - y, columns - x) >= APART
        depth = np.where(far, depth, 0) if (depth * far).any() else depth
        points[row, 0] = divmod(int(depth.argmax()), mask.shape[1])[::-1]
    rows = np.arange(len(truth))
    again, _ = method.click(points, np.ones((len(truth), 1), np.int64), rows)
    return overlaps(again, first).tolist()


def overlaps(a: Masks, b: Masks) -> np.ndarray:
    """The IoU of each pair of masks, (m,); 1 if both are empty."""
    return np.asarray(iou(a.reshape(len(a), -1), b.reshape(len(b), -1)))


class Trained:
    """A head; its last logits of each object are the mask prompt of the next click."""

    def __init__(self, path: str, backbone: Backbone) -> None:
        head, self.encoder, self.about = load_head(path, backbone, "promptable")
        self.head = cast(PromptableHead, head)
        self._last: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def image(self, image: ImageLike) -> None:
        features, pixels, self.frame = self.encoder.encode(image)
        self.embedded: Embedded = self.head.embed(features[None], pixels)

    @torch.no_grad()
    def click(self, points: np.ndarray, signs: np.ndarray, rows: np.ndarray) -> tuple[Masks, np.ndarray]:
        prompt = empty_prompt(torch.zeros(len(rows), dtype=torch.int64, device=self.encoder.device))
        frame: Frame = self.frame
        on_canvas = frame.points_to_canvas(torch.from_numpy(points).float())
        prompt.points = on_canvas.to(self.encoder.device)
        prompt.signs = torch.from_numpy(signs).to(self.encoder.device)
        if points.shape[1] > 1:
            prompt.masks = torch.stack([self._last[int(row)] for row in rows])
        answer: Answer = self.head(self.embedded, prompt)
        self._last |= {int(row): answer.logits[i, :1] for i, row in enumerate(rows)}
        return self._masks(answer), answer.quality[:, 0].cpu().numpy()

    @torch.no_grad()
    def box(self, boxes: np.ndarray) -> Masks:
        prompt = empty_prompt(torch.zeros(len(boxes), dtype=torch.int64, device=self.encoder.device))
        prompt.boxes = self.frame.boxes_to_canvas(torch.from_numpy(boxes)).to(self.encoder.device)
        return self._masks(self.head(self.embedded, prompt))

    def _masks(self, answer: Answer) -> Masks:
        masks = [self.frame.from_canvas(row[:1])[0] > 0 for row in answer.logits]
        return torch.stack(masks).cpu().numpy()


class Baseline:
    """Masks from clicks or boxes alone. A click's region is added, or taken away if it is negative."""

    def __init__(self, region: Callable[[np.ndarray, int, int], np.ndarray], round_box: bool = False) -> None:
        self.region, self.round_box = region, round_box

    def image(self, image: ImageLike) -> None:
        self.pixels = np.atleast_3d(np.asarray(image)).astype(np.float32)

    def click(self, points: np.ndarray, signs: np.ndarray, rows: np.ndarray) -> tuple[Masks, np.ndarray]:
        masks = np.zeros((len(points), *self.pixels.shape[:2]), bool)
        for mask, places, which in zip(masks, points.astype(int), signs, strict=True):
            for (x, y), sign in zip(places, which, strict=True):
                if sign != PADDING:
                    mask[self.region(self.pixels, x, y)] = bool(sign)
        return masks, np.full(len(points), np.nan)

    def box(self, boxes: np.ndarray) -> Masks:
        height, width = self.pixels.shape[:2]
        y, x = np.mgrid[:height, :width] + 0.5
        x0, y0, x1, y1 = (edge[:, None, None] for edge in boxes.T)
        across, down = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
        return across**2 + down**2 <= 1 if self.round_box else np.maximum(abs(across), abs(down)) < 1


def baseline(cfg: Config, train: ObjectSource | None) -> Baseline:
    """The baseline of `method`; a blob's size and the tolerance of flood are fitted to training images."""
    if train is None:
        return Baseline(disc(1.0), round_box=cfg.method == "ellipse")
    pairs = [train[index] for index in range(len(train))]
    if cfg.method == "blob":
        areas = [o.rles[k].area for _, o in pairs for k in o.chosen(cfg.min_area)]
        return Baseline(disc(float(np.sqrt(np.median(areas) / np.pi)) if areas else 1.0))
    return max((Baseline(flood(t)) for t in TOLERANCES), key=lambda method: _one_click(method, pairs, cfg))


def _one_click(method: Baseline, pairs: list[tuple[ImageLike, Objects]], cfg: Config) -> float:
    """The mean IoU at one click."""
    reached: list[float] = []
    for image, objects in pairs:
        method.image(image)
        truth = [objects.mask(number) for number in objects.chosen(cfg.min_area)]
        clicks = [deepest_click(mask, np.zeros_like(mask)) for mask in truth]
        points = np.array([[click[:2]] for click in clicks if click is not None]).reshape(-1, 1, 2)
        masks, _ = method.click(points, np.ones((len(points), 1), np.int64), np.arange(len(points)))
        reached += overlaps(masks, np.stack(truth)).tolist() if truth else []
    return float(np.mean(reached)) if reached else 0.0


def disc(radius: float) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Pixels within `radius` of the click."""

    def region(pixels: np.ndarray, x: int, y: int) -> np.ndarray:
        rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
        return np.hypot(columns - x, rows - y) <= radius

    return region


def flood(tolerance: float) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Pixels connected to the click, no channel of which differs by more from the mean of 3 x 3 there."""

    def region(pixels: np.ndarray, x: int, y: int) -> np.ndarray:
        colour = pixels[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean(axis=(0, 1))
        similar = np.abs(pixels - colour).max(axis=2) <= tolerance
        similar[y, x] = True
        parts, _ = ndimage().label(similar)
        return parts == parts[y, x]

    return region
