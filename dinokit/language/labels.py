"""From talks to ids and labels: what the language model reads, and which of it it learns to say.

The whole talk is rendered once by the chat template and read once by the tokenizer, with offsets. A token is
supervised if it begins inside an answer. Nothing is counted, so no tokenizer shifts the labels; what does not
fit is an error and no warning.

    B  talks     L  tokens     n  image tokens of an image
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinokit.data.decode import ImageLike
from dinokit.data.talks import MARK, Talk, Turn
from dinokit.data.transforms import size_of

IGNORED = -100  # the label of a token that is not supervised
CHECKED = 50  # talks whose ids are compared with those of their parts


@dataclass(frozen=True)
class Rendered:
    """A talk as text, with the places (first, after the last character) of its answers."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render(tokenizer: Any, turns: Sequence[Turn], key: str = "the talk") -> Rendered:
    """The text of a talk by the tokenizer's chat template.

    Raises:
        ValueError: if the template writes a talk otherwise when more follows, so that no answer has a place.
    """

    def text(count: int, prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns[:count]]
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return str(written)

    whole, spans = text(len(turns), False), []
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before, after = text(number, True), text(number + 1, False)
        if not whole.startswith(before) or not whole.startswith(after):
            raise ValueError(
                f"{key}: the chat template of the language model writes the first {number + 1} turns "
                f"otherwise when more turns follow, so its answers have no place. Give the folder a template "
                f"that only adds text."
            )
        spans.append((len(before), len(after)))
    return Rendered(whole, tuple(spans))


def marked(tokenizer: Any, talk: Talk) -> str:
    """A talk as the model reads it, with [[ ]] around what it learns to say, and one mark an image."""
    shown, parts, place = render(tokenizer, talk.turns, talk.key), [], 0
    for begin, end in shown.spans:
        parts += [shown.text[place:begin], "[[", shown.text[begin:end], "]]"]
        place = end
    return "".join([*parts, shown.text[place:]])


def prompt_of(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The text after which the model answers."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def special_texts(tokenizer: Any) -> set[str]:
    """The symbols of the tokenizer that no text of a talk may contain, as they would end or begin a turn."""
    added = {str(each) for each in tokenizer.added_tokens_decoder.values() if each.special}
    return (added | set(map(str, tokenizer.all_special_tokens))) - {MARK}


def stop_ids(tokenizer: Any, generation: Any = None) -> list[int]:
    """The symbols that end an answer: those of model and tokenizer, and what the template ends one with."""
    given = getattr(generation, "eos_token_id", None)
    found: set[Any] = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id}
    shown = render(tokenizer, [Turn("user", "a"), Turn("assistant", "a")])
    encoded = tokenizer(shown.text[slice(*shown.spans[0])], add_special_tokens=False)["input_ids"]
    ids = special_ids(tokenizer)
    found.add(next((each for each in reversed(encoded) if each in ids), None))
    return sorted(found - {None})


def unknown_word(tokenizer: Any, texts: Sequence[str]) -> str:
    """The first word that the tokenizer does not know; the first of all where none is found."""
    words, unknown = [word for text in texts for word in text.split()], tokenizer.unk_token_id
    rows = tokenizer(words, add_special_tokens=False)["input_ids"]
    return next((word for word, row in zip(words, rows, strict=True) if unknown in row), words[0])


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokenizer's symbols."""
    added = {number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
    return added | set(tokenizer.all_special_ids)


class Labels:
    """Ids and labels of talks.

    Args:
        tokenizer: a fast one with a chat template.
        stops: ids that end an answer.
        count: image tokens n of an image.
        length: tokens; longer talks lose whole turns at their end.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[int], count: Callable[[ImageLike], int], length: int
    ) -> None:
        self.tokenizer, self.stops, self.count, self.length = tokenizer, set(stops), count, length
        self.specials, self.ids = special_texts(tokenizer), special_ids(tokenizer)
        self.checked = self.cut = 0  # talks whose ids were checked, and those of them that lost turns
        self.one_image = False  # whether every talk must have one image

    def __call__(self, talk: Talk) -> tuple[list[int], list[int]]:
        """Ids and labels of a talk, (L,) each; labels are ids where the token is supervised, else IGNORED.

        Raises:
            ValueError: if a text contains a symbol of the template, an answer has no end symbol, or not even
                the first answer fits into `length`; it names the talk.
        """
        turns, cut = self.expanded(talk), False
        while True:
            shown = render(self.tokenizer, turns, talk.key)
            read = self.tokenizer(shown.text, add_special_tokens=False, return_offsets_mapping=True)
            ids = list(read["input_ids"])
            if len(ids) <= self.length:
                break
            kept = turns[:-2]
            if not any(turn.role == "assistant" for turn in kept):
                raise ValueError(
                    f"{talk.key}: {len(ids)} tokens to its first answer, more than length={self.length}. "
                    f"Raise length, or remove the talk."
                )
            turns, cut = kept, True
        labels = self._labels(talk.key, ids, read["offset_mapping"], shown)
        if self.checked < CHECKED:
            self.checked, self.cut = self.checked + 1, self.cut + cut
            self._check(talk.key, ids, shown)
        return ids, labels

    def expanded(self, talk: Talk) -> list[Turn]:
        """The turns with every image mark written as often as the image has tokens."""
        self.check_texts(talk.key, talk.turns, len(talk.images))
        counts = iter([self.count(image) for image in talk.images])
        turns = []
        for turn in talk.turns:
            first, *rest = turn.text.split(MARK)
            turns.append(Turn(turn.role, first + "".join(MARK * next(counts) + text for text in rest)))
        return turns

    def check_texts(self, key: str, turns: Sequence[Turn], images: int) -> None:
        """Refuse a talk that contains a symbol of the template, or has not the one image that it must have.

        Raises:
            ValueError: naming the talk.
        """
        found = next((each for turn in turns for each in self.specials if each in turn.text), None)
        if found:
            raise ValueError(
                f"{key}: a text contains {found}, a symbol of the language model that would end or "
                f"begin a turn. Remove it from the text."
            )
        if self.one_image and images != 1:
            raise ValueError(
                f"{key}: {images} images, and connector.name=gated shows each text one. Leave out such "
                f"talks, or take connector.name=mlp."
            )

    def _labels(self, key: str, ids: list[int], offsets: Any, shown: Rendered) -> list[int]:
        labels = [IGNORED] * len(ids)
        for begin, end in shown.spans:
            inside = [n for n, (first, _) in enumerate(offsets) if begin <= first < end]
            while inside and ids[inside[-1]] not in self.ids:
                inside.pop()  # what a template writes after the end symbol is not said by the model
            if not inside or ids[inside[-1]] not in self.stops:
                raise ValueError(
                    f"{key}: the chat template ends an answer with no symbol that stops the model, so it "
                    f"would never stop. Give the folder a template with the end symbol in the "
                    f"turn of the assistant."
                )
            for n in inside:
                labels[n] = ids[n]
        return labels

    def _check(self, key: str, ids: list[int], shown: Rendered) -> None:
        """Compare the ids with those of the parts: no token may lie across the begin of an answer."""
        for begin, _ in shown.spans:
            before = self.tokenizer(shown.text[:begin], add_special_tokens=False)["input_ids"]
            if ids[: len(before)] != list(before):
                raise ValueError(
                    f"{key}: a token lies across the begin of an answer, so the model would be asked "
                    f"otherwise than it was trained. Let the template end the header with a line break or a "
                    f"symbol."
                )
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos not in self.stops and ids.count(bos) > 1:
            raise ValueError(f"{key}: the text begins {ids.count(bos)} times: the template writes BOS twice.")


def padded(
    rows: Sequence[Sequence[int]], fill: int, left: bool = False, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows of any length as (B, L), and the mask (B, L) of what is no padding, by place and not by id."""
    longest = max(map(len, rows))
    longest += -longest % multiple
    table = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(None, len(row))
        table[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return table, mask


class Counter:
    """How many tokens the processor writes for an image: it is asked, once a size."""

    def __init__(self, processor: Any, by_size: bool) -> None:
        self.processor, self.by_size = processor, by_size
        self.known: dict[tuple[int, int], int] = {}

    def __call__(self, image: ImageLike) -> int:
        size = size_of(image) if self.by_size else (0, 0)
        if size not in self.known:
            ids = self.processor(images=[image], text=[MARK])["input_ids"][0]
            number = self.processor.tokenizer.convert_tokens_to_ids(MARK)
            self.known[size] = list(ids).count(number)
        return self.known[size]


class Collate:
    """Talks as what the model is called with: right padding, labels, pixels."""

    def __init__(self, processor: Any, labels: Labels, blank: bool = False) -> None:
        self.processor, self.labels, self.blank = processor, labels, blank

    def __call__(self, talks: Sequence[Talk]) -> dict[str, Tensor]:
        rows = [self.labels(talk) for talk in talks]
        ids, mask = padded([row for row, _ in rows], self.labels.tokenizer.pad_token_id)
        labels, _ = padded([row for _, row in rows], IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        images = [
            image for talk, (row, _) in zip(talks, rows, strict=True) for image in self._kept(talk, row)
        ]
        return {**batch, **pixels(self.processor, images, self.blank)}

    def _kept(self, talk: Talk, ids: Sequence[int]) -> list[ImageLike]:
        """The images whose symbols are in `ids`: a talk that was too long has lost its last turns."""
        symbols = ids.count(self.labels.tokenizer.convert_tokens_to_ids(MARK))
        kept: list[ImageLike] = []
        for image in talk.images:
            symbols -= self.labels.count(image)
            if symbols >= 0:
                kept.append(image)
        return kept


def pixels(processor: Any, images: Sequence[ImageLike], blank: bool = False) -> dict[str, Tensor]:
    """What the image processor makes of images; with `blank` all are the mean colour, which is 0."""
    if not images:
        return {}
    made = dict(processor.image_processor([_in_bytes(image) for image in images], return_tensors="pt"))
    if blank:
        made["pixel_values"] = torch.zeros_like(made["pixel_values"])
    return made


def _in_bytes(image: ImageLike) -> ImageLike:
    """An image of 8 bits a channel, as processors of transformers expect."""
    deep = isinstance(image, np.ndarray) and image.dtype == np.uint16
    return (np.asarray(image) // 257).astype(np.uint8) if deep else image
