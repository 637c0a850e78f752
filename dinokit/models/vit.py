"""The Vision Transformers of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).

Parameter names are those of the released files, so these load with strict=True.

    b  images of a group    N  patches an image    R  registers    D  width    M  side of the stored grid
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import Backbone, Input, Tokens, check_blocks
from dinokit.models.attention import PackedBatch
from dinokit.models.block import NORM_EPS, Block

SINCOS_RMS = 0.5  # of positions that start as waves: that of patch embeddings at the start
SIZES = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "giant2": {"width": 1536, "depth": 40, "heads": 24},
}


@dataclass
class Config:
    channels: int = 3
    size: int = 224  # pixels: the image side whose patch grid the positional embedding stores
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16  # pixels
    stem: Literal["linear", "conv"] = "linear"  # conv: ConvStem, for a few thousand images
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layer_scale: float = 1e-5  # at the start; 0: none, as in DINO
    drop_path: float = 0.0  # share of images that a residual branch leaves out
    drop_path_uniform: bool = True  # the same rate in every block; else a line from 0 to drop_path
    registers: int = 0  # extra tokens (Darcet et al., arXiv 2309.16588)
    mask_token: bool = True
    # Weights at the start. reference: a deviation of 0.02, made for width 768; fan_in: 0.7 / sqrt(inputs)
    # in the blocks, for any width.
    init: Literal["reference", "fan_in"] = "reference"
    positions: Literal["random", "sincos"] = "random"  # sincos: waves of rms 0.5, as strong as patches
    pos_offset: float = 0.1  # 0.1 as in the files without registers, 0 as in those with
    pos_antialias: bool = False  # False as in the files without registers, True as in those with


def interpolate_grid(grid: Tensor, height: int, width: int, offset: float, antialias: bool) -> Tensor:
    """A positional grid (1, M, M, D) for another patch grid, (1, height, width, D), bicubic in float32.

    An offset makes the sampling scale (side + offset) / M instead of side / M. DINO used it against a
    rounding error. The released weights without registers were trained with it, so they need it.
    """
    side = grid.shape[1]
    if offset:
        size, scale = None, [(height + offset) / side, (width + offset) / side]
    else:
        size, scale = (height, width), None
    x = grid.float().permute(0, 3, 1, 2)
    x = F.interpolate(x, size=size, scale_factor=scale, mode="bicubic", antialias=antialias)
    assert x.shape[-2:] == (height, width), f"{tuple(x.shape[-2:])} for {(height, width)}"
    return x.permute(0, 2, 3, 1)


def sincos(side: int, width: int) -> Tensor:
    """Waves of row and column at width / 4 frequencies (MoCo v3, arXiv 2104.02057): (side**2, width).

    Raises:
        ValueError: if width is no multiple of four.
    """
    if width % 4:
        raise ValueError(f"backbone.positions=sincos needs a backbone.width that four divides, not {width}.")
    frequency = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    place = torch.arange(side)[:, None] * frequency  # (side, width / 4)
    rows, columns = place[:, None].expand(-1, side, -1), place[None].expand(side, -1, -1)
    waves = [rows.sin(), rows.cos(), columns.sin(), columns.cos()]
    return torch.cat(waves, dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and maps each linearly, row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def maps(self, x: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, D, h / patch, w / patch)."""
        return self.proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, N, D)."""
        return self.maps(x).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Convolutions of 3 x 3 pixels that halve the image down to one place a patch (arXiv 2106.14881).

    Neighbouring patches share pixels, and a few images suffice to learn edges. Where a patch is masked, its
    neighbours still contain some of its pixels.

    Raises:
        ValueError: if the patch is no power of two, or the width cannot be halved so often.
    """

    GROUPS = 8  # of channels that are normalised together, in each image apart: other crops do not matter

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        if patch < 2 or patch != 2**halvings:
            raise ValueError(f"backbone.stem=conv needs a backbone.patch of 2, 4, 8, 16 or 32, not {patch}.")
        least = self.GROUPS * 2 ** (halvings - 1)
        if width % least:
            raise ValueError(
                f"backbone.stem=conv with patch {patch} needs a multiple of {least} as backbone.width, "
                f"not {width}."
            )
        self.layers = nn.Sequential()
        for left in reversed(range(halvings)):
            out = width // 2**left
            self.layers.append(nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False))
            self.layers.append(nn.GroupNorm(self.GROUPS, out))
            self.layers.append(nn.GELU())
            channels = out
        self.layers.append(nn.Conv2d(width, width, 1))

    def maps(self, x: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, D, h / patch, w / patch)."""
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, N, D)."""
        return self.maps(x).flatten(2).transpose(1, 2)


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, PackedBatch]:
    """Groups of images (b, n, D), each with its own b and n, as rows (T, D), and where they are."""
    batch = PackedBatch(tuple((x.shape[0], x.shape[1]) for x in groups))
    return torch.cat([x.flatten(0, 1) for x in groups]), batch


def split_tokens(x: Tensor, registers: int) -> Tokens:
    """Rows (b, 1 + R + N, D) as class token, registers and patches."""
    return Tokens(cls=x[:, 0], registers=x[:, 1 : 1 + registers], patches=x[:, 1 + registers :])


def embed_patches(vit: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """The patches of crops x (b, C, h, w), with the mask token where `mask` (b, N) is true: (b, N, D).

    Raises:
        ValueError: if a side is no multiple of the patch, or a mask is given and there is no mask token.
    """
    height, width = x.shape[2:]
    if height % vit.patch or width % vit.patch:
        near = [max(side // vit.patch, 1) * vit.patch for side in (height, width)]
        raise ValueError(
            f"an image of {height} x {width} pixels cannot be cut into patches of {vit.patch}: make both "
            f"sides a multiple of {vit.patch}, such as {near[0]} x {near[1]}."
        )
    patches: Tensor = vit.patch_embed(x)
    if mask is None:
        return patches
    if not hasattr(vit, "mask_token"):
        raise ValueError("masks need a mask token: set backbone.mask_token=true.")
    return torch.where(mask[..., None], vit.mask_token.to(patches.dtype), patches)


class VisionTransformer(Backbone):
    """A ViT with a class token, optional registers, mask token and LayerScale."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.size % cfg.patch:
            raise ValueError(f"backbone.size={cfg.size} is no multiple of backbone.patch={cfg.patch}.")
        if cfg.width % cfg.heads:
            raise ValueError(f"backbone.width={cfg.width} is no multiple of backbone.heads={cfg.heads}.")
        self.width, self.patch, self.channels, self.heads = cfg.width, cfg.patch, cfg.channels, cfg.heads
        self.offset, self.antialias = cfg.pos_offset, cfg.pos_antialias
        self.side = cfg.size // cfg.patch  # M
        self.input = Input(cfg.size, (0.5,) * cfg.channels, (0.5,) * cfg.channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, cfg.width))
        self.registers = cfg.registers
        if cfg.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, cfg.registers, cfg.width))
        if cfg.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, cfg.width))
        stem = ConvStem if cfg.stem == "conv" else PatchEmbed
        self.patch_embed = stem(cfg.channels, cfg.width, cfg.patch)
        share = [1.0 if cfg.drop_path_uniform else i / max(cfg.depth - 1, 1) for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(
            Block(cfg.width, cfg.heads, cfg.ffn, cfg.layer_scale, cfg.drop_path * s) for s in share
        )
        self.norm = nn.LayerNorm(cfg.width, eps=NORM_EPS)
        self._init_weights(cfg)

    def _init_weights(self, cfg: Config) -> None:
        # DINO initialises the class token like the positions; DINOv2 sets it, and the registers, near zero.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6 if cfg.mask_token else 0.02)
        if self.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                std = 0.02 if cfg.init == "reference" else 0.7 * module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        if cfg.positions == "sincos":
            waves = sincos(self.side, cfg.width)
            with torch.no_grad():
                self.pos_embed[0, 1:] = SINCOS_RMS / waves.square().mean().sqrt() * waves

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """Features of groups of crops of different sizes, in one pass without padding.

        Args:
            crops: (b, C, h, w) for each group, normalised; h and w multiples of the patch.
            masks: for each group (b, N) bool, True where the mask token replaces the patch, or None.

        Returns:
            Tokens for each group.

        Raises:
            ValueError: if a side is no multiple of the patch, or a mask is given and there is no mask token.
        """
        rows, batch = self.embed(crops, masks)
        for block in self.blocks:
            rows = block(rows, batch)
        return [split_tokens(x, self.registers) for x in batch.split(self.norm(rows))]

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor | None]:
        """The output of the official DINOv2 backbones for x (b, C, h, w) and masks (b, N) bool or None."""
        rows, batch = self.embed([x], [masks])
        for block in self.blocks:
            rows = block(rows, batch)
        tokens = split_tokens(batch.split(self.norm(rows))[0], self.registers)
        return {
            "x_norm_clstoken": tokens.cls,
            "x_norm_regtokens": tokens.registers,
            "x_norm_patchtokens": tokens.patches,
            "x_prenorm": batch.split(rows)[0],
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Outputs of some blocks, in the order of depth, as the official models return them.

        Args:
            x: (b, C, h, w).
            n: the last n blocks, or the numbers of the blocks, from 0.
            reshape: patches as (b, D, h / patch, w / patch), else (b, N, D).
            return_class_token: return (patches, class token (b, D)) for each block.
            norm: apply the final norm to each.

        Raises:
            ValueError: if there is no such block.
        """
        depth = len(self.blocks)
        blocks = range(depth - n, depth) if isinstance(n, int) else n
        outs = self.layers(x, blocks, norm)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        patches = [
            o.patches.transpose(1, 2).unflatten(2, grid).contiguous() if reshape else o.patches for o in outs
        ]
        if return_class_token:
            return tuple(zip(patches, (o.cls for o in outs), strict=True))
        return tuple(patches)

    def layers(self, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """As Backbone."""
        check_blocks(blocks, len(self.blocks))
        rows, batch = self.embed([crops], [None])
        tokens = []
        for i, block in enumerate(self.blocks[: max(blocks, default=-1) + 1]):
            rows = block(rows, batch)
            if i in blocks:
                x = batch.split(self.norm(rows) if norm else rows)[0]
                tokens.append(split_tokens(x, self.registers))
        return tokens

    def embed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, PackedBatch]:
        """The input of the first block: the rows (T, D) of all crops, with positions."""
        return pack([self._embed_group(x, mask) for x, mask in zip(crops, masks, strict=True)])

    def _embed_group(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, _, h, w = x.shape
        patches = embed_patches(self, x, mask)
        position = self._positions(h // self.patch, w // self.patch)  # (1, 1 + N, D)
        parts = [(self.cls_token + position[:, :1]).expand(b, -1, -1), patches + position[:, 1:]]
        if self.registers:  # they have no position
            parts.insert(1, self.register_tokens.expand(b, -1, -1))
        return torch.cat(parts, dim=1)  # (b, 1 + R + N, D)

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.side, self.side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side))
        grid = interpolate_grid(grid, height, width, self.offset, self.antialias).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)


build = VisionTransformer
