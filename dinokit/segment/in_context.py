"""A head that segments by example: images with the thing marked, and a new image (SegGPT, arXiv 2304.03284).

Every patch of the new image attends to the patches of the examples, and what it reads there is their labels:
labels enter as values of the attention alone, and each head of the attention weighs them by one number. So
the answer is linear in the labels, any classes can be asked for at once, and renumbering them renumbers the
answer exactly. It is a learnt form of the k-nearest-neighbour vote (Balazevic et al., arXiv 2306.01667),
which it contains as a special case.

    N  patches of the examples     Q  patches of the new image     K  classes, with 0 for the rest
    c  width     H  heads
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.segment.prompts import UP, pixel_stem
from dinokit.segment.recipe import Context


@dataclass
class Examples:
    """Patches of all examples together; their order does not matter."""

    features: Tensor  # (N, D)
    shares: Tensor  # (N, K): of each class in the patch; a row sums to 1


def label_shares(labels: Tensor, classes: int, patch: int) -> tuple[Tensor, Tensor]:
    """The share of each class in each patch, over the labelled pixels.

    Args:
        labels: (S, S) ids on the canvas, below 0 where there is no label, as beyond the image.
        classes: K.
        patch: pixels.

    Returns:
        (h * w, K), and (h * w,) bool: whether a pixel of the patch has a label.
    """
    one_hot = torch.stack([(labels == k).float() for k in range(classes)])
    counts = F.avg_pool2d(one_hot[None], patch)[0].flatten(1).T
    total = counts.sum(dim=1, keepdim=True)
    return counts / total.clamp(min=1e-9), total[:, 0] > 0


def attend(q: Tensor, k: Tensor, nearest: int = 0) -> Tensor:
    """Softmax over the keys of logits q @ k: (H, Q, d), (H, N, d) -> (H, Q, N).

    With `nearest`, only so many largest logits of a row count.
    """
    logits = q @ k.transpose(1, 2)
    if 0 < nearest < logits.shape[2]:
        least = logits.topk(nearest, dim=2).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.softmax(dim=2)


class Layer(nn.Module):
    """Reads labels at the examples' patches, then smooths them over similar patches of the new image."""

    def __init__(self, width: int, heads: int, hidden: int, nearest: int, first: bool) -> None:
        super().__init__()
        self.heads, self.nearest = heads, nearest
        self.q, self.k, self.near = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.near):  # at first, heads compare parts of the features
            nn.init.eye_(layer.weight)
        self.sharpness = nn.Parameter(torch.full((2, heads), math.log(10.0)))
        self.read = nn.Parameter(torch.full((heads,), (1.0 if first else 0.0) / heads))
        self.smooth = nn.Parameter(torch.zeros(heads))
        last = nn.Linear(hidden, width)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)

    def forward(
        self, x: Tensor, examples: Tensor, shares: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """X (Q, c), examples (N, c), shares (N, K), labels so far r (Q, K) -> x, examples and r."""
        scale = self.sharpness.exp()[:, :, None, None]
        q, k, near = self._split(self.q(x)), self._split(self.k(examples)), self._split(self.near(x))
        read = attend(scale[0] * q, k, self.nearest)
        r = r + torch.einsum("h,hqn,nk->qk", self.read, read, shares)
        r = r + torch.einsum("h,hqn,nk->qk", self.smooth, attend(scale[1] * near, near), r)
        return x + self.mlp(x), examples + self.mlp(examples), r

    def _split(self, x: Tensor) -> Tensor:
        """(n, c) -> (H, n, c / H), of unit length."""
        return F.normalize(x.unflatten(1, (self.heads, -1)).transpose(0, 1), dim=2)


class InContextHead(nn.Module):
    """Features of examples and of a new image -> logits of the examples' classes.

    Args:
        features: D.
        config: sizes.
        channels: of the images.
    """

    def __init__(self, features: int, config: Context, channels: int = 3) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"context.width={config.width} is no multiple of context.heads={config.heads}.")
        c = config.width
        self.config, self.features = config, features
        self.project, self.norm = nn.Linear(features, c), nn.LayerNorm(c)
        self.layers = nn.ModuleList(
            Layer(c, config.heads, config.hidden, config.nearest, i == 0) for i in range(config.depth)
        )
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))
        self.stem = pixel_stem(channels, 16)
        self.cells = nn.Conv2d(c, 16, 1)
        self.weights = nn.Conv2d(16, 9, 3, padding=1)
        nn.init.zeros_(self.weights.weight)
        # At first, mostly the patch itself.
        self.weights.bias = nn.Parameter(torch.tensor([0.0, 0, 0, 0, 2, 0, 0, 0, 0]))

    def forward(self, features: Tensor, pixels: Tensor, examples: Examples) -> Tensor:
        """Logits (K, 4 h, 4 w) of one image.

        Args:
            features: (D, h, w).
            pixels: (C, S, S), normalised, of the same canvas.
            examples: with K classes.
        """
        h, w = features.shape[1:]
        x, keys = (self.norm(self.project(rows)) for rows in (features.flatten(1).T, examples.features))
        r = torch.zeros(h * w, examples.shares.shape[1], device=x.device)
        for layer in self.layers:
            x, keys, r = layer(x, keys, examples.shares, r)
        logits = self.sharpness.exp() * r.T.unflatten(1, (h, w))
        return self._finer(logits, x.T.unflatten(1, (h, w)), pixels)

    def _finer(self, logits: Tensor, x: Tensor, pixels: Tensor) -> Tensor:
        """Each fine cell is a convex combination of the 3 x 3 patches around it, the same for all classes."""
        h, w = logits.shape[1:]
        stem = F.interpolate(self.stem(pixels[None]), (UP * h, UP * w), mode="bilinear", align_corners=False)
        weights = self.weights(F.gelu(stem + F.interpolate(self.cells(x[None]), scale_factor=UP)))
        around = F.unfold(F.pad(logits[None], (1, 1, 1, 1), mode="replicate"), 3)  # (1, K * 9, h * w)
        around = around.view(len(logits), 9, h, w).repeat_interleave(UP, 2).repeat_interleave(UP, 3)
        return (weights.softmax(dim=1) * around).sum(dim=1)
