"""The layers of a transformer block besides attention: LayerScale, stochastic depth, feed-forward nets.

T  rows: the tokens of all images      D  width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models.attention import PackedBatch


class LayerScale(nn.Module):
    """A gain for each channel, near zero at the start (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, a residual branch is dropped for some images of each group.

    Of b images, max(int(b * (1 - rate)), 1) keep the branch. It is scaled by b over that number, so that the
    mean over the group stays the same (DINOv2, arXiv 2304.07193, section 5).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    @property
    def active(self) -> bool:
        """Whether any branch is dropped."""
        return self.training and self.rate > 0

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """The branch (T, D) of all images -> (T, D)."""
        return x * self.factors(batch, x.device) if self.active else x

    def draw(self, batch: PackedBatch, device: torch.device) -> list[Tensor]:
        """For each group, the images that keep the branch."""
        return [
            torch.rand(images, device=device).argsort()[: max(int(images * (1 - self.rate)), 1)]
            for images, _ in batch.groups
        ]

    def factors(self, batch: PackedBatch, device: torch.device) -> Tensor:
        """What the branch of each row is multiplied by: 0 or the scale, (T, 1)."""
        factors = []
        for (images, tokens), chosen in zip(batch.groups, self.draw(batch, device), strict=True):
            factor = torch.zeros(images, device=device).index_fill_(0, chosen, images / len(chosen))
            factors.append(factor.repeat_interleave(tokens, output_size=images * tokens))
        return torch.cat(factors)[:, None]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the exact GELU; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) with x1, x2 the halves of w12(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8  # two thirds of the MLP's, rounded up to 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)
