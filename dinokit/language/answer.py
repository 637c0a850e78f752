"""Answers of a trained model: batches of questions on images, greedily, by transformers' generate()."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dinokit.data.talks import MARK, Talk, Turn
from dinokit.language.labels import Counter, Labels, padded, pixels, prompt_of, unknown_word
from dinokit.language.model import Answerer


def question(images: Sequence[Any], text: str, key: str = "the question") -> Talk:
    """A talk that ends with a question; without marks in its text the images stand before it.

    Raises:
        ValueError: if there are other marks than images.
    """
    marks = text.count(MARK)
    if not marks:
        text = "\n".join([MARK] * len(images) + [text])
    elif marks != len(images):
        raise ValueError(
            f"{key}: {marks} times {MARK} for {len(images)} images. Write one for each, or none."
        )
    return Talk(key, tuple(images), (Turn("user", text),))


class Asker:
    """Prompts for a model, and its answers.

    Args:
        answerer: in eval mode.
        most: tokens of an answer; it is cut there.
    """

    def __init__(self, answerer: Answerer, most: int = 32) -> None:
        self.answerer, self.most = answerer, most
        stops = answerer.model.generation_config.eos_token_id
        count = Counter(answerer.processor, answerer.tiled)
        self.labels = Labels(
            answerer.tokenizer, stops if isinstance(stops, list) else [stops], count, 1 << 30
        )
        self.labels.one_image = answerer.one_image

    def inputs(self, talks: Sequence[Talk], blank: bool = False) -> dict[str, Tensor]:
        """What the model is called with: padded on the left, so that every row ends with its prompt.

        Raises:
            ValueError: if a text contains a symbol of the template, or a word that the model does not know.
        """
        tokenizer = self.answerer.tokenizer
        texts = [prompt_of(tokenizer, self.labels.expanded(talk)) for talk in talks]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for talk, row in zip(talks, rows, strict=True):
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row:
                word = unknown_word(tokenizer, [turn.text for turn in talk.turns])
                raise ValueError(
                    f"{talk.key}: the language model does not know '{word}'. It knows "
                    f"{len(tokenizer)} words, which eval vqa asks with."
                )
        ids, mask = padded(rows, tokenizer.pad_token_id, left=True)
        shown = [image for talk in talks for image in talk.images]
        made = {
            "input_ids": ids,
            "attention_mask": mask,
            **pixels(self.answerer.processor, shown, blank),
        }
        return {name: value.to(self.answerer.model.device) for name, value in made.items()}

    def answers(self, talks: Sequence[Talk], batch: int = 16, blank: bool = False) -> Iterator[str]:
        """The answer to each talk's last question.

        Args:
            talks: each ends with a user's turn.
            batch: talks that are computed at a time.
            blank: show the mean colour in place of every image.

        Raises:
            ValueError: as inputs().
        """
        for first in range(0, len(talks), batch):
            yield from self._batch(talks[first : first + batch], blank)

    @torch.no_grad()
    def _batch(self, talks: Sequence[Talk], blank: bool) -> list[str]:
        inputs: Any = self.inputs(talks, blank)
        ids = self.answerer.model.generate(**inputs, max_new_tokens=self.most, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.answerer.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [str(text).strip() for text in texts]
