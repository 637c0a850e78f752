"""Segmentation by EoMT: a copy of the backbone is tuned with queries among its tokens (arXiv 2503.19108).

The protocol of the paper on ADE20K: each query answers with one mask and one class, or with no object. In
training the queries are matched to the classes of an image so that the whole cost is least (DETR, arXiv
2005.12872), and the answers after every block that sees queries are compared at random points, most of them
where a mask is uncertain (PointRend, arXiv 1912.08193). The backbone that is evaluated stays as it was.

    b  images     Q  queries     C  classes     K  classes in an image     P  points     M  matched pairs
    H, W  of an image     u h, u w  of a mask
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config.registry import check_at_least, only_if
from dinokit.data.dense import IGNORE, DenseSource
from dinokit.data.dense_transforms import SegmentationTransform
from dinokit.data.loader import dense_training_loader
from dinokit.data.sampler import generator
from dinokit.eval import DenseConfig
from dinokit.eval._dense import Rates, Schedule, slide, train_head
from dinokit.eval._images import count_shared, named_optimistic, partial_result
from dinokit.eval._segmentation import open_splits, segmentation_scores
from dinokit.features import device_of, normalised
from dinokit.features.tokens import padded, padding
from dinokit.heads.eomt import POWER, EoMT, Segments, joint_blocks, restricted_shares
from dinokit.heads.released import load_head, save_head
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.partial import PartialResult
from dinokit.segment.losses import dice_loss

CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights of the losses, and of the costs of a match
NO_OBJECT = 0.1  # weight of the class "no object"
OVERSAMPLED, UNCERTAIN = 3, 0.75  # points drawn for one that is used; share of the most uncertain of them
DRAWS = 17  # stream of random numbers


@dataclass
class Config(DenseConfig):
    resize: int = 512  # pixels of the shorter side
    # of the copy: all, the blocks that see queries, or nothing
    tune: Literal["all", "joint", "none"] = only_if("all", head=False)
    blocks: int = 0  # last blocks that see queries; 0: as published, 3 of 12, 4 of 24 and 5 of 40
    queries: int = 100  # each gives one mask and one class: at least as many as classes in an image
    crop: int = 512  # pixels of crops and windows
    stride: int = 341  # pixels between windows
    ratio: tuple[float, ...] = only_if((0.5, 2.0), head=False)  # of random resizing
    steps: int = only_if(39_153, head=False)  # 31 epochs of ADE20K
    batch: int = only_if(16, head=False)  # crops a step
    lr: float = only_if(1e-4, head=False)
    layer_decay: float = only_if(0.8, head=False)  # the rate of a block over that of the next one
    weight_decay: float = only_if(0.05, head=False)
    # share of the steps: 500 of 39,153; the copy is tuned only after it, with a warm-up twice as long
    warmup: float = only_if(0.0128, head=False)
    clip: float = only_if(0.01, head=False)  # largest gradient norm; 0 is off
    points: int = only_if(12_544, head=False)  # at which masks are compared
    save_every: int = only_if(500, head=False)  # steps
    head: str = ""  # eomt.pth that such an evaluation wrote into `out`; nothing is trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, resize=1, blocks=0, queries=1, crop=1, stride=1, steps=1, batch=1, points=4, save_every=1
        )
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={list(self.ratio)}: give two numbers above 0, the smaller one first.")
        if self.stride > self.crop:
            raise ValueError(f"stride={self.stride} leaves gaps between windows of crop={self.crop}.")
        if not (0 <= self.warmup <= 1 and 0 < self.layer_decay <= 1):
            raise ValueError(
                f"warmup={self.warmup} and layer_decay={self.layer_decay}: both are 1 at most, and "
                f"layer_decay is above 0."
            )
        if self.precision == "fp16" and not self.head:
            raise ValueError(
                "precision=fp16: this trains, and fp16 gradients vanish. Take bf16 or fp32; head=FILE, which "
                "trains nothing, takes fp16 too."
            )


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Tune a copy of the backbone with its queries, and evaluate test images at their stored size.

    Returns:
        As `segmentation`: 'mIoU', 'mean accuracy', 'pixel accuracy', 'iou NAME' for each class;
        'images_train', 'images_test'.

    Raises:
        ValueError, LookupError: if the data or the backbone do not fit, or scipy is not installed; the
            message says how to go on.
    """
    joint_blocks(backbone, cfg.blocks)
    _scipy()
    train, test = open_splits(cfg, backbone)
    shared = count_shared(cfg, train, test)
    partial = partial_result(cfg, "eomt", backbone)
    device = device_of(backbone)
    # auto without fp16, whose gradients would have to be scaled: on a GPU without bf16 it is fp32.
    precision = pick_precision(cfg.precision, device)
    if precision == "fp16" and cfg.precision == "auto":
        precision = "fp32"
    tuned = _Tuned(cfg, backbone, train, DTYPES[precision])
    if cfg.head:
        load_head(cfg.head, tuned.head.eval(), f"EoMT on such a backbone, with queries={cfg.queries}")
        if int(tuned.head.joint) != tuned.head.blocks:
            raise ValueError(
                f"head={cfg.head} was tuned with queries in the last {int(tuned.head.joint)} blocks, not in "
                f"{tuned.head.blocks}: set blocks={int(tuned.head.joint)}."
            )
    else:
        tuned.train(partial)

    def shares(windows: Tensor) -> Tensor:
        size = (windows.shape[2], windows.shape[3])
        return class_shares(tuned(windows.to(device))[-1], *size, backbone.patch)

    scores = segmentation_scores(cfg, lambda image: slide(image, cfg.crop, cfg.stride, shares), test, device)
    partial.remove()
    return {**named_optimistic(scores, shared), "images_train": len(train), "images_test": len(test)}


class _Tuned:
    """The network, how it sees images, and its training."""

    def __init__(
        self, cfg: Config, backbone: Backbone, train: DenseSource, dtype: torch.dtype | None
    ) -> None:
        self.cfg, self.source, self.dtype, self.device = cfg, train, dtype, device_of(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            head = EoMT(backbone, len(train.classes), cfg.queries, cfg.blocks, cfg.tune)
        self.head = head.to(self.device)

    def __call__(self, images: Tensor, restricted: Sequence[float] = ()) -> list[Segments]:
        """Segments of images (b, channels, H, W), uint8 or float32 in [0, 1], in float32."""
        x = padded(normalised(self.head.backbone, images), self.head.backbone.patch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            found = self.head(x, restricted)
        return [Segments(each.masks.float(), each.classes.float()) for each in found]

    def train(self, partial: PartialResult) -> None:
        """Tune it, and leave it in eval mode."""
        cfg, colour = self.cfg, tuple(self.head.backbone.input.mean)
        transform = SegmentationTransform(cfg.resize, (cfg.ratio[0], cfg.ratio[1]), cfg.crop, colour)

        def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
            yield from dense_training_loader(
                self.source, transform, seed=cfg.seed, start_step=start, steps=cfg.steps, batch=cfg.batch,
                rank=rank(), world=world_size(), workers=cfg.workers,
            )  # fmt: skip

        rates = learning_rates(self.head, cfg.layer_decay)
        with torch.random.fork_rng(devices=[]):
            train_head(cfg, self.head, batches, self._loss, rates, partial, cfg.clip)
        if cfg.out and rank() == 0:
            save_head(Path(cfg.out) / "eomt.pth", self.head)

    def _loss(self, images: Tensor, truth: Tensor, step: int) -> Tensor:
        # Anew for each step, so a training that resumes draws as one that was not stopped.
        torch.manual_seed(int(generator(self.cfg.seed, step, rank(), DRAWS).integers(2**62)))
        restricted = restricted_shares(step, self.cfg.steps, self.head.blocks)
        found = self(images.to(self.device), restricted)
        # Both the map of the crop and its truth are padded, as the image is.
        left, right, top, bottom = padding(truth.shape[1], truth.shape[2], self.head.backbone.patch)
        truth = F.pad(truth, (left, right, top, bottom), value=IGNORE)
        return segments_loss(found, truth, self.cfg.points)


def learning_rates(head: EoMT, decay: float) -> Rates:
    """Parameters with the factor of their rate, from a step, all steps and those of the warm-up.

    What is new has a linear warm-up; the copy is not tuned during that, and then has a warm-up twice as long.
    A power of the steps that remain follows. The rate of each block is `decay` times that of the next, and
    that of embeddings is the first block's.
    """

    def new(step: int, steps: int, warmup: int) -> float:
        return step / warmup if step < warmup else (1 - (step - warmup) / max(steps - warmup, 1)) ** POWER

    def tuned(scale: float) -> Schedule:
        def factor(step: int, steps: int, warmup: int) -> float:
            after = step - warmup
            return scale * new(after, steps - warmup, 2 * warmup) if after >= 0 else 0.0

        return factor

    backbone = head.backbone
    last = len(backbone.blocks) - 1
    number = {parameter: i for i, block in enumerate(backbone.blocks) for parameter in block.parameters()}
    number |= dict.fromkeys(backbone.get_submodule("norm").parameters(), last)
    parts: dict[int, list[nn.Parameter]] = {}
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parts.setdefault(number.get(parameter, 0), []).append(parameter)
    ours = [p for name, p in head.named_parameters() if not name.startswith("backbone.")]
    return [(ours, new), *((each, tuned(decay ** (last - i))) for i, each in parts.items())]


def class_shares(found: Segments, height: int, width: int, patch: int) -> Tensor:
    """For each pixel the sum over queries of their classes' shares, where their masks are: (b, C, H, W)."""
    left, right, top, bottom = padding(height, width, patch)
    size = (height + top + bottom, width + left + right)
    masks = F.interpolate(found.masks, size, mode="bilinear", align_corners=False).sigmoid()
    masks = masks[:, :, top : top + height, left : left + width]
    return torch.einsum("bqc,bqhw->bchw", found.classes.softmax(-1)[..., :-1], masks)


def segments_loss(found: Sequence[Segments], truth: Tensor, points: int) -> Tensor:
    """The loss of the segments after several blocks, each with its own matches, summed: ().

    2 times the cross-entropy of classes (of unmatched queries with "no object", which weighs 0.1), 5 times
    the binary cross-entropy of matched masks at points, 5 times their dice loss; the latter two over the
    number of classes in all images. Pixels without a class are outside of every mask.

    Args:
        found: of each block.
        truth: (b, H, W) classes, or IGNORE, on the CPU.
        points: at which masks are compared; drawn from the global generator.
    """
    device, none = found[0].masks.device, found[0].classes.shape[2] - 1
    labels = [ids[ids != IGNORE].unique().long().to(device, non_blocking=True) for ids in truth]
    truth = truth.to(device, non_blocking=True)
    targets = [(ids == each[:, None, None]).float() for ids, each in zip(truth, labels, strict=True)]
    queries = found[0].masks.shape[1]
    matched = sum(min(len(each), queries) for each in labels)
    weight = matched + NO_OBJECT * (len(truth) * queries - matched)
    counts = torch.tensor([sum(map(len, labels)), weight], dtype=torch.float32).to(device)
    masks, weights_in_all = all_reduce_sum(counts) / world_size()
    total = torch.zeros((), device=device)
    for each in found:
        pairs = match(each, targets, labels, points)
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
        query = torch.cat([q for q, _ in pairs])
        wanted = torch.full(each.classes.shape[:2], none, device=device)
        wanted[image, query] = torch.cat([k[t] for k, (_, t) in zip(labels, pairs, strict=True)])
        weights = torch.ones(none + 1, device=device)
        weights[none] = NO_OBJECT
        classes = F.cross_entropy(each.classes.flatten(0, 1), wanted.flatten(), weights, reduction="sum")
        total = total + CLASS * classes / weights_in_all
        if not len(query):  # all processes have gradients of the same parameters
            total = total + 0 * each.masks.sum()
            continue
        logits = each.masks[image, query]
        true = torch.cat([x[t] for x, (_, t) in zip(targets, pairs, strict=True)])
        places = uncertain_points(logits, points)
        logits, true = at_points(logits, places), at_points(true, places)
        mask = F.binary_cross_entropy_with_logits(logits, true, reduction="none").mean(1).sum()
        total = total + (MASK * mask + DICE * dice_loss(logits, true).sum()) / masks.clamp(min=1)
    return total


@torch.no_grad()
def match(
    found: Segments, targets: Sequence[Tensor], labels: Sequence[Tensor], points: int
) -> list[tuple[Tensor, Tensor]]:
    """For each image the queries and the targets that belong together, at the least cost of all.

    Args:
        found: of b images.
        targets: for each image (K, H, W) of 0 and 1.
        labels: for each image (K,), their classes.
        points: at which masks are compared; drawn from the global generator.
    """
    costs = []
    for masks, classes, target, label in zip(found.masks, found.classes, targets, labels, strict=True):
        places = torch.rand(1, points, 2, device=masks.device)
        logits, true = (at_points(x, places.expand(len(x), -1, -1)) for x in (masks, target))
        costs.append(pair_costs(logits, true) - CLASS * classes.softmax(-1)[:, label])
    flat = torch.cat([each.flatten() for each in costs]).cpu()  # one wait for the device a block
    assign, pairs = _scipy().linear_sum_assignment, []
    for cost, part in zip(costs, flat.split([each.numel() for each in costs]), strict=True):
        pairs.append(assign(part.view(cost.shape).nan_to_num(nan=1e30).numpy()))
    device = found.masks.device
    return [(torch.from_numpy(q).to(device), torch.from_numpy(t).to(device)) for q, t in pairs]


def pair_costs(logits: Tensor, true: Tensor) -> Tensor:
    """Weighted cross-entropy and dice loss of each mask (Q, P) with each target (K, P): (Q, K)."""
    entropy = F.softplus(-logits) @ true.T + F.softplus(logits) @ (1 - true).T
    p = logits.sigmoid()
    dice = 1 - (2 * p @ true.T + 1) / (p.sum(1)[:, None] + true.sum(1) + 1)
    return MASK * entropy / logits.shape[1] + DICE * dice


def at_points(maps: Tensor, places: Tensor) -> Tensor:
    """Values of maps (M, h, w) at places (M, P, 2), x and y in [0, 1], bilinear: (M, P)."""
    return F.grid_sample(maps[:, None], 2 * places[:, None] - 1, align_corners=False)[:, 0, 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, points: int) -> Tensor:
    """Places (M, P, 2) at which masks (M, h, w) are compared: three quarters where logits are nearest 0."""
    places = torch.rand(len(logits), OVERSAMPLED * points, 2, device=logits.device)
    chosen = at_points(logits, places).abs().topk(int(UNCERTAIN * points), dim=1, largest=False).indices
    rest = torch.rand(len(logits), points - chosen.shape[1], 2, device=logits.device)
    return torch.cat([places.gather(1, chosen[:, :, None].expand(-1, -1, 2)), rest], dim=1)


def _scipy() -> Any:
    """scipy.optimize: the matches of queries."""
    try:
        return import_module("scipy.optimize")
    except ModuleNotFoundError:
        raise ValueError(
            "The matches of queries need scipy, which is not installed: "
            "pip install '.[segment]' in the clone."
        ) from None
