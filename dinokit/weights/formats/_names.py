"""The names that the official files and timm's share, and what training code puts before and around them."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from dinokit.weights.found import CORE

WRAPPING = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.)+")  # of DDP, compile and FSDP
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2 trains in chunks of blocks: blocks.CHUNK.NUMBER.


def backbone_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Those of the backbone by the names of the released files, and in words what else there is.

    Of a student and a teacher the teacher is taken; of a backbone and heads, the backbone.
    """
    named = {WRAPPING.sub("", name): value for name, value in tensors.items()}
    beside: list[str] = []
    for prefix in ("teacher.", "backbone."):
        if any(name.startswith(prefix) for name in named):
            beside += groups(name for name in named if not name.startswith(prefix))
            inner = {name.removeprefix(prefix): v for name, v in named.items() if name.startswith(prefix)}
            named = {WRAPPING.sub("", name): value for name, value in inner.items()}
    return {CHUNK.sub(r"blocks.\1.", name): value for name, value in named.items()}, beside


def is_vit(tensors: dict[str, Tensor]) -> bool:
    """Whether all are there without which nobody can speak of a ViT of this family."""
    return all(name in tensors for name in CORE)


def groups(names: Iterable[str]) -> list[str]:
    """Names by their first word, each with its number of tensors."""
    return [f"{word} ({count} tensors)" for word, count in Counter(n.split(".")[0] for n in names).items()]


def words(format_: str, wrapper: str) -> str:
    """A format's name, with the key under which the tensors were."""
    return f"{format_}, its '{wrapper}'" if wrapper else format_
