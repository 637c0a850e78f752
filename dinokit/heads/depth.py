"""The linear depth head of DINOv2 (arXiv 2304.07193, section 7.4): a share for each of 256 depths.

L  blocks looked into     D  width of the backbone     h, w  patches down and across
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.features import Map

UPSAMPLE = 4  # the map of features, before the 1 x 1 layer
FLOOR = 0.1  # added to every rectified logit, so that no depth has a share of 0


class LinearDepth(nn.Module):
    """Depth as the mean of depths evenly spaced over a range, weighted by rectified logits (AdaBins' rule).

    Args:
        width: D.
        layers: L; the input width is 2 L D, as the class token goes beside every patch.
        least: metres: the first of the depths.
        most: metres: the last.
        bins: how many depths.
    """

    def __init__(self, width: int, layers: int, least: float, most: float, bins: int = 256) -> None:
        super().__init__()
        self.least, self.most = least, most
        self.conv_depth = nn.Conv2d(2 * layers * width, bins, kernel_size=1)
        self.register_buffer("centres", torch.linspace(least, most, bins), persistent=False)

    def forward(self, maps: Sequence[Map]) -> Tensor:
        """L maps -> depth (b, 1, 4 h, 4 w) in metres."""
        x = torch.cat([m.with_cls() for m in maps], dim=1)
        # A 1 x 1 layer and a bilinear change of size can change places: this order is sixteen times cheaper.
        logits = F.interpolate(
            self.conv_depth(x), scale_factor=UPSAMPLE, mode="bilinear", align_corners=False
        )
        share = logits.relu() + FLOOR
        centres: Tensor = self.get_buffer("centres")
        return (share * centres.view(1, -1, 1, 1)).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True)
