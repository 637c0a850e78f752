"""The tower of texts: an encoder of transformers with its tokenizer, and one vector a text.

It is a small Bert from nothing over the words of the captions, or any text encoder in a folder of Hugging
Face. Nothing is downloaded, and no code in a folder is run.

    b  texts     L  tokens of the longest     T  width of the encoder
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinokit.language import needed
from dinokit.language.align_recipe import Text
from dinokit.language.folders import open_network, open_with
from dinokit.language.words import word_tokenizer

Pool = Literal["mean", "last"]


class TextTower(nn.Module):
    """An encoder and how its tokens are pooled.

    Args:
        encoder: of transformers; its output has `last_hidden_state`.
        tokenizer: of transformers.
        pool: mean of the tokens that are no padding, or the last of them by its place: an end symbol is the
            largest id only in the vocabulary of CLIP.
        length: tokens, at most.
    """

    def __init__(self, encoder: Any, tokenizer: Any, pool: Pool, length: int) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.pool, self.length = encoder, tokenizer, pool, length
        self.width = int(encoder.config.hidden_size)

    def train(self, mode: bool = True) -> "TextTower":
        """As of nn.Module; a frozen encoder stays in eval mode, where dropout does nothing."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, (b, L) int64, padded at the right and cut to `length`."""
        given = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        found = self.tokenizer([*texts], padding_side="right", **given)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def cut(self, texts: Iterable[str]) -> int:
        """How many texts are longer than `length`."""
        return sum(len(ids) > self.length for ids in self.tokenizer([*texts])["input_ids"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, L), (b, L) -> (b, T)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return pooled(output.last_hidden_state, attention_mask, self.pool)

    def save(self, folder: Path) -> None:
        """Write encoder and tokenizer as AutoModel and AutoTokenizer read them."""
        with quiet():
            self.encoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers inside the block."""
    settings = needed("transformers.utils.logging")
    shown, level = settings.is_progress_bar_enabled(), settings.get_verbosity()
    settings.disable_progress_bar()
    settings.set_verbosity_error()  # a Bert has a pooler that nothing here reads, and reports that it is new
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if shown:
            settings.enable_progress_bar()


def pooled(tokens: Tensor, mask: Tensor, pool: Pool) -> Tensor:
    """One vector a text, from tokens (b, L, T) and a mask (b, L) that is 0 at padding: (b, T)."""
    if pool == "mean":
        weight = mask[:, :, None].to(tokens.dtype)
        return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).argmax(dim=1)
    return tokens[torch.arange(len(tokens), device=mask.device), last]


def build_tower(cfg: Text, captions: Iterable[str]) -> TextTower:
    """The tower of a recipe.

    Args:
        cfg: the section `text`.
        captions: whose words are the vocabulary of a tiny tower.

    Raises:
        ValueError: if there is no such folder, or it has no text encoder.
    """
    if cfg.name == "folder":
        tower = open_tower(Path(cfg.path).expanduser(), cfg.pool, cfg.length, "text.path")
        tower.requires_grad_(cfg.train)
        if isinstance(pooler := getattr(tower.encoder, "pooler", None), nn.Module):
            pooler.requires_grad_(False)  # nothing reads it: several processes would wait for its gradient
        return tower
    transformers, tokenizers = needed("transformers"), needed("tokenizers")
    split = tokenizers.pre_tokenizers.BertPreTokenizer()  # at spaces, and around punctuation
    counts = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(caption.lower()))
    tokenizer = word_tokenizer([word for word, _ in counts.most_common(cfg.words)], chat=False)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.backend_tokenizer.pre_tokenizer = split
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=4 * cfg.width,
        max_position_embeddings=cfg.length,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # the usual 0.02 is for widths of 768 and more
    )
    return TextTower(transformers.BertModel(config, add_pooling_layer=False), tokenizer, "mean", cfg.length)


def open_tower(folder: Path, pool: Pool, length: int, key: str) -> TextTower:
    """The encoder in a folder of Hugging Face, in eval mode.

    Args:
        folder: with config.json, model.safetensors and the files of a fast tokenizer.
        pool: as TextTower.
        length: tokens, at most; fewer if the encoder has fewer positions.
        key: what names the folder, for errors.

    Raises:
        ValueError: if there is no such folder, transformers does not take it without other code, or it has
            another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{key}={folder} is no folder of a text encoder: it has no config.json. transformers writes one "
            f"by save_pretrained(), of the model and of its tokenizer."
        )
    with quiet():
        encoder = open_network("AutoModel", folder, key)
    tokenizer, config = open_with("AutoTokenizer", folder, key), encoder.config
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise ValueError(
            f"{key}={folder} has a {type(encoder).__name__}, which is no encoder of texts alone. Take its "
            f"part for texts, such as the CLIPTextModel of a CLIPModel, and save it by save_pretrained()."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{key}={folder}: its tokenizer has no symbol for padding. Set one and save it again."
        )
    places = getattr(config, "max_position_embeddings", length)
    return TextTower(encoder.float().eval(), tokenizer, pool, min(length, places))
