"""Files of heads: the tensors, and in the metadata everything that is needed to use them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from dinokit.features import fingerprint
from dinokit.models import Backbone
from dinokit.runtime.device import pick_device
from dinokit.segment.encoder import Encoder
from dinokit.segment.in_context import InContextHead
from dinokit.segment.promptable import PromptableHead
from dinokit.segment.recipe import Context, Head, Unified
from dinokit.segment.unified import UnifiedHead
from dinokit.weights import load_backbone
from dinokit.weights.checkpoint import read_safetensors, write_tensors
from dinokit.weights.formats.native import LARGEST

NAME = "head.safetensors"
KEY = "dinokit_head"  # of the metadata
SIZES: dict[str, type[Head] | type[Context]] = {"promptable": Head, "in_context": Context, "unified": Head}


@dataclass
class SavedHead:
    """What a file of a head says."""

    kind: str
    config: dict[str, Any]  # sizes of the head
    size: int  # pixels: the side of the canvas
    layers: int  # blocks of the backbone
    fingerprint: str  # of the backbone
    objects: dict[str, Any] | None  # the section of the images that it was trained on
    steps: int
    unified: dict[str, Any] = field(default_factory=dict)  # of a unified head: sizes beside its decoder
    words: list[str] = field(default_factory=list)  # likewise: that it knows


def save_head(path: Path, head: nn.Module, about: SavedHead) -> None:
    """Write a head, atomically."""
    tensors = {key: x.detach().cpu().contiguous() for key, x in head.state_dict().items()}
    write_tensors(path, tensors, {KEY: json.dumps(asdict(about))})


def load_head(path: str | Path, backbone: Backbone, kind: str) -> tuple[nn.Module, Encoder, SavedHead]:
    """The head in a file, or in the folder of its run, with the images' encoder that it was trained on.

    Raises:
        LookupError: if there is no such file; it says which command makes one.
        ValueError: if it is another file, of another kind, or was trained on other weights.
    """
    file = Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    if not file.is_file():
        raise LookupError(
            f"There is no head {file} (looked from {Path.cwd()}). dinokit train-head writes one: RUN/{NAME}."
        )
    try:
        tensors, metadata = read_safetensors(file)
        about = SavedHead(**json.loads(metadata[KEY]))
        config, more = SIZES[about.kind](**about.config), Unified(**about.unified)
        sizes = [about.size, about.layers, config.width, config.depth, config.hidden]
        sizes += [more.samples, more.memory + 1, more.embedding]
        # Before anything of these sizes is built.
        wrong = config.depth > len(tensors) or not all(type(word) is str for word in about.words)
        if wrong or not all(type(n) is int and 0 < n <= LARGEST for n in sizes):
            raise ValueError(f"sizes {sizes}")  # noqa: TRY301 - named below
    except (KeyError, OverflowError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{file} is no head that dinokit train-head saved.") from None
    if about.kind != kind and (about.kind, kind) != ("unified", "promptable"):  # it takes all those prompts
        raise ValueError(f"{file} is a head of kind {about.kind}; this needs one of kind {kind}.")
    if about.fingerprint != fingerprint(backbone):
        raise ValueError(
            f"{file} was trained on the features of other weights: give those as weights=, or train a head "
            f"on these: dinokit train-head RECIPE weights=..."
        )
    encoder = Encoder(backbone, about.size, about.layers)
    head: nn.Module
    if about.kind == "unified":
        head = UnifiedHead(encoder.width, cast(Head, config), more, about.words, backbone.channels)
    elif isinstance(config, Head):
        head = PromptableHead(encoder.width, config, backbone.channels)
    else:
        head = InContextHead(encoder.width, config, backbone.channels)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return head.to(encoder.device).eval(), encoder, about


def load_both(
    weights: str | Path | Backbone, head: str | Path, device: str, kind: str
) -> tuple[nn.Module, Encoder]:
    """A backbone, given or in a file, and the head that was trained on it. Raises as load_head()."""
    backbone = weights if isinstance(weights, Backbone) else load_backbone(weights)
    module, encoder, _ = load_head(head, backbone.to(pick_device(device)).eval(), kind)
    return module, encoder
