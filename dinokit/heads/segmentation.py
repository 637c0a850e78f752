"""The linear segmentation head of DINOv2 (arXiv 2304.07193, section 7.4): batch norm and one 1 x 1 layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class LinearSegmenter(nn.Module):
    """Logits of C classes for every patch.

    Args:
        width: of its input: that of the backbone times the number of blocks, concatenated.
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


def to_size(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits, or depths, (b, C, h, w) at another size, bilinear.

    The grid of a padded image is stretched over the image without the padding, as in the published protocol:
    an error of scale of about a hundredth, which the released heads were trained and judged with.
    """
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
