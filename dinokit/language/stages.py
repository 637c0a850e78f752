"""The talks of a stage of `dinokit instruct`: their order, the parts of a batch, what is checked first."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset

from dinokit.data.talks import MARK, Talk, TalkSource
from dinokit.data.talks.llava import Llava
from dinokit.language.labels import CHECKED, Collate, Counter, Labels
from dinokit.language.model import Answerer
from dinokit.language.recipe import Config, Stage, stages_of
from dinokit.runtime.distributed import world_size


class Order(Dataset[Talk]):
    """The talks of a stage in the order of its steps: each epoch is a permutation by (seed, stage, epoch)."""

    def __init__(self, talks: TalkSource, count: int, seed: int) -> None:
        self.talks, self.count, self.seed = talks, count, seed
        self._epoch, self._places = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Talk:
        epoch, place = divmod(index, len(self.talks))
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            self._places, self._epoch = torch.randperm(len(self.talks), generator=draw), epoch
        return self.talks[int(self._places[place])]


@dataclass
class Shares:
    """How a batch is divided."""

    micro: int  # talks that a process computes at a time
    parts: int  # times that it does so in a step


def shares(stage: Stage, name: str, processes: int) -> Shares:
    """The parts of a step.

    Raises:
        ValueError: if processes and parts do not divide the batch.
    """
    own, rest = divmod(stage.batch, processes)
    micro = stage.micro or own
    if rest or own % max(micro, 1):
        raise ValueError(
            f"stages.{name}.batch={stage.batch} is not divided by {processes} processes with "
            f"stages.{name}.micro={micro} talks each. Choose a batch that is."
        )
    return Shares(micro, own // micro)


def steps_of(stage: Stage, talks: int) -> int:
    """The steps of a stage."""
    return stage.steps or math.ceil(stage.epochs * talks / stage.batch)


def prepared(
    cfg: Config, name: str, steps: int, talks: TalkSource, answerer: Answerer
) -> tuple[Order, Collate]:
    """The talks of a stage in their order, and what makes batches of them.

    Raises:
        ValueError: if the batch cannot be divided, a text has a symbol of the language model, one of the
            first talks does not fit, or an answer has an unknown word; it names the stage's key or the talk.
    """
    stages = stages_of(cfg)
    stage = stages[name]
    shares(stage, name, world_size())
    order = Order(talks, steps * stage.batch, cfg.run.seed + 7_919 * [*stages].index(name))
    stops = answerer.model.generation_config.eos_token_id
    labels = Labels(answerer.tokenizer, stops, Counter(answerer.processor, answerer.tiled), cfg.length)
    labels.one_image = answerer.one_image
    collate = Collate(answerer.processor, labels, stage.blank)
    if isinstance(talks, Llava):
        for record in talks.records:
            images = sum(turn.text.count(MARK) for turn in record.turns)
            labels.check_texts(record.key, record.turns, images)
    first = [order[place] for place in range(min(len(talks), len(order), CHECKED))]
    collate(first)
    unknown = answerer.tokenizer.unk_token_id
    if unknown is not None and unknown not in stops:
        # Of talks that do not give their answers without their images, the first are looked at.
        said = [(talk.key, turn.text) for talk in first for turn in talk.turns if turn.role == "assistant"]
        check_words(cfg, answerer.tokenizer, chain(said, getattr(talks, "answers", tuple)()))
    return order, collate


def check_words(cfg: Config, tokenizer: Any, answers: Iterable[tuple[str, str]]) -> None:
    """Refuse answers with a word that the language model does not know. Each word is looked up once.

    Args:
        cfg: names the language model.
        tokenizer: with an unknown token.
        answers: key of the talk, and text.

    Raises:
        ValueError: naming the first such talk, and the word.
    """
    words: dict[str, str] = {}  # with the first talk that has it
    for key, text in answers:
        for word in text.split():
            words.setdefault(word, key)
    rows = tokenizer([*words], add_special_tokens=False)["input_ids"]
    for word, row in zip(words, rows, strict=True):
        if tokenizer.unk_token_id in row:
            given = f"start={cfg.start}" if cfg.start else f"language.name={cfg.language.name}"
            raise ValueError(
                f"{words[word]}: the language model does not know '{word}', a word of the answer, and would "
                f"learn to say {tokenizer.unk_token}. {given} knows {len(tokenizer)} words; a tiny one has "
                f"those of the built-in pictures alone. Give a model that knows the words of the talks: "
                f"language.name=folder language.path=FOLDER, or another start=. Or leave such talks out."
            )
