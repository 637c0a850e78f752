"""Low-rank changes (LoRA, arXiv 2106.09685) of a language model's linear layers, by peft."""

from typing import Any

from torch import nn

from dinokit.language import needed
from dinokit.language.model import Answerer
from dinokit.language.recipe import Lora


def targets(decoder: nn.Module) -> list[str]:
    """The names of all linear layers in a decoder: found by type, as every family names them otherwise."""
    return [name for name, module in decoder.named_modules() if type(module) is nn.Linear]


def add_lora(answerer: Answerer, cfg: Lora) -> dict[str, nn.Parameter]:
    """Add low-rank changes to the decoder, not to the output layer; at first they change nothing.

    Returns:
        Their parameters, by name.

    Raises:
        ValueError: if peft is not installed.
    """
    peft = needed("peft", "lora")
    decoder = answerer.model.model.language_model
    settings = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=targets(decoder)
    )
    peft.inject_adapter_in_model(settings, decoder)
    named = answerer.model.named_parameters()
    return {name: parameter for name, parameter in named if ".lora_" in name}


def merge_lora(answerer: Answerer) -> None:
    """Add the changes to the weights, so that the model is one of transformers again."""
    decoder = answerer.model.model.language_model
    layers = [(name, module) for name, module in decoder.named_modules() if hasattr(module, "base_layer")]
    for name, module in layers:
        if not hasattr(module, "merge"):
            continue
        layer: Any = module
        layer.merge()
        parent = decoder.get_submodule(name.rpartition(".")[0]) if "." in name else decoder
        setattr(parent, name.rpartition(".")[2], layer.base_layer)
