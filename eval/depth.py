"""Monocular depth from frozen patch features.

Methods: `linear` (on one or four blocks) and `dpt`, by the recipe of DINOv2 (arXiv 2304.07193, section 7.4);
`mean` predicts the mean depth of the training set everywhere, as a baseline. Scores are means over images of
the scores of each image.

    B  images of a step     H, W  of an image     valid  pixels with a reading, where the depth is above 0
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if
from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import DepthTransform, resize_image, shorter_side_to
from dinokit.data.predictions import Sampler
from dinokit.eval import DenseConfig
from dinokit.eval._dense import (
    DenseBackbone,
    cosine,
    cut_and_resize,
    open_dense,
    read_pairs,
    train_head,
    training_batches,
)
from dinokit.eval._images import count_shared, named_optimistic, partial_result
from dinokit.eval._metrics import depth_errors
from dinokit.features import Map, device_of, frozen, last_blocks, spread_blocks
from dinokit.heads import DPT, LinearDepth, to_size
from dinokit.heads.released import load_depther, save_head
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank
from dinokit.runtime.log import info
from dinokit.runtime.partial import PartialResult

EPS = 1e-3  # metres, added before the logarithm
VARIANCE_FREE = 100 / 38_400  # share of a training in which the scale-invariant loss has no variance term
SCALES = (1, 2, 4, 6)  # pixels between two that the gradient loss compares

WITH_HEAD = ("linear", "dpt")  # methods with a head
TRAINED: dict[str, Any] = {"method": ("linear", "dpt"), "head": False}  # settings that need a trained head

Predict = Callable[[Tensor], Tensor]  # an image (C, H, W) in [0, 1] -> its depth (H, W), metres


@dataclass(frozen=True)
class DepthProtocol:
    """How a data set is used."""

    max_depth: float  # metres
    border: str  # what is cut off images, a key of BORDERS
    crop: tuple[int, int]  # of training; zeros: the backbone's own size
    brightness: float  # strength of its augmentation
    evaluated: str  # region of a test map that counts, a key of DEPTH_CROPS
    size: tuple[int, int]  # of test images, height and width; zeros: as stored


PROTOCOLS = {
    "none": DepthProtocol(10.0, "none", (0, 0), 0.25, "none", (0, 0)),
    "nyu": DepthProtocol(10.0, "nyu", (416, 544), 0.25, "eigen", (0, 0)),
    "kitti": DepthProtocol(80.0, "kitti", (352, 704), 0.1, "garg", (0, 0)),
    "sunrgbd": DepthProtocol(10.0, "none", (416, 544), 0.25, "none", (480, 640)),
}


@dataclass
class Config(DenseConfig):
    method: Literal["linear", "dpt", "mean"] = "linear"  # mean: the training set's, everywhere
    layers: int = only_if(4, method=("linear",), head=False)  # blocks whose features the head sees, 1 or 4
    # whether features are taken after the backbone's final norm
    norm: bool = only_if(False, method=WITH_HEAD)
    protocol: Literal["none", "nyu", "kitti", "sunrgbd"] = "none"  # crops and range of a data set
    min_depth: float = 1e-3  # metres
    max_depth: float = 0.0  # metres: deeper readings do not count; 0: the protocol's; without one, 10
    # pixels, height and width; empty: the protocol's, or the backbone's own size
    crop: tuple[int, ...] = only_if((), **TRAINED)
    augment: bool = only_if(True, **TRAINED)  # false: features once, of plain windows: minutes on a CPU
    steps: int = only_if(38_400, **TRAINED)
    batch: int = only_if(16, **TRAINED)
    lr: float = only_if(1e-4, **TRAINED)
    weight_decay: float = only_if(0.01, **TRAINED)
    warmup: float = only_if(1 / 3, **TRAINED)  # share of the steps: 12,800 of 38,400
    clip: float = only_if(35.0, **TRAINED)  # largest gradient norm; 0 is off
    bins: int = only_if(256, method=("linear",), head=False)  # depths that are weighted
    features: int = only_if(256, method=("dpt",), head=False)  # channels of the fusion
    gradient_weight: float = only_if(0.5, **TRAINED)  # of the gradient loss, beside the scale-invariant one
    # reference: over the batch, as in DINOv2's code
    gradient_form: Literal["spatial", "reference"] = only_if("spatial", **TRAINED)
    flip: bool = True  # the test averages over the mirror image
    # file of a trained head, ours or a released one; nothing is trained
    head: str = only_if("", method=WITH_HEAD)
    # a linear head from a file gets a range to 80 m, whatever it was trained on
    hub_range_bug: bool = only_if(False, head=True)
    save_every: int = only_if(500, **TRAINED)  # steps
    cache_gib: float = only_if(4.0, **TRAINED, augment=False)  # memory that features may take

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers not in (1, 4):
            raise ValueError(f"layers={self.layers}: the linear head takes features of 1 or 4 blocks.")
        if len(self.crop) not in (0, 2) or any(side < 1 for side in self.crop):
            raise ValueError(f"crop={list(self.crop)}: give height and width, such as crop=[416,544].")
        if not 0 <= self.min_depth < (self.max_depth or math.inf):
            raise ValueError(f"min_depth={self.min_depth} and max_depth={self.max_depth}: no range between.")
        check_at_least(self, steps=1, batch=1, bins=1, features=1, save_every=1)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Train a head, or read one, and evaluate the depth of the test images at their stored size.

    Returns:
        As `depth_errors` of eval/_metrics.py: 'rmse', 'abs_rel', 'log_10', 'a1' and more; 'images_train',
        'images_test', and 'images_without_depth', if some of these have no reading in the range.

    Raises:
        ValueError, LookupError: if the data do not fit; the message names the key to set.
    """
    cfg.max_depth = cfg.max_depth or PROTOCOLS[cfg.protocol].max_depth
    test = open_dense(cfg.test, "test", "depth", backbone, cfg.max_test)
    more: dict[str, float] = {}
    shared = 0
    partial = partial_result(cfg, "depth", backbone)
    with frozen(backbone):
        if cfg.head:
            predict = _load_head(cfg, backbone)
        else:
            train = open_dense(cfg.train, "train", "depth", backbone, cfg.max_train)
            shared = count_shared(cfg, train, test)
            more["images_train"] = len(train)
            if cfg.method == "mean":
                predict = _mean_depth(cfg, train, device_of(backbone))
            else:
                predict = _train_head(cfg, backbone, train, partial)
        scores = _scores(cfg, predict, test, device_of(backbone))
    partial.remove()
    return {**named_optimistic(scores, shared), **more}


def _mean_depth(cfg: Config, train: DenseSource, device: torch.device) -> Predict:
    """Predicts the mean depth of all training pixels.

    Raises:
        ValueError: if there is no reading.
    """
    total = count = 0.0
    for pair in read_pairs(train, cfg.workers, "training maps"):
        depths = pair.target[(pair.target > cfg.min_depth) & (pair.target < cfg.max_depth)]
        total, count = total + depths.double().sum().item(), count + len(depths)
    if not count:
        raise ValueError(f"No training image has a reading between {cfg.min_depth} and {cfg.max_depth} m.")
    return lambda image: torch.full(image.shape[1:], total / count, device=device)


def _load_head(cfg: Config, backbone: Backbone) -> Predict:
    trained_on: Literal["KITTI", "NYU"] = "KITTI" if cfg.protocol == "kitti" else "NYU"
    model = load_depther(cfg.head, backbone, trained_on, cfg.hub_range_bug, cfg.max_depth)
    dense = DenseBackbone(backbone, model.blocks, cfg.precision, cfg.norm)
    return _with_head(dense, model.head.to(dense.device))


def _with_head(dense: DenseBackbone, head: LinearDepth | DPT) -> Predict:
    def predict(image: Tensor) -> Tensor:
        depth = head(dense(image[None])).clamp(head.min_depth, head.max_depth)
        return to_size(depth, image.shape[1], image.shape[2])[0, 0]

    return predict


def _train_head(cfg: Config, backbone: Backbone, train: DenseSource, partial: PartialResult) -> Predict:
    count = 4 if cfg.method == "dpt" else cfg.layers
    blocks = last_blocks(backbone, 1) if count == 1 else spread_blocks(backbone, count)
    dense = DenseBackbone(backbone, blocks, cfg.precision, cfg.norm)
    head: LinearDepth | DPT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if cfg.method == "dpt":
            head = DPT(dense.width, cfg.min_depth, cfg.max_depth, cfg.features)
        else:
            head = LinearDepth(dense.width, count, cfg.min_depth, cfg.max_depth, cfg.bins)
    head = head.to(dense.device)

    def loss(maps: list[Map], truth: Tensor, step: int) -> Tensor:
        if not (truth > 0).any():
            raise ValueError(f"The {len(truth)} images of step {step} have no reading: check depth_scale.")
        predicted, truth = to_size(head(maps), truth.shape[1], truth.shape[2]), truth[:, None]
        value = scale_invariant_loss(predicted, truth, step / cfg.steps)
        if cfg.gradient_weight:
            value = value + cfg.gradient_weight * gradient_loss(predicted, truth, cfg.gradient_form)
        if step + 1 == cfg.steps and predicted.detach().amax() <= 1.001 * head.min_depth:
            info(
                f"after {cfg.steps} steps the head predicts {head.min_depth:g} m, the least depth, for every "
                f"pixel of the last step: its last ReLU is 0 everywhere and has no gradient. Train again "
                f"with a rate below lr={cfg.lr:g}, or with clip=35."
            )
        return value

    protocol, size, colour = PROTOCOLS[cfg.protocol], backbone.input.size, tuple(backbone.input.mean)
    crop = (cfg.crop[0], cfg.crop[1]) if cfg.crop else protocol.crop if any(protocol.crop) else (size, size)
    transform = DepthTransform(cfg.resize, protocol.border, crop, colour, brightness=protocol.brightness)
    batches = training_batches(cfg, dense, train, transform, protocol.border, crop, crop, fill=0)
    train_head(cfg, head, batches, loss, cosine, partial, cfg.clip)
    if cfg.out and rank() == 0:
        kind = cfg.method if cfg.method == "dpt" else f"linear{'' if count == 1 else count}"
        save_head(Path(cfg.out) / f"depth_{kind}_head.pth", head)
    return _with_head(dense, head)


@torch.no_grad()
def _scores(cfg: Config, predict: Predict, test: DenseSource, device: torch.device) -> dict[str, float]:
    """Means over the test images, of all processes, of the errors of each.

    Raises:
        ValueError: if no image has a reading in the range.
    """
    protocol = PROTOCOLS[cfg.protocol]
    border = protocol.border if cfg.protocol == "kitti" else "none"  # NYU is tested with its border
    sums: dict[str, float] = {}
    with_depth = without_depth = 0
    samples = Sampler(cfg.out, len(test), test.classes)
    for pair in read_pairs(test, cfg.workers, "test images", share=True):
        stored, truth = cut_and_resize(pair.image, pair.target, border, 0)
        image = stored.float() / 255
        if any(protocol.size):
            image = resize_image(image, *protocol.size)
        elif cfg.resize:
            image = resize_image(image, *shorter_side_to(image, cfg.resize))
        predicted = predict(image)
        if cfg.flip:
            predicted = (predicted + predict(image.flip(-1)).flip(-1)) / 2
        predicted = to_size(predicted[None, None], truth.shape[0], truth.shape[1])[0, 0]
        samples.add(pair.index, test.name(pair.index), stored, truth, predicted)
        errors = depth_errors(predicted, truth.to(device), cfg.min_depth, cfg.max_depth, protocol.evaluated)
        if errors is None:
            without_depth += 1
            continue
        with_depth += 1
        sums = {key: sums.get(key, 0.0) + value for key, value in errors.items()}
    samples.save()
    names = ["rmse", "abs_rel", "log_10", "a1", "a2", "a3", "rmse_log", "sq_rel", "silog"]
    numbers = [*(sums.get(name, 0.0) for name in names), with_depth, without_depth]
    *totals, count, missing = all_reduce_sum(torch.tensor(numbers).double()).tolist()
    if not count:
        raise ValueError(
            f"None of the {missing:.0f} test images has a reading between min_depth={cfg.min_depth} and "
            f"max_depth={cfg.max_depth} m in the evaluated region: check test.depth_scale and max_depth."
        )
    scores = {name: total / count for name, total in zip(names, totals, strict=True)}
    scores["images_test"] = count + missing
    return scores | ({"images_without_depth": missing} if missing else {})


def scale_invariant_loss(predicted: Tensor, truth: Tensor, progress: float) -> Tensor:
    """sqrt(Var(g) + 0.15 mean(g)^2) of g = ln(predicted) - ln(truth) over valid pixels (arXiv 1406.2283): ().

    Args:
        predicted: depths (B, 1, H, W).
        truth: depths, 0 where there is no reading.
        progress: share of the training that is complete. The variance, the unbiased one, is left out in the
            first 100 of the published 38,400 steps, and in the same share of a shorter training.
    """
    valid = truth > 0
    g = (predicted[valid] + EPS).log() - (truth[valid] + EPS).log()
    square = 0.15 * g.mean().square()
    return (square if progress < VARIANCE_FREE else square + g.var()).clamp_min(1e-12).sqrt()


def gradient_loss(
    predicted: Tensor, truth: Tensor, form: Literal["spatial", "reference"] = "spatial"
) -> Tensor:
    """The change of the logarithmic error over two pixels, summed over four scales: ().

    Both (B, 1, H, W). At a scale of s every s-th pixel is used; |d(i) - d(i + 2)| of valid pixels i and
    i + 2, along both axes, is summed and divided by the number of valid pixels.

    Args:
        predicted: depths.
        truth: depths, 0 where there is no reading.
        form: "reference" uses the batch and the channel as the two axes, as DINOv2's code does by mistake:
            with two images it is 0.
    """
    first, second = (2, 3) if form == "spatial" else (0, 1)
    total = predicted.new_zeros(())
    for scale in SCALES:
        index = [slice(None)] * 4
        index[first] = index[second] = slice(None, None, scale)
        valid = truth[tuple(index)] > 0
        d = (predicted[tuple(index)] + EPS).log() - (truth[tuple(index)] + EPS).log()
        changes = [_changes(d, valid, axis) for axis in (first, second)]
        total = total + torch.stack(changes).sum() / valid.sum().clamp_min(1)
    return total


def _changes(d: Tensor, valid: Tensor, axis: int) -> Tensor:
    n = max(d.shape[axis] - 2, 0)
    both = valid.narrow(axis, 0, n) & valid.narrow(axis, d.shape[axis] - n, n)
    change = d.narrow(axis, 0, n) - d.narrow(axis, d.shape[axis] - n, n)
    return torch.where(both, change.abs(), 0.0).sum()
