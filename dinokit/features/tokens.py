"""Runs a frozen backbone on images: one vector per image, feature maps, attention; and its fingerprint.

b  images     C  channels     D  width of the backbone     N  patches     h, w  patches down and across
H  heads of attention     T  tokens: class, registers, patches     d  D / H
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.models import Backbone, Input, Tokens

GEM_POWER, GEM_MIN = 4.0, 1e-6  # of DINO's copy detection
# Blocks that DINOv2's depth heads use, by the depth of the backbone.
SPREAD = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
PLAIN = bool, int, float, str, tuple, Input, torch.dtype, type(None)


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """Eval mode inside the block; after it each module is in the mode that it was in."""
    before = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def device_of(backbone: Backbone) -> torch.device:
    """The device of the backbone's parameters, or else of its buffers."""
    return next((t.device for t in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))


def normalised(backbone: Backbone, crops: Tensor) -> Tensor:
    """Crops (b, C, H, W), uint8 or float32 in [0, 1], normalised by the backbone's mean and std.

    Raises:
        ValueError: if C is not the backbone's number of channels.
    """
    if crops.shape[1] != backbone.channels:
        raise ValueError(
            f"The images have {crops.shape[1]} channels, but the backbone takes {backbone.channels}: give it "
            f"images like those that it was trained on."
        )
    # torch.tensor(v, device=...) would wait for the device.
    mean, std = (
        torch.tensor(v).to(crops.device, non_blocking=True).view(-1, 1, 1)
        for v in (backbone.input.mean, backbone.input.std)
    )
    x = crops.float() / 255 if crops.dtype == torch.uint8 else crops.float()
    return (x - mean) / std


def block_tokens(backbone: Backbone, crops: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
    """Tokens after each of `blocks`, in the order of depth.

    Args:
        backbone: one without `layers` gives its last block only.
        crops: (b, C, H, W), normalised, with sides that are multiples of the patch.
        blocks: indices from 0; [-1] for a backbone without blocks: its output.
        norm: after the final norm, or before it.

    Raises:
        ValueError: if the backbone does not give these.
    """
    if list(blocks) == last_blocks(backbone, 1) and norm:
        return backbone([crops], [None])
    layers = backbone.layers(crops, blocks, norm)
    widths = [tokens.cls.shape[1] for tokens in layers]
    if len(set(widths)) > 1:
        raise ValueError(
            f"Blocks {list(blocks)} of {type(backbone).__name__} differ in their widths, {widths}, as the "
            f"stages of a CNN do: ask for its last block, or for one at a time."
        )
    return layers


def last_layers(backbone: Backbone, crops: Tensor, count: int) -> list[Tokens]:
    """Tokens after each of the last `count` blocks, as block_tokens() with last_blocks().

    Raises:
        ValueError: if the backbone does not give so many.
    """
    return block_tokens(backbone, crops, last_blocks(backbone, count))


@dataclass(frozen=True)
class Pooling:
    """Pools tokens into one vector per image: class tokens of the last blocks, then pooled patches.

    The class tokens stand in the order of depth; the patches are those of the last block. blocks=4 and
    pool='mean' give the input of the released four-block classifiers (DINOv2, arXiv 2304.07193, appendix
    B.3); the input for fewer blocks is the columns at its right.
    """

    blocks: int = 1  # class tokens of so many last blocks
    pool: Literal["none", "mean", "gem"] = "none"  # gem: generalised mean, fourth power (arXiv 1711.02512)

    def width(self, backbone: Backbone) -> int:
        """Numbers in a vector."""
        return backbone.width * (self.blocks + (self.pool != "none"))

    def __call__(self, backbone: Backbone, crops: Tensor) -> Tensor:
        """Normalised crops (b, C, H, W) -> (b, width) float32.

        Raises:
            ValueError: if the backbone gives fewer blocks, or has no patches to pool.
        """
        layers = last_layers(backbone, crops, self.blocks)
        columns = [tokens.cls.float() for tokens in layers]
        if self.pool != "none":
            patches = layers[-1].patches.float()
            if not patches.shape[1]:
                raise ValueError(f"{type(backbone).__name__} gives no patches that could be pooled.")
            columns.append(patches.mean(dim=1) if self.pool == "mean" else generalised_mean(patches))
        return torch.cat(columns, dim=1)


@dataclass(frozen=True)
class AllPatches:
    """All patches of the last block, one after another, instead of a vector that sums them up."""

    size: int = 224  # pixels, the side of the crops

    def width(self, backbone: Backbone) -> int:
        """Numbers in the row of an image: N * D."""
        return (self.size // backbone.patch) ** 2 * patch_width(backbone)

    def __call__(self, backbone: Backbone, crops: Tensor) -> Tensor:
        """Normalised crops (b, C, size, size) -> (b, N * D) float32, row after row of the grid.

        Raises:
            ValueError: if the backbone does not give one feature for each patch.
        """
        maps = block_tokens(backbone, crops, last_blocks(backbone, 1))[0].patches
        _check_grid(backbone, maps, (self.size // backbone.patch,) * 2)
        return maps.float().flatten(1)


def generalised_mean(patches: Tensor) -> Tensor:
    """GeM pooling: the fourth root of the mean of fourth powers of positive values. (b, N, D) -> (b, D)."""
    return patches.clamp(min=GEM_MIN).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)


@dataclass
class Map:
    """Features of a batch of images after one block."""

    patches: Tensor  # (b, D, h, w) float32
    cls: Tensor  # (b, D) float32

    def with_cls(self) -> Tensor:
        """(b, 2 D, h, w): each patch concatenated with the class token."""
        return torch.cat([self.patches, self.cls[:, :, None, None].expand_as(self.patches)], dim=1)


def last_blocks(backbone: Backbone, count: int) -> list[int]:
    """Indices of the last `count` blocks; [-1] for a backbone without blocks: its output.

    Raises:
        ValueError: if there are not so many.
    """
    depth = len(backbone.blocks)
    if count == 1:
        return [depth - 1]
    if count > depth:
        raise ValueError(
            f"{count} blocks were asked for, but {type(backbone).__name__} has {depth or 'none'}: "
            f"ask for fewer."
        )
    return list(range(depth - count, depth))


def spread_blocks(backbone: Backbone, count: int) -> list[int]:
    """Indices of `count` blocks at equal distances, with the last one.

    For four blocks of a backbone with 12, 24 or 40 blocks, they are those of DINOv2's depth heads.

    Raises:
        ValueError: if there are not so many.
    """
    depth = len(backbone.blocks)
    if count == 4 and depth in SPREAD:
        return list(SPREAD[depth])
    last_blocks(backbone, count)
    return [(i + 1) * depth // count - 1 for i in range(count)]


def dense(
    backbone: Backbone,
    images: Tensor,
    blocks: Sequence[int],
    norm: bool = True,
    precision: torch.dtype | None = None,
) -> list[Map]:
    """Feature maps after each of `blocks`, in the order of depth, without gradient.

    Images are padded with zeros, the mean colour, to multiples of the patch, equally on all sides; an odd
    pixel goes to the right and to the bottom.

    Args:
        backbone: in eval mode (`frozen`), with patches.
        images: (b, C, H, W), uint8 or float32 in [0, 1], on the backbone's device, of any size.
        blocks: indices from 0; only the last one of a backbone that has no `layers`.
        norm: after the final norm, or before it.
        precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.

    Raises:
        ValueError: if the backbone has no patches, cannot give these blocks, or has other channels.
    """
    with torch.inference_mode():
        x = padded(normalised(backbone, images), backbone.patch)
        grid = (x.shape[2] // backbone.patch, x.shape[3] // backbone.patch)
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            tokens = block_tokens(backbone, x, blocks, norm)
    _check_grid(backbone, tokens[0].patches, grid)
    return [_map(t, grid) for t in tokens]


def padded(x: Tensor, patch: int) -> Tensor:
    """Images (b, C, H, W) with zeros around them, up to multiples of `patch`."""
    left, right, top, bottom = padding(x.shape[2], x.shape[3], patch)
    return F.pad(x, (left, right, top, bottom)) if left + right + top + bottom else x


def padding(height: int, width: int, patch: int) -> tuple[int, int, int, int]:
    """Pixels to add at the left, the right, the top and the bottom."""
    across, down = -width % patch, -height % patch
    return across // 2, across - across // 2, down // 2, down - down // 2


def patch_width(backbone: Backbone) -> int:
    """Numbers in a patch feature, found by running the backbone on a blank image.

    Raises:
        ValueError: as `dense`.
    """
    # A model that is only read may take a single size.
    side = backbone.input.size if backbone.frozen_only else backbone.patch * max(1, 32 // backbone.patch)
    blank = torch.zeros(1, backbone.channels, side, side, device=device_of(backbone))
    with frozen(backbone):
        return dense(backbone, blank, last_blocks(backbone, 1))[0].patches.shape[1]


def _check_grid(backbone: Backbone, patches: Tensor, grid: tuple[int, int]) -> None:
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{type(backbone).__name__} gives {patches.shape[1]} patch features for a grid of "
            f"{grid[0]} x {grid[1]}: maps need one for each patch. For pixels as a baseline take "
            f"backbone.name=raw_patches."
        )


def _map(tokens: Tokens, grid: tuple[int, int]) -> Map:
    # A copy made outside of inference mode: a head that trains on it saves it for its gradient.
    patches = tokens.patches.transpose(1, 2).unflatten(2, grid)
    return Map(
        patches.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
        tokens.cls.to(torch.float32, copy=True),
    )


@torch.inference_mode()
def attention(backbone: Backbone, crops: Tensor, block: int = -1) -> Tensor:
    """Softmax attention of the class token over all tokens, in one block.

    Attention kernels do not return their weights. So a hook records the input of one block's attention during
    a normal forward pass, and only the row of the class token is computed from it: O(T * D).
    The last N of T are the patches, row by row: attention(...)[..., -N:].unflatten(2, (h, w)) are H maps.
    DINO uses the last block (arXiv 2104.14294, figure 1).

    Args:
        backbone: a ViT of ours or of timm, on the device of the crops; it does not change.
        crops: (b, C, h, w), normalised.
        block: its index, from 0; negative ones count from the end.

    Returns:
        (b, H, T) float32; rows sum to 1.

    Raises:
        ValueError: if there is no such block, or it has another kind of attention.
    """
    depth = len(backbone.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block={block}: the backbone has {depth} blocks, numbered from 0.")
    layer = getattr(backbone.blocks[block], "attn", None)
    heads = getattr(layer, "heads", None) or getattr(layer, "num_heads", None)
    qkv = getattr(layer, "qkv", None)
    if not isinstance(layer, nn.Module) or not isinstance(qkv, nn.Linear) or not heads:
        raise ValueError(
            f"Block {block} of {type(backbone).__name__} has no attention with one linear layer "
            f"`attn.qkv`, so its weights cannot be computed."
        )
    recorded: list[Tensor] = []
    # Ours projects with the positions of its tokens; timm's has a linear layer for it.
    project = getattr(layer, "project", lambda x, *_: qkv(x))
    handle = layer.register_forward_pre_hook(lambda _, inputs: recorded.append(project(*inputs)))
    try:
        with frozen(backbone):
            backbone([crops], [None])
    finally:
        handle.remove()
    return _weights(layer, recorded[0].reshape(len(crops), -1, qkv.out_features), int(heads))


def _weights(layer: nn.Module, qkv: Tensor, heads: int) -> Tensor:
    """(b, T, 3 * D) -> (b, H, T)."""
    q, k, _ = qkv.float().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (b, H, T, d)
    q = getattr(layer, "q_norm", nn.Identity())(q[:, :, :1])
    k = getattr(layer, "k_norm", nn.Identity())(k)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)[:, :, 0]


def fingerprint(module: nn.Module, *, settings: bool = False) -> str:
    """SHA-256 of a module's tensors, as 64 hexadecimal digits.

    By default it covers what a file of weights contains: name, type, shape and values of every tensor in
    state_dict(). It does not depend on the file format. Recipes, feature stores and checkpoints contain it.

    With `settings` it also covers what no file contains: buffers that are not saved, and the modules' plain
    attributes (number of heads, patch size ...). Backbones with the same value compute the same features.
    Use it for caches and results; it may change with the version of dinokit.

    It copies every tensor to the CPU, one at a time: about one second for each gigabyte.
    """
    state = module.state_dict()
    if not settings:
        return _digest(state)
    unsaved = {name: value for name, value in module.named_buffers() if name not in state}
    attributes = "".join(f"{name} {_attributes(child)}\n" for name, child in module.named_modules())
    return sha256((attributes + _digest({**state, **unsaved})).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attributes(module: nn.Module) -> str:
    plain = sorted((key, value) for key, value in vars(module).items() if isinstance(value, PLAIN))
    return f"{type(module).__qualname__} {[(key, value) for key, value in plain if key != 'training']}"
