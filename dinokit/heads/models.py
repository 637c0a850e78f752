"""A backbone with a depth or segmentation head as one model. The backbone has no gradient."""

import torch
from torch import Tensor, nn

from dinokit.features import dense
from dinokit.heads.dpt import DPT
from dinokit.heads.linear import LinearDepth, LinearSegmenter, to_size
from dinokit.models import Backbone


class Depther(nn.Module):
    """Images (b, 3, H, W), float32 in [0, 1] or uint8 -> depth (b, 1, H, W), metres in the head's range."""

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
