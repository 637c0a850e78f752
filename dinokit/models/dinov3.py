"""The Vision Transformers of DINOv3 (Siméoni et al. 2025, arXiv 2508.10104), with rotary positions.

Written from the paper and from facts about the released files. Parameter names are those of these files, so
they load with strict=True.

    b  images of a group      h, w  patches down and across      N  h * w      R  registers      D  width
    H  heads of attention      d  D / H      G, L  the groups of global and of local crops
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinokit.models import Backbone, Input, Tokens, check_blocks
from dinokit.models.attention import PackedBatch
from dinokit.models.block import Block
from dinokit.models.vit import PatchEmbed, embed_patches, pack, split_tokens

# The released models: their differences from Config.
SIZES: dict[str, dict[str, Any]] = {
    "vits16": {"width": 384, "depth": 12, "heads": 6},
    "vits16plus": {"width": 384, "depth": 12, "heads": 6, "ffn": "swiglu", "hidden": 1536},
    "vitb16": {"width": 768, "depth": 12, "heads": 12},
    "vitl16": {"width": 1024, "depth": 24, "heads": 16},
    "vitl16plus": {"width": 1024, "depth": 24, "heads": 16, "ffn": "swiglu", "hidden": 4096},
    "vith16plus": {"width": 1280, "depth": 32, "heads": 20, "ffn": "swiglu", "hidden": 5120},
    "vit7b16": {
        "width": 4096, "depth": 40, "heads": 32, "ffn": "swiglu", "hidden": 8192, "qkv_bias": "none",
        "untied_local_norm": True,
    },
}  # fmt: skip


@dataclass
class Config:
    channels: int = 3
    size: int = 256  # pixels: the side of the images that it is shown; it takes any multiple of the patch
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16  # pixels
    ffn: Literal["mlp", "swiglu"] = "mlp"
    hidden: int = 0  # channels inside the feed-forward net; 0: 4 * width, and for swiglu swiglu_hidden()
    layer_scale: float = 1e-5  # at the start; 0: none
    drop_path: float = 0.0  # share of images that a residual branch leaves out, in every block
    registers: int = 4  # extra tokens, called storage tokens in DINOv3
    mask_token: bool = True
    qkv_bias: Literal["all", "no_keys", "none"] = "no_keys"  # DINOv3-7B: none
    norm_eps: float = 1e-5
    untied_cls_norm: bool = False  # a final norm for class token and registers, another for patches
    untied_local_norm: bool = False  # in training, another final norm for these tokens of local crops
    rope_base: float = 100.0  # the longest period over the shortest, nearly
    rope_sides: Literal["separate", "max", "min"] = "separate"  # of the grid: 1 is half of its own side, ...
    # Noise of the coordinates in training. The released models were trained with rescale=2 alone.
    rope_shift: float = 0.0  # adds a number in [-shift, shift] to an axis
    rope_jitter: float = 1.0  # multiplies an axis by a number in [1 / jitter, jitter]
    rope_rescale: float = 2.0  # multiplies both axes by one number in [1 / rescale, rescale]
    rope_noise: Literal["block", "forward"] = "block"  # drawn anew for each block, or once a forward pass

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"backbone.width={self.width} over backbone.heads={self.heads} must be a multiple of 4: "
                "rotary positions need a quarter of a head's channels for rows and columns each."
            )
        for key in ("rope_jitter", "rope_rescale"):
            if getattr(self, key) < 1:
                raise ValueError(f"backbone.{key}={getattr(self, key)} must be 1 (no noise) or more.")


def swiglu_hidden(ratio: float, width: int, multiple: int = 8) -> int:
    """Channels inside a SwiGLU: two thirds of ratio * width, rounded up to a multiple."""
    return -(-int(int(ratio * width) * 2 / 3) // multiple) * multiple


class Rope(nn.Module):
    """Angles of rotary positions on an axis-parallel grid, in coordinates of the image.

    A patch's centre has coordinates in (-1, 1), whatever the resolution. Quarters of a head's channels turn
    with the row and with the column, at periods of base ** (4 k / d), k = 0 ... d / 4 - 1.
    """

    periods: Tensor  # (d / 4,) float32: saved, as in the released files

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.sides = cfg.rope_sides
        self.shift, self.jitter, self.rescale = cfg.rope_shift, cfg.rope_jitter, cfg.rope_rescale
        self.register_buffer("periods", periods(cfg.width // cfg.heads, cfg.rope_base))

    def coordinates(self, height: int, width: int) -> Tensor:
        """Row and column of each patch's centre, without noise: (N, 2), row by row."""
        by_row, by_column = {
            "separate": (height, width),
            "max": (max(height, width),) * 2,
            "min": (min(height, width),) * 2,
        }[self.sides]
        options: Any = {"device": self.periods.device, "dtype": self.dtype}
        rows = (torch.arange(height, **options) + 0.5) / by_row
        columns = (torch.arange(width, **options) + 0.5) / by_column
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        return 2 * grid.flatten(0, 1) - 1

    def add_noise(self, coordinates: Tensor) -> Tensor:
        """Shift, jitter and rescale coordinates (N, 2), all patches by the same numbers."""
        device = coordinates.device
        if self.shift:
            coordinates = coordinates + self.shift * (2 * torch.rand(2, device=device) - 1)
        if self.jitter > 1:
            coordinates = coordinates * (log(self.jitter) * (2 * torch.rand(2, device=device) - 1)).exp()
        if self.rescale > 1:
            coordinates = coordinates * (log(self.rescale) * (2 * torch.rand(1, device=device) - 1)).exp()
        return coordinates

    def table(self, coordinates: Tensor, prefix: int) -> Tensor:
        """Cosine and sine of the angles of `prefix` tokens that do not turn, and of N patches.

        Returns:
            (2, prefix + N, d), float32 or float64: [d / 4 of rows, d / 4 of columns] twice.
        """
        angles = 2 * pi * coordinates[:, :, None] / self.periods.to(self.dtype)  # (N, 2, d / 4)
        angles = angles.flatten(1).repeat(1, 2)
        angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])
        return torch.stack([angles.cos(), angles.sin()])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the angles: that of the periods, but never half precision."""
        return torch.promote_types(self.periods.dtype, torch.float32)

    @property
    def noisy(self) -> bool:
        """Whether coordinates get noise now."""
        return self.training and (self.shift > 0 or self.jitter > 1 or self.rescale > 1)


def periods(head_width: int, base: float) -> Tensor:
    """The periods of rotary positions, (d / 4,) float32."""
    exponents = torch.arange(head_width // 4, dtype=torch.float64) * 4 / head_width
    return (base**exponents).float()


class DINOv3(Backbone):
    """A ViT with a class token, registers, a mask token, and rotary positions of the patches."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.width, self.patch, self.channels, self.heads = cfg.width, cfg.patch, cfg.channels, cfg.heads
        self.config, self.registers, self.noise = cfg, cfg.registers, cfg.rope_noise
        self.input = Input(cfg.size, (0.5,) * cfg.channels, (0.5,) * cfg.channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        if cfg.registers:
            self.storage_tokens = nn.Parameter(torch.zeros(1, cfg.registers, cfg.width))
        if cfg.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, cfg.width))
        self.patch_embed = PatchEmbed(cfg.channels, cfg.width, cfg.patch)
        self.rope_embed = Rope(cfg)
        ffn: Literal["mlp", "split_swiglu"] = "mlp" if cfg.ffn == "mlp" else "split_swiglu"
        hidden = cfg.hidden or (4 * cfg.width if cfg.ffn == "mlp" else swiglu_hidden(4, cfg.width))
        self.blocks = nn.ModuleList(
            Block(
                cfg.width, cfg.heads, ffn, cfg.layer_scale, cfg.drop_path, hidden, cfg.qkv_bias, cfg.norm_eps
            )
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        if cfg.untied_cls_norm:
            self.cls_norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        if cfg.untied_local_norm:
            self.local_cls_norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        if self.registers:
            nn.init.normal_(self.storage_tokens, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """As Backbone: groups of crops of different sizes in one pass without padding.

        Raises:
            ValueError: if a side is no multiple of the patch, or a mask is given and there is no mask token.
        """
        rows, batch = self.forward_blocks(crops, masks)
        return [self.tokens(x, group) for group, x in enumerate(batch.split(rows))]

    def forward_blocks(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, PackedBatch]:
        """The rows (T, D) after the last block, before the final norm."""
        rows, batch = self.embed(crops, masks)
        for block, rotated in zip(self.blocks, self.rotations(crops, batch), strict=True):
            rows = block(rows, rotated)
        return rows, batch

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """As Backbone."""
        check_blocks(blocks, len(self.blocks))
        rows, batch = self.embed([crops], [None])
        found = []
        last = max(blocks, default=-1)
        for i, rotated in zip(range(last + 1), self.rotations([crops], batch), strict=False):
            rows = self.blocks[i](rows, rotated)
            if i in blocks:
                x = batch.split(rows)[0]
                found.append(self.tokens(x, 0) if norm else split_tokens(x, self.registers))
        return found

    def embed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, PackedBatch]:
        """The input of the first block: the rows (T, D) of all crops, without positions."""
        return pack([self._embed_group(x, mask) for x, mask in zip(crops, masks, strict=True)])

    def rotations(self, crops: Sequence[Tensor], batch: PackedBatch) -> Iterator[PackedBatch]:
        """For each block the batch with rotary positions; their noise is drawn for each group, and block."""
        rope, prefix = self.rope_embed, 1 + self.registers
        clean = [rope.coordinates(x.shape[2] // self.patch, x.shape[3] // self.patch) for x in crops]
        rotated = None
        for _ in self.blocks:
            if rotated is None or (rope.noisy and self.noise == "block"):
                tables = [rope.table(rope.add_noise(c) if rope.noisy else c, prefix) for c in clean]
                rotated = PackedBatch(batch.groups, tuple(tables))
            yield rotated

    def tokens(self, x: Tensor, group: int) -> Tokens:
        """Rows (b, 1 + R + N, D) of a group of crops after the final norms."""
        normed = self.norm(x)
        name = "local_cls_norm" if self.training and group == 1 else "cls_norm"
        norm = getattr(self, name, getattr(self, "cls_norm", None))
        if norm is not None:
            prefix = 1 + self.registers
            normed = torch.cat([norm(x[:, :prefix]), normed[:, prefix:]], dim=1)
        return split_tokens(normed, self.registers)

    def _embed_group(self, x: Tensor, mask: Tensor | None) -> Tensor:
        patches, b = embed_patches(self, x, mask), len(x)
        tokens = [self.cls_token, self.storage_tokens] if self.registers else [self.cls_token]
        return torch.cat([*(token.expand(b, -1, -1) for token in tokens), patches], dim=1)


build = DINOv3
