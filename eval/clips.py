"""Clips: what frozen features of frames, read in their order, say of what moves.

Each frame goes through the backbone alone. A small head reads the patches of all frames
(dinokit.video.probe): it is trained on training clips, and how long and at which rate is chosen on clips held
out of them. Where it is known what a clip is backwards or mirrored, these are training clips as well, and
every test clip is evaluated backwards too. Of a clip and its reversal, a head that ignores the order has one
right at most.

    n  clips     V  views     T  frames     P  places of a frame     D  width     C  classes
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config import registry
from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.clips import Clip, Clips
from dinokit.eval._images import split_images
from dinokit.features import dense, device_of, frozen, last_blocks, patch_width, spread_places
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import memory
from dinokit.runtime.log import info, watch
from dinokit.video.probe import build_probe
from dinokit.video.sampling import Sampling

SHARE = 0.5  # of the memory that features may fill
VIEWS = {"mirrored": 3, "flipped": 2}  # the dimension of frames (n, 3, H, W) that is turned round


@dataclass
class Config:
    train: dict[str, Any] | None = source_field("data.clips", "train")
    test: dict[str, Any] | None = source_field("data.clips", "test")
    max_train: int = 0  # clips, drawn evenly from the set; 0: all
    max_test: int = 0  # clips, drawn evenly from the set; 0: all
    frames: int = 8  # of a clip
    sampling: Literal["even", "ends", "dense", "fps"] = "even"  # which frames
    stride: int = only_if(1, sampling=("dense",))  # frames from one to the next
    rate: float = only_if(1.0, sampling=("fps",))  # frames a second
    head: Literal["flat", "attentive"] = "flat"  # attentive: for thousands of clips and trained features
    time: bool = True  # whether the head knows the order of the frames
    grid: int = 8  # places along a side; where patches are more, they are averaged
    lr: tuple[float, ...] = (1e-3, 3e-3)  # of AdamW; a head for each
    steps: tuple[int, ...] = (200, 400, 600)  # after which a head is evaluated on the clips held out
    step_batch: int = 64  # clips a step
    held_out: float = 0.15  # share of the training clips, by which rate and steps are chosen
    mirror: bool = False  # train on mirrored clips too, as of the same class, where the source does not say
    baselines: bool = True  # train a head on the frame in the middle, and one without time, as well
    size: int = 0  # pixels; 0: the size that the backbone was trained on
    batch: int = 256  # frames, for the backbone
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training

    def __post_init__(self) -> None:
        check_at_least(self, max_train=0, max_test=0, frames=1, stride=1, grid=1, step_batch=1, size=0)
        check_at_least(self, steps=1, batch=1, seed=0)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: it must lie between 0 and 1.")
        if not self.lr or min(self.lr) <= 0:
            raise ValueError(f"lr={list(self.lr)}: give one rate above 0, or several.")
        if not self.steps:
            raise ValueError("steps is empty: give at least one number, such as steps=[400].")


@dataclass
class _Features:
    """Clips as a head sees them. The frame in the middle comes after the frames that were taken."""

    x: Tensor  # (V, n, T + 1, P, D) float16, on the CPU
    real: Tensor  # (n, T + 1) bool: which are no repetition
    y: Tensor  # (n,)


@dataclass
class _Task:
    """What is learned from which frames."""

    classes: int
    after: Tensor  # (V, C): the class of a view, by that of the clip
    back: Tensor | None  # (C,): the class of the clip backwards; None if it is not known
    use: slice  # of the T + 1 frames
    time: bool


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Accuracy of the chosen head on test clips, and where it is known what they are backwards, on these too.

    Returns:
        'accuracy'; 'pair_accuracy', the share of the clips that are right forwards and backwards. 'shuffled'
        is the accuracy of the same head, with the frames of each test clip in random order. 'middle_frame' is
        that of a head that is trained on the frame in the middle alone. 'order_free' and
        'order_free_pair_accuracy' are those of one without time. 'held_out', 'lr', 'steps': how the head was
        chosen; 'clips_train', 'clips_test'.

    Raises:
        ValueError, LookupError: if the data do not fit, or the backbone gives no map of patches.
    """
    train, test = _open(cfg, "train", cfg.max_train), _open(cfg, "test", cfg.max_test)
    if train.classes != test.classes:
        raise ValueError(
            f"The classes of train and test are not the same: give both the same classes. They are "
            f"{', '.join(train.classes[:5])} ... and {', '.join(test.classes[:5])} ..."
        )
    shared = sorted({clip.name for clip in train.clips} & {clip.name for clip in test.clips})
    if shared:
        raise ValueError(
            f"{len(shared)} test clips are training clips too, such as {shared[0]}: give others, or splits."
        )
    classes, changed = len(train.classes), dict(train.changed)
    if cfg.mirror:
        changed.setdefault("mirrored", tuple(range(classes)))
    views = [view for view in VIEWS if view in changed]
    # Test clips count twice: those with their frames in another order are a copy.
    _check_memory(cfg, backbone, len(train.clips) * (1 + len(views)) + 2 * len(test.clips))
    seen = _features(cfg, backbone, "train", train.clips, views)
    unseen = _features(cfg, backbone, "test", test.clips, [])
    after = torch.tensor([tuple(range(classes)), *(changed[view] for view in views)])
    back = torch.tensor(changed["backwards"]) if "backwards" in changed else None
    task = _Task(classes, after, back, slice(0, cfg.frames), cfg.time)
    device = device_of(backbone)
    head, chosen = _chosen_head(cfg, task, seen, device)
    scores = _scores(head, task, unseen, "")
    scores["shuffled"] = _scores(head, task, _shuffled(unseen, cfg.seed), "")["accuracy"]
    if cfg.baselines:
        alone = replace(task, use=slice(cfg.frames, None), time=True)
        found = _scores(_chosen_head(cfg, alone, seen, device)[0], alone, unseen, "middle_frame")
        scores["middle_frame"] = found["middle_frame"]
        free = replace(task, time=False)
        scores |= _scores(_chosen_head(cfg, free, seen, device)[0], free, unseen, "order_free")
    return scores | chosen | {"clips_train": len(train.clips), "clips_test": len(test.clips)}


def _open(cfg: Config, key: str, limit: int) -> Clips:
    """The clips of a section, `limit` drawn evenly, at random within equal parts of the set.

    Raises:
        ValueError: if it is not given, or has one class only.
    """
    section = getattr(cfg, key)
    if not section or not section.get("name"):
        raise ValueError(f"{key}.name must be given; there is: {', '.join(registry.names('data.clips'))}.")
    split = key if section.get("split") == "auto" else section.get("split", key)
    found: Clips = registry.build("data.clips", {**section, "split": split})
    if len(found.classes) < 2:
        raise ValueError(f"{key}: there is one class only, '{found.classes[0]}': nothing to distinguish.")
    chosen = spread_places(len(found.clips), limit)  # not at a fixed step: every fourth may be of one class
    return Clips(found.classes, [found.clips[i] for i in chosen], found.changed)


def _features(
    cfg: Config, backbone: Backbone, key: str, clips: Sequence[Clip], views: Sequence[str]
) -> _Features:
    """Features of the frames that are taken; of training clips, at random where the way has a choice.

    Raises:
        ValueError: if a clip cannot be read, with its name.
    """
    sampling = Sampling(cfg.sampling, cfg.frames, cfg.stride, cfg.rate)
    group = max(1, cfg.batch // ((cfg.frames + 1) * (1 + len(views))))
    rng = np.random.default_rng(cfg.seed) if key == "train" else None
    found, real = torch.empty(0), []
    with frozen(backbone):
        for start in watch(range(0, len(clips), group), (len(clips) + group - 1) // group, f"{key} clips"):
            frames = []
            for clip in clips[start : start + group]:
                seconds = clip.seconds(range(len(clip)))
                taken, mask = sampling(seconds, rng)
                middle, _ = Sampling("even", 1)(seconds)
                real.append([*mask, True])
                frames.append(_square(clip.frames([*taken, *middle]), cfg.size or backbone.input.size))
            images = torch.cat(frames)
            turned = torch.cat([images, *(images.flip(VIEWS[view]) for view in views)])
            x = _places(cfg, backbone, turned).unflatten(0, (1 + len(views), -1, cfg.frames + 1))
            if not start:  # one tensor for all clips: parts that are joined at the end would be there twice
                found = x.new_empty(len(x), len(clips), *x.shape[2:])
            found[:, start : start + x.shape[1]] = x
    y = torch.tensor([clip.label for clip in clips])
    return _Features(found, torch.tensor(real), y)


def _square(frames: np.ndarray, size: int) -> Tensor:
    """Frames (n, H, W, 3) uint8 to (n, 3, size, size) in [0, 1]: resized, and the centre."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        sides = (max(size, round(height * scale)), max(size, round(width * scale)))
        x = F.interpolate(x, sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (x.shape[2] - size) // 2, (x.shape[3] - size) // 2
    return x[:, :, top : top + size, left : left + size]


def _places(cfg: Config, backbone: Backbone, images: Tensor) -> Tensor:
    """Patches of images (m, 3, H, W), averaged to the grid: (m, P, D) float16."""
    device = device_of(backbone)
    precision = DTYPES[pick_precision(cfg.precision, device)]
    found = []
    for part in images.split(cfg.batch):
        patches = dense(backbone, part.to(device), last_blocks(backbone, 1), precision=precision)[0].patches
        grid = (min(cfg.grid, patches.shape[2]), min(cfg.grid, patches.shape[3]))
        small = F.adaptive_avg_pool2d(patches, grid)
        found.append(small.flatten(2).transpose(1, 2).to("cpu", torch.float16))
    return torch.cat(found)


def _chosen_head(
    cfg: Config, task: _Task, data: _Features, device: torch.device
) -> tuple[nn.Module, dict[str, float]]:
    """The head that is best on the clips held out, of all rates and steps; of equal ones the first."""
    fit, held = split_images(len(data.y), cfg.held_out, cfg.seed)
    places, width = data.x.shape[3:]
    frames = data.x[0, 0, task.use].shape[0]
    tried: list[tuple[float, float, int, nn.Module]] = []
    for lr in cfg.lr:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            head = build_probe(cfg.head, frames, places, width, task.classes, task.time).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=0.01)
        rng = torch.Generator().manual_seed(cfg.seed)
        for step in range(1, max(cfg.steps) + 1):
            x, real, y = _draw(task, data, fit, cfg.step_batch, rng)
            loss = F.cross_entropy(head(x.to(device).float(), real.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in cfg.steps:
                accuracy = _scores(head, task, data, "", held)["accuracy"]
                tried.append((accuracy, lr, step, deepcopy(head)))
                info(f"lr {lr:g}, {step} steps: {tried[-1][0]:.3f} of the clips held out are right")
    accuracy, lr, steps, best = max(tried, key=lambda each: each[0])
    return best, {"held_out": accuracy, "lr": lr, "steps": steps}


def _draw(
    task: _Task, data: _Features, rows: Tensor, count: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of random clips in random views, half of them backwards where that has a class."""
    chosen = rows[torch.randint(len(rows), (count,), generator=rng)]
    view = torch.randint(len(data.x), (count,), generator=rng)
    x, real = data.x[view, chosen][:, task.use], data.real[chosen][:, task.use]
    y = task.after[view, data.y[chosen]]
    if task.back is not None:
        turned = torch.rand(count, generator=rng) < 0.5
        x = torch.where(turned[:, None, None, None], x.flip(1), x)
        real = torch.where(turned[:, None], real.flip(1), real)
        y = torch.where(turned, task.back[y], y)
    return x, real, y


def _scores(
    head: nn.Module, task: _Task, data: _Features, name: str, rows: Tensor | None = None
) -> dict[str, float]:
    """The share of the clips that are right, and of those that are so forwards and backwards.

    `rows`: numbers of the clips; None: all.
    """
    rows = torch.arange(len(data.y)) if rows is None else rows
    y = data.y[rows]
    right = [_predicted(head, task, data, rows) == y]
    if task.back is not None:
        right.append(_predicted(head, task, data, rows, backwards=True) == task.back[y])
    scores = {name or "accuracy": torch.stack(right).double().mean().item()}
    if task.back is not None:
        scores[f"{name}_pair_accuracy" if name else "pair_accuracy"] = (
            (right[0] & right[1]).double().mean().item()
        )
    return scores


@torch.no_grad()
def _predicted(
    head: nn.Module, task: _Task, data: _Features, rows: Tensor, backwards: bool = False
) -> Tensor:
    """The class (n,) of each of these clips. Only those of a batch are copied."""
    device = next(head.parameters()).device
    found = []
    for part in rows.split(64):
        x, real = data.x[0, part, task.use], data.real[part, task.use]
        if backwards:
            x, real = x.flip(1), real.flip(1)
        found.append(head(x.to(device).float(), real.to(device)).argmax(dim=1).cpu())
    return torch.cat(found)


def _shuffled(data: _Features, seed: int) -> _Features:
    """The frames of each clip, but for the one in the middle, in an order of its own."""
    n, frames = data.real.shape[0], data.real.shape[1] - 1
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(n, frames, generator=rng).argsort(dim=1)
    order = torch.cat([order, torch.full((n, 1), frames)], dim=1)
    rows = torch.arange(n)[:, None]
    return _Features(data.x[:, rows, order], data.real[rows, order], data.y)


def _check_memory(cfg: Config, backbone: Backbone, clips: int) -> None:
    side = min(cfg.grid, max(1, (cfg.size or backbone.input.size) // backbone.patch))
    needed = 2 * clips * (cfg.frames + 1) * side**2 * patch_width(backbone)
    if needed > SHARE * memory():
        raise ValueError(
            f"The features of all clips need {needed / 2**30:.1f} GiB, and there are "
            f"{SHARE * memory() / 2**30:.1f} for them: give a smaller grid or fewer frames, or max_train=N."
        )
