"""Folders of Hugging Face: transformers opens them, downloads nothing and runs no code of theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinokit.language import needed

LOCAL = {"local_files_only": True, "trust_remote_code": False}
LAYERS = 1000  # the most that a config.json may ask for


def open_network(kind: str, folder: Path, key: str, **options: Any) -> Any:
    """A network with its weights, which are in safetensors.

    Args:
        kind: a class of transformers that finds the network's own, such as AutoModel.
        folder: with config.json and model.safetensors, or its parts with their index.
        key: what names the folder, for errors.
        options: of from_pretrained().

    Raises:
        ValueError: if it cannot be read, would need other code, or lacks a tensor; it names the folder.
    """
    transformers = needed("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        check_config(config.to_dict())
        opened = getattr(transformers, kind)
        network, report = opened.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **LOCAL, **options
        )
        check_complete(report)
    except Exception as error:  # a damaged folder fails in transformers in many ways
        raise unreadable(folder, key, error) from None
    return network


def open_with(kind: str, folder: Path, key: str, **options: Any) -> Any:
    """What stands beside a network: AutoTokenizer, or AutoProcessor.

    Raises:
        ValueError: as open_network().
    """
    try:
        return getattr(needed("transformers"), kind).from_pretrained(folder, **LOCAL, **options)
    except Exception as error:
        raise unreadable(folder, key, error) from None


def unreadable(folder: Path, key: str, error: Exception) -> ValueError:
    """The error for a folder that transformers does not read."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{key}={folder} cannot be read: {type(error).__name__}: {reason}. It needs config.json, "
        f"model.safetensors and the files of a tokenizer, as save_pretrained() of transformers writes them."
    )


def check_complete(report: Mapping[str, Any]) -> None:
    """Refuse weights that lack a tensor: transformers fills it with random numbers and only logs it.

    Args:
        report: of from_pretrained(output_loading_info=True). Tied weights are not missing in it.

    Raises:
        ValueError: it names the first of them.
    """
    # A text encoder that was trained on words has often no pooler, and nothing here reads one.
    missing = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    wrong = sorted(missing | {str(found[0]) for found in report["mismatched_keys"]})
    if wrong:
        raise ValueError(
            f"its model.safetensors is damaged or of another model: {len(wrong)} tensors are missing or have "
            f"another shape than in config.json, such as {', '.join(wrong[:3])}"
        )


def check_config(settings: Any) -> None:
    """Refuse a config.json that makes transformers fetch other code, or that builds layers without end.

    Raises:
        ValueError: it names the key.
    """
    for key, value in settings.items():
        if key == "quantization_config" or "attn_implementation" in str(key):
            if value not in (None, True, False, "eager", "sdpa"):
                raise ValueError(f"its config.json has {key}={value}, which needs other code")
        elif isinstance(value, dict):
            check_config(value)
        elif key in ("num_hidden_layers", "num_layers") and not (type(value) is int and 0 <= value <= LAYERS):
            raise ValueError(f"its config.json has {key}={value}, and {LAYERS} is the most")
