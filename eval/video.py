"""Video object segmentation without training: labels of the first frame propagate between similar patches.

The protocol of DINO (arXiv 2104.14294, section 4.2.2; label propagation of Jabri et al., arXiv 2006.14613) on
DAVIS 2017: each patch takes the labels of its nearest patches in the first frame and the last few.

    N  patches of a frame     R  earlier frames     D  width     O  objects, and the background
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config import registry
from dinokit.config.registry import check_at_least, source_field
from dinokit.data.dense_transforms import to_tensors
from dinokit.data.videos import Video
from dinokit.eval._dense import DenseBackbone, labels_of_nearest
from dinokit.eval._images import partial_result
from dinokit.eval._metrics import contour, region
from dinokit.features import frozen, last_blocks
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch

MULTIPLE = 64  # pixels: the longer side is rounded down to a multiple of it, where the patch divides it


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.videos", "test", labels=False)
    size: int = 480  # pixels of the shorter side
    frames: int = 7  # earlier frames that labels come from, besides the first
    radius: int = 12  # patches: largest distance that a label propagates over; 0: any
    k: int = 5  # patches that a patch takes its labels from
    temp: float = 0.1  # a patch weighs exp(cosine / temp)
    out: str = ""  # folder for the scores of finished videos, from which a stopped run resumes
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training

    def __post_init__(self) -> None:
        check_at_least(self, size=1, frames=0, radius=0, k=1)
        if self.temp <= 0:
            raise ValueError(f"temp={self.temp}, but it must be above 0.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Propagate the labels, and evaluate every frame but the first and the last.

    Returns:
        'J&F mean', 'J mean' (region) and 'F mean' (outline), over objects, each the mean over its frames;
        'videos', 'objects'.

    Raises:
        ValueError: if there are no such videos, or the backbone has no patches.
    """
    if not cfg.test:
        raise ValueError(f"test.name must be given; there is: {', '.join(registry.names('data.videos'))}.")
    dense = DenseBackbone(backbone, last_blocks(backbone, 1), cfg.precision)
    videos: list[Video] = registry.build("data.videos", cfg.test)
    partial = partial_result(cfg, "video", backbone, cfg.test)
    finished = {name: scores for piece in partial.load_pieces() for name, scores in piece.items()}
    sums = torch.zeros(3, dtype=torch.float64)
    share = videos[rank() :: world_size()]
    with frozen(backbone), torch.no_grad():
        for video in watch(share, len(share), "videos"):
            scores = finished.get(video.name)
            if scores is None:
                scores = _video_scores(cfg, dense, video)
                partial.append({video.name: scores})
            sums += torch.tensor([[j, f, 1.0] for j, f in scores], dtype=torch.float64).sum(dim=0)
    j, f, objects = all_reduce_sum(sums).tolist()
    if not objects:
        raise ValueError("The first frames of the videos show no object.")
    partial.remove()
    j, f = j / objects, f / objects
    return {"J&F mean": (j + f) / 2, "J mean": j, "F mean": f, "videos": len(videos), "objects": objects}


def _video_scores(cfg: Config, dense: DenseBackbone, video: Video) -> list[tuple[float, float]]:
    """J and F of each object of a video."""
    first = torch.from_numpy(video.mask(0))
    objects = int(first.max())
    scores = torch.zeros(objects, 2, dtype=torch.float64)
    count = len(video) - 2
    for index, predicted in enumerate(_propagated(cfg, dense, video, first, objects + 1), start=1):
        if index > count:
            break
        truth = torch.from_numpy(video.mask(index))
        for number in range(objects):
            a, b = predicted == number + 1, truth == number + 1
            scores[number] += torch.tensor([region(a, b), contour(a, b)], dtype=torch.float64)
    return [(j, f) for j, f in (scores / count).tolist()]


def _propagated(
    cfg: Config, dense: DenseBackbone, video: Video, first: Tensor, labels: int
) -> Iterator[Tensor]:
    """The labels (H, W) of each frame after the first, one after the other."""
    x, grid = _patches(cfg, dense, video, 0)
    ids = F.interpolate(first[None, None].float(), grid, mode="nearest").long().flatten()
    shares = F.one_hot(ids, labels).float().to(x.device)  # (N, O)
    near = _neighbourhood(grid, cfg.radius, x.device)
    start = (x, shares)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=cfg.frames)
    for index in range(1, len(video)):
        x, _ = _patches(cfg, dense, video, index)
        past = [start, *recent]
        keys, labels_before = torch.cat([f for f, _ in past]), torch.cat([s for _, s in past])
        shares = labels_of_nearest(x, keys, labels_before, cfg.k, cfg.temp, near)
        recent.append((x, shares))
        yield _to_labels(shares, grid, dense.backbone.patch, first.shape)


def _patches(cfg: Config, dense: DenseBackbone, video: Video, index: int) -> tuple[Tensor, tuple[int, int]]:
    """Features (N, D) on the unit sphere, and the grid."""
    image = to_tensors(video.frame(index, dense.backbone.channels), np.zeros((1, 1)))[0]
    patch = dense.backbone.patch
    step = MULTIPLE if MULTIPLE % patch == 0 and cfg.size % patch == 0 else patch
    short = min(image.shape[1:])
    height, width = (
        cfg.size // patch * patch if side == short else max(step, cfg.size * side // short // step * step)
        for side in image.shape[1:]
    )
    small = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    maps = dense(small)[0].patches
    return F.normalize(maps[0].flatten(1).T, dim=1), (maps.shape[2], maps.shape[3])


def _neighbourhood(grid: tuple[int, int], radius: int, device: torch.device) -> Tensor | None:
    """(N, N) bool: patches no further apart than `radius` down and across."""
    if not radius:
        return None
    down, across = (
        (torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)).abs() <= radius
        for n in grid
    )
    return (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)


def _to_labels(shares: Tensor, grid: tuple[int, int], patch: int, size: tuple[int, ...]) -> Tensor:
    """Shares (N, O) of the patches as labels (H, W) of the frame's pixels, on the CPU.

    Each label's map is scaled to [0, 1] first, so that a small object does not disappear beside a large one.
    """
    maps = shares.T.unflatten(1, grid)[None]
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
    maps = torch.where(high > 0, (maps - low) / (high - low).clamp_min(1e-12), maps)
    ids = maps.argmax(dim=0)[None, None].float()
    return F.interpolate(ids, (size[0], size[1]), mode="nearest")[0, 0].byte().cpu()
