"""Coding rate: the class features of a batch fill as large a volume as they can, against collapse.

Yu et al. 2020 (MCR2, arXiv 2006.08558): the rate that codes rows with a mean squared error of eps, which
they write eps^2, is 1/2 logdet(I + D / (B eps) Z'Z). Wu et al. 2025 (SimDINO, arXiv 2502.10385) maximise it
in place of DINO's prototypes, centre and temperatures, on the normalised output of a head. Here it replaces
KoLeo, on class tokens of the backbone. KoLeo depends on the nearest neighbour of a row, the rate on all rows.

    B  images      D  width
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.losses import Views
from dinokit.runtime.distributed import all_gather_rows


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset()
    least_images: ClassVar[int] = 2
    weight: float = 1.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    eps: float = 0.05  # squared error of the code; SimDINO's first version has 0.5
    distributed: bool = False  # the rate of the images of all processes; else of those of this one

    def __post_init__(self) -> None:
        if not 0 < self.eps < inf:
            raise ValueError(f"losses.coding_rate.eps={self.eps:g} must be above 0, such as 0.05.")


def coding_rate(x: Tensor, eps: float) -> Tensor:
    """1/2 logdet(I + D / (B eps) Z'Z) of the rows Z of x on the unit sphere, in nats. Returns ().

    From the smaller of Z'Z and ZZ', which have the same determinant here. B equal rows have
    1/2 log(1 + D / eps); the largest rate, of B >= D rows that are the same in all directions, is
    D/2 log(1 + 1 / eps).

    Args:
        x: (B, D).
        eps: squared error, above 0.
    """
    z = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    count, width = z.shape
    products = z.T @ z if width < count else z @ z.T
    identity = torch.eye(len(products), device=z.device, dtype=z.dtype)
    factor = torch.linalg.cholesky_ex(identity + width / (count * eps) * products).L  # does not wait
    return factor.diagonal().log().sum()


class CodingRateLoss(nn.Module):
    """Minus coding_rate() of a global crop, times (D + B) / (D B) as in SimDINO; the mean over crops."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.eps, self.distributed = cfg.weight, cfg.eps, cfg.distributed

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        crops = views.student_feature  # (G, B, D)
        if self.distributed:
            crops = all_gather_rows(crops.transpose(0, 1).contiguous()).transpose(0, 1)  # (G, world * B, D)
        count, width = crops.shape[1:]
        rates = torch.stack([coding_rate(x, self.eps) for x in crops])
        return -(width + count) / (width * count) * rates.mean()


build = CodingRateLoss
