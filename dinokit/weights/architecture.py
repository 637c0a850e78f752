"""Identifies the backbone in a file of weights from the names and shapes of its tensors."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from dinokit.models import Input
from dinokit.models.vit import Config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; used by every released model
# Of the satellite images of DINOv3 (arXiv 2508.10104).
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
DINOV3_LICENCE = "DINOv3 License"
DINOV3_NOTE = (
    f"If this is a released file of DINOv3, or was trained from one, it stands under Meta's "
    f"{DINOV3_LICENCE}, and so do models that are trained from it."
)
HEAD = 64  # channels of an attention head in every released model
# The tensors that every ViT of this family has.
CORE = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
WRAPPING = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.)+")  # of DDP, compile and FSDP
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2 trains in chunks of blocks: blocks.CHUNK.NUMBER.

# Other models, and a pattern of names that only their files have. The first match decides.
OTHER_MODELS = (
    ("a diffusion model", r"^(down|up|mid)_blocks?\.|model\.diffusion_model\.|^transformer_blocks\."),
    ("an object detector", r"^rpn\.|^roi_heads\.|bbox_embed|^bbox_head|^model\.\d+\.(conv|cv\d|m)\."),
    ("a segmentation model", r"^decode_head\.|^mask_embed"),
    (
        "a CLIP-like model of images and text",
        r"visual\.(conv1|class_emb|trans)|vision_model\.|logit_scale|^norm_pre\.",
    ),
    ("a Swin or BEiT, whose positions are relative", r"relative_position_bias_table"),
    ("a masked autoencoder (MAE), or one fine-tuned from it", r"decoder_(blocks|embed|pos)|^fc_norm\."),
    ("a masked autoencoder (MAE)", r"^decoder\.decoder_"),
    ("a Sapiens2, whose layers are named otherwise than DINOv3's", r"^(backbone\.)?blocks\.\d+\.attn\.wq\."),
    ("a DINOv3 of another layout", r"rope_embeddings|storage_tokens"),
    ("a language model", r"layers\.\d+\.self_attn|^transformer\.h\.\d|^bert\.|lm_head"),
    ("a ViT whose queries and keys are normalised", r"^blocks\.\d+\.attn\.[qk]_norm\."),
    ("a ViT of torchvision, which is trained with labels", r"^encoder\.layers\.encoder_layer_\d"),
    ("a convolutional network", r"layer1\.0|^stem\.|^stages\.|^features\.\d|bn1\.running_mean"),
    ("a ViT trained with labels (it has a classifier)", r"^head\.(weight|bias)$|^classifier\.|dist_token"),
    ("the projection head of a DINO without its backbone", r"head\.(mlp|last_layer)"),
)


@dataclass
class StoredBackbone:
    """A backbone as a file contains it."""

    format: str  # its name, for people
    tensors: dict[str, Tensor]  # by our names
    section: dict[str, Any]  # the section `backbone` of a recipe that builds the architecture
    input: Input
    ignored: list[str] = field(default_factory=list)  # other content of the file, in words
    notes: list[str] = field(default_factory=list)  # sentences about values that the file does not contain
    recipe: str = ""
    version: str = ""  # of dinokit, if it wrote the file
    licence: str = ""  # of the weights, if it is not the usual Apache-2.0
    # Tensors as the file has them, by our names, where `tensors` has them computed anew.
    alternatives: dict[str, Tensor] = field(default_factory=dict)


def stored_vit(
    format: str,  # noqa: A002  # the name of the field
    tensors: dict[str, Tensor],
    heads: int | None,
    ignored: list[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> StoredBackbone:
    """A vit whose architecture is inferred from its tensors.

    Args:
        format: its name.
        tensors: by our names; all of CORE must be among them.
        heads: the number of attention heads, if it is known.
        ignored: other content of the file, in words.
        mean: of the images, if the file contains it, and `std`; else those of ImageNet.
        std: see `mean`.
        size: of the images in pixels; without mean and std it has no effect.

    Raises:
        ValueError: if the architecture cannot be inferred.
    """
    config, notes = infer_config(tensors, heads)
    if mean is None or std is None:
        size = None
        mean, std = (MEAN, STD) if config.channels == 3 else ((0.5,) * config.channels,) * 2
        if config.channels != 3:
            notes.append(f"Mean and deviation of {config.channels} channels are not known: 0.5 is assumed.")
    shown = Input(size or input_size(config), tuple(map(float, mean)), tuple(map(float, std)))
    other_types = {str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"}
    if other_types:
        notes.append(f"The file contains {', '.join(sorted(other_types))}; the backbone is float32.")
    return StoredBackbone(format, tensors, {"name": "vit", **asdict(config)}, shown, ignored, notes)


def infer_config(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[Config, list[str]]:
    """The Config of the vit with these tensors, and notes about what was assumed.

    The interpolation of positions is that of the released files: models without registers were trained with
    an offset of 0.1, models with registers with antialiasing and no offset.

    Raises:
        ValueError: if it cannot be inferred.
    """
    conv = "patch_embed.layers.0.weight" in tensors
    if conv:
        kernels = [t for name, t in tensors.items() if name.startswith("patch_embed.layers") and t.ndim == 4]
        width, channels = kernels[-1].shape[0], kernels[0].shape[1]
        patch = [2 ** (len(kernels) - 1)] * 2  # each but the last halves the image
    else:
        width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    rows = tensors["pos_embed"].shape[1] - 1
    side = round(rows**0.5)
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError(f"its patches are not square, but {' x '.join(map(str, patch))}")
    if side**2 != rows:
        raise ValueError(
            f"its positional embedding has {rows} positions and one for the class token: no square grid"
        )
    notes = []
    if heads is None:
        if width % HEAD:
            raise ValueError(
                f"it does not contain the number of attention heads, and its width, {width}, is no multiple "
                f"of {HEAD}: give heads=N"
            )
        heads = width // HEAD
        notes.append(
            f"The file does not contain the number of heads: {heads} of {HEAD} channels are assumed."
        )
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    return Config(
        channels=channels,
        size=side * patch[0],
        width=width,
        depth=max(numbers) + 1,
        heads=heads,
        patch=patch[0],
        stem="conv" if conv else "linear",
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,
        registers=registers,
        mask_token="mask_token" in tensors,
        pos_offset=0.0 if registers else 0.1,
        pos_antialias=bool(registers),
    ), notes


def input_size(config: Config) -> int:
    """Pixels of the images for a vit: those of its grid, but 224 for DINOv2's grid of 518.

    DINOv2 was trained at 224 pixels in all but its last 10,000 steps, and is evaluated at 224 (arXiv
    2304.07193).
    """
    return 224 if (config.size, config.patch) == (518, 14) else config.size


def backbone_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors by the names of the released files, and the other content in words.

    Of a student and a teacher it takes the teacher; of a backbone and heads, the backbone.
    """
    named = {WRAPPING.sub("", name): value for name, value in tensors.items()}
    ignored: list[str] = []
    for prefix in ("teacher.", "backbone."):
        if any(name.startswith(prefix) for name in named):
            ignored += count_groups(name for name in named if not name.startswith(prefix))
            inner = {name.removeprefix(prefix): v for name, v in named.items() if name.startswith(prefix)}
            named = {WRAPPING.sub("", name): value for name, value in inner.items()}
    return {CHUNK.sub(r"blocks.\1.", name): value for name, value in named.items()}, ignored


def is_vit(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors of CORE are there."""
    return all(name in tensors for name in CORE)


def count_groups(names: Iterable[str]) -> list[str]:
    """The first words of names, each with its number of tensors."""
    return [f"{word} ({count} tensors)" for word, count in Counter(n.split(".")[0] for n in names).items()]


def other_model(names: Iterable[str]) -> str:
    """What a file with tensors of these names contains, as 'a ...', for messages; '' if it is not known."""
    names = list(names)
    known = next((what for what, p in OTHER_MODELS if any(re.search(p, name) for name in names)), "")
    if known or not any(name.startswith("blocks.0.") for name in names):
        return known
    has_positions = any("pos_embed" in name for name in names)
    return "" if has_positions else "a ViT that stores no positions, such as DINOv3, where they are rotary"
