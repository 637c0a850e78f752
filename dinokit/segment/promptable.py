"""A promptable head: masks of the objects that prompts point at, from the frozen features of any backbone.

The decoder of SAM (arXiv 2304.02643): with the published sizes and without `detail` it is that network, and a
test compares the two. What differs by default: the decoder is small, an image's pixels enter through a stem
(SAM 2, arXiv 2408.00714, adds finer features for the same reason: cells of a patch have lost the outlines),
and the single answer is the one to use from the first prompt on.

    B  images     M  prompts     D  width of the backbone     h, w  patches down and across     c  width here
    A  answers for a prompt     T  tokens of a prompt     N  cells of the image, h * w
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.segment.prompts import UP, Prompt, PromptEncoder, channel_norm, pixel_stem
from dinokit.segment.recipe import Head


@dataclass
class Embedded:
    """Images as the decoder sees them, computed once for all prompts."""

    cells: Tensor  # (B, c, h, w)
    detail: Tensor | None  # (B, c / 8, 4 h, 4 w)
    side: int  # pixels of the canvas


@dataclass
class Answer:
    """Masks of M prompts: the single one, then `answers` others."""

    logits: Tensor  # (M, 1 + A, 4 h, 4 w); above 0 is object
    quality: Tensor  # (M, 1 + A): the IoU that the head expects of each
    tokens: Tensor | None = None  # (M, 1 + A, c): what the masks are made from
    words: Tensor | None = None  # (M, V) logits: the names of the single answer; of a unified head


class Perceptron(nn.Sequential):
    """Three layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, outputs),
        )  # fmt: skip


# The two-way transformer: tokens of a prompt and cells of its image attend to each other in turn. Prompts are
# a flat list, and a token may be padding, which nothing attends to.


class Attention(nn.Module):
    """Multi-head attention with queries, keys and values of their own, at a width of `inner`."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, used: Tensor | None = None) -> Tensor:
        """(M, Q, c), (M, K, c), (M, K, c) -> (M, Q, c); keys where `used` (M, K) is False do not count."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        mask = None if used is None else used[:, None, None, :]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image to the tokens."""

    def __init__(self, width: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.first = first  # its self-attention has neither positions nor a residual, as published
        self.self_attn = Attention(width, width, heads)
        self.token_to_image = Attention(width, width // 2, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.image_to_token = Attention(width, width // 2, heads)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))

    def forward(
        self, x: Tensor, image: Tensor, start: Tensor, places: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: (M, T, c), tokens.
            image: (M, N, c), cells.
            start: (M, T, c), the tokens before the first block, which stand for their positions.
            places: (N, c), positions of the cells.
            used: (M, T) bool, False for padding.
        """
        if self.first:
            x = self.norm1(self.self_attn(x, x, x, used))
        else:
            x = self.norm1(x + self.self_attn(x + start, x + start, x, used))
        x = self.norm2(x + self.token_to_image(x + start, image + places, image))
        x = self.norm3(x + self.mlp(x))
        image = self.norm4(image + self.image_to_token(image + places, x + start, x, used))
        return x, image


class TwoWayTransformer(nn.Module):
    """Blocks, and a last look of the tokens at the image."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoWayBlock(width, heads, hidden, i == 0) for i in range(depth))
        self.final = Attention(width, width // 2, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, places: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (M, T, c) and cells (M, N, c) -> the same; arguments as TwoWayBlock."""
        x = tokens
        for block in self.blocks:
            x, image = block(x, image, tokens, places, used)
        return self.norm(x + self.final(x + tokens, image + places, image)), image


class PromptableHead(nn.Module):
    """Features of images and prompts -> masks.

    Args:
        features: D.
        config: sizes.
        channels: of the images.
    """

    def __init__(self, features: int, config: Head, channels: int = 3) -> None:
        super().__init__()
        if config.width % 64 or config.width % config.heads or config.width // 2 % config.heads:
            raise ValueError(
                f"head.width={config.width}: it is a multiple of 64, and half of it one of "
                f"head.heads={config.heads}."
            )
        c, masks = config.width, config.answers + 1
        self.config, self.features = config, features
        self.neck = nn.Sequential(
            nn.Conv2d(features, c, 1, bias=False), channel_norm(c),
            nn.Conv2d(c, c, 3, padding=1, bias=False), channel_norm(c),
        )  # fmt: skip
        self.prompts = PromptEncoder(c)
        self.quality_token, self.mask_tokens = (nn.Parameter(torch.randn(n, c)) for n in (1, masks))
        self.transformer = TwoWayTransformer(c, config.depth, config.heads, config.hidden)
        self.up1 = nn.ConvTranspose2d(c, c // 4, 2, stride=2)
        self.up_norm = channel_norm(c // 4)
        self.up2 = nn.ConvTranspose2d(c // 4, c // 8, 2, stride=2)
        self.kernels = nn.ModuleList(Perceptron(c, c, c // 8) for _ in range(masks))
        self.quality = Perceptron(c, c, masks)
        self.stem = pixel_stem(channels, c // 8) if config.detail else None

    def embed(self, patches: Tensor, images: Tensor) -> Embedded:
        """Features (B, D, h, w) and the images (B, C, S, S), normalised, that they are of."""
        detail = None
        if self.stem is not None:
            grid = (UP * patches.shape[2], UP * patches.shape[3])
            detail = F.interpolate(self.stem(images), grid, mode="bilinear", align_corners=False)
        return Embedded(self.neck(patches), detail, images.shape[-1])

    def forward(self, embedded: Embedded, prompt: Prompt) -> Answer:
        """The answers to M prompts; each is independent of the others."""
        return self.decode(embedded, prompt, *self.prompts(prompt, embedded.side))

    def decode(
        self, embedded: Embedded, prompt: Prompt, tokens: Tensor, used: Tensor, dense: Tensor | float = 0.0
    ) -> Answer:
        """The answers to M prompts that are encoded.

        Args:
            embedded: their images.
            prompt: of which the images and earlier masks are read.
            tokens: (M, T, c) of the prompts.
            used: (M, T) bool, False for padding.
            dense: (M, c, h, w), added to the cells beside the earlier masks.
        """
        m, (h, w) = len(prompt.image), embedded.cells.shape[2:]
        own = torch.cat([self.quality_token, self.mask_tokens])
        tokens = torch.cat([own.expand(m, -1, -1), tokens], dim=1)
        used = torch.cat([used.new_ones(m, len(own)), used], dim=1)
        cells = embedded.cells[prompt.image] + self.prompts.dense(prompt.masks) + dense
        x, cells = self.transformer(tokens, cells.flatten(2).transpose(1, 2), self.prompts.grid(h, w), used)
        cells = cells.transpose(1, 2).unflatten(2, (h, w))
        fine = self.up2(F.gelu(self.up_norm(self.up1(cells))))
        if embedded.detail is not None:
            fine = fine + embedded.detail[prompt.image]
        masks = x[:, 1 : len(own)]
        kernels = torch.stack([kernel(masks[:, k]) for k, kernel in enumerate(self.kernels)], dim=1)
        logits = torch.einsum("mac,mchw->mahw", kernels, F.gelu(fine))
        quality = self.quality(x[:, 0])
        return Answer(logits, quality.sigmoid() if self.config.bounded else quality, masks)
