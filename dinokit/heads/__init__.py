"""Heads on frozen features, for segmentation and depth, alone or with their backbone as one model.

The linear heads of DINOv2 (arXiv 2304.07193, section 7.4), and DPT (Ranftl et al., arXiv 2103.13413) as it
uses it: convolutions only, no batch norm. Their parameter names are those of the released heads, so the
released files load with strict=True.

L  blocks used     C  classes     D  width of the backbone     h, w  patches down and across
F  channels of the fusion, 256
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.features import Map, dense
from dinokit.models import Backbone

UPSAMPLE = 4  # of the depth logits
BIN_FLOOR = 0.1  # added to every rectified depth logit, so that no bin has weight 0
FEATURES = 256  # F


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


class Conv(nn.Module):
    """A convolution, as child `conv`, that keeps the size; initialised for a ReLU after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        return self.conv(x)


class Residual(nn.Module):
    """x plus two 3 x 3 convolutions of it, each after a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(width, width, 3, bias=False), Conv(width, width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, F, h, w) -> the same."""
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """Adds a map of the backbone to the fused deeper maps, and doubles the size."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.project = Conv(width, width, 1)
        self.res_conv_unit1 = None if first else Residual(width)  # the first adds no map
        self.res_conv_unit2 = Residual(width)

    def forward(self, x: Tensor, side: Tensor | None) -> Tensor:
        """Fused maps (b, F, h, w), and a map (b, F, h', w') or none -> (b, F, 2 h, 2 w)."""
        if self.res_conv_unit1 is not None and side is not None:
            if side.shape != x.shape:
                side = F.interpolate(side, x.shape[2:], mode="bilinear", align_corners=False)
            x = x + self.res_conv_unit1(side)
        x = self.res_conv_unit2(x)
        # The two commute; the 1 x 1 convolution costs a quarter before the resizing.
        return F.interpolate(self.project(x), scale_factor=2, mode="bilinear", align_corners=True)


class Reassemble(nn.Module):
    """Four maps of the backbone, with the class token mixed in, at 4, 2, 1 and 1/2 times the patch grid."""

    def __init__(self, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.projects = nn.ModuleList(Conv(width, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in channels
        )

    def forward(self, maps: Sequence[Map]) -> list[Tensor]:
        """Four maps -> (b, D / 8, 4 h, 4 w), (b, D / 4, 2 h, 2 w), (b, D / 2, h, w), (b, D, h / 2, w / 2)."""
        outputs = []
        for m, readout, project, resize in zip(
            maps, self.readout_projects, self.projects, self.resize_layers, strict=True
        ):
            x = readout(m.with_cls().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            outputs.append(resize(project(x)))
        return outputs


class Regressor(nn.Module):
    """Three convolutions and one upsampling: one number for each pixel, at twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(width // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, F, h, w) -> (b, 1, 2 h, 2 w)."""
        return self.head(x)


class DPT(nn.Module):
    """Depth from four blocks.

    Args:
        width: D, 8 or more; divided by 8, 4 and 2, and rounded down, as in DINOv2's code.
        min_depth: metres: added to the rectified output, so the smallest depth that it can give.
        max_depth: metres: the caller clamps the depth to it.
        features: F.
    """

    def __init__(self, width: int, min_depth: float, max_depth: float, features: int = FEATURES) -> None:
        super().__init__()
        if width < 8:
            raise ValueError(f"DPT needs a backbone whose width is 8 or more, and this one's is {width}.")
        self.min_depth, self.max_depth = min_depth, max_depth
        channels = [width // 8, width // 4, width // 2, width]
        self.reassemble_blocks = Reassemble(width, channels)
        self.convs = nn.ModuleList(Conv(c, features, 3, bias=False) for c in channels)
        self.fusion_blocks = nn.ModuleList(Fusion(features, first=i == 0) for i in range(4))
        self.project = Conv(features, features, 3)
        self.conv_depth = Regressor(features)

    def forward(self, maps: Sequence[Map]) -> Tensor:
        """Four maps, the deepest last -> depth (b, 1, 16 h, 16 w) in metres, for even h and w.

        With odd h or w it is one patch larger: half of the deepest map is rounded up.
        """
        sides = [conv(x) for conv, x in zip(self.convs, self.reassemble_blocks(maps), strict=True)]
        x, first = sides[-1], True
        for fuse, side in zip(self.fusion_blocks, reversed(sides), strict=True):
            x = fuse(x, None if first else side)
            first = False
        return self.conv_depth(self.project(x).relu()).relu() + self.min_depth


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
