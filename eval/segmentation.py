"""Semantic segmentation: how much of what and where is in frozen patch features.

Methods: `linear` (batch norm and a 1 x 1 layer on the last block) and `ms` (on the last four, tested at
several scales and mirrored) by the recipe of DINOv2 (arXiv 2304.07193, section 7.4); `knn` (the nearest
training patches vote; nothing is trained; arXiv 2306.01667) and `logreg` (logistic regression on patches) in
seconds to minutes; `majority` gives every pixel the most frequent class of the training masks.

    b  images of a step     C  classes     D  width     H, W  of an image     h, w  patches down and across
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import only_if
from dinokit.data.dense import IGNORE, DenseSource
from dinokit.data.dense_transforms import (
    SegmentationTransform,
    resize_image,
    resize_map,
    shorter_side_to,
)
from dinokit.data.loader import dense_loader, dense_training_loader
from dinokit.data.transforms import to_uint8
from dinokit.eval._bank import fill_bank, grid_to_image, neighbour_judge, patch_rows, regression_judge
from dinokit.eval._cache import fill_cache
from dinokit.eval._confusion import Confusion
from dinokit.eval._fit import Plan, Shown, fit, poly
from dinokit.eval._labelled import refuse_overlap
from dinokit.eval._look import Look, open_pairs
from dinokit.eval._resume import Resume, identity
from dinokit.eval._windows import slide
from dinokit.features import Map, device_of, frozen, last_blocks, patch_width
from dinokit.heads.linear import LinearSegmenter, to_size
from dinokit.heads.released import load_segmenter, save_head
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.log import watch

Judge = Callable[[Tensor], Tensor]  # an image (C, H, W) -> what is said of each pixel (classes, H, W)

WITH_HEAD = ("linear", "ms")  # methods with a head
TRAINED: dict[str, Any] = {"method": ("linear", "ms"), "head": False}  # where one is trained


@dataclass
class Config:
    train: dict[str, Any] | None = field(default=None, metadata={"registry": "data.dense", "split": "train"})
    test: dict[str, Any] | None = field(default=None, metadata={"registry": "data.dense", "split": "test"})
    method: Literal["linear", "ms", "knn", "logreg", "majority"] = "linear"  # majority: one class everywhere
    resize: int = 0  # pixels of the shorter side; 0: as published, 512, or 640 for ms
    crop: int = only_if(0, method=WITH_HEAD)  # pixels of crops and windows; 0: as published, 512 or 640
    stride: int = only_if(0, method=WITH_HEAD)  # pixels between windows; 0: as published, 341 or 320
    augment: bool = only_if(True, **TRAINED)  # false: features once, of plain windows: minutes on a CPU
    # of random resizing; empty: as published, 0.5 to 2, or 1 to 3 for ms
    ratio: tuple[float, ...] = only_if((), **TRAINED, augment=True)
    cap: float = only_if(0.75, **TRAINED, augment=True)  # most that one class may have of a training crop
    steps: int = only_if(40_000, **TRAINED)
    batch: int = only_if(16, **TRAINED)  # crops a step
    lr: float = only_if(1e-3, **TRAINED)
    weight_decay: float = only_if(1e-4, **TRAINED)
    warmup: float = only_if(0.0375, **TRAINED)  # share of the steps: 1,500 of 40,000
    scales: tuple[float, ...] = ()  # of the test; empty: 1, or 1 1.32 1.73 2.28 3 for ms
    flip: Literal["auto", "yes", "no"] = "auto"  # whether mirror images are tested too; auto: for ms
    k: int = only_if(30, method=("knn",))  # neighbours
    temp: float = only_if(0.02, method=("knn",))  # a vote weighs softmax(cosine / temp)
    bank: int = only_if(100_000, method=("knn", "logreg"))  # training patches
    # tried on a tenth of the training images
    c: tuple[float, ...] = only_if((1e-4, 1e-3, 1e-2, 1e-1, 1.0), method=("logreg",))
    # file of a trained head, ours or a released one; nothing is trained
    head: str = only_if("", method=WITH_HEAD)
    out: str = ""  # folder for the head; a training that was killed goes on from what is there
    save_every: int = only_if(500, **TRAINED)  # steps
    cache_gib: float = only_if(4.0, **TRAINED, augment=False)  # most that features may take
    seed: int = 0
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_train: int = 0  # images, drawn evenly from the set; 0: all
    max_test: int = 0

    def __post_init__(self) -> None:
        sizes = (640, 640, 320) if self.method == "ms" else (512, 512, 341)
        self.resize, self.crop, self.stride = (
            given or usual for given, usual in zip((self.resize, self.crop, self.stride), sizes, strict=True)
        )
        ms = self.method == "ms"
        self.ratio = tuple(self.ratio) or ((1.0, 3.0) if ms else (0.5, 2.0))
        self.scales = tuple(self.scales) or ((1, 1.32, 1.73, 2.28, 3.0) if ms else (1.0,))
        for key in ("resize", "crop", "stride", "steps", "batch", "k", "bank", "save_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}, but it must be 1 or more.")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={list(self.ratio)}: give two numbers above 0, the smaller one first.")
        if min(self.scales) <= 0 or self.temp <= 0 or not self.c or min(self.c) <= 0:
            raise ValueError("scales, temp and c must be above 0, and c have at least one number.")
        if self.stride > self.crop:
            raise ValueError(f"stride={self.stride} leaves gaps between windows of crop={self.crop}.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Train what the method trains, and judge every pixel of the test images at its stored size.

    Returns:
        'mIoU' (mean over the classes that are true or given somewhere), 'mean accuracy' over classes, 'pixel
        accuracy', 'iou NAME' for each class; 'images_train', 'images_test'; for logreg 'c'.

    Raises:
        ValueError, LookupError: if the data cannot be judged; the message names the key to set.
    """
    refuse_overlap(cfg.train, cfg.test)
    train = open_pairs(cfg.train, "train", "mask", backbone, cfg.max_train)
    test = open_pairs(cfg.test, "test", "mask", backbone, cfg.max_test)
    if list(train.classes) != list(test.classes):
        raise ValueError(
            f"The classes of train ({', '.join(train.classes[:5])} ...) and test "
            f"({', '.join(test.classes[:5])} ...) are not the same, or not in the same order."
        )
    more: dict[str, float] = {}
    same = identity(asdict(cfg), backbone) if cfg.out else ""
    resume = Resume(cfg.out, "segmentation", same, device_of(backbone))
    with frozen(backbone):
        judge: Judge
        if cfg.method in ("linear", "ms"):
            judge = _through_head(cfg, backbone, train, resume)
        elif cfg.method == "majority":
            judge = _majority(train, cfg.workers, device_of(backbone))
        else:
            judge, more = _through_patches(cfg, backbone, train)
        scores = _test(cfg, judge, test, device_of(backbone))
    resume.finish()
    return {**scores, **more, "images_train": len(train), "images_test": len(test)}


def _look(cfg: Config, backbone: Backbone) -> Look:
    patch_width(backbone)
    dtype = DTYPES[pick_precision(cfg.precision, device_of(backbone))]
    return Look(backbone, last_blocks(backbone, 4 if cfg.method == "ms" else 1), True, dtype)


def _through_head(cfg: Config, backbone: Backbone, train: DenseSource, resume: Resume) -> Judge:
    """Logits of an image at its own size, by a head that is trained here or read from a file."""
    look = _look(cfg, backbone)
    if cfg.head:
        head, blocks = load_segmenter(cfg.head, backbone)
        if head.conv_seg.out_channels != len(train.classes):
            raise ValueError(
                f"head={cfg.head} tells {head.conv_seg.out_channels} classes apart; the data have "
                f"{len(train.classes)}."
            )
        look = Look(backbone, blocks, True, look.precision)
        head = head.to(look.device)
    else:
        head = _trained(cfg, look, train, resume)

    def logits(windows: Tensor) -> Tensor:
        return to_size(head(_side_by_side(look(windows))), *windows.shape[2:])

    return lambda image: slide(image, cfg.crop, cfg.stride, logits)


def _trained(cfg: Config, look: Look, train: DenseSource, resume: Resume) -> LinearSegmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        head = LinearSegmenter(patch_width(look.backbone) * len(look.blocks), len(train.classes))
    head = head.to(look.device)

    def loss(maps: list[Map], truth: Tensor, step: int) -> Tensor:
        logits = to_size(head(_side_by_side(maps)), *truth.shape[1:])
        judged = (truth != IGNORE).sum().clamp_min(1)
        return F.cross_entropy(logits, truth.long(), ignore_index=IGNORE, reduction="sum") / judged

    schedule = poly(cfg.steps, round(cfg.warmup * cfg.steps))
    plan = Plan(cfg.steps, cfg.lr, cfg.weight_decay, schedule, 0.0, resume, cfg.save_every)
    fit(head, _shown(cfg, look, train), loss, plan)
    if cfg.out and rank() == 0:
        save_head(Path(cfg.out) / f"segmentation_{cfg.method}_head.pth", head)
    return head


def _shown(cfg: Config, look: Look, train: DenseSource) -> Callable[[int], Iterator[Shown]]:
    if not cfg.augment:
        crop, stride = (cfg.crop, cfg.crop), (cfg.stride, cfg.stride)
        cache = fill_cache(
            look, train, lambda x, y: _resized(x, y, cfg.resize), crop, stride, IGNORE, cfg.cache_gib,
            cfg.workers,
        )  # fmt: skip
        return lambda start: cache.batches(cfg.seed, cfg.batch, start, cfg.steps)
    cut = SegmentationTransform(
        cfg.resize, (cfg.ratio[0], cfg.ratio[1]), cfg.crop, tuple(look.backbone.input.mean), cfg.cap
    )

    def online(start: int) -> Iterator[Shown]:
        for images, truth in dense_training_loader(
            train, cut, seed=cfg.seed, start_step=start, steps=cfg.steps, batch=cfg.batch,
            rank=rank(), world=world_size(), workers=cfg.workers,
        ):  # fmt: skip
            yield look(images), truth.to(look.device)

    return online


def _resized(image: Tensor, ids: Tensor, resize: int) -> tuple[Tensor, Tensor]:
    size = shorter_side_to(image, resize)
    return to_uint8(resize_image(image.float() / 255, *size)), resize_map(ids, *size)


def _side_by_side(maps: list[Map]) -> Tensor:
    return torch.cat([m.patches for m in maps], dim=1)


def _through_patches(cfg: Config, backbone: Backbone, train: DenseSource) -> tuple[Judge, dict[str, float]]:
    """Shares of the classes at the pixels of an image, by judging its patches one by one."""
    look = _look(cfg, backbone)
    bank = fill_bank(look, train, cfg.resize, cfg.bank, cfg.workers, cfg.seed)
    more: dict[str, float] = {"patches_train": len(bank.x)}
    if cfg.method == "knn":
        judge = neighbour_judge(bank, cfg.k, cfg.temp)
    else:
        judge, more["c"] = regression_judge(bank, sorted(cfg.c), held_out=0.1)
    return (
        lambda image: grid_to_image(judge(patch_rows(look, image)), *image.shape[1:], backbone.patch),
        more,
    )


def _majority(train: DenseSource, workers: int, device: torch.device) -> Judge:
    counts = torch.zeros(len(train.classes), dtype=torch.int64)
    for pair in watch(dense_loader(train, range(len(train)), workers), len(train), "training masks"):
        counts += pair.target[pair.target != IGNORE].long().bincount(minlength=len(counts))
    most = F.one_hot(counts.argmax(), len(counts)).float().to(device)[:, None, None]
    return lambda image: most.expand(-1, *image.shape[1:])


@torch.no_grad()
def _test(cfg: Config, judge: Judge, test: DenseSource, device: torch.device) -> dict[str, float]:
    confusion = Confusion(len(test.classes), device)
    flips = (False, True) if cfg.flip == "yes" or (cfg.flip == "auto" and cfg.method == "ms") else (False,)
    share = range(rank(), len(test), world_size())
    for pair in watch(dense_loader(test, share, cfg.workers), len(share), "test images"):
        image = pair.image.float() / 255
        total = torch.zeros((), device=device)
        for scale in cfg.scales:
            resized = resize_image(image, *shorter_side_to(image, round(cfg.resize * scale)))
            for flip in flips:
                said = judge(resized.flip(-1) if flip else resized)
                said = to_size((said.flip(-1) if flip else said)[None], *pair.target.shape)[0]
                total = total + (said.softmax(dim=0) if len(cfg.scales) * len(flips) > 1 else said)
        confusion.add(total.argmax(dim=0), pair.target.to(device))
    return confusion.scores(test.classes)
