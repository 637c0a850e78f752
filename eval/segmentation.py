"""Semantic segmentation from frozen patch features.

Methods: `linear` (batch norm and a 1 x 1 convolution on the last block) and `ms` (on the last four, tested at
several scales and mirrored) by the recipe of DINOv2 (arXiv 2304.07193, section 7.4); `knn` (the nearest
training patches vote; nothing is trained; arXiv 2306.01667) and `logreg` (logistic regression on patches) in
seconds to minutes; `majority` gives every pixel the most frequent class of the training masks.

    b  images of a step     C  classes     D  width     H, W  of an image     h, w  patches down and across
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if
from dinokit.data.dense import IGNORE, DenseSource
from dinokit.data.dense_transforms import SegmentationTransform, resize_image, resize_map, shorter_side_to
from dinokit.eval import DenseConfig
from dinokit.eval._dense import (
    DenseBackbone,
    labels_of_nearest,
    poly,
    read_pairs,
    slide,
    train_head,
    training_batches,
)
from dinokit.eval._images import count_shared, named_optimistic, partial_result
from dinokit.eval._segmentation import Predict, open_splits, segmentation_scores
from dinokit.features import Map, device_of, frozen, last_blocks
from dinokit.features.extract import check_finite
from dinokit.features.tokens import padding
from dinokit.heads import LinearSegmenter, to_size
from dinokit.heads.released import load_segmenter, save_head
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank
from dinokit.runtime.log import watch
from dinokit.runtime.partial import PartialResult

WITH_HEAD = ("linear", "ms")  # methods with a head
TRAINED: dict[str, Any] = {"method": ("linear", "ms"), "head": False}  # settings that need a trained head


@dataclass
class Config(DenseConfig):
    method: Literal["linear", "ms", "knn", "logreg", "majority"] = "linear"  # majority: one class everywhere
    resize: int = 0  # pixels of the shorter side; 0: as published, 512, or 640 for ms
    crop: int = only_if(0, method=WITH_HEAD)  # pixels of crops and windows; 0: as published, 512 or 640
    stride: int = only_if(0, method=WITH_HEAD)  # pixels between windows; 0: as published, 341 or 320
    augment: bool = only_if(True, **TRAINED)  # false: features once, of plain windows: minutes on a CPU
    # of random resizing; empty: as published, 0.5 to 2, or 1 to 3 for ms
    ratio: tuple[float, ...] = only_if((), **TRAINED, augment=True)
    cap: float = only_if(0.75, **TRAINED, augment=True)  # largest share of one class in a training crop
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
    # further sizes of the test images, times `resize`, each scored alone: robustness to resolution
    sizes: tuple[float, ...] = only_if((), method=("knn",))
    # values of C, compared on a tenth of the training images
    c: tuple[float, ...] = only_if((1e-4, 1e-3, 1e-2, 1e-1, 1.0), method=("logreg",))
    # file of a trained head, ours or a released one; nothing is trained
    head: str = only_if("", method=WITH_HEAD)
    save_every: int = only_if(500, **TRAINED)  # steps
    cache_gib: float = only_if(4.0, **TRAINED, augment=False)  # memory that features may take

    def __post_init__(self) -> None:
        super().__post_init__()
        ms = self.method == "ms"
        self.resize, self.crop, self.stride = (
            value or published
            for value, published in zip(
                (self.resize, self.crop, self.stride), (640, 640, 320) if ms else (512, 512, 341), strict=True
            )
        )
        self.ratio = tuple(self.ratio) or ((1.0, 3.0) if ms else (0.5, 2.0))
        self.scales = tuple(self.scales) or ((1, 1.32, 1.73, 2.28, 3.0) if ms else (1.0,))
        check_at_least(self, crop=1, stride=1, steps=1, batch=1, k=1, bank=1, save_every=1, sizes=1e-2)
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={list(self.ratio)}: give two numbers above 0, the smaller one first.")
        if not all(size <= 16 for size in self.sizes):  # nor nan
            raise ValueError(f"sizes={list(self.sizes)}: they are multiples of `resize`, 16 at most.")
        if min(self.scales) <= 0 or self.temp <= 0 or not self.c or min(self.c) <= 0:
            raise ValueError("scales, temp and c must be above 0, and c have at least one number.")
        if self.stride > self.crop:
            raise ValueError(f"stride={self.stride} leaves gaps between windows of crop={self.crop}.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Train the head of the method, if it has one, and evaluate test images at their stored size.

    Returns:
        'mIoU' (mean over the classes that are true or predicted somewhere), 'mean accuracy' over classes,
        'pixel accuracy', 'iou NAME' for each class; 'images_train', 'images_test'; for logreg 'c'; with
        sizes=[2] 'mIoU x2', of test images of twice the size, and 'cosine x2', of their patches with those
        at `resize`.

    Raises:
        ValueError, LookupError: if the data do not fit; the message names the key to set.
    """
    train, test = open_splits(cfg, backbone)
    shared = count_shared(cfg, train, test)
    more: dict[str, float] = {}
    partial = partial_result(cfg, "segmentation", backbone)
    predict: Predict
    with frozen(backbone):
        if cfg.method == "majority":
            predict = _majority(train, cfg.workers, device_of(backbone))
        elif cfg.method in WITH_HEAD:
            predict = _with_head(cfg, backbone, train, partial)
        else:
            predict, more = _with_patch_bank(cfg, backbone, train)
        mirrored = cfg.flip == "yes" or (cfg.flip == "auto" and cfg.method == "ms")
        flips = (False, True) if mirrored else (False,)
        scores = segmentation_scores(cfg, predict, test, device_of(backbone), cfg.scales, flips)
        for size in cfg.sizes:
            scores |= _at_another_size(cfg, backbone, predict, test, size, flips)
    partial.remove()
    return {**named_optimistic(scores, shared), **more, "images_train": len(train), "images_test": len(test)}


def _dense_backbone(cfg: Config, backbone: Backbone) -> DenseBackbone:
    return DenseBackbone(backbone, last_blocks(backbone, 4 if cfg.method == "ms" else 1), cfg.precision)


def _with_head(cfg: Config, backbone: Backbone, train: DenseSource, partial: PartialResult) -> Predict:
    """Logits of an image at its own size, by a head that is trained here or read from a file."""
    dense = _dense_backbone(cfg, backbone)
    if cfg.head:
        head, blocks = load_segmenter(cfg.head, backbone)
        if head.conv_seg.out_channels != len(train.classes):
            raise ValueError(
                f"head={cfg.head} has {head.conv_seg.out_channels} classes; the data have "
                f"{len(train.classes)}."
            )
        dense = DenseBackbone(backbone, blocks, cfg.precision)
        head = head.to(dense.device)
    else:
        head = _train_head(cfg, dense, train, partial)

    def logits(windows: Tensor) -> Tensor:
        return to_size(head(_concatenated(dense(windows))), *windows.shape[2:])

    return lambda image: slide(image, cfg.crop, cfg.stride, logits)


def _train_head(
    cfg: Config, dense: DenseBackbone, train: DenseSource, partial: PartialResult
) -> LinearSegmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        head = LinearSegmenter(dense.width * len(dense.blocks), len(train.classes))
    head = head.to(dense.device)

    def loss(maps: list[Map], truth: Tensor, step: int) -> Tensor:
        logits = to_size(head(_concatenated(maps)), *truth.shape[1:])
        count = (truth != IGNORE).sum().clamp_min(1)
        return F.cross_entropy(logits, truth.long(), ignore_index=IGNORE, reduction="sum") / count

    transform = SegmentationTransform(
        cfg.resize, (cfg.ratio[0], cfg.ratio[1]), cfg.crop, tuple(dense.backbone.input.mean), cfg.cap
    )
    crop, stride = (cfg.crop, cfg.crop), (cfg.stride, cfg.stride)
    batches = training_batches(cfg, dense, train, transform, "none", crop, stride, IGNORE)
    train_head(cfg, head, batches, loss, poly, partial)
    if cfg.out and rank() == 0:
        save_head(Path(cfg.out) / f"segmentation_{cfg.method}_head.pth", head)
    return head


def _concatenated(maps: list[Map]) -> Tensor:
    return torch.cat([m.patches for m in maps], dim=1)


def _with_patch_bank(cfg: Config, backbone: Backbone, train: DenseSource) -> tuple[Predict, dict[str, float]]:
    """Shares of the classes at the pixels of an image, by classifying each of its patches."""
    dense = _dense_backbone(cfg, backbone)
    bank = fill_bank(dense, train, cfg.resize, cfg.bank, cfg.workers, cfg.seed)
    more: dict[str, float] = {"patches_train": len(bank.x)}
    if cfg.method == "knn":
        classify = knn_classifier(bank, cfg.k, cfg.temp)
    else:
        classify, more["c"] = regression_classifier(bank, sorted(cfg.c), held_out=0.1)

    def predict(image: Tensor) -> Tensor:
        shares = classify(patch_rows(dense, image))
        return grid_to_image(shares, image.shape[1], image.shape[2], backbone.patch)

    return predict, more


def _majority(train: DenseSource, workers: int, device: torch.device) -> Predict:
    counts = torch.zeros(len(train.classes), dtype=torch.int64)
    for pair in read_pairs(train, workers, "training masks"):
        counts += pair.target[pair.target != IGNORE].long().bincount(minlength=len(counts))
    one_hot = F.one_hot(counts.argmax(), len(counts)).float().to(device)[:, None, None]
    return lambda image: one_hot.expand(-1, *image.shape[1:])


def _at_another_size(
    cfg: Config, backbone: Backbone, predict: Predict, test: DenseSource, size: float, flips: Sequence[bool]
) -> dict[str, float]:
    """The mIoU of test images of `size` times cfg.resize, and the mean cosine of patches at the two sizes.

    For the cosine, sides are rounded to multiples of the patch; the larger grid is interpolated to the other.
    """
    other = replace(cfg, out="")
    miou = segmentation_scores(other, predict, test, device_of(backbone), (size,), flips)["mIoU"]
    dense, sums = _dense_backbone(cfg, backbone), torch.zeros(2, dtype=torch.float64)
    for pair in read_pairs(test, cfg.workers, "test images at two sizes", share=True):
        image, maps = pair.image.float() / 255, []
        for scale in (1.0, size):
            sides = shorter_side_to(image, round(cfg.resize * scale))
            h, w = (max(1, round(side / backbone.patch)) * backbone.patch for side in sides)
            maps.append(dense(resize_image(image, h, w)[None])[0].patches)
        sums += torch.tensor([float(cosines_on_one_grid(*maps).mean()), 1.0], dtype=torch.float64)
    total, count = all_reduce_sum(sums).tolist()
    return {f"mIoU x{size:g}": miou, f"cosine x{size:g}": total / count}


def cosines_on_one_grid(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (b, h, w) of two maps (b, D, ., .) of the same images, on the smaller of the two grids."""
    grid = min(a.shape[2:], b.shape[2:])
    a, b = (F.interpolate(x, grid, mode="bilinear", antialias=True) for x in (a, b))
    return F.cosine_similarity(a, b, dim=1)


# Segmentation without a trained decoder: patches of training images with the classes of their pixels.
#
#     N  patches in the bank     Q  patches of a test image     k  neighbours


@dataclass
class PatchBank:
    """Patches on the backbone's device."""

    x: Tensor  # (N, D) float32
    shares: Tensor  # (N, C) float32: of the labelled pixels of a patch, the share of each class
    image: Tensor  # (N,) int64: the number of the image


def fill_bank(
    dense: DenseBackbone, source: DenseSource, resize: int, limit: int, workers: int, seed: int
) -> PatchBank:
    """Patches of all pairs that have a labelled pixel; of each image an equal share of `limit` patches.

    Raises:
        ValueError: if no pixel is labelled, or a pair cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    share = max(1, limit // len(source))
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for pair in read_pairs(source, workers, "patches of training images"):
        size = shorter_side_to(pair.image, resize)
        x = patch_rows(dense, resize_image(pair.image.float() / 255, *size))
        counts = patch_counts(resize_map(pair.target, *size), dense.backbone.patch, len(source.classes))
        chosen = counts.sum(dim=1).nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:share]]
        labelled = counts[chosen].to(x.device)
        image = torch.full((len(chosen),), pair.index)
        rows.append((x[chosen.to(x.device)], labelled / labelled.sum(1, keepdim=True), image))
    x, shares, image = (torch.cat(column) for column in zip(*rows, strict=True))
    if not len(x):
        raise ValueError("No pixel of the training images is labelled: check `ignore` and the masks' ids.")
    check_finite(x, dense.precision, "patches")
    return PatchBank(x, shares, image)


def patch_rows(dense: DenseBackbone, image: Tensor) -> Tensor:
    """Features of the patches of one image (C, H, W), row by row: (h w, D)."""
    return dense(image[None])[0].patches[0].flatten(1).T.contiguous()


def patch_counts(ids: Tensor, patch: int, classes: int) -> Tensor:
    """Number of pixels of each class in each patch: ids (H, W) -> (h w, C), padded as in `dense`."""
    left, right, top, bottom = padding(ids.shape[0], ids.shape[1], patch)
    ids = F.pad(ids.long(), (left, right, top, bottom), value=IGNORE)
    blocks = (
        ids.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    )
    index = torch.arange(len(blocks))[:, None] * classes + blocks
    counts = index[blocks != IGNORE].bincount(minlength=len(blocks) * classes)
    return counts.view(-1, classes).float()


def grid_to_image(rows: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Values (h w, C) of the patches of an image of `height` x `width`, at its pixels: (C, height, width)."""
    left, right, top, bottom = padding(height, width, patch)
    h, w = (height + top + bottom) // patch, (width + left + right) // patch
    x = rows.T.unflatten(1, (h, w))[None]
    x = F.interpolate(x, (h * patch, w * patch), mode="bilinear", align_corners=False)
    return x[0, :, top : top + height, left : left + width]


def knn_classifier(bank: PatchBank, k: int, temp: float) -> Callable[[Tensor], Tensor]:
    """A function from patches (Q, D) to shares of the classes (Q, C), by the k nearest patches in the bank.

    Each neighbour by cosine votes with weight softmax(cosine / temp) for the classes of its pixels, by their
    share: in-context segmentation (Balazevic et al., arXiv 2306.01667). The search is exact.
    """
    keys = F.normalize(bank.x, dim=1)
    return lambda x: labels_of_nearest(F.normalize(x, dim=1), keys, bank.shares, k, temp)


def regression_classifier(
    bank: PatchBank, cs: list[float], held_out: float
) -> tuple[Callable[[Tensor], Tensor], float]:
    """Multinomial logistic regression from patches (Q, D) to shares of the classes (Q, C), and its C.

    Features are standardised. The objective is C times the sum of the cross-entropies, plus half the square
    of the weights (not of the biases), by L-BFGS. C is chosen on the patches of a share of the
    images, by mean IoU of the largest class of each patch; then the regression is fitted to all patches.

    Args:
        bank: training patches.
        cs: C, ascending.
        held_out: share of the images to choose C on.
    """
    mean, std = bank.x.mean(dim=0), bank.x.std(dim=0).clamp_min(1e-6)
    x = (bank.x - mean) / std
    best = cs[0]
    if len(cs) > 1:
        last = bank.image >= bank.image.max() + 1 - max(1, round(held_out * (int(bank.image.max()) + 1)))
        last = last.to(x.device)  # the patches of the last images
        truth, scores, weights = bank.shares[last].argmax(1), [], None
        for c in watch(cs, len(cs), "logistic regression"):
            weights = _fit_regression(x[~last], bank.shares[~last], c, weights)
            scores.append(_mean_iou((_with_bias(x[last]) @ weights).argmax(1), truth, bank.shares.shape[1]))
        best = cs[max(range(len(cs)), key=lambda i: scores[i])]
    weights = _fit_regression(x, bank.shares, best, None)
    return lambda rows: (_with_bias((rows - mean) / std) @ weights).softmax(dim=1), best


def _fit_regression(x: Tensor, shares: Tensor, c: float, start: Tensor | None) -> Tensor:
    """(D + 1, C) weights, the last row the biases."""
    x, scale = _with_bias(x), 1 / (c * len(x))  # divided by C N, the objective is of size 1
    w = start.clone() if start is not None else x.new_zeros(x.shape[1], shares.shape[1])
    w.requires_grad_(True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w, shares) + scale / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()


def _with_bias(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    counts = (truth * classes + predicted).bincount(minlength=classes**2).view(classes, classes).double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal() / union)[union > 0].mean().item()
