"""KoLeo: pushes each class feature away from its nearest neighbour, so that the features of a batch spread.

Sablayrolles et al. 2019 (arXiv 1806.03198); DINOv2 gives it weight 0.1 (arXiv 2304.07193).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.losses import Views
from dinokit.runtime.distributed import all_gather_rows, rank


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset()
    least_images: ClassVar[int] = 2
    weight: float = 0.1
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    distributed: bool = False  # search the images of all processes; else, as in DINOv2, of this one
    # With `distributed`: images of a search set, those of neighbouring processes; 0: all. DINOv3 keeps the
    # size of the set when processes have fewer images: 16 in its last stage (arXiv 2508.10104).
    group: int = 0
    eps: float = 1e-8  # added to a distance in [0, 2]: a duplicate costs -log(eps) = 18.4, not infinity

    def __post_init__(self) -> None:
        if self.group and not self.distributed:
            raise ValueError(f"losses.koleo.group={self.group} needs losses.koleo.distributed=true.")


def koleo(x: Tensor, eps: float = 1e-8, distributed: bool = False, group: int = 0) -> Tensor:
    """Minus the mean log distance from each row of x (B, D) to its nearest other row. Returns ().

    Rows are put on the unit sphere first. The search has no gradient, the distance has.

    Args:
        x: B >= 2, or any B if there are other processes and `distributed`.
        eps: added to a distance.
        distributed: search among the rows of all processes; B must be the same in each. The mean of the
            losses of all processes, and of their gradients, is then that of one process with all rows.
        group: with `distributed`, consecutive rows of all processes that are searched together; 0: all.

    Raises:
        ValueError: if `group` is no multiple of B, or does not divide the rows of all processes.
    """
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    bank = all_gather_rows(x) if distributed else x  # (world * B, D)
    first = rank() * len(x) if distributed else 0  # the row of the bank where this process's rows begin
    if distributed and group:
        if group % len(x) or len(bank) % group:
            raise ValueError(
                f"losses.koleo.group={group} must be a multiple of the {len(x)} images that a process has at "
                f"a time, and divide the {len(bank)} of all."
            )
        bank, first = bank[first // group * group :][:group], first % group
    with torch.no_grad():
        dots = x @ bank.T  # cosines
        dots.diagonal(first).fill_(-torch.inf)  # a row is not its own neighbour
        nearest = dots.argmax(dim=1)  # (B,)
    distance = (x - bank[nearest]).norm(dim=-1)  # (B,)
    return -(distance + eps).log().mean()


class KoLeoLoss(nn.Module):
    """koleo() of each global crop."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.eps = cfg.weight, cfg.eps
        self.distributed, self.group = cfg.distributed, cfg.group

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        # One term for each global crop: two crops of one image should be close, so they are not compared.
        return torch.stack(
            [koleo(x, self.eps, self.distributed, self.group) for x in views.student_feature]
        ).sum()


build = KoLeoLoss
