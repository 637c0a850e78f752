"""What a file of weights turned out to be: tensors by our names, and the vit that they belong to."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from dinokit.models import Input
from dinokit.models.vit import Config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as every released file was trained
HEAD = 64  # channels of an attention head, in every released file
# Which tensors must be there before a ViT of this family can be spoken of.
CORE = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")


@dataclass
class Found:
    """A backbone in a file."""

    format: str  # in words
    tensors: dict[str, Tensor]  # by our names
    section: dict[str, Any]  # the recipe's section `backbone` that builds what they belong to
    input: Input
    beside: list[str] = field(default_factory=list)  # what else is in the file and not wanted, in words
    notes: list[str] = field(default_factory=list)  # sentences on what had to be supposed
    recipe: str = ""
    version: str = ""  # of dinokit, if it wrote the file


def found_vit(
    format: str,  # noqa: A002  # the field's name
    tensors: dict[str, Tensor],
    heads: int | None,
    input: Input | None = None,  # noqa: A002
    beside: list[str] | None = None,
) -> Found:
    """A vit whose architecture is read off its tensors.

    Args:
        format: in words.
        tensors: by our names; all of CORE must be among them.
        heads: if somebody said how many there are.
        input: if the file says what the weights were trained to see.
        beside: what else is in the file, in words.

    Raises:
        ValueError: if the tensors do not tell.
    """
    config, notes = anatomy(tensors, heads)
    if input is None:
        mean, std = (MEAN, STD) if config.channels == 3 else ((0.5,) * config.channels,) * 2
        input = Input(shown_size(config), mean, std)  # noqa: A001
        if config.channels != 3:
            notes.append(f"Mean and deviation of {config.channels} channels are not known: 0.5 is supposed.")
    halves = {str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"}
    if halves:
        notes.append(f"The file holds {', '.join(sorted(halves))}; the backbone is float32.")
    return Found(format, tensors, {"name": "vit", **asdict(config)}, input, beside or [], notes)


def anatomy(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[Config, list[str]]:
    """The Config of the vit that tensors by our names belong to, and what was supposed.

    The rule of the positional embedding is that of the released files: those without registers were trained
    with an offset of 0.1, those with registers with antialiasing and none.

    Raises:
        ValueError: if the tensors do not tell.
    """
    width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    rows = tensors["pos_embed"].shape[1] - 1
    side = round(rows**0.5)
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError(f"its patches are no squares, but {' x '.join(map(str, patch))}")
    if side**2 != rows:
        raise ValueError(f"its positional embedding has {rows} places and the class token's: no square grid")
    notes = []
    if heads is None:
        if width % HEAD:
            raise ValueError(
                f"it does not say how many attention heads there are, and its width, {width}, is no multiple "
                f"of {HEAD}: give heads=N"
            )
        heads = width // HEAD
        notes.append(f"The file does not say how many heads it has: {heads} of {HEAD} channels are supposed.")
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    return Config(
        channels=channels,
        size=side * patch[0],
        width=width,
        depth=max(numbers) + 1,
        heads=heads,
        patch=patch[0],
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,
        registers=registers,
        mask_token="mask_token" in tensors,
        pos_offset=0.0 if registers else 0.1,
        pos_antialias=bool(registers),
    ), notes


def shown_size(config: Config) -> int:
    """Pixels of the images to show a vit: its grid's, but 224 for DINOv2's grid of 518.

    DINOv2 saw 224 pixels for all but its last 10,000 steps, and is evaluated at 224 (arXiv 2304.07193).
    """
    return 224 if (config.size, config.patch) == (518, 14) else config.size
