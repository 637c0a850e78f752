"""Reads and writes files of heads: those that DINOv2 released, and those of our evaluators.

Both have the same layout. The file of a linear classifier contains `weight` and `bias`; the others contain,
under `state_dict`, the tensors of the head with the prefix `decode_head.`. For models with registers only
classifiers were released.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dinokit.features import last_blocks, spread_blocks
from dinokit.heads import DPT, Depther, LinearDepth, LinearSegmenter, Segmenter
from dinokit.models import Backbone
from dinokit.runtime.files import atomic
from dinokit.weights.checkpoint import open_checkpoint

PREFIX = "decode_head."
MIN_DEPTH = 1e-3  # metres
MAX_DEPTH = {"NYU": 10.0, "KITTI": 80.0}  # metres
CLASSES = {"ADE20K": 150, "VOC2012": 21}  # of released segmentation heads


def save_head(path: Path, head: nn.Module) -> None:
    """Write a dense head in the layout of the released files, atomically."""
    tensors = {PREFIX + key: value.detach().cpu() for key, value in head.state_dict().items()}
    # Into an open file: one that torch opens gets its own name written into it, here a temporary one.
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save({"state_dict": tensors}, file)


def load_head(path: str | Path, head: nn.Module, what: str) -> None:
    """Read what save_head() wrote into a head of the same shape.

    Args:
        path: of the file.
        head: to fill.
        what: it is, for messages.

    Raises:
        LookupError: if there is no such file.
        ValueError: if it is of another head.
    """
    _load(head, _read(path), path, what)


def load_segmenter(path: str | Path, backbone: Backbone) -> tuple[LinearSegmenter, list[int]]:
    """A segmentation head, and the blocks whose patches, after the final norm, are concatenated for it.

    Raises:
        LookupError: if there is no such file.
        ValueError: if it is another kind of head, or does not fit the backbone.
    """
    tensors = _read(path)
    _need(path, tensors, ("conv_seg.weight", "bn.running_mean"))
    classes, inputs = tensors["conv_seg.weight"].shape[:2]
    what = f"a segmentation head on a backbone {backbone.width} wide"
    count = _one_or_four(inputs, backbone.width, path, what)
    head = LinearSegmenter(inputs, classes)
    _load(head, tensors, path, what)
    return head.eval(), last_blocks(backbone, count)


def load_depther(
    path: str | Path,
    backbone: Backbone,
    trained_on: str = "NYU",
    hub_range_bug: bool = False,
    max_depth: float | None = None,
) -> Depther:
    """A backbone with a depth head. Its tensors show its kind: linear on one or four blocks, or DPT.

    Args:
        path: of a released file, such as dinov2_vits14_nyu_linear4_head.pth, or of one of ours.
        backbone: the one that it was trained on.
        trained_on: "NYU" (1 mm to 10 m) or "KITTI" (1 mm to 80 m).
        hub_range_bug: give a linear head the range to 80 m for any training set. A version of the
            reference's hub code does so for NYU, whose depths are then eight times too large.
        max_depth: metres, in place of the range of `trained_on`.

    Raises:
        LookupError: if there is no such file.
        ValueError: if it is another kind of head, does not fit the backbone, or `trained_on` is unknown.
    """
    max_depth = max_depth or _max_depth(trained_on)
    tensors = _read(path)
    what = f"a depth head on a backbone {backbone.width} wide"
    head: LinearDepth | DPT
    if "conv_depth.weight" in tensors:
        bins, inputs = tensors["conv_depth.weight"].shape[:2]
        count = _one_or_four(inputs, 2 * backbone.width, path, what)
        head = LinearDepth(
            backbone.width, count, MIN_DEPTH, MAX_DEPTH["KITTI"] if hub_range_bug else max_depth, bins
        )
    else:
        _need(path, tensors, ("project.conv.weight", "conv_depth.head.0.weight"))
        head, count = DPT(backbone.width, MIN_DEPTH, max_depth, len(tensors["project.conv.bias"])), 4
    _load(head, tensors, path, what)
    return _depther(backbone, head, count)


def released_model(
    backbone: Backbone,
    model: str,
    kind: Literal["ld", "dd", "seg"],
    fetch: Callable[[str], str | Path] | None,
    layers: int = 4,
    weights: str = "NYU",
    hub_range_bug: bool = False,
) -> Depther | Segmenter:
    """A released backbone with its head, as torch.hub's entry points `dinov2_vitX14_KIND` return it.

    Args:
        backbone: the released one, without registers.
        model: its name, such as "dinov2_vits14".
        kind: of the head: linear depth, DPT depth, or segmentation.
        fetch: from the path of a file below the URL of the released models to its local path; None
            initialises a head at random.
        layers: blocks that a linear head uses, 1 or 4.
        weights: the head's training set: "NYU" or "KITTI", for segmentation "ADE20K" or "VOC2012".
        hub_range_bug: as `load_depther`.

    Raises:
        ValueError: if no such head was released, or the file contains another head.
    """
    trained_on: Mapping[str, float] = CLASSES if kind == "seg" else MAX_DEPTH
    if layers not in (1, 4) or weights.upper() not in trained_on or "_reg" in model:
        raise ValueError(
            f"No {'segmentation' if kind == 'seg' else 'depth'} head was released for {model} with "
            f"layers={layers} and weights='{weights}': they use 1 or 4 blocks, were trained on "
            f"{' and '.join(trained_on)}, and models with registers have none."
        )
    names = {"ld": ("linear", "linear4"), "dd": ("dpt", "dpt"), "seg": ("linear", "ms")}[kind]
    path = fetch and fetch(f"{model}/{model}_{weights.lower()}_{names[layers == 4]}_head.pth")
    if kind == "seg":
        return _segmenter(backbone, path, layers, weights.upper())
    if path is None:
        max_depth = _max_depth("KITTI" if hub_range_bug and kind == "ld" else weights)
        if kind == "dd":
            return _depther(backbone, DPT(backbone.width, MIN_DEPTH, max_depth), 4)
        return _depther(backbone, LinearDepth(backbone.width, layers, MIN_DEPTH, max_depth), layers)
    loaded = load_depther(path, backbone, weights, hub_range_bug)
    is_dpt = isinstance(loaded.head, DPT)
    if is_dpt != (kind == "dd") or (not is_dpt and len(loaded.blocks) != layers):
        asked = _entry_name(model, kind == "dd", layers)
        found = _entry_name(model, is_dpt, len(loaded.blocks))
        raise ValueError(
            f"{path} is not the head of {asked}, but of {found}. Call that, or give another file."
        )
    return loaded


def _segmenter(backbone: Backbone, path: str | Path | None, layers: int, trained_on: str) -> Segmenter:
    classes = CLASSES[trained_on]
    if path is None:
        head, blocks = LinearSegmenter(layers * backbone.width, classes), last_blocks(backbone, layers)
        return Segmenter(backbone, head, blocks)
    head, blocks = load_segmenter(path, backbone)
    if len(blocks) != layers:
        raise ValueError(f"{path} is a head with layers={len(blocks)}: give that, or another file.")
    if head.conv_seg.out_channels != classes:
        raise ValueError(
            f"{path} has {head.conv_seg.out_channels} classes, and {trained_on} has {classes}. For heads of "
            f"other data: dinokit.heads.Segmenter(backbone, *load_segmenter(path, backbone))."
        )
    return Segmenter(backbone, head, blocks)


def _entry_name(model: str, is_dpt: bool, layers: int) -> str:
    return f"{model}_dd" if is_dpt else f"{model}_ld with layers={layers}"


def _max_depth(trained_on: str) -> float:
    if trained_on.upper() not in MAX_DEPTH:
        raise ValueError(f"weights='{trained_on}': depth heads were released for {' and '.join(MAX_DEPTH)}.")
    return MAX_DEPTH[trained_on.upper()]


def _depther(backbone: Backbone, head: LinearDepth | DPT, count: int) -> Depther:
    blocks = last_blocks(backbone, 1) if count == 1 else spread_blocks(backbone, count)
    return Depther(backbone, head, blocks)


def _one_or_four(inputs: int, width: int, path: str | Path, what: str) -> int:
    """The number of blocks of a head that takes `width` numbers of each."""
    if inputs not in (width, 4 * width):
        raise ValueError(
            f"{path} is not {what}: it takes {inputs} numbers per patch, not {width} or {4 * width}."
        )
    return inputs // width


def _read(path: str | Path) -> dict[str, Tensor]:
    tensors = open_checkpoint(path).tensors
    head = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    return head or tensors


def _need(path: str | Path, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        have = ", ".join(list(tensors)[:4]) or "no tensor"
        raise ValueError(f"{path} is another kind of head: it has no {' and no '.join(missing)}, but {have}.")


def _load(head: nn.Module, tensors: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    try:
        head.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(f"{path} is not {what}: {lines}") from None
