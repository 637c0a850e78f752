"""The talks of a stage of `dinokit instruct`: their order, the parts of a batch, what is checked first."""

import math
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from dinokit.data.talks import MARK, Talk, TalkSource
from dinokit.data.talks.llava import Llava
from dinokit.language.labels import CHECKED, Collate, Counter, Labels, unknown_word
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
        ValueError: if the batch cannot be divided, a text has a symbol of the language model, or one of the
            first talks does not fit or has an answer with an unknown word; it names the stage's key or the
            talk.
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
    unknown = answerer.tokenizer.unk_token_id
    learnt = [unknown is not None and unknown in row for row in collate(first)["labels"].tolist()]
    if unknown not in stops and any(learnt):
        talk, tokenizer = first[learnt.index(True)], answerer.tokenizer
        word = unknown_word(tokenizer, [turn.text for turn in talk.turns if turn.role == "assistant"])
        given = f"start={cfg.start}" if cfg.start else f"language.name={cfg.language.name}"
        raise ValueError(
            f"{talk.key}: the language model does not know '{word}', a word of the answer, and would "
            f"learn to say {tokenizer.unk_token}. {given} knows {len(tokenizer)} words; a tiny one has "
            f"those of the built-in pictures alone. Give a model that knows the words of the talks: "
            f"language.name=folder language.path=FOLDER, or another start=."
        )
    return order, collate
