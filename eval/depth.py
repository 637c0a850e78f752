"""Monocular depth: how much of how far is in frozen patch features.

Methods: `linear` (on one or four blocks) and `dpt`, by the recipe of DINOv2 (arXiv 2304.07193, section 7.4);
`mean` gives every pixel the mean depth of the training set: what all must beat. Scores are means over images
of each image's own.

    b  images of a step     H, W  of an image
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinokit.config.registry import only_if
from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import DepthTransform
from dinokit.data.loader import dense_training_loader
from dinokit.eval._cache import fill_cache
from dinokit.eval._depth_scores import gradient, scale_invariant
from dinokit.eval._depth_test import DepthTest, framed, judge_depth, mean_judge
from dinokit.eval._fit import Plan, Shown, cosine, fit
from dinokit.eval._labelled import refuse_overlap
from dinokit.eval._look import Look, open_pairs
from dinokit.eval._resume import Resume, identity
from dinokit.features import Map, device_of, frozen, last_blocks, patch_width, spread_blocks
from dinokit.heads.dpt import DPT
from dinokit.heads.linear import LinearDepth, to_size
from dinokit.heads.released import load_depther, save_head
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.log import info

# max_depth, border cut off, crop of training, strength of brightness, part judged, size at the test
PROTOCOLS = {
    "none": (10.0, "none", (0, 0), 0.25, "none", (0, 0)),
    "nyu": (10.0, "nyu", (416, 544), 0.25, "eigen", (0, 0)),
    "kitti": (80.0, "kitti", (352, 704), 0.1, "garg", (0, 0)),
    "sunrgbd": (10.0, "none", (416, 544), 0.25, "none", (480, 640)),
}

WITH_HEAD = ("linear", "dpt")  # methods with a head
TRAINED: dict[str, Any] = {"method": ("linear", "dpt"), "head": False}  # where one is trained


@dataclass
class Config:
    train: dict[str, Any] | None = field(default=None, metadata={"registry": "data.dense", "split": "train"})
    test: dict[str, Any] | None = field(default=None, metadata={"registry": "data.dense", "split": "test"})
    method: Literal["linear", "dpt", "mean"] = "linear"  # mean: the training set's, everywhere
    layers: int = only_if(4, method=("linear",), head=False)  # blocks looked into, 1 or 4
    # whether features are taken after the backbone's final norm
    norm: bool = only_if(False, method=WITH_HEAD)
    protocol: Literal["none", "nyu", "kitti", "sunrgbd"] = "none"  # crops and range of a data set
    min_depth: float = 1e-3  # metres
    max_depth: float = 0.0  # metres: deeper readings are not judged; 0: the protocol's; without one, 10
    resize: int = 0  # pixels of the shorter side, for training and test; 0: as stored
    # pixels, height and width; empty: the protocol's, or the backbone's own size
    crop: tuple[int, ...] = only_if((), **TRAINED)
    augment: bool = only_if(True, **TRAINED)  # false: features once, of plain windows: minutes on a CPU
    steps: int = only_if(38_400, **TRAINED)
    batch: int = only_if(16, **TRAINED)
    lr: float = only_if(1e-4, **TRAINED)
    weight_decay: float = only_if(0.01, **TRAINED)
    warmup: float = only_if(1 / 3, **TRAINED)  # share of the steps: 12,800 of 38,400
    clip: float = only_if(35.0, **TRAINED)  # largest gradient norm; 0 is off
    bins: int = only_if(256, method=("linear",), head=False)  # depths that are weighed
    features: int = only_if(256, method=("dpt",), head=False)  # channels of the fusion
    gradient_weight: float = only_if(0.5, **TRAINED)  # of the gradient loss, beside the scale-invariant one
    # reference: over the batch, as in DINOv2's code
    gradient_form: Literal["spatial", "reference"] = only_if("spatial", **TRAINED)
    flip: bool = True  # the test averages over the mirror image
    # file of a trained head, ours or a released one; nothing is trained
    head: str = only_if("", method=WITH_HEAD)
    # a linear head from a file gets a range to 80 m, whatever it was trained on
    hub_range_bug: bool = only_if(False, head=True)
    out: str = ""  # folder for the head; a training that was killed goes on from what is there
    save_every: int = only_if(500, **TRAINED)  # steps
    cache_gib: float = only_if(4.0, **TRAINED, augment=False)  # most that features may take
    seed: int = 0
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_train: int = 0  # images, drawn evenly from the set; 0: all
    max_test: int = 0

    def __post_init__(self) -> None:
        if self.layers not in (1, 4):
            raise ValueError(f"layers={self.layers}: the linear head looks into 1 or 4 blocks.")
        if len(self.crop) not in (0, 2) or any(side < 1 for side in self.crop):
            raise ValueError(f"crop={list(self.crop)}: give height and width, such as crop=[416,544].")
        if not 0 <= self.min_depth < (self.max_depth or math.inf):
            raise ValueError(f"min_depth={self.min_depth} and max_depth={self.max_depth}: no range between.")
        for key in ("steps", "batch", "bins", "features", "save_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}, but it must be 1 or more.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Train a head, or read one, and judge the depth of the test images at their stored size.

    Returns:
        As `errors` of eval/_depth_scores.py: 'rmse', 'abs_rel', 'log_10', 'a1' and more; 'images_train',
        'images_test', and 'images_without_depth', if some of these have no reading in the range.

    Raises:
        ValueError, LookupError: if the data cannot be judged; the message names the key to set.
    """
    refuse_overlap(cfg.train, cfg.test)
    most, border, crop, brightness, judged, size = PROTOCOLS[cfg.protocol]
    cfg.max_depth = cfg.max_depth or most
    test = open_pairs(cfg.test, "test", "depth", backbone, cfg.max_test)
    whole = border if cfg.protocol == "kitti" else "none"  # NYU is tested with its rim
    how = DepthTest(cfg.min_depth, cfg.max_depth, whole, judged, cfg.resize, size, cfg.flip, cfg.workers)
    more: dict[str, float] = {}
    same = identity(asdict(cfg), backbone) if cfg.out else ""
    resume = Resume(cfg.out, "depth", same, device_of(backbone))
    with frozen(backbone):
        if cfg.head:
            trained_on = "KITTI" if cfg.protocol == "kitti" else "NYU"
            model = load_depther(cfg.head, backbone, trained_on, cfg.hub_range_bug, cfg.max_depth)
            look, head = _look(cfg, backbone, model.blocks), model.head.to(device_of(backbone))
            judge = _judge(look, head)
        else:
            train = open_pairs(cfg.train, "train", "depth", backbone, cfg.max_train)
            more["images_train"] = len(train)
            if cfg.method == "mean":
                judge = mean_judge(how, train, device_of(backbone))
            else:
                window = tuple(cfg.crop) or (crop if any(crop) else (backbone.input.size,) * 2)
                shape = DepthTransform(
                    cfg.resize,
                    border,
                    (window[0], window[1]),
                    tuple(backbone.input.mean),
                    brightness=brightness,
                )
                judge = _trained(cfg, backbone, train, shape, resume)
        scores = judge_depth(how, judge, test, device_of(backbone))
    resume.finish()
    return {**scores, **more}


def _look(cfg: Config, backbone: Backbone, blocks: list[int]) -> Look:
    patch_width(backbone)
    dtype = DTYPES[pick_precision(cfg.precision, device_of(backbone))]
    return Look(backbone, blocks, cfg.norm, dtype)


def _judge(look: Look, head: LinearDepth | DPT) -> Callable[[Tensor], Tensor]:
    return lambda image: to_size(
        head(look(image[None])).clamp(head.min_depth, head.max_depth), *image.shape[1:]
    )[0, 0]


def _trained(
    cfg: Config, backbone: Backbone, train: DenseSource, shape: DepthTransform, resume: Resume
) -> Callable[[Tensor], Tensor]:
    count = 4 if cfg.method == "dpt" else cfg.layers
    look = _look(cfg, backbone, last_blocks(backbone, 1) if count == 1 else spread_blocks(backbone, count))
    width = patch_width(backbone)
    head: LinearDepth | DPT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if cfg.method == "dpt":
            head = DPT(width, cfg.min_depth, cfg.max_depth, cfg.features)
        else:
            head = LinearDepth(width, count, cfg.min_depth, cfg.max_depth, cfg.bins)
    head = head.to(look.device)

    def loss(maps: list[Map], truth: Tensor, step: int) -> Tensor:
        if not (truth > 0).any():
            raise ValueError(f"The {len(truth)} images of step {step} have no reading: look at depth_scale.")
        given, truth = to_size(head(maps), *truth.shape[1:]), truth[:, None]
        value = scale_invariant(given, truth, step / cfg.steps)
        if cfg.gradient_weight:
            value = value + cfg.gradient_weight * gradient(given, truth, cfg.gradient_form)
        if step + 1 == cfg.steps and given.detach().amax() <= 1.001 * head.min_depth:
            info(
                f"after {cfg.steps} steps the head says {head.min_depth:g} m, the least depth, of every "
                f"pixel that it saw last: its last rectifier lets nothing through, and no gradient leads "
                f"back from there. Train again with a rate below lr={cfg.lr:g}, or with clip=35."
            )
        return value

    schedule = cosine(cfg.steps, round(cfg.warmup * cfg.steps))
    plan = Plan(cfg.steps, cfg.lr, cfg.weight_decay, schedule, cfg.clip, resume, cfg.save_every)
    fit(head, _shown(cfg, look, train, shape), loss, plan)
    if cfg.out and rank() == 0:
        kind = cfg.method if cfg.method == "dpt" else f"linear{'' if count == 1 else count}"
        save_head(Path(cfg.out) / f"depth_{kind}_head.pth", head)
    return _judge(look, head)


def _shown(
    cfg: Config, look: Look, train: DenseSource, shape: DepthTransform
) -> Callable[[int], Iterator[Shown]]:
    if not cfg.augment:

        def prepare(image: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
            return framed(image, depth, shape.border, cfg.resize)

        cache = fill_cache(look, train, prepare, shape.crop, shape.crop, 0, cfg.cache_gib, cfg.workers)
        return lambda start: cache.batches(cfg.seed, cfg.batch, start, cfg.steps)

    def online(start: int) -> Iterator[Shown]:
        for images, truth in dense_training_loader(
            train, shape, seed=cfg.seed, start_step=start, steps=cfg.steps, batch=cfg.batch,
            rank=rank(), world=world_size(), workers=cfg.workers,
        ):  # fmt: skip
            yield look(images), truth.to(look.device)

    return online
