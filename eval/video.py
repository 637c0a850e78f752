"""Video object segmentation without training: labels of the first frame are handed on by likeness of patches.

The protocol of DINO (arXiv 2104.14294, section 4.2.2; label propagation of Jabri et al., arXiv 2006.14613) on
DAVIS 2017: each patch takes the labels of its nearest patches in the first frame and the last few.

    N  patches of a frame     R  frames looked back to     D  width     O  objects, and the background
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config import registry
from dinokit.data.dense_transforms import to_tensors
from dinokit.data.videos import Video
from dinokit.eval._look import Look
from dinokit.eval._outlines import contour, region
from dinokit.eval._resume import identity
from dinokit.features import device_of, frozen, last_blocks, patch_width
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.files import write_text
from dinokit.runtime.log import watch

BLOCK = 512  # patches that ask at a time
MULTIPLE = 64  # pixels: what the longer side is cut down to a multiple of, where the patch divides it


@dataclass
class Config:
    test: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.videos", "split": "test", "labels": False}
    )
    size: int = 480  # pixels of the shorter side
    frames: int = 7  # looked back to, besides the first
    radius: int = 12  # patches: how far away a likeness is looked for; 0: anywhere
    k: int = 5  # patches that a patch takes its labels from
    temp: float = 0.1  # a likeness weighs exp(cosine / temp)
    out: str = ""  # folder for the scores of each video; a run that was killed goes on from what is there
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training

    def __post_init__(self) -> None:
        for key, low in {"size": 1, "frames": 0, "radius": 0, "k": 1}.items():
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)}, but it must be {low} or more.")
        if self.temp <= 0:
            raise ValueError(f"temp={self.temp}, but it must be above 0.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Hand the labels on, and judge every frame but the first and the last.

    Returns:
        'J&F mean', 'J mean' (region) and 'F mean' (outline), over objects, each the mean over its frames;
        'videos', 'objects'.

    Raises:
        ValueError: if there are no such videos, or the backbone has no patches.
    """
    patch_width(backbone)
    dtype = DTYPES[pick_precision(cfg.precision, device_of(backbone))]
    look = Look(backbone, last_blocks(backbone, 1), True, dtype)
    if not cfg.test:
        raise ValueError(f"test.name must be given; there is: {', '.join(registry.names('data.videos'))}.")
    videos: list[Video] = registry.build("data.videos", cfg.test)
    sums = torch.zeros(3, dtype=torch.float64)
    share = videos[rank() :: world_size()]
    with frozen(backbone), torch.no_grad():
        for video in watch(share, len(share), "videos"):
            scores = _kept(cfg, look, video)
            sums += torch.tensor([[j, f, 1.0] for j, f in scores], dtype=torch.float64).sum(dim=0)
    j, f, objects = all_reduce_sum(sums).tolist()
    if not objects:
        raise ValueError("The first frames of the videos show no object.")
    j, f = j / objects, f / objects
    return {"J&F mean": (j + f) / 2, "J mean": j, "F mean": f, "videos": len(videos), "objects": objects}


def _kept(cfg: Config, look: Look, video: Video) -> list[tuple[float, float]]:
    """J and F of each object of a video; read from `out` if it was judged before in the same way."""
    if not cfg.out:
        return _judged(cfg, look, video)
    path = Path(cfg.out) / f"{video.name}.json"
    who = identity({**asdict(cfg), "videos": cfg.test}, look.backbone)
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] == who:
            return [(j, f) for j, f in kept["scores"]]
    scores = _judged(cfg, look, video)
    write_text(path, json.dumps({"identity": who, "scores": scores}))
    return scores


def _judged(cfg: Config, look: Look, video: Video) -> list[tuple[float, float]]:
    first = torch.from_numpy(video.mask(0))
    objects = int(first.max())
    scores = torch.zeros(objects, 2, dtype=torch.float64)
    count = len(video) - 2
    for index, given in enumerate(_handed_on(cfg, look, video, first, objects + 1), start=1):
        if index > count:
            break
        truth = torch.from_numpy(video.mask(index))
        for number in range(objects):
            a, b = given == number + 1, truth == number + 1
            scores[number] += torch.tensor([region(a, b), contour(a, b)], dtype=torch.float64)
    return [(j, f) for j, f in (scores / count).tolist()]


def _handed_on(cfg: Config, look: Look, video: Video, first: Tensor, labels: int) -> Iterator[Tensor]:
    """The labels (H, W) of each frame after the first, one after the other."""
    x, grid = _patches(cfg, look, video, 0)
    ids = F.interpolate(first[None, None].float(), grid, mode="nearest").long().flatten()
    shares = F.one_hot(ids, labels).float().to(x.device)  # (N, O)
    near = _neighbourhood(grid, cfg.radius, x.device)
    start = (x, shares)
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=cfg.frames)
    for index in range(1, len(video)):
        x, _ = _patches(cfg, look, video, index)
        back = [start, *past]
        shares = propagate(
            x, torch.stack([f for f, _ in back]), torch.stack([s for _, s in back]), near, cfg.k, cfg.temp
        )
        past.append((x, shares))
        yield _labelled(shares, grid, look.backbone.patch, first.shape)


def propagate(x: Tensor, past: Tensor, shares: Tensor, near: Tensor | None, k: int, temp: float) -> Tensor:
    """The labels that patches take from those of earlier frames.

    Args:
        x: (N, D), on the unit sphere.
        past: (R, N, D), likewise.
        shares: (R, N, O): of each label in these patches.
        near: (N, N) bool: which places a patch looks at; None: all.
        k: how many of the R N patches, the most alike, it takes labels from.
        temp: each weighs exp(cosine / temp).

    Returns:
        (N, O).
    """
    bank, known = past.flatten(0, 1), shares.flatten(0, 1)
    done = []
    for start in range(0, len(x), BLOCK):
        likeness = x[start : start + BLOCK] @ bank.T  # (block, R N)
        if near is not None:
            likeness.masked_fill_(~near[start : start + BLOCK].repeat(1, len(past)), float("-inf"))
        values, places = likeness.topk(min(k, len(bank)), dim=1)
        done.append(torch.einsum("nk,nko->no", (values / temp).softmax(dim=1), known[places]))
    return torch.cat(done)


def _patches(cfg: Config, look: Look, video: Video, index: int) -> tuple[Tensor, tuple[int, int]]:
    """Features (N, D) on the unit sphere, and the grid."""
    image = to_tensors(video.frame(index, look.backbone.channels), np.zeros((1, 1)))[0]
    patch = look.backbone.patch
    step = MULTIPLE if MULTIPLE % patch == 0 and cfg.size % patch == 0 else patch
    short = min(image.shape[1:])
    height, width = (
        cfg.size // patch * patch if side == short else max(step, cfg.size * side // short // step * step)
        for side in image.shape[1:]
    )
    small = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    maps = look(small)[0].patches
    return F.normalize(maps[0].flatten(1).T, dim=1), (maps.shape[2], maps.shape[3])


def _neighbourhood(grid: tuple[int, int], radius: int, device: torch.device) -> Tensor | None:
    """(N, N) bool: places no further apart than `radius` down and across."""
    if not radius:
        return None
    down, across = (
        (torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)).abs() <= radius
        for n in grid
    )
    return (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)


def _labelled(shares: Tensor, grid: tuple[int, int], patch: int, size: tuple[int, ...]) -> Tensor:
    """Shares (N, O) of the patches as labels (H, W) of the frame's pixels, on the CPU.

    Each label's map is brought to [0, 1] first, so that a small object is not lost against a large one.
    """
    maps = shares.T.unflatten(1, grid)[None]
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
    maps = torch.where(high > 0, (maps - low) / (high - low).clamp_min(1e-12), maps)
    ids = maps.argmax(dim=0)[None, None].float()
    return F.interpolate(ids, (size[0], size[1]), mode="nearest")[0, 0].byte().cpu()
