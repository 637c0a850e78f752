"""Connectors that the LLaVA classes of transformers lack: one linear layer, queries, gated cross-attention.

Each takes the place of the two-layer projector in the class, so training and generation are those of LLaVA.
`linear` is a projector without its activation, and opens wherever LLaVA does. `query` (Perceiver resampler,
arXiv 2204.14198) makes a fixed number of tokens. `gated` makes none: new layers between those of the language
model read the image, behind gates that are shut at the start, so the language model begins unchanged.

    b  images     N  tokens of an image     D  width of the backbone     L  tokens of the text
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.language import needed
from dinokit.language.folders import LOCAL, check_config, unreadable
from dinokit.language.recipe import Connector

OWN_TYPE = "dinokit_llava"  # model_type of folders that no class of transformers can open
STOCK = ("mlp", "linear")  # connectors that LLaVA's own classes have


def attach(model: Any, cfg: Connector) -> None:
    """Put a connector in the place of the projector of a model of LLaVA; `mlp` leaves it.

    Raises:
        ValueError: if the model shows tiles, whose tokens a query or a gate would not find in their places.
    """
    if cfg.name not in STOCK and model.config.model_type != "llava":
        raise ValueError(f"connector.name={cfg.name} needs view.name=square: tiles have an order to keep.")
    if cfg.name == "linear":
        second = model.model.multi_modal_projector.linear_2  # the class has two: this one changes nothing
        nn.init.eye_(second.weight)
        nn.init.zeros_(second.bias)
    elif cfg.name == "query":
        model.model.multi_modal_projector = Queries(model.config, cfg)
    elif cfg.name == "gated":
        gates = Gates(model.config, cfg)
        model.model.multi_modal_projector = gates
        gates.follow(model)


def image_tokens(cfg: Connector, tokens: int) -> int:
    """How many tokens of the language model an image of `tokens` patches and registers becomes."""
    return {"query": cfg.queries, "gated": 0}.get(cfg.name, tokens)


class Queries(nn.Module):
    """Learned queries that read the tokens of an image, then a linear layer: (b, N, D) -> (b, queries, T)."""

    def __init__(self, config: Any, cfg: Connector) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        heads = config.vision_config.num_attention_heads
        idefics = needed("transformers.models.idefics.perceiver")
        self.resampler = idefics.IdeficsPerceiverResampler(
            _settings(config), width, cfg.depth, heads, width // heads, cfg.queries
        )
        self.out = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.resampler(tokens))


class Gates(nn.Module):
    """Layers that look at the image, before every `every`-th layer of the language model.

    As a projector it keeps the tokens of the images for these layers, and gives the language model none.
    """

    def __init__(self, config: Any, cfg: Connector) -> None:
        super().__init__()
        layer = needed("transformers.models.idefics.modeling_idefics").IdeficsGatedCrossAttentionLayer
        self.places = [*range(0, config.text_config.num_hidden_layers, cfg.every)]
        settings = _settings(config)
        self.layers = nn.ModuleList(layer(settings, layer_idx=number) for number in range(len(self.places)))
        self.norm = nn.LayerNorm(config.vision_config.hidden_size)
        self.width = config.text_config.hidden_size
        self.images: Tensor | None = None  # (b, N, D) of the texts that are computed

    def forward(self, tokens: Tensor) -> Tensor:
        self.images = self.norm(tokens)
        return tokens.new_zeros(len(tokens), 0, self.width)

    def follow(self, model: Any) -> None:
        """Run the layers before those of the language model; no parameter of it changes its name."""
        model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer, place in zip(self.layers, self.places, strict=True):
            decoder = model.model.language_model.layers[place]
            decoder.register_forward_pre_hook(_Look(self, layer), with_kwargs=True)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forget the images of the texts before, unless a text goes on that has shown its own."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if kwargs.get("pixel_values") is None and (cache is None or not cache.get_seq_length()):
            self.images = None


class _Look:
    """A hook: a layer of Gates before one of the language model."""

    def __init__(self, gates: Gates, layer: nn.Module) -> None:
        self.gates, self.layer = gates, layer

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        images = self.gates.images
        if images is None:
            return None
        given = args[0] if args else kwargs["hidden_states"]  # (b, L, T)
        if len(images) != len(given):
            raise ValueError(
                f"{len(images)} images for {len(given)} texts: connector.name=gated shows each text one "
                f"image. Leave out talks with more or none, or take connector.name=mlp."
            )
        # Without a mask transformers would take the attention for a causal one.
        mask = given.new_zeros(len(given), 1, given.shape[1], images.shape[1])
        looked = self.layer(
            given, image_hidden_states=images.to(given.dtype), image_attention_mask=mask,
            cross_attention_gate=given.new_ones(given.shape[:2]),
        )  # fmt: skip
        if args:
            return (looked, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": looked}


def _settings(config: Any) -> Any:
    """The sizes of the layers of Idefics: those of the language model, reading the width of the backbone."""
    text = config.text_config
    settings = needed("transformers").IdeficsConfig(
        hidden_size=text.hidden_size, intermediate_size=4 * text.hidden_size,
        num_attention_heads=text.num_attention_heads, alpha_type="float", alpha_initializer="zeros",
        vision_config={"embed_dim": config.vision_config.hidden_size},
    )  # fmt: skip
    settings._attn_implementation = "sdpa"
    return settings


def mark_folder(folder: Path, cfg: Connector) -> None:
    """Let transformers refuse a saved folder whose connector its class lacks: it would leave out weights."""
    if cfg.name not in STOCK:
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**values, "model_type": OWN_TYPE, "connector": asdict(cfg)}, indent=2))


def open_connected(folder: Path, key: str) -> Any | None:
    """The model of a folder that mark_folder() has marked; None for others.

    Raises:
        ValueError: if it cannot be read; it names the folder.
    """
    transformers = needed("transformers")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if values.get("model_type") != OWN_TYPE:
            return None
        check_config(values)
        cfg = Connector(**values.pop("connector"))
        config = transformers.LlavaConfig(**{**values, "model_type": "llava"})
        base: Any = transformers.LlavaForConditionalGeneration

        class Connected(base):  # type: ignore[misc]
            """LLaVA with this connector, for from_pretrained()."""

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                attach(self, cfg)

        opened, report = Connected.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **LOCAL,
        )
        wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]})
        if wrong:
            raise ValueError(f"its weights do not fit its config.json: {wrong[:3]}")  # noqa: TRY301
    except Exception as error:  # a damaged folder fails in transformers in many ways
        raise unreadable(folder, key, error) from None
    return opened
