"""The settings of a text alignment: configs/align_*.yaml. Imports no torch.

view   how an image is shown to the frozen backbone
head   what makes its tokens into a vector and a map
text   the tower of texts
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.config.recipe import FrozenRun
from dinokit.config.registry import check_at_least

OTHERS = {"tiny": ("path", "pool", "train"), "folder": ("width", "depth", "heads", "words")}  # without effect


@dataclass
class View:
    """How an image is shown to the backbone: whole, resized to a square."""

    size: int = 0  # pixels: the side of the square; 0: the size that the backbone was trained on
    block: int = (
        -1
    )  # whose tokens are shown: from 0, or from the end; a backbone without blocks has one output
    norm: bool = False  # after the final norm, which costs the mean of patches part of its colour


@dataclass
class Head:
    """Blocks over the frozen tokens (dino.txt, arXiv 2412.16334), and the space of images and texts."""

    width: int = 128  # a multiple of `heads`
    depth: int = 2  # blocks; 0: a linear layer alone
    heads: int = 4
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layer_scale: float = 0.0  # initial gain of each block's branches; 0: none. dino.txt: 1e-5
    drop_path: float = 0.0  # rate of stochastic depth; dino.txt: 0.3
    # patches pass a perceptron of their own and no attention of the head: else they learn to say what the
    # whole image shows, and a map shows nothing. false: as dino.txt
    local: bool = True
    embedding: int = 256  # numbers of a vector: half of the class token, half of the mean of patches


@dataclass
class Text:
    """The tower of texts."""

    name: Literal["tiny", "folder"] = "tiny"  # tiny: a Bert from nothing; folder: the encoder in `path`
    # an encoder of Hugging Face with its tokenizer, such as a Bert or a CLIPTextModel
    path: str = ""
    # mean: of the tokens that are no padding; last: the last of them, for a causal encoder
    pool: Literal["mean", "last"] = "mean"
    train: bool = True  # false, of a folder: only what follows the encoder
    length: int = 64  # tokens; longer captions are cut
    width: int = 128  # this and those below: of tiny
    depth: int = 4
    heads: int = 4
    words: int = 20_000  # the most frequent words of the captions are its vocabulary


@dataclass
class Optim:
    """AdamW and its schedule: a linear warm-up, then a half cosine to zero."""

    steps: int = 1500
    batch: int = 128  # images and texts of a step, over all processes
    lr: float = 1e-3  # peak
    text_lr: float = 0.0  # peak, of the tower of texts; 0: as lr
    warmup: int = 100  # steps
    weight_decay: float = 1e-4  # of matrices; not of biases, norms and the scale
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest gradient norm; 0 is off


@dataclass
class Run(FrozenRun):
    """Where and how to run."""

    checkpoint_every: int = 500
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # of the computation; weights stay in fp32, and so does the loss
    )
    workers: int = 0  # loader processes; they have work only where tokens do not fit into memory_gib
    memory_gib: float = 2.0  # that the tokens of all images may take; else they are computed in every step


@dataclass
class Config:
    """A whole alignment of images and texts on a frozen backbone."""

    name: str = ""  # of the recipe
    backbone: dict[str, Any] = field(default_factory=dict)  # weights=FILE_OR_RUN, or name=NAME and its keys
    data: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.captions", "split": "train"}
    )
    loss: Literal["sigmoid", "clip"] = "sigmoid"  # of SigLIP, for batches of any size, or of CLIP
    # a second text for each image: the description of all its things with two colours exchanged, which is
    # false, where the source has it (NegCLIP, arXiv 2210.01936), else another caption. With loss=sigmoid
    exchanged: bool = False
    view: View = field(default_factory=View)
    head: Head = field(default_factory=Head)
    text: Text = field(default_factory=Text)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        check_at_least(self.view, size=0)
        check_at_least(self.head, width=1, depth=0, heads=1, layer_scale=0, drop_path=0, embedding=2)
        check_at_least(self.text, length=2, width=1, depth=1, heads=1, words=1)
        check_at_least(self.optim, steps=1, batch=2, lr=0, text_lr=0, warmup=0, weight_decay=0, clip=0)
        check_at_least(self.run, workers=0, memory_gib=0)
        if self.exchanged and self.loss != "sigmoid":
            raise ValueError("exchanged=true adds texts that no image shows: it needs loss=sigmoid.")
        for name, section in (("head", self.head), ("text", self.text)):
            if section.width % section.heads:
                raise ValueError(
                    f"{name}.width={section.width} is no multiple of {name}.heads={section.heads}."
                )
        if self.head.width % 4 or self.head.embedding % 2:
            raise ValueError("head.width must be a multiple of 4, and head.embedding of 2.")
        given = [key for key in OTHERS[self.text.name] if getattr(self.text, key) != getattr(Text, key)]
        if given and given != ["path"]:
            raise ValueError(f"text.{given[0]} has no effect with text.name={self.text.name}. Remove it.")
        if (self.text.name == "folder") != bool(self.text.path):
            raise ValueError("text.path is the folder of text.name=folder: give both, or neither.")
