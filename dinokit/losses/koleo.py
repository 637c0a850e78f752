"""KoLeo: push each class feature away from its nearest neighbour, so that the batch fills the sphere.

Sablayrolles et al. 2019 (arXiv 1806.03198); DINOv2 gives it weight 0.1 (arXiv 2304.07193).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.losses import Views


@dataclass
class Config:
    least_images: ClassVar[int] = 2
    weight: float = 0.1
    eps: float = 1e-8  # added to a distance in [0, 2]: a duplicate costs -log(eps) = 18.4, not infinity


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance from each row of x (B, D) to its nearest other row. Returns ().

    Rows are put on the unit sphere first. B >= 2. The search has no gradient, the distance has.
    """
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(dim=1)  # (B,); -2 is below any cosine
    distance = (x - x[nearest]).norm(dim=-1)  # (B,)
    return -(distance + eps).log().mean()


class KoLeoLoss(nn.Module):
    """koleo() of each global crop."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.eps = cfg.weight, cfg.eps

    def forward(self, views: Views) -> Tensor:
        """()."""
        # One term a global crop, summed: two crops of one image are near on purpose, never compare them.
        return torch.stack([koleo(x, self.eps) for x in views.student_feature]).sum()


build = KoLeoLoss
