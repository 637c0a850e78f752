"""Any other model of timm, for frozen use: a folder with config.json, or a file whose model is known."""

from dataclasses import replace
from typing import Any

import torch

from dinokit.models import Input
from dinokit.weights.architecture import MEAN, STD, StoredBackbone
from dinokit.weights.checkpoint import Checkpoint

MOST = 2  # times the numbers in a file that its model may have
DEPTHS = {"depth", "depths", "layers", "num_layers", "num_blocks"}  # arguments of timm: numbers of blocks
# Arguments that a classifier and a frozen backbone need not share; positions are resampled.
NO_DIFFERENCE = {"in_chans", "num_classes", "img_size", "dynamic_img_size"}
SHOWN = 224  # pixels, of a model whose config.json names no size


def read(file: Checkpoint, heads: int | None) -> StoredBackbone | None:
    """A folder as timm writes it: `architecture`, `model_args` and `pretrained_cfg` are in config.json.

    Raises:
        ValueError: if timm cannot build the model.
    """
    name = file.config.get("architecture")
    if not isinstance(name, str):
        return None
    try:
        import timm
    except ModuleNotFoundError:
        return None  # users of torch.hub may lack it
    if not timm.is_model(name):
        return None
    shown = file.config.get("pretrained_cfg") or {}
    tag = str(shown.get("tag") or "")
    full = f"{name}.{tag}" if f"{name}.{tag}" in timm.models.get_arch_pretrained_cfgs(name) else name
    given = file.config.get("model_args") or {}
    args = {key: value for key, value in given.items() if key not in ("in_chans", "num_classes")}
    channels = (shown.get("input_size") or (3,))[0]
    section = {"name": "timm_any", "model": full, "channels": channels, "args": args}
    stored = fitted(file, section)
    return replace(stored, input=input_of(file, Input(SHOWN, MEAN, STD)), licence=_licence(shown))


def input_of(file: Checkpoint, otherwise: Input) -> Input:
    """The images of a folder's config.json; `otherwise` for what it does not say."""
    shown = file.config.get("pretrained_cfg") or {}
    size = (shown.get("input_size") or (3, otherwise.size))[1]
    return Input(size, tuple(shown.get("mean") or otherwise.mean), tuple(shown.get("std") or otherwise.std))


def check_same(file: Checkpoint, model: str, args: dict[str, Any], shown: Input) -> None:
    """Compare a folder's config.json, if there is one, with the model that its tensors are to fill.

    Raises:
        ValueError: if it is another model, has other arguments, or was trained on images of another mean or
            deviation.
    """
    config = file.config.get("pretrained_cfg") or {}
    theirs = str(file.config.get("architecture") or model).partition(".")[0]
    if theirs != model.partition(".")[0]:
        raise ValueError(f"its config.json says {theirs}, and backbone.model={model}")
    if file.config.get("architecture"):
        given = file.config.get("model_args") or {}
        for name in sorted({*given, *args} - NO_DIFFERENCE):
            if _plain(given.get(name)) != _plain(args.get(name)):
                raise ValueError(
                    f"its config.json has model_args {name}={given.get(name, 'not given')}, and "
                    f"backbone.args {name}={args.get(name, 'not given')}: give equal ones, "
                    f"or leave out backbone.model, so that the folder decides"
                )
    for key, ours in (("mean", shown.mean), ("std", shown.std)):
        if config.get(key) and list(config[key]) != list(ours):
            raise ValueError(
                f"its config.json has {key} {config[key]}, and {model} in timm {list(ours)}: leave out "
                f"backbone.model, so that the folder decides"
            )


def fitted(file: Checkpoint, section: dict[str, Any]) -> StoredBackbone:
    """The tensors of a file by the names of the timm_any in `section`; those of a classifier are left out.

    timm's own rule for each architecture renames what other projects wrote, and resamples positions.

    Raises:
        ValueError: if timm cannot build the model.
    """
    from importlib import import_module

    from dinokit.models.timm_any import Config, TimmAny, classifier_names

    values = {key: value for key, value in section.items() if key not in ("name", "pretrained")}
    _check_depth(section["model"], section.get("args") or {}, len(file.tensors))
    try:
        with torch.device("meta"):
            backbone = TimmAny(Config(**values))
    except (KeyError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"timm cannot build the {section['model']} of it: {error}") from None
    asked, have = (sum(t.numel() for t in x.values()) for x in (backbone.state_dict(), file.tensors))
    if asked > MOST * have:  # building it could take all memory
        raise ValueError(f"its {section['model']} has {asked:,} numbers, and the file has {have:,}")
    tensors, ignored = dict(file.tensors), list(file.other_keys)
    rename = getattr(import_module(type(backbone.net).__module__), "checkpoint_filter_fn", None)
    if rename is not None:
        try:
            tensors = rename(tensors, backbone.net)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"timm finds no {section['model']} in it: {error!r}") from None
    for name in classifier_names(backbone.net):
        heads = [key for key in tensors if key.startswith(f"{name}.")]
        ignored += [f"the classifier {name}"] if heads else []
        tensors = {key: value for key, value in tensors.items() if key not in heads}
    note = f"For frozen use; its class token: {backbone.cls_kind}."
    named = {f"net.{key}": value for key, value in tensors.items()}
    return StoredBackbone(
        f"timm, {section['model']}", named, dict(section), backbone.input, ignored, [note],
        licence=_licence(backbone.net.pretrained_cfg),
    )  # fmt: skip


def _check_depth(model: str, args: dict[str, Any], tensors: int) -> None:
    """Each block has a tensor at least: building more, even without values, could take hours."""
    for name in DEPTHS & set(args):
        value = args[name]
        numbers = [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int)]
        if sum(numbers) > tensors:
            raise ValueError(
                f"timm cannot build the {model} of it: {name}={value}, and the file has {tensors} tensors"
            )


def _plain(value: Any) -> Any:
    """JSON has lists where Python has tuples."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _licence(shown: dict[str, Any]) -> str:
    """Of a pretrained_cfg; empty for the usual Apache-2.0."""
    name = str(shown.get("license") or "")
    return "" if name == "apache-2.0" else name
