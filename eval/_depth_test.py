"""What the depth evaluator does without a head: the frame of an image, the mean depth, and the test.

H, W  of an image
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import BORDERS, resize_image, resize_map, shorter_side_to
from dinokit.data.loader import dense_loader
from dinokit.data.transforms import to_uint8
from dinokit.eval._depth_scores import errors
from dinokit.heads.linear import to_size
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch


@dataclass(frozen=True)
class DepthTest:
    """How the depth of a test image is asked for, and judged."""

    least: float  # metres: what lies outside of this range is not judged
    most: float
    border: str  # cut off image and truth, a key of BORDERS
    judged: str  # the part that is judged, a key of CROPS
    resize: int  # pixels of the shorter side; 0: as stored
    size: tuple[int, int]  # in place of it, height and width; zeros: none
    flip: bool  # average over the mirror image
    workers: int


def framed(image: Tensor, depth: Tensor, border: str, resize: int) -> tuple[Tensor, Tensor]:
    """An image (C, H, W) and its depth (H, W) without the border, the shorter side `resize` unless 0."""
    top, bottom, left, right = BORDERS[border](*depth.shape)
    image, depth = image[:, top:bottom, left:right], depth[top:bottom, left:right]
    if not resize:
        return image, depth
    size = shorter_side_to(image, resize)
    return to_uint8(resize_image(image.float() / 255, *size)), resize_map(depth, *size)


def mean_judge(cfg: DepthTest, train: DenseSource, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Says of every pixel the mean depth of all training pixels.

    Raises:
        ValueError: if there is no reading.
    """
    total = count = 0.0
    for pair in watch(dense_loader(train, range(len(train)), cfg.workers), len(train), "training maps"):
        seen = pair.target[(pair.target > cfg.least) & (pair.target < cfg.most)]
        total, count = total + seen.double().sum().item(), count + len(seen)
    if not count:
        raise ValueError(f"No training image has a reading between {cfg.least} and {cfg.most} m.")
    return lambda image: torch.full(image.shape[1:], total / count, device=device)


@torch.no_grad()
def judge_depth(
    cfg: DepthTest, judge: Callable[[Tensor], Tensor], test: DenseSource, device: torch.device
) -> dict[str, float]:
    """Means over the test images of each one's errors; `judge` gives of an image (C, H, W) its depth (H, W).

    Raises:
        ValueError: if no image has a reading where it is judged.
    """
    sums: dict[str, float] = {}
    seen = bare = 0
    share = range(rank(), len(test), world_size())
    for pair in watch(dense_loader(test, share, cfg.workers), len(share), "test images"):
        image, truth = framed(pair.image, pair.target, cfg.border, 0)
        image = image.float() / 255
        if any(cfg.size) or cfg.resize:
            image = resize_image(image, *(cfg.size if any(cfg.size) else shorter_side_to(image, cfg.resize)))
        given = judge(image)
        if cfg.flip:
            given = (given + judge(image.flip(-1)).flip(-1)) / 2
        given = to_size(given[None, None], *truth.shape)[0, 0]
        found = errors(given, truth.to(device), cfg.least, cfg.most, cfg.judged)
        if found is None:
            bare += 1
            continue
        seen += 1
        sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
    return _means(cfg, sums, seen, bare)


def _means(cfg: DepthTest, sums: dict[str, float], seen: int, bare: int) -> dict[str, float]:
    """Over the images of all processes."""
    names = ["rmse", "abs_rel", "log_10", "a1", "a2", "a3", "rmse_log", "sq_rel", "silog"]
    numbers = all_reduce_sum(torch.tensor([*(sums.get(name, 0.0) for name in names), seen, bare]).double())
    *totals, judged, without = numbers.tolist()
    if not judged:
        raise ValueError(
            f"None of the {without:.0f} test images has a reading between min_depth={cfg.least} and "
            f"max_depth={cfg.most} m where it is judged: look at test.depth_scale and max_depth."
        )
    done = {name: total / judged for name, total in zip(names, totals, strict=True)}
    rest = {"images_without_depth": without} if without else {}
    return {**done, "images_test": judged + without, **rest}
