"""The settings of a head that learns from masks of objects: configs/head_*.yaml. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.config.recipe import FrozenRun
from dinokit.config.registry import check_at_least

# Metadata of a section that one kind of head reads (dinokit.config.registry.only_if).
PROMPTABLE = {"only_if": {"kind": ("promptable", "unified")}}
UNIFIED = {"only_if": {"kind": ("unified",)}}
IN_CONTEXT = {"only_if": {"kind": ("in_context",)}}


@dataclass
class Head:
    """The sizes of a promptable head."""

    width: int = 64  # a multiple of 64
    depth: int = 2  # two-way blocks
    heads: int = 4
    hidden: int = 256  # of their perceptrons
    answers: int = 3  # masks for an ambiguous prompt, beside the single one
    detail: bool = True  # a stem on the pixels sharpens the masks
    bounded: bool = True  # qualities pass a sigmoid; SAM's are linear


@dataclass
class Losses:
    """The weights of the losses, and the form of the focal loss."""

    focal: float = 5.0
    alpha: float = -1.0  # weight of the object's cells in the focal loss, from 0 to 1; below 0: no weight
    gamma: float = 0.0  # 0: cross entropy. SAM: focal 20, alpha 0.25, gamma 2, dice 1, quality 1
    dice: float = 5.0
    quality: float = 1.0  # with kind=promptable or unified
    words: float = 1.0  # of the names of answers, with kind=unified


@dataclass
class Prompts:
    """The prompts that are simulated in training."""

    objects: int = 6  # of an image in a step; drawn again if it has fewer
    min_area: int = 24  # pixels of the canvas; smaller objects are not asked for
    # share of objects whose first prompt is a box, with noise, and no click; with kind=promptable
    box: float = 0.25
    rounds: int = 4  # answers for an object in a step: the first, and one after each further click


@dataclass
class Unified:
    """What a unified head has beside its decoder, and the odds of the first prompts that it learns from."""

    samples: int = 8  # patches of strokes, or of a region of another image, that become tokens
    memory: int = 4  # patches under the last answer that become tokens; 0: none
    embedding: int = 64  # width of the vectors of words, if they are learned
    align: str = (
        ""  # the folder of a run of dinokit align on these weights: vectors of words that stay as they are
    )
    point: float = 0.2
    box: float = 0.1
    stroke: float = 0.1
    mask: float = 0.05
    region: float = 0.25  # an object of the same class in another image
    text: float = 0.3  # words of the object's class
    both: float = 0.2  # share of first prompts of two kinds
    absent: float = 0.2  # share of texts that nothing in the image fits: the answer is empty

    @property
    def odds(self) -> dict[str, float]:
        """The odds of each kind of prompt."""
        return {kind: getattr(self, kind) for kind in ("point", "box", "stroke", "mask", "region", "text")}


@dataclass
class Context:
    """The sizes of a head that segments by example, and what it learns from."""

    width: int = 64
    depth: int = 2  # layers
    heads: int = 4
    hidden: int = 128  # of their perceptrons
    nearest: int = 0  # patches of the examples that count for a patch; 0: all
    shots: int = 1  # examples of an episode
    min_area: int = 60  # pixels of the canvas; images with less of a class are not asked for it


@dataclass
class Optim:
    """AdamW and its schedule: a linear warm-up, then a half cosine to zero."""

    steps: int = 1500
    batch: int = 8  # images per step over all processes
    lr: float = 2e-3  # peak
    warmup: int = 100  # steps
    weight_decay: float = 0.05  # of parameters with two axes or more; not of biases and norms
    clip: float = 1.0  # largest gradient norm; 0 is off


@dataclass
class Run(FrozenRun):
    """Where and how to run; only `seed` changes what is learnt."""

    memory_gib: float = 2.0  # that images and their features may take; the others are computed again


@dataclass
class Config:
    """A whole training of a head on a frozen backbone."""

    name: str = ""  # of the recipe
    # of the head: by clicks and boxes, by examples, or by prompts of any kind
    kind: Literal["promptable", "in_context", "unified"] = "promptable"
    backbone: dict[str, Any] = field(default_factory=dict)  # weights=FILE_OR_RUN, or name=NAME and its keys
    start: str = ""  # a trained head of the same sizes to begin with, or the folder of its run
    layers: int = 1  # last blocks of the backbone whose patches are concatenated
    size: int = 0  # pixels: the side of the canvas; 0: the size that the backbone was trained on
    objects: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.objects", "split": "train"}
    )
    head: Head = field(default_factory=Head, metadata=PROMPTABLE)
    context: Context = field(default_factory=Context, metadata=IN_CONTEXT)
    prompts: Prompts = field(default_factory=Prompts, metadata=PROMPTABLE)
    unified: Unified = field(default_factory=Unified, metadata=UNIFIED)
    losses: Losses = field(default_factory=Losses)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        check_at_least(self, layers=1, size=0)
        check_at_least(self.head, width=64, depth=1, heads=1, hidden=1, answers=0)
        check_at_least(self.context, width=1, depth=1, heads=1, hidden=1, nearest=0, shots=1, min_area=1)
        check_at_least(self.prompts, objects=1, min_area=1, rounds=1)
        check_at_least(self.losses, focal=0, gamma=0, dice=0, quality=0, words=0)
        check_at_least(self.optim, steps=1, batch=1, lr=0, warmup=0, weight_decay=0, clip=0)
        check_at_least(self.run, memory_gib=0)
        check_at_least(self.unified, samples=1, memory=0, embedding=1, **dict.fromkeys(self.unified.odds, 0))
        if not sum(self.unified.odds.values()):
            raise ValueError(f"unified: give one of {', '.join(self.unified.odds)} odds above 0.")
        shares = {"prompts.box": self.prompts.box}
        shares |= {f"unified.{key}": getattr(self.unified, key) for key in ("both", "absent")}
        for key, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{key}={share}: it is a share, from 0 to 1.")
        if self.kind == "in_context" and self.losses.quality != Losses.quality:
            raise ValueError("losses.quality: only with kind=promptable or unified. Remove it.")
        if self.kind != "unified" and self.losses.words != Losses.words:
            raise ValueError("losses.words: only with kind=unified. Remove it.")
        if self.unified.align and self.unified.embedding != Unified.embedding:
            raise ValueError("unified.embedding: the vectors are those of unified.align. Remove it.")
        if self.kind == "unified" and self.prompts.box != Prompts.box:
            raise ValueError("prompts.box: only with kind=promptable. Set unified.box.")
