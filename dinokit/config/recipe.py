"""The recipe: what a run is, as dataclasses.

Units, everywhere: a duration is in optimiser steps, a batch is images over all processes, a size is in
pixels, and a pair [a, b] of a schedule is a cosine from a to b.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

MISSING: Any = "???"  # what OmegaConf takes as "must be given"

# What the section `backbone` may hold beside the fields of its file's Config: the weights that training
# begins with (whatever load_backbone() takes), and their fingerprint, which the run writes down.
WEIGHT_KEYS = ("weights", "fingerprint")


def within(low: float, high: float, default: Any) -> Any:
    """A field whose number, or each of whose numbers, lies in [low, high]."""
    return field(default=default, metadata={"range": (low, high)})


def at_least(low: float, default: Any) -> Any:
    """A field whose number, or each of whose numbers, is `low` or more."""
    return within(low, float("inf"), default)


def share(default: Any) -> Any:
    """A field of probabilities or shares."""
    return within(0, 1, default)


@dataclass
class Head:
    """A projection head: an MLP, the unit sphere, prototypes (DINO, arXiv 2104.14294, appendix C)."""

    prototypes: int = at_least(1, 65_536)
    hidden: int = at_least(1, 2048)
    bottleneck: int = at_least(1, 256)
    layers: int = at_least(1, 3)  # linear layers before the prototypes
    norm_last_layer: bool = False  # hold every prototype's length at 1


@dataclass
class Heads:
    cls: Head = field(default_factory=Head)
    patch: Head | None = None  # none: masked patches go through the class token's head


@dataclass
class Teacher:
    momentum: tuple[float, float] = share((0.992, 1.0))  # of the moving average that the teacher is
    temp: tuple[float, float] = at_least(
        1e-3, (0.04, 0.07)
    )  # softmax temperature: a line over temp_warmup steps, then flat
    temp_warmup: int = at_least(0, 0)
    temp_every: int = at_least(
        1, 1
    )  # steps between two changes of the temperature; DINO changes it once an epoch
    frozen: str = ""  # a backbone file or run that teaches without moving; the average is then a thing apart


@dataclass
class CropGroup:
    count: int = at_least(0, 2)
    size: int = at_least(1, 224)
    scale: tuple[float, float] = share((0.32, 1.0))  # share of the image's area
    blur: tuple[float, ...] = share((0.5,))  # probability: one for all crops of the group, or one a crop
    solarize: tuple[float, ...] = share((0.0,))


@dataclass
class Crops:
    """Multi-crop augmentation (DINO, section 3.1); the defaults are those that DINO and DINOv2 share."""

    globals: CropGroup = field(default_factory=CropGroup)
    locals: CropGroup = field(default_factory=lambda: CropGroup(count=8, size=96, scale=(0.05, 0.32)))
    ratio: tuple[float, float] = at_least(
        0.01, (0.75, 4 / 3)
    )  # of width to height, drawn evenly in its logarithm
    # How a JPEG is decoded: whole; or at 1/2, 1/4 or 1/8 where each crop is still shrunk to half or less,
    # which is faster for large photos and moves pixels a little (docs/performance.md).
    decode: Literal["whole", "reduced"] = "whole"
    flip: float = share(0.5)  # probability of a mirror image
    vertical_flip: float = share(0.0)
    jitter: float = share(0.8)  # probability that the next four apply; each of those is a strength, 0 is off
    brightness: float = at_least(0, 0.4)
    contrast: float = at_least(0, 0.4)
    saturation: float = at_least(0, 0.2)  # needs RGB
    hue: float = within(0, 0.5, 0.1)  # needs RGB
    gray: float = share(0.2)  # probability; needs RGB
    blur_sigma: tuple[float, float] = at_least(0.01, (0.1, 2.0))  # pixels
    blur_kernel: int = at_least(1, 9)  # pixels, odd
    solarize_threshold: float = share(128 / 255)  # in [0, 1]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # one a channel, in [0, 1]
    std: tuple[float, ...] = at_least(1e-6, (0.229, 0.224, 0.225))


@dataclass
class Masks:
    """Block masks over the student's global crops (BEiT, arXiv 2106.08254; iBOT, arXiv 2111.07832)."""

    images: float = share(0.5)  # share of global crops that get a mask
    patches: tuple[float, float] = share(
        (0.1, 0.5)
    )  # share of such a crop's patches, spread evenly over the batch


@dataclass
class Optim:
    """AdamW and the clock."""

    steps: int = at_least(1, MISSING)
    batch: int = at_least(1, MISSING)  # images per step over all processes, never per GPU
    lr: float = at_least(0, MISSING)  # peak, for a batch of `lr_batch` images
    lr_batch: int = at_least(1, 1024)
    lr_rule: Literal["none", "sqrt", "linear"] = "sqrt"
    head_warmup: int = at_least(0, 0)  # the heads learn alone for so many steps; `warmup` counts from there
    warmup: int = at_least(0, 0)
    min_lr: float = at_least(0, 1e-6)
    weight_decay: tuple[float, float] = at_least(0, (0.04, 0.4))
    betas: tuple[float, float] = share((0.9, 0.999))
    clip: float = at_least(0, 3.0)  # largest gradient norm; 0 is off
    clip_per: Literal["part", "tensor"] = "part"  # part: the backbone or a head; DINO clips tensor by tensor
    layer_decay: float = share(1.0)  # block i of n trains at lr * layer_decay ** (n - i)
    patch_lr: float = at_least(0, 1.0)  # factor on the patch embedding's learning rate
    head_frozen: int = at_least(0, 0)  # the prototypes stand still for so many steps at the start
    head_freeze: Literal["lr", "gradient"] = "lr"  # by a zero rate (DINOv2) or by leaving them out (DINO)

    @property
    def peak_lr(self) -> float:
        """lr, moved from `lr_batch` to `batch` images by `lr_rule`."""
        ratio = self.batch / self.lr_batch
        return self.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[self.lr_rule]


@dataclass
class Run:
    """Where and how; nothing here but `seed`, `precision` and `accumulate` changes what is learnt."""

    out: str = ""  # the run's folder; empty is runs/NAME-OF-THE-RECIPE
    seed: int = at_least(0, 0)
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where it multiplies faster
    accumulate: int = at_least(
        1, 1
    )  # parts that a step's batch is cut into, one after another (docs/training.md)
    workers: int = at_least(-1, -1)  # processes that load images; -1: one a core but one, 16 at most; 0: none
    # The next six change speed and memory alone: docs/performance.md.
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = "auto"
    compile: Literal["none", "blocks", "colour", "all"] = "none"  # all: blocks and colour
    checkpointing: Literal["none", "selective", "full"] = "none"
    logits: Literal["chunks", "whole"] = "chunks"  # of the prototypes: a few at a time, or all
    tokens: Literal["read", "all"] = "read"  # of the last block: those that a loss reads, or all
    keep_memory: bool = True  # on a CPU, what a step frees is kept for the next
    log_every: int = at_least(1, 10)
    checkpoint_every: int = at_least(1, 500)
    keep: int = at_least(1, 2)  # checkpoints, the newest
    keep_every: int = at_least(0, 0)  # steps: one every so many stays, its teacher in teachers/; 0: none
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # of several processes; auto: ddp while it fits
    timeout_minutes: float = at_least(0.05, 30.0)  # without a step or a word of the others, before a run ends
    max_unreadable: float = share(0.01)  # share of images that may be unreadable before the run stops

    def compiles(self, part: Literal["blocks", "colour"]) -> bool:
        """Whether torch.compile makes this part."""
        return self.compile in (part, "all")


@dataclass
class Recipe:
    name: str = MISSING
    backbone: dict[str, Any] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    losses: dict[str, Any] = field(default_factory=dict)
    teacher: Teacher = field(default_factory=Teacher)
    crops: Crops = field(default_factory=Crops)
    masks: Masks | None = None
    data: dict[str, Any] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    evals: dict[str, Any] = field(default_factory=dict)
    run: Run = field(default_factory=Run)

    @property
    def architecture(self) -> dict[str, Any]:
        """The section `backbone` without where its weights come from: what it is built from."""
        return {key: value for key, value in self.backbone.items() if key not in WEIGHT_KEYS}
