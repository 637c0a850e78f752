"""Object discovery without training or labels: one box an image, by a cut of the graph of its patches.

TokenCut (arXiv 2202.11539, section 3.2): patches are joined where their cosine is above `threshold`; the
second eigenvector of the normalised cut divides them in two. The object is the connected part that contains
the patch of the largest value in the eigenvector. Features are the patches of the last block; the paper took
the keys of that block. The score is CorLoc as in LOST (arXiv 2109.14279, section 4.1). The normalised cut
of N patches costs N^3: a second for 1,000, a minute for 4,000 on one core.

    N  patches of an image     D  width     h, w  patches down and across     m  objects     H, W  of an image
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, only_if, source_field
from dinokit.data.boxes import Box, box_iou
from dinokit.data.decode import ImageLike
from dinokit.data.objects import ndimage
from dinokit.data.transforms import size_of
from dinokit.eval._dense import DenseBackbone
from dinokit.eval._objects import open_objects
from dinokit.eval._patches import patches_of
from dinokit.features import frozen, last_blocks
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch
from dinokit.segment.prompts import boxes_of

FAR = 1e-5  # weight between patches whose cosine is not above the threshold: the graph stays connected
MOST = 10_000  # patches of an image: their graph takes 2.4 GB
RIGHT = 0.5  # IoU from which a box counts


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.objects", "test", labels=False)
    method: Literal["tokencut", "centre"] = "tokencut"  # centre: the same box in the middle of every image
    threshold: float = only_if(0.2, method=("tokencut",))  # cosine above which two patches are joined
    share: float = only_if(0.7, method=("centre",))  # of each side of the image, for the box
    resize: int = only_if(0, method=("tokencut",))  # pixels of the shorter side; 0: as stored, as published
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training

    def __post_init__(self) -> None:
        check_at_least(self, resize=0, max_test=0)
        if not -1 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold}: it is a cosine, from -1 to below 1.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: it must be above 0, and 1 at most.")


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Find one box in each image that has an object.

    Returns:
        'CorLoc', the share of images whose box has an IoU of 0.5 or more with the box of an object; 'IoU',
        the mean of the largest IoU; 'images_test', how many images; 'images_empty', how many further ones
        have no object, if there are such.

    Raises:
        ValueError, LookupError: if the images do not fit, or none has an object; the message names the key.
    """
    source = open_objects(cfg.test, "test", backbone, cfg.max_test)
    dense = None
    if cfg.method == "tokencut":
        dense = DenseBackbone(backbone, last_blocks(backbone, 1), cfg.precision)
    sums = torch.zeros(4, dtype=torch.float64)  # right boxes, IoU, images with and without an object
    numbers = range(rank(), len(source), world_size())
    with frozen(backbone):
        for index in watch(numbers, len(numbers), "test images"):
            image, objects = source[index]
            masks = [objects.mask(number) for number, rle in enumerate(objects.rles) if rle.area]
            if not masks:
                sums[3] += 1
                continue
            truth: list[Box] = boxes_of(torch.from_numpy(np.stack(masks))).tolist()
            found = centre_box(objects.size, cfg.share) if dense is None else find_box(cfg, dense, image)
            best = max(box_iou(found, box) for box in truth)
            sums += torch.tensor([best >= RIGHT, best, 1, 0], dtype=torch.float64)
    right, total, count, empty = all_reduce_sum(sums).tolist()
    if not count:
        raise ValueError(f"No test image ({(cfg.test or {})['name']}) has an object: there is none to find.")
    scores = {"CorLoc": right / count, "IoU": total / count, "images_test": int(count)}
    return scores | ({"images_empty": int(empty)} if empty else {})


def find_box(cfg: Config, dense: DenseBackbone, image: ImageLike) -> Box:
    """The box of the object that TokenCut finds, in pixels of the image as stored."""
    patches, grid = patches_of(dense, image, cfg.resize)
    if (count := patches[0].numel()) > MOST:
        raise ValueError(
            f"An image of {' x '.join(map(str, size_of(image)))} pixels has {count:,} patches, and the cut "
            f"of their graph is computed for {MOST:,} at most: give resize=N, pixels of the shorter side, "
            f"such as 480."
        )
    mask = foreground(patches, cfg.threshold)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    corners = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]])
    (x0, y0), (x1, y1) = np.clip(grid.to_pixels(corners), 0, size_of(image)).tolist()
    return x0, y0, x1, y1


def foreground(patches: Tensor, threshold: float) -> np.ndarray:
    """The patches of the object, (h, w) bool, from features (D, h, w).

    All patches, if all are joined: there is nothing to divide.
    """
    x = F.normalize(patches.flatten(1).T, dim=1)
    joined = (x @ x.T > threshold).cpu()
    grid = patches.shape[1:]
    if joined.all():
        return np.ones(grid, bool)
    vector = second_eigenvector(torch.where(joined, 1.0, FAR).double())
    seed = int(vector.abs().argmax())
    side = vector > vector.mean()
    if not side[seed]:
        side = ~side
    parts, _ = ndimage().label(side.unflatten(0, grid).numpy())
    return np.asarray(parts == parts.flat[seed])


def second_eigenvector(weights: Tensor) -> Tensor:
    """The v (N,) of (D - W) v = e D v with the second smallest e; W (N, N) float64, D its sums on a diagonal.

    With u = D^(1/2) v these are eigenvectors of the symmetric D^(-1/2) W D^(-1/2), which has 1 - e.
    """
    scale = weights.sum(dim=1).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * weights * scale)  # ascending
    return scale * vectors[:, -2]


def centre_box(size: tuple[int, int], share: float) -> Box:
    """A box in the middle of an image of `size` (H, W), with `share` of each side."""
    (height, width), margin = size, (1 - share) / 2
    return margin * width, margin * height, (1 - margin) * width, (1 - margin) * height
