"""Heads on frozen features, for segmentation and depth, alone or with their backbone as one model.

The linear heads of DINOv2 (arXiv 2304.07193, section 7.4). Their parameter names are those of its released
heads, so the released files load with strict=True.

L  blocks used     C  classes     D  width of the backbone     h, w  patches down and across
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.features import Map, dense
from dinokit.heads.dpt import DPT
from dinokit.models import Backbone

UPSAMPLE = 4  # of the depth logits
BIN_FLOOR = 0.1  # added to every rectified depth logit, so that no bin has weight 0


class LinearSegmenter(nn.Module):
    """Batch norm and a 1 x 1 convolution: logits of C classes for every patch.

    Args:
        width: of the input: D times the number of concatenated blocks.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv_seg = nn.Conv2d(width, classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, h, w) -> (b, C, h, w)."""
        return self.conv_seg(self.bn(x))


class LinearDepth(nn.Module):
    """Depth as the mean of evenly spaced depths, weighted by rectified logits (AdaBins, arXiv 2011.14141).

    Args:
        width: D.
        layers: L; the input width is 2 L D, because each patch is concatenated with the class token.
        min_depth: metres: the first bin.
        max_depth: metres: the last bin.
        bins: their number.
    """

    def __init__(self, width: int, layers: int, min_depth: float, max_depth: float, bins: int = 256) -> None:
        super().__init__()
        self.min_depth, self.max_depth = min_depth, max_depth
        self.conv_depth = nn.Conv2d(2 * layers * width, bins, kernel_size=1)
        self.register_buffer("centres", torch.linspace(min_depth, max_depth, bins), persistent=False)

    def forward(self, maps: Sequence[Map]) -> Tensor:
        """L maps -> depth (b, 1, 4 h, 4 w) in metres."""
        x = torch.cat([m.with_cls() for m in maps], dim=1)
        # A 1 x 1 convolution and bilinear resizing commute: this order is sixteen times cheaper.
        logits = F.interpolate(
            self.conv_depth(x), scale_factor=UPSAMPLE, mode="bilinear", align_corners=False
        )
        weights = logits.relu() + BIN_FLOOR
        centres: Tensor = self.get_buffer("centres")
        return (weights * centres.view(1, -1, 1, 1)).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def to_size(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits, or depths, (b, C, h, w) at another size, bilinear.

    The grid of a padded image is stretched over the image without the padding, as in the published protocol:
    a scale error of about 1 %, which the released heads were trained and evaluated with.
    """
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


class Depther(nn.Module):
    """A backbone without gradient and its depth head.

    Images (b, 3, H, W), float32 in [0, 1] or uint8 -> depth (b, 1, H, W), metres in the head's range.
    """

    def __init__(self, backbone: Backbone, head: LinearDepth | DPT, blocks: list[int]) -> None:
        super().__init__()
        self.backbone, self.head, self.blocks = backbone, head, blocks
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images -> depth; see the class."""
        maps = dense(self.backbone, images, self.blocks, norm=False)
        depth = self.head(maps).clamp(self.head.min_depth, self.head.max_depth)
        return to_size(depth, images.shape[2], images.shape[3])


class Segmenter(nn.Module):
    """Images (b, 3, H, W), float32 in [0, 1] or uint8 -> logits of C classes (b, C, H, W).

    It runs on the whole image at its own size. The published results use windows and, for heads on four
    blocks, an average over scales, as `dinokit eval segmentation head=FILE` does.
    """

    def __init__(self, backbone: Backbone, head: LinearSegmenter, blocks: list[int]) -> None:
        super().__init__()
        self.backbone, self.head, self.blocks = backbone, head, blocks
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits; see the class."""
        maps = dense(self.backbone, images, self.blocks)
        logits = self.head(torch.cat([m.patches for m in maps], dim=1))
        return to_size(logits, images.shape[2], images.shape[3])
