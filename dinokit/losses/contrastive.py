"""InfoNCE: a crop must find another crop of its own image among the crops of all images of the batch.

van den Oord et al. 2018 (arXiv 1807.03748); SimCLR (arXiv 2002.05709) for projector and temperature. It needs
no teacher and no prototypes, so it learns from few images and small batches, where the targets of DINO are
still noise: alone, or in the first part of a run (`phase`), before DINO and iBOT (docs/training.md).

    S  crops: global ones first, then local    G  global crops    B  images    P  width of the projection
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.losses import Views
from dinokit.losses.dino import pair_weights
from dinokit.runtime.distributed import all_gather_rows, rank


@dataclass
class Config:
    uses: ClassVar[frozenset[str]] = frozenset({"projection"})
    least_images: ClassVar[int] = 2
    weight: float = 1.0
    phase: tuple[float, float] = (0.0, 1.0)  # of the run
    temperature: float = 0.2
    distributed: bool = False  # compare with the images of all processes; else with those of this one


def info_nce(z: Tensor, global_crops: int, temperature: float, distributed: bool = False) -> Tensor:
    """Mean cross-entropy over all pairs of a crop and another, global crop of the same image. Returns ().

    The candidates for crop s and its partner g are the crops g of all images. A crop is never compared with
    itself, nor with other crops of its own image as negatives.

    Args:
        z: (S, B, P) projections, of any length.
        global_crops: G, the first of the S.
        temperature: of the softmax over images, applied to cosines.
        distributed: take the candidates from all processes; B must be the same in each.
    """
    z = F.normalize(z.float(), dim=-1)
    candidates = z[:global_crops].transpose(0, 1)  # (B, G, P)
    if distributed:
        candidates = all_gather_rows(candidates.contiguous())  # (world * B, G, P)
    log_p = (torch.einsum("sbp,cgp->sgbc", z, candidates) / temperature).log_softmax(dim=-1)
    first = rank() * z.shape[1] if distributed else 0  # the candidate where this process's images begin
    own = log_p.diagonal(first, dim1=2, dim2=3).mean(dim=-1)  # (S, G)
    return -(own * pair_weights(len(z), global_crops, z.device)).sum()


class ContrastiveLoss(nn.Module):
    """info_nce() of the student's projections."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight, self.temperature, self.distributed = cfg.weight, cfg.temperature, cfg.distributed

    def forward(self, views: Views) -> Tensor:
        """The loss of a batch, ()."""
        return info_nce(
            views.student_projection, len(views.student_feature), self.temperature, self.distributed
        )


build = ContrastiveLoss
