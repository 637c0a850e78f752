"""A model that answers: a backbone's tower, a connector and a language model in one class of transformers.

It is a LlavaForConditionalGeneration (arXiv 2310.03744) or, with view=tiles, a
LlavaNextForConditionalGeneration. The saved folder is opened by AutoModelForImageTextToText and AutoProcessor
where dinokit is not installed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinokit.data.scenes.regions import REGIONS, WORDS
from dinokit.data.scenes.sentences import VOCABULARY
from dinokit.data.talks import MARK
from dinokit.features import fingerprint
from dinokit.language import needed
from dinokit.language.connectors import Gates, attach, image_tokens, mark_folder, open_connected
from dinokit.language.folders import open_network, open_with
from dinokit.language.labels import stop_ids
from dinokit.language.recipe import Config, Connector, Language, View
from dinokit.language.towers import Tower, tower_of
from dinokit.language.words import word_tokenizer
from dinokit.models import Backbone
from dinokit.runtime.files import aside, write_text

ABOUT = "dinokit.json"  # beside the model: what it was made of
ROWS = 64  # rows of the embedding are a multiple of it where the image symbol adds one
SAME = 1e-3  # of the logits' largest value: the language model alone, and inside of the class
CONNECTOR = ("multi_modal_projector", "image_newline")  # names of its parameters begin with them


@dataclass
class Answerer:
    """The model, and the processor that prepares images and text for it."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer, with the image's symbol."""
        return self.processor.tokenizer

    @property
    def tiled(self) -> bool:
        """Whether an image is shown in tiles, so that its number of tokens depends on its size."""
        return bool(self.model.config.model_type == "llava_next")

    @property
    def one_image(self) -> bool:
        """Whether each text must have one image."""
        return isinstance(self.model.model.multi_modal_projector, Gates)

    def parameters(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of `connector`, or of `language`, by name."""
        named = dict(self.model.model.named_parameters())
        if part == "connector":
            found = {f"model.{k}": v for k, v in named.items() if k.startswith(CONNECTOR)}
            fixed = "linear_2" if self.model.config.projector_hidden_act == "linear" else "-"
            return {name: value for name, value in found.items() if fixed not in name}
        found = {f"model.{k}": v for k, v in named.items() if k.startswith("language_model")}
        output = self.model.lm_head.weight
        tied = any(output is each for each in found.values())
        return found if tied else {**found, "lm_head.weight": output}

    def scales(self) -> tuple[float, float]:
        """Root mean squares of an image's tokens behind the connector, and of rows of the embedding."""
        rows = self.model.get_input_embeddings().weight
        side = self.model.config.vision_config.image_size
        shown = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            tower = self.model.model.vision_tower(shown.to(rows.device), output_hidden_states=True)
            tokens = tower.hidden_states[self.model.config.vision_feature_layer]
            seen = self.model.model.multi_modal_projector(tokens)
        if not seen.numel():  # of a connector that gives the language model no tokens
            return math.nan, math.nan
        return float(seen.float().pow(2).mean().sqrt()), float(rows.detach().float().pow(2).mean().sqrt())


def without_bars() -> None:
    """Turn off the progress bars of transformers, for commands, which show their own."""
    needed("transformers").utils.logging.disable_progress_bar()


def build_model(cfg: Config, backbone: Backbone) -> Answerer:
    """The model of a recipe before its first step.

    Raises:
        ValueError, LookupError: if backbone or language model have no place in the class; it says why.
    """
    torch.manual_seed(cfg.run.seed)
    tower = tower_of(backbone, cfg.view.size, cfg.view.layer)
    language, tokenizer = language_model(cfg.language, vocabulary(cfg))
    image_id = tokenizer.convert_tokens_to_ids(MARK)
    model = assemble(tower, language, cfg.view, image_id, cfg.connector)
    settings = model.generation_config
    settings.eos_token_id = stop_ids(tokenizer, language.generation_config)
    settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    settings.do_sample = False
    for key in ("temperature", "top_p", "top_k"):  # of a sampling that is off
        setattr(settings, key, None)
    return Answerer(model, processor_of(tower, tokenizer, cfg.view, cfg.connector))


def vocabulary(cfg: Config) -> tuple[str, ...]:
    """The words that a tiny language model knows: those of boxes only if some talks of the recipe have boxes.

    Words that it does not need would change how a model begins.
    """
    sections = [cfg.data, *(stage.get("data") for stage in cfg.stages.values() if stage)]
    asked = {family for section in sections for family in (section or {}).get("families") or ()}
    return VOCABULARY + WORDS * bool(asked & {*REGIONS})


def language_model(cfg: Language, words: Sequence[str]) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, which has the image's symbol and one for padding.

    Args:
        cfg: which.
        words: that a tiny one knows.

    Raises:
        ValueError, LookupError: if the folder has no such model; nothing is downloaded.
    """
    transformers = needed("transformers")
    if cfg.name == "tiny":
        tokenizer = word_tokenizer(words, chat=True)
        if cfg.width % cfg.heads:
            raise ValueError(f"language.width={cfg.width} is no multiple of language.heads={cfg.heads}.")
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=cfg.width, intermediate_size=cfg.hidden,
            num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads, num_key_value_heads=cfg.heads,
            tie_word_embeddings=True, initializer_range=0.05,  # 0.02 is for a width of thousands
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), tokenizer
    folder = Path(cfg.path).expanduser()
    if not (folder / "config.json").is_file():
        raise LookupError(
            f"language.path={cfg.path} is no folder of a language model: it has no config.json. Give one as "
            f"Hugging Face has it; nothing is downloaded."
        )
    tokenizer = open_with("AutoTokenizer", folder, "language.path", use_fast=True)
    if not tokenizer.is_fast or not tokenizer.chat_template:
        what = "chat template" if tokenizer.is_fast else "fast tokenizer (tokenizer.json)"
        raise ValueError(
            f"language.path={cfg.path} has no {what}, which gives every answer its place in the text. Take "
            f"the instruct version of the model, or add one with transformers."
        )
    model = open_network("AutoModelForCausalLM", folder, "language.path", dtype=torch.float32)
    head = model.get_output_embeddings()
    if head is None or head.bias is not None or not hasattr(model, "model"):
        raise ValueError(
            f"language.path={cfg.path}: a {type(model).__name__} has no place in transformers' Llava classes,"
            f" which take a decoder and an output layer without bias. Llama, Mistral, Qwen2 and Qwen3 fit."
        )
    missing = [MARK] + ([] if tokenizer.pad_token else ["<pad>"])
    tokenizer.add_tokens([_symbol(transformers, text) for text in missing], special_tokens=True)
    if not tokenizer.pad_token:
        tokenizer.pad_token = "<pad>"
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS, mean_resizing=False)
    return model, tokenizer


def _symbol(transformers: Any, text: str) -> Any:
    return transformers.AddedToken(text, special=True, normalized=False)


def assemble(
    tower: Tower, language: Any, view: View, image_id: int, connector: Connector | None = None
) -> Any:
    """The three parts in their class.

    Raises:
        ValueError: if the language model computes other logits inside of the class than alone.
    """
    if view.name == "tiles" and (tower.registers or view.cls):
        what = "view.cls=true" if view.cls else f"a backbone with {tower.registers} registers"
        raise ValueError(
            f"view.name=tiles and {what}: transformers' LLaVA-NeXT puts patches alone into their places. "
            f"Take view.name=square."
        )
    connector = connector or Connector()
    transformers = needed("transformers")
    grid = (tower.input.size // tower.patch) ** 2
    settings = {
        "vision_config": tower.model.config,
        "text_config": language.config,
        "image_token_index": image_id,
        "vision_feature_layer": tower.layer,
        "vision_feature_select_strategy": "full" if view.cls else "default",
        "image_seq_length": image_tokens(connector, grid + tower.registers + view.cls),
        "projector_hidden_act": "linear" if connector.name == "linear" else "gelu",
        "tie_word_embeddings": language.config.tie_word_embeddings,
    }
    if view.name == "tiles":
        settings["image_grid_pinpoints"] = [list(canvas) for canvas in canvases(view, tower.input.size)]
    name = "LlavaNext" if view.name == "tiles" else "Llava"
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    projector = model.model.multi_modal_projector
    projector.to_empty(device="cpu")
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    if view.name == "tiles":
        width = language.config.hidden_size
        model.model.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
    model.model.vision_tower = tower.model
    model.model.language_model = language.model
    model.lm_head = language.get_output_embeddings()
    attach(model, connector)
    model.eval()
    language.eval()
    ids = torch.arange(min(8, image_id))[None]
    with torch.no_grad():
        alone, inside = language(input_ids=ids).logits, model(input_ids=ids).logits
    if not torch.allclose(alone, inside, rtol=0, atol=SAME * float(alone.abs().max())):
        raise ValueError(
            f"A {type(language).__name__} scales its embeddings or logits outside of its decoder, which "
            f"transformers' {name} class leaves out. Llama, Mistral, Qwen2 and Qwen3 fit."
        )
    return model


def canvases(view: View, size: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths in pixels of the canvases of tiles; by default those of LLaVA-1.6.

    Raises:
        ValueError: if one is no multiple of the tile.
    """
    s = size
    chosen = view.canvases or ((s, 2 * s), (2 * s, s), (2 * s, 2 * s), (3 * s, s), (s, 3 * s))
    wrong = [list(canvas) for canvas in chosen if canvas[0] % s or canvas[1] % s]
    if wrong:
        raise ValueError(f"view.canvases has {wrong[0]}, which tiles of {s} pixels do not cover.")
    return tuple(chosen)


def processor_of(tower: Tower, tokenizer: Any, view: View, connector: Connector | None = None) -> Any:
    """The processor that shows images as training does, and writes as many image symbols as tokens."""
    transformers, connector = needed("transformers"), connector or Connector()
    grid = (tower.input.size // tower.patch) ** 2
    tokens = image_tokens(connector, grid + tower.registers + view.cls)
    side = tower.input.size
    square = {"height": side, "width": side}
    common = {"image_mean": list(tower.input.mean), "image_std": list(tower.input.std), "resample": 3}
    if view.name == "tiles":
        pins = [list(canvas) for canvas in canvases(view, side)]
        shown = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pins, **common
        )
    else:
        shown = transformers.BitImageProcessor(size=square, crop_size=square, do_center_crop=False, **common)
    tokenizer.padding_side = "left"  # of generation: training pads by itself
    kind = transformers.LlavaNextProcessor if view.name == "tiles" else transformers.LlavaProcessor
    return kind(
        image_processor=shown, tokenizer=tokenizer, patch_size=tower.patch, image_token=MARK,
        vision_feature_select_strategy="full" if view.cls else "default",
        num_additional_image_tokens=tokens - grid + (not view.cls), chat_template=tokenizer.chat_template,
    )  # fmt: skip


def about(cfg: Config, backbone: Backbone) -> dict[str, Any]:
    """What a saved model records of its making."""
    return {
        "recipe": cfg.name,
        "backbone": {k: v for k, v in cfg.backbone.items() if k in ("name", "weights")},
        "fingerprint": fingerprint(backbone),
        "width": backbone.width,
        "patch": backbone.patch,
        "view": asdict(cfg.view),
        "connector": asdict(cfg.connector),
        "language": asdict(cfg.language),
    }


def save_model(answerer: Answerer, folder: Path, facts: dict[str, Any]) -> None:
    """Write the folder of a model; an existing one is replaced when the new one is complete."""
    with aside(folder) as beside:
        new = beside / folder.name
        answerer.model.save_pretrained(new)
        answerer.processor.save_pretrained(new)
        mark_folder(new, Connector(**facts.get("connector", {})))
        write_text(new / ABOUT, json.dumps(facts, indent=1))


def folder_of(path: str | Path) -> Path:
    """The folder of a model: the one given, or that of a run.

    Raises:
        LookupError: if there is none.
    """
    given = Path(path).expanduser()
    for folder in (given, given / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise LookupError(
        f"{path} has no model that answers: neither config.json nor model/config.json. `dinokit instruct` "
        f"writes model/ into the folder of its run when a stage is done."
    )


def open_model(path: str | Path, device: torch.device | str = "cpu") -> Answerer:
    """A saved model, in eval mode. Nothing is downloaded and no code of a file is run.

    Raises:
        LookupError, ValueError: if there is none, it cannot be read or is of another kind, or transformers is
            not installed.
    """
    folder = folder_of(path)
    model = open_connected(folder, "model") or open_network(
        "AutoModelForImageTextToText", folder, "model", dtype=torch.float32
    )
    if model.config.model_type not in ("llava", "llava_next"):
        raise ValueError(
            f"{folder} has a {type(model).__name__}; dinokit asks models of LLaVA and LLaVA-NeXT."
        )
    return Answerer(model.to(device).eval(), open_with("AutoProcessor", folder, "model"))
