"""SIGReg: pushes the class features of a batch towards independent standard Gaussians, against collapse.

Balestriero and LeCun 2025 (LeJEPA, arXiv 2511.08544). Features are an isotropic Gaussian if their projections
on all directions are standard Gaussians (Cramér and Wold). Some random directions are tested in each step, by
the statistic of Epps and Pulley (1983): how far the empirical characteristic function of the projections is
from that of a Gaussian. It takes KoLeo's place; losses/lejepa.py trains with it alone, without a teacher.

    B  images      D  width      S  directions      T  knots of the integral
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.config.registry import check_at_least
from dinokit.losses import Views
from dinokit.runtime.distributed import all_gather_rows

KNOTS, END = 17, 3.0  # of the integral over t, which is even: from 0 to END, and doubled


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset()
    least_images: ClassVar[int] = 2
    weight: float = 0.05
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    directions: int = 256  # new ones in each step
    distributed: bool = False  # test the images of all processes together; else those of this one

    def __post_init__(self) -> None:
        check_at_least(self, directions=1)


def sigreg(x: Tensor, directions: Tensor, distributed: bool = False) -> Tensor:
    """The mean statistic of Epps and Pulley over directions, and over sets of rows. Returns ().

    Of projections p it is B * integral of |mean(exp(i t p)) - g(t)|^2 g(t) dt with g(t) = exp(-t^2 / 2), by
    the trapezoidal rule. Standard Gaussians give about 1.06 for any B, rows that are all 0 about 0.41 * B.

    Args:
        x: (..., B, D), each of the sets of B rows apart.
        directions: (D, S) of length 1.
        distributed: B counts the rows of all processes; it must be the same in each. The mean of the losses
            of all processes, and of their gradients, is then that of one process with all rows.
    """
    projections = (x if x.dtype == torch.float64 else x.float()) @ directions.to(x.device)  # (..., B, S)
    t = torch.linspace(0, END, KNOTS, device=x.device, dtype=projections.dtype)
    gaussian = (-t.square() / 2).exp()
    angles = projections[..., None] * t  # (..., B, S, T)
    function = torch.stack([angles.cos().mean(dim=-3), angles.sin().mean(dim=-3)])  # (2, ..., S, T)
    count = x.shape[-2]
    if distributed:
        functions = all_gather_rows(function[None])  # (world, 2, ..., S, T)
        function, count = functions.mean(dim=0), count * len(functions)
    distance = (function[0] - gaussian).square() + function[1].square()
    return 2 * count * torch.trapezoid(distance * gaussian, t, dim=-1).mean()


def random_directions(width: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Directions (width, count), uniform on the sphere: a function of the seed, on any device."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed))
    drawn = F.normalize(drawn, dim=0)
    if device.type == "cuda":
        drawn = drawn.pin_memory()  # copying pageable memory would wait for the GPU
    return drawn.to(device, non_blocking=True)


class SIGRegLoss(nn.Module):
    """sigreg() of the class tokens of each global crop, as the backbone gives them."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.directions, self.distributed = cfg.weight, cfg.directions, cfg.distributed

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        x = views.student_feature
        return sigreg(
            x, random_directions(x.shape[-1], self.directions, views.seed, x.device), self.distributed
        )


build = SIGRegLoss
