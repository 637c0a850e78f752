"""The settings of a model that answers questions on images: configs/instruct_*.yaml. Imports no torch.

view        how an image is shown to the frozen backbone
connector   what makes its tokens into tokens of the language model
stages      what is trained after what, each with its own optimiser
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.config.recipe import FrozenRun
from dinokit.config.registry import check_at_least, only_if
from dinokit.config.values import validated

PARTS = ("connector", "language", "lora")


@dataclass
class View:
    """How an image is shown to the backbone."""

    # square: resized to a square (LLaVA); tiles: also in tiles of higher resolution (LLaVA-NeXT)
    name: Literal["square", "tiles"] = "square"
    size: int = 0  # pixels: the side of the square, or of a tile; 0: the side of the backbone's own grid
    # with tiles: pixels, height and width of the canvases to choose from; none: five as LLaVA-1.6 has
    canvases: tuple[tuple[int, int], ...] = ()
    layer: int = -1  # block whose output is shown, before the final norm; -1 the last, 0 the embeddings
    cls: bool = False  # show the class token too


@dataclass
class Connector:
    """From the backbone's tokens to those of the language model."""

    # mlp: two layers with GELU between (LLaVA-1.5); linear: one (LLaVA); query: a fixed number of tokens
    # (Perceiver); gated: no tokens, layers inside of the language model that look at the image (Flamingo)
    name: Literal["mlp", "linear", "query", "gated"] = "mlp"
    queries: int = only_if(32, name=("query",))  # tokens that an image becomes
    depth: int = only_if(2, name=("query",))  # layers of the resampler
    every: int = only_if(1, name=("gated",))  # layers of the language model from one look to the next


@dataclass
class Language:
    """The language model: one from nothing, or a folder of Hugging Face."""

    name: Literal["tiny", "folder"] = "tiny"  # tiny: a Llama from nothing; folder: the one in `path`
    path: str = ""  # with folder: a causal language model with a fast tokenizer
    width: int = 128  # this and those below: of tiny
    depth: int = 4
    heads: int = 4
    hidden: int = 384  # of its perceptrons


@dataclass
class Lora:
    """Low-rank changes of the linear layers of the language model (arXiv 2106.09685): trains=[lora]."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05


@dataclass
class Stage:
    """One training: what changes, for how long, how fast. AdamW with a half cosine to zero."""

    trains: tuple[str, ...] = ("connector", "language")  # of connector, language, lora
    steps: int = 0  # of the optimiser; 0: as many as `epochs` takes
    epochs: float = 1.0  # with steps=0: times that each talk is seen
    batch: int = 128  # talks a step over all processes
    micro: int = 0  # talks that a process computes at a time; 0: its share of the batch
    lr: float = 1e-3  # peak
    connector_lr: float = 0.0  # peak, of the connector; 0: as lr
    warmup: float = 0.03  # share of the steps in which the rate rises in a line
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm; 0: off
    blank: bool = False  # show grey images: the baseline that sees nothing
    data: dict[str, Any] = field(default_factory=dict)  # keys that replace those of the recipe's data


@dataclass
class Run(FrozenRun):
    """Where and how to run."""

    precision: Literal["fp32", "bf16"] = "fp32"  # of the computation; weights that train stay in fp32
    checkpointing: bool = False  # compute activations of the language model again in place of keeping them
    workers: int = 0  # loader processes


@dataclass
class Config:
    """A whole training of a model that answers."""

    name: str = ""  # of the recipe
    backbone: dict[str, Any] = field(default_factory=dict)  # weights=FILE_OR_RUN, or name=NAME and its keys
    start: str = (
        ""  # a trained model's folder or run, to go on from: connector and language model are its own
    )
    view: View = field(default_factory=View)
    connector: Connector = field(default_factory=Connector)
    language: Language = field(default_factory=Language)
    lora: Lora = field(default_factory=Lora)
    data: dict[str, Any] | None = field(default=None, metadata={"registry": "data.talks"})
    length: int = 2048  # tokens: longer talks are cut after a whole answer
    stages: dict[str, Any] = field(default_factory=dict)  # by name, in order: see Stage
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        check_at_least(self.view, size=0)
        check_at_least(self.connector, queries=1, depth=1, every=1)
        check_at_least(self.language, width=8, depth=1, heads=1, hidden=8)
        check_at_least(self.lora, rank=1, alpha=0, dropout=0)
        check_at_least(self, length=8)
        check_at_least(self.run, workers=0)
        if (self.language.name == "folder") != bool(self.language.path):
            raise ValueError("language.path is the folder of language.name=folder: give both, or neither.")
        if self.view.canvases and self.view.name != "tiles":
            raise ValueError("view.canvases: only with view.name=tiles. Remove it.")
        if self.view.name == "tiles" and self.connector.name in ("query", "gated"):
            raise ValueError(
                f"connector.name={self.connector.name} needs view.name=square: tiles have an order to keep."
            )


def _stage(name: str, given: Any) -> Stage:
    if not isinstance(given, Mapping):
        raise ValueError(f"stages.{name}={given}: it is a section, as in stages.{name}.steps=1000.")
    stage = Stage(**validated(Stage, given, f"stages.{name}"))
    if not stage.trains or not set(stage.trains) <= set(PARTS):
        raise ValueError(
            f"stages.{name}.trains={list(stage.trains)}: it is a list of some of {', '.join(PARTS)}."
        )
    if {"language", "lora"} <= set(stage.trains):
        raise ValueError(
            f"stages.{name}.trains: language changes all its weights, lora leaves them; name one of the two."
        )
    for key, least in {"batch": 1, "steps": 0, "epochs": 0, "micro": 0, "lr": 0, "connector_lr": 0,
                       "warmup": 0, "weight_decay": 0, "clip": 0}.items():  # fmt: skip
        if getattr(stage, key) < least:
            raise ValueError(f"stages.{name}.{key}={getattr(stage, key)}: it must be {least} or more.")
    if stage.warmup > 1:
        raise ValueError(f"stages.{name}.warmup={stage.warmup}: it is a share of the steps, from 0 to 1.")
    if not stage.steps and not stage.epochs:
        raise ValueError(f"stages.{name}: steps and epochs are both 0. Give one of them.")
    return stage


def stages_of(cfg: Config) -> dict[str, Stage]:
    """The stages, in order; null removes one.

    Raises:
        ValueError: if there is none, or a key or value of one is wrong; it names the key.
    """
    if not any(stage is not None for stage in cfg.stages.values()):
        raise ValueError("stages: a recipe has one or more, such as stages.all.steps=1000.")
    return {name: _stage(name, stage) for name, stage in cfg.stages.items() if stage is not None}
