"""LeJEPA: the crops of an image have one projection, and those of all images are an isotropic Gaussian.

Balestriero and LeCun 2025 (arXiv 2511.08544). It needs no teacher, no prototypes and no negatives; SIGReg
(losses/sigreg.py) is what keeps the projections from being all the same. It takes the place of
losses/contrastive.py.

    S  crops: global ones first, then local    G  global crops    B  images    P  width of the projection
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from dinokit.config.registry import check_at_least
from dinokit.losses import Views
from dinokit.losses.sigreg import random_directions, sigreg


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset({"projection"})
    least_images: ClassVar[int] = 2
    weight: float = 1.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    spread: float = 0.05  # lambda, the weight of SIGReg; that of the invariance is 1 - lambda
    directions: int = 256  # of SIGReg, new ones in each step
    distributed: bool = False  # SIGReg of the images of all processes; else of those of this one

    def __post_init__(self) -> None:
        check_at_least(self, directions=1)
        if not 0 <= self.spread <= 1:
            raise ValueError(f"losses.lejepa.spread={self.spread:g}: it must be from 0 to 1, such as 0.05.")


def invariance(z: Tensor, global_crops: int) -> Tensor:
    """Mean squared difference of the projections of crops from the mean of the image's global ones. ().

    Args:
        z: (S, B, P).
        global_crops: G, the first of the S.
    """
    return (z - z[:global_crops].mean(dim=0)).square().mean()


class LeJEPALoss(nn.Module):
    """invariance() and sigreg() of the student's projections; SIGReg sees each crop apart."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.spread = cfg.weight, cfg.spread
        self.directions, self.distributed = cfg.directions, cfg.distributed

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        z = views.student_projection.float()
        directions = random_directions(z.shape[-1], self.directions, views.seed, z.device)
        spread = sigreg(z, directions, self.distributed)
        return (1 - self.spread) * invariance(z, len(views.student_feature)) + self.spread * spread


build = LeJEPALoss
