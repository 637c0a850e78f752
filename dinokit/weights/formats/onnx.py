"""ONNX: a graph from normalised images to `cls` and `patches`, for images of one size or of any size.

Positions are resampled by two small matrices, one for each side of the grid: the bicubic kernel at the
distance of every new position from every old one. So the graph takes any size, with offset and antialiasing,
and needs no operator that differs between runtimes. Rotary positions are a function of the grid as they are.

    M  side of the stored grid     h, w  the patch grid of an image     D  width
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import Backbone
from dinokit.models.dinov3 import DINOv3
from dinokit.models.vit import VisionTransformer
from dinokit.weights.formats import Exported, metadata_of

MAX_BYTES = 2**31 - 2**20  # of one protobuf file, less space for the graph; larger weights go to another file


def write(vit: Any, out: Path, size: int | None = None) -> Exported:
    """Write one file for any number of images, and `*.data` beside it for more than two gigabytes of weights.

    `vit` is a VisionTransformer or DINOv3 of ours, or a TimmViT with a `size`.

    Raises:
        ValueError: if the size is not a multiple of the patch.
    """
    if size is not None and (size < 1 or size % vit.patch):
        raise ValueError(f"size={size} is not a multiple of the backbone's patch, {vit.patch} pixels.")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ModuleNotFoundError as error:
        raise RuntimeError(f"to=onnx needs {error.name}: pip install '.[onnx]' in the clone") from None
    graphs: dict[type, type[nn.Module]] = {VisionTransformer: Graph, DINOv3: RotaryGraph}
    graph = graphs.get(type(vit), TokenGraph)(vit)
    side = size or vit.patch * (vit.input.size // vit.patch + 1)
    dynamic = {0: torch.export.Dim("batch")}
    if size is None:
        dynamic |= {2: vit.patch * torch.export.Dim("rows"), 3: vit.patch * torch.export.Dim("columns")}
    images = torch.zeros(2, vit.channels, side, side + (vit.patch if size is None else 0))
    with torch.no_grad():  # with gradients, layers save more than inference needs
        program = torch.onnx.export(
            graph.eval(), (images,), dynamo=True, verbose=False, dynamic_shapes={"images": dynamic},
            input_names=["images"], output_names=["cls", "patches"],
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(metadata_of(vit) if type(vit) in graphs else {})
    program.save(out, external_data=sum(p.numel() * 4 for p in vit.parameters()) > MAX_BYTES)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = session.run(None, {"images": x.numpy()})
        return torch.from_numpy(cls), torch.from_numpy(patches)

    mean, std = json.dumps(vit.input.mean), json.dumps(vit.input.std)
    notes = [f"It takes images (batch, {vit.channels}, h, w) in [0, 1] minus {mean}, divided by {std}."]
    command = "onnxruntime.InferenceSession('PATH').run(['cls', 'patches'], {'images': images})"
    return Exported(command, forward, every_size=True, notes=notes)


class TokenGraph(nn.Module):
    """Any backbone, for images of one size."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C, h, w) -> class tokens (b, D), patches (b, N, D)."""
        tokens = self.backbone([images], [None])[0]
        return tokens.cls, tokens.patches


class Graph(nn.Module):
    """A vit in plain tensor operations, without branches that depend on a size."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit, self.positions = vit, Positions(vit)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C, h, w) -> class tokens (b, D), patches (b, N, D)."""
        vit = self.vit
        maps = vit.patch_embed.maps(images)
        b, width, h, w = maps.shape
        position = self.positions(torch.arange(h), torch.arange(w)).reshape(1, h * w, width)
        parts = [(vit.cls_token + vit.pos_embed[:, :1]).expand(b, -1, -1)]
        if vit.registers:
            parts.append(vit.register_tokens.expand(b, -1, -1))
        x = torch.cat([*parts, maps.flatten(2).transpose(1, 2) + position], dim=1)
        block: Any
        for block in vit.blocks:
            x = x + block.ls1(attended(block.attn, block.norm1(x)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = vit.norm(x)
        return x[:, 0], x[:, 1 + vit.registers :]


class RotaryGraph(nn.Module):
    """A dinov3 in plain tensor operations, without branches that depend on a size."""

    def __init__(self, vit: DINOv3) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C, h, w) -> class tokens (b, D), patches (b, N, D)."""
        vit = self.vit
        maps = vit.patch_embed.maps(images)
        b, _, h, w = maps.shape
        table = self._table(torch.arange(h), torch.arange(w))
        tokens = [vit.cls_token, vit.storage_tokens] if vit.registers else [vit.cls_token]
        parts = [token.expand(b, -1, -1) for token in tokens]
        x = torch.cat([*parts, maps.flatten(2).transpose(1, 2)], dim=1)
        block: Any
        for block in vit.blocks:
            x = x + block.ls1(attended(block.attn, block.norm1(x), table))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        found = vit.tokens(x, 0)
        return found.cls, found.patches

    def _table(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Rope.table() of a grid: the numbers 0 to h - 1 and 0 to w - 1 -> (2, 1 + R + h w, d)."""
        rope = self.vit.rope_embed
        h, w = (torch.ones_like(x, dtype=torch.float32).sum() for x in (rows, columns))
        longer, shorter = torch.maximum(h, w), torch.minimum(h, w)
        by_row, by_column = {"separate": (h, w), "max": (longer, longer), "min": (shorter, shorter)}[
            rope.sides
        ]
        down, across = (rows + 0.5) / by_row, (columns + 0.5) / by_column
        grid = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)
        return rope.table(2 * grid - 1, 1 + self.vit.registers)


def attended(attn: Any, x: Tensor, table: Tensor | None = None) -> Tensor:
    """Attention (b, n, D) -> (b, n, D); with a table, queries and keys are turned as by rotate()."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    if table is not None:
        q, k = (_turned(part, *table) for part in (q, k))
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Positions(nn.Module):
    """interpolate_grid() of dinokit.models.vit for any grid, in plain arithmetic."""

    places: Tensor
    grid: Tensor

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.side, self.offset, self.antialias = vit.side, vit.offset, vit.antialias
        # Without antialiasing the kernel crosses the border, where the outermost positions are repeated.
        border = 0 if vit.antialias else 2
        places = torch.arange(-border, vit.side + border)
        inside = places.clamp(0, vit.side - 1)
        grid = vit.pos_embed[0, 1:].detach().float().unflatten(0, (vit.side, vit.side))
        self.register_buffer("places", places.float())
        self.register_buffer("grid", grid[inside][:, inside])

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The numbers 0 to h - 1 and 0 to w - 1 -> (h, w, D)."""
        h, w = (torch.ones_like(x, dtype=torch.float32).sum() for x in (rows, columns))
        stored = (h == self.side) & (w == self.side)  # then the grid is not resampled
        offset = torch.where(stored, 0.0, self.offset)
        down, across = self._weights(rows, h + offset), self._weights(columns, w + offset)
        return torch.einsum("hi,ijd,wj->hwd", down, self.grid, across)

    def _weights(self, new: Tensor, length: Tensor) -> Tensor:
        """(n,) positions of the new grid and its length -> (n, positions of the old grid)."""
        ratio = self.side / length
        distance = (new[:, None] + 0.5) * ratio - 0.5 - self.places
        if not self.antialias:
            return cubic(distance, -0.75)
        weights = cubic(distance / ratio.clamp(min=1.0), -0.5)
        return weights / weights.sum(dim=1, keepdim=True)


def cubic(distance: Tensor, a: float) -> Tensor:
    """The bicubic kernel (Keys, 1981); torch uses a = -0.75, and -0.5 with antialiasing."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
