"""Experimental: a small language model that reads and writes images as embeddings.

It follows Emu2 (arXiv 2312.13286).

The features of an image, averaged to 4 x 4 and standardised by channel, are 16 embeddings. They stand in the
sequence in place of words, and the model predicts the next element: a word, or the next embedding. A decoder
turns embeddings into pixels.

    <bos> caption [IMG] v1 ... v16 [/IMG] <eos>        writes an image
    <bos> [IMG] v1 ... v16 [/IMG] caption <eos>        reads one

Letters: b images, D channels of an embedding, W width of the language model, T tokens.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.data.scenes.sentences import VOCABULARY
from dinokit.language import needed
from dinokit.language.words import IMAGE, word_tokenizer
from dinokit.runtime.files import write_text
from dinokit.weights.checkpoint import open_checkpoint, write_tensors

GRID, COUNT = 4, 16  # embeddings across an image, and in all
OPEN, CLOSE = "[IMG]", "[/IMG]"


@dataclass
class Shape:
    """What the model is built from."""

    channels: int  # D
    width: int = 128  # W
    layers: int = 3
    heads: int = 4
    weight: float = 4.0  # of the loss of embeddings, beside that of words
    pixels: int = 64  # the side of the drawn image


class Decoder(nn.Module):
    """Embeddings (b, 16, D), standardised -> pixels (b, 3, S, S) in [0, 1]: two blocks of attention."""

    def __init__(self, channels: int, pixels: int, width: int = 192) -> None:
        super().__init__()
        self.side = pixels // GRID
        self.project, self.places = nn.Linear(channels, width), nn.Parameter(torch.zeros(1, COUNT, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.pixels = nn.Linear(width, 3 * self.side**2)

    def forward(self, embeddings: Tensor) -> Tensor:
        """As the class says."""
        rows = self.pixels(self.blocks(self.project(embeddings) + self.places))
        return F.pixel_shuffle(rows.transpose(1, 2).unflatten(2, (GRID, GRID)), self.side) + 0.5


class Imagine(nn.Module):
    """A Llama of transformers with `up` (D -> W) and `down` (W -> D), both without bias, and a decoder."""

    mean: Tensor  # (D,), of the embeddings of the training
    std: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        transformers = needed("transformers")
        self.shape = shape
        self.tokenizer = word_tokenizer([*VOCABULARY, OPEN, CLOSE], chat=False)
        config = transformers.LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=shape.width, intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=128,
            pad_token_id=self.tokenizer.pad_token_id, bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        self.lm = transformers.LlamaForCausalLM(config)
        self.up = nn.Linear(shape.channels, shape.width, bias=False)
        self.down = nn.Linear(shape.width, shape.channels, bias=False)
        self.decoder = Decoder(shape.channels, shape.pixels)
        self.register_buffer("mean", torch.zeros(shape.channels))
        self.register_buffer("std", torch.ones(shape.channels))
        ids: Any = self.tokenizer.convert_tokens_to_ids([IMAGE, OPEN, CLOSE])
        self.image_id, self.open_id, self.close_id = map(int, ids)

    def standardised(self, embeddings: Tensor) -> Tensor:
        """By the stored mean and deviation of each channel: else a few large channels rule the loss."""
        return (embeddings - self.mean) / self.std

    def tokens(self, captions: Sequence[str], writes: Sequence[bool]) -> dict[str, Tensor]:
        """The sequences of captions with an image, padded: input_ids and attention_mask, (b, T)."""
        image = f"{OPEN} {' '.join([IMAGE] * COUNT)} {CLOSE}"
        pairs = zip(captions, writes, strict=True)
        texts = [f"{words} {image}" if write else f"{image} {words}" for words, write in pairs]
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt"))

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, embeddings: Tensor) -> Tensor:
        """States after the final norm, (b, T, W), of sequences with embeddings (b, 16, D) in their places."""
        rows = self._rows(input_ids, embeddings)
        return self.lm.model(inputs_embeds=rows, attention_mask=attention_mask).last_hidden_state

    def forward(self, input_ids: Tensor, attention_mask: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        """The losses of a batch, with transformers' names of arguments; embeddings are standardised.

        Words are predicted but not image places nor their begin and end, whose number is fixed. The state
        before an image place predicts its embedding, so the begin symbol predicts the first.
        """
        states = self.hidden(input_ids, attention_mask, embeddings)
        predicted = self.down(states[:, :-1][input_ids[:, 1:] == self.image_id])
        image = F.smooth_l1_loss(predicted, embeddings.flatten(0, 1))
        hidden = attention_mask == 0
        for symbol in (self.image_id, self.open_id, self.close_id):
            hidden |= input_ids == symbol
        labels = input_ids.masked_fill(hidden, -100)  # which cross_entropy() leaves out
        logits = self.lm.lm_head(states[:, :-1])
        words = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"loss": words + self.shape.weight * image, "words": words, "image": image}

    @torch.inference_mode()
    def imagine(self, captions: Sequence[str], cache: bool = True) -> Tensor:
        """Embeddings (b, 16, D), standardised, from captions in the words of the vocabulary.

        `cache` keeps the keys and values of what was read; else every step reads all again.
        """
        texts = [f"{self.tokenizer.bos_token} {caption} {OPEN}" for caption in captions]
        lists: Any = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        made = torch.empty(len(lists), COUNT, self.shape.channels)
        for length in {len(ids) for ids in lists}:  # together without padding, which would move positions
            chosen = [i for i, ids in enumerate(lists) if len(ids) == length]
            rows = self.lm.get_input_embeddings()(torch.tensor([lists[i] for i in chosen]))
            kept, new = self._cache() if cache else {}, rows
            for k in range(COUNT):
                out = self.lm.model(inputs_embeds=new, use_cache=cache, **kept)
                made[chosen, k] = self.down(out.last_hidden_state[:, -1])
                rows = torch.cat([rows, self.up(made[chosen, k : k + 1])], dim=1)
                new = rows[:, -1:] if cache else rows
        return made

    def _rows(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        rows = self.lm.get_input_embeddings()(ids)
        places = (ids == self.image_id)[..., None].expand_as(rows)
        return rows.masked_scatter(places, self.up(embeddings).to(rows.dtype))

    def _cache(self) -> dict[str, Any]:
        """An empty cache under the name that this version of transformers gives it."""
        names = inspect.signature(self.lm.model.forward).parameters
        return {"cache" if "cache" in names else "past_key_values": needed("transformers").DynamicCache()}

    @torch.inference_mode()
    def teacher_forced(self, captions: Sequence[str], embeddings: Tensor) -> Tensor:
        """Embeddings (b, 16, D) predicted from the caption and the true ones before each."""
        batch = self.tokens(captions, [True] * len(captions))
        ids = batch["input_ids"]
        states = self.hidden(ids, batch["attention_mask"], embeddings)
        return self.down(states[:, :-1][ids[:, 1:] == self.image_id]).unflatten(0, (-1, COUNT))

    @torch.inference_mode()
    def read(self, embeddings: Tensor, longest: int = 24) -> list[str]:
        """Captions of standardised embeddings (b, 16, D): the likeliest word each time."""
        ids = self.tokens([""] * len(embeddings), [False] * len(embeddings))["input_ids"][:, :-1]  # no <eos>
        made = self.lm.generate(
            inputs_embeds=self._rows(ids, embeddings), attention_mask=torch.ones_like(ids),
            max_new_tokens=longest, do_sample=False,
        )  # fmt: skip
        return list(self.tokenizer.batch_decode(made, skip_special_tokens=True))


def check_words(model: Imagine, caption: str) -> None:
    """Refuse a caption with words that the model has never read.

    Raises:
        ValueError: naming them, and those that there are.
    """
    unknown = sorted(set(caption.split()) - set(VOCABULARY))
    if unknown or not caption.split():
        raise ValueError(
            f"The model knows {len(VOCABULARY)} words, and not: {', '.join(unknown) or '(no words given)'}. "
            f"Write as in 'a red disc at the top left and a blue cross at the middle right'."
        )


def save(model: Imagine, out: Path, about: Mapping[str, Any]) -> None:
    """Write a folder: tensors, the settings, and what it was made from.

    Raises:
        OSError: if it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_tensors(out / "imagine.safetensors", tensors, {})
    write_text(out / "imagine.json", json.dumps({"shape": asdict(model.shape), **about}, indent=2))


def load(folder: str | Path) -> tuple[Imagine, dict[str, Any]]:
    """The model of a folder that save() wrote, in eval mode, and what it was made from.

    Raises:
        LookupError: if there is no such folder.
        ValueError: if its files do not fit each other.
    """
    settings = Path(folder) / "imagine.json"
    if not settings.is_file():
        raise LookupError(f"{folder} has no imagine.json: give the folder that dinokit imagine train wrote.")
    try:
        about = dict(json.loads(settings.read_text(encoding="utf-8")))
        model = Imagine(Shape(**about.pop("shape")))
        model.load_state_dict(open_checkpoint(Path(folder) / "imagine.safetensors").tensors)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is damaged, or was written by another version: {error}") from None
    return model.eval().requires_grad_(False), about
