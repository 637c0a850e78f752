"""The recipe of a training run, as plain dataclasses. Ranges of values are in config/check.py.

Units: durations are in optimizer steps, a batch is images over all processes, sizes are in pixels, and a pair
[a, b] of a schedule is a cosine from a to b.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dinokit.config.registry import check_at_least

MISSING: Any = "???"  # OmegaConf's mark for "must be given"

# Keys of the section `backbone` that are not in the Config of its model: the weights that training starts
# from (anything that load_backbone() reads), and their fingerprint, which the run records.
WEIGHT_KEYS = ("weights", "fingerprint")


@dataclass
class Head:
    """A projection head: an MLP, the unit sphere, prototypes (DINO, arXiv 2104.14294, appendix C)."""

    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3  # linear layers before the prototypes
    norm_last_layer: bool = False  # keep the norm of every prototype at 1
    standardize: bool = False  # features to mean 0 and deviation 1 over the rows of a forward pass, first


@dataclass
class Projector:
    """An MLP with batch norm, for losses that compare images with each other (arXiv 2002.05709)."""

    hidden: int = 512
    output: int = 128
    layers: int = 3  # linear layers


@dataclass
class Heads:
    cls: Head = field(default_factory=Head)
    patch: Head | None = None  # none: masked patches use the head of the class token
    projector: Projector | None = None  # for losses.contrastive or lejepa


@dataclass
class GramTeacher:
    """The network whose patch similarities losses.gram anchors (DINOv3, arXiv 2508.10104)."""

    # A run or file of the backbone's architecture. Empty: the teacher itself, the moving average.
    weights: str = ""
    refresh_from: int = 0  # after this many steps it becomes a copy of the moving average, for the first time
    refresh_every: int = 0  # steps between two such copies; 0: none is made
    refreshes: int = 3  # copies in all


@dataclass
class Teacher:
    momentum: tuple[float, float] = (0.992, 1.0)  # of the moving average of the student
    temp: tuple[float, float] = (0.04, 0.07)  # of the softmax: linear over temp_warmup steps, then constant
    temp_warmup: int = 0  # steps
    temp_every: int = 1  # steps between two changes of the temperature; DINO: an epoch
    frozen: str = ""  # weights or run of a frozen teacher; the moving average is then kept beside it
    # A run: student and teacher begin with its moving average, heads included, as the next stage of training.
    start: str = ""
    gram: GramTeacher | None = None  # for losses.gram


@dataclass
class CropGroup:
    count: int = 2  # crops of one image
    size: int = 224  # pixels
    scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    blur: tuple[float, ...] = (0.5,)  # probability: one for all crops of the group, or one for each
    solarize: tuple[float, ...] = (0.0,)  # probability, as blur


@dataclass
class Crops:
    """Multi-crop augmentation (DINO, section 3.1); the defaults are those of both DINO and DINOv2."""

    globals: CropGroup = field(default_factory=CropGroup)
    locals: CropGroup = field(default_factory=lambda: CropGroup(count=8, size=96, scale=(0.05, 0.32)))
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height, uniform in its logarithm
    # How a JPEG is decoded: whole; or reduced to 1/2, 1/4 or 1/8 if every crop is still shrunk to half or
    # less. That is faster for large photos and changes pixels a little (docs/performance.md).
    decode: Literal["whole", "reduced"] = "whole"
    # Pixels of the Gram teacher's copies of the global crops, without colour; 0: it sees the same crops.
    gram_size: int = 0
    # Sizes of which each step draws one, for all processes the same: [probability, globals.size, locals.size,
    # gram_size]. Empty: always those of the sections.
    mixed: tuple[tuple[float, int, int, int], ...] = ()
    flip: float = 0.5  # probability
    vertical_flip: float = 0.0  # probability
    transpose: float = 0.0  # probability; with both flips all eight symmetries of a square
    jitter: float = 0.8  # probability of the next four; each of them is a strength, 0 is off
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2  # needs RGB
    hue: float = 0.1  # needs RGB
    tint: float = 0.0  # strength of a colour cast: a factor for each channel, always; needs RGB
    gray: float = 0.2  # probability; needs RGB
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel: int = 9  # pixels, odd
    solarize_threshold: float = 128 / 255  # in [0, 1]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # for each channel, in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def variants(self) -> "list[Crops]":
        """The settings with the sizes of each entry of `mixed`; without any, themselves."""
        return [
            replace(
                self,
                globals=replace(self.globals, size=int(large)),
                locals=replace(self.locals, size=int(small)),
                gram_size=int(gram),
            )
            for _, large, small, gram in self.mixed
        ] or [self]


@dataclass
class Masks:
    """Block masks over the student's global crops (BEiT, arXiv 2106.08254; iBOT, arXiv 2111.07832)."""

    images: float = 0.5  # share of global crops that get a mask
    # Share of patches in such a crop, spread evenly over the batch.
    patches: tuple[float, float] = (0.1, 0.5)


@dataclass
class Optim:
    """AdamW and its schedules."""

    steps: int = MISSING  # of the whole run
    batch: int = MISSING  # images per step over all processes, never per GPU
    lr: float = MISSING  # peak, for a batch of `lr_batch` images
    lr_batch: int = 1024
    lr_rule: Literal["none", "sqrt", "linear"] = "sqrt"
    head_warmup: int = 0  # steps in which only the heads learn; `warmup` starts after them
    warmup: int = 0  # steps of a linear rise of the learning rate
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after its warm-up
    min_lr: float = 1e-6  # at the end of a cosine
    weight_decay: tuple[float, float] = (0.04, 0.4)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0  # largest gradient norm; 0 is off
    clip_per: Literal["part", "tensor"] = "part"  # part: the backbone or a head; DINO: tensor
    layer_decay: float = 1.0  # block i of n trains at lr * layer_decay ** (n - i)
    patch_lr: float = 1.0  # factor on the patch embedding's learning rate
    head_frozen: int = 0  # steps at the start in which the prototypes do not change
    head_freeze: Literal["lr", "gradient"] = "lr"  # zero learning rate (DINOv2) or no gradient (DINO)

    @property
    def peak_lr(self) -> float:
        """`lr` scaled from `lr_batch` to `batch` images by `lr_rule`."""
        ratio = self.batch / self.lr_batch
        return self.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[self.lr_rule]


@dataclass
class Run:
    """Where and how to run; only `seed`, `precision` and `accumulate` change what is learnt."""

    out: str = ""  # the run's folder; empty: runs/NAME-OF-THE-RECIPE
    # must: only with a checkpoint; never: begin anew, and overwrite the old records
    resume: Literal["auto", "must", "never"] = "auto"
    images: Literal["same", "changed"] = "same"  # changed: resume once although the images are others
    seed: int = 0
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where it is faster
    accumulate: int = 1  # micro-batches of one step (docs/training.md)
    workers: int = -1  # processes that load images; -1: cores less one, at most 16; 0: none
    # The next six change only speed and memory: docs/performance.md.
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = "auto"
    compile: Literal["none", "blocks", "colour", "all"] = "none"  # all: blocks and colour
    checkpointing: Literal["none", "selective", "full"] = "none"
    logits: Literal["chunks", "whole"] = "chunks"  # prototypes a slice at a time, or all at once
    tokens: Literal["read", "all"] = "read"  # of the last block: only those that a loss reads, or all
    keep_memory: bool = True  # on a CPU: reuse the memory of one step in the next
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # steps between checkpoints kept for good, with teachers/; 0: none
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # of several processes; auto: ddp if it fits
    timeout_minutes: float = 30.0  # without progress, before the run ends with an error
    max_unreadable: float = 0.01  # largest share of unreadable images; more stop the run
    max_skipped: int = 5  # steps in a row with losses or gradients that are not finite; more stop the run
    log: tuple[str, ...] = ()  # trackers besides metrics.jsonl: tensorboard, wandb, mlflow, trackio
    report: bool = True  # write report.html at the end, as dinokit report does

    def compiles(self, part: Literal["blocks", "colour"]) -> bool:
        """Whether this part is compiled by torch.compile."""
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
        """The section `backbone` without WEIGHT_KEYS: what the model is built from."""
        return {key: value for key, value in self.backbone.items() if key not in WEIGHT_KEYS}


@dataclass
class FrozenRun:
    """The section `run` of a training on a frozen backbone: where and how to run."""

    out: str = ""  # the run's folder; empty: runs/NAME-OF-THE-RECIPE
    resume: Literal["auto", "must", "never"] = "auto"  # must: with a checkpoint; never: anew
    seed: int = 0
    device: str = "auto"  # auto: cuda, else mps, else cpu
    log_every: int = 20
    checkpoint_every: int = 250
    keep: int = 2  # newest checkpoints that are kept
    timeout_minutes: float = 30.0  # without progress, before the run ends with an error

    def __post_init__(self) -> None:
        check_at_least(self, log_every=1, checkpoint_every=1, keep=1)
