"""The recipe: what a run is, as dataclasses, and which of their values cannot stand together.

Units, everywhere: a duration is in optimiser steps, a batch is images over all processes, a size is in
pixels, and a pair [a, b] of a schedule is a cosine from a to b.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit import shelves

MISSING: Any = "???"  # what OmegaConf takes as "must be given"


@dataclass
class Head:
    """A projection head: an MLP, the unit sphere, prototypes (DINO, arXiv 2104.14294, appendix C)."""

    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3  # linear layers before the prototypes
    norm_last_layer: bool = False  # hold every prototype's length at 1


@dataclass
class Heads:
    cls: Head = field(default_factory=Head)
    patch: Head | None = None  # none: masked patches go through the class token's head


@dataclass
class Teacher:
    momentum: tuple[float, float] = (0.992, 1.0)  # of the moving average that the teacher is
    temp: tuple[float, float] = (0.04, 0.07)  # softmax temperature: a line over temp_warmup steps, then flat
    temp_warmup: int = 0
    temp_every: int = 1  # steps between two changes of the temperature; DINO changes it once an epoch


@dataclass
class CropGroup:
    count: int = 2
    size: int = 224
    scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    blur: tuple[float, ...] = (0.5,)  # probability: one for all crops of the group, or one a crop
    solarize: tuple[float, ...] = (0.0,)


@dataclass
class Crops:
    """Multi-crop augmentation (DINO, section 3.1); the defaults are those that DINO and DINOv2 share."""

    globals: CropGroup = field(default_factory=CropGroup)
    locals: CropGroup = field(default_factory=lambda: CropGroup(count=8, size=96, scale=(0.05, 0.32)))
    ratio: tuple[float, float] = (0.75, 4 / 3)  # of width to height, drawn evenly in its logarithm
    flip: float = 0.5  # probability of a mirror image
    vertical_flip: float = 0.0
    jitter: float = 0.8  # probability that the next four apply; each of those is a strength, 0 is off
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2  # needs RGB
    hue: float = 0.1  # needs RGB
    gray: float = 0.2  # probability; needs RGB
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel: int = 9  # pixels, odd
    solarize_threshold: float = 128 / 255  # in [0, 1]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # one a channel, in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass
class Masks:
    """Block masks over the student's global crops (BEiT, arXiv 2106.08254; iBOT, arXiv 2111.07832)."""

    images: float = 0.5  # share of global crops that get a mask
    patches: tuple[float, float] = (0.1, 0.5)  # share of such a crop's patches, spread evenly over the batch


@dataclass
class Optim:
    """AdamW and the clock."""

    steps: int = MISSING
    batch: int = MISSING  # images per step over all processes, never per GPU
    lr: float = MISSING  # peak, for a batch of `lr_batch` images
    lr_batch: int = 1024
    lr_rule: Literal["none", "sqrt", "linear"] = "sqrt"
    warmup: int = 0
    min_lr: float = 1e-6
    weight_decay: tuple[float, float] = (0.04, 0.4)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0  # largest gradient norm; 0 is off
    clip_per: Literal["part", "tensor"] = "part"  # part: the backbone or a head; DINO clips tensor by tensor
    layer_decay: float = 1.0  # block i of n trains at lr * layer_decay ** (n - i)
    patch_lr: float = 1.0  # factor on the patch embedding's learning rate
    head_frozen: int = 0  # the prototypes stand still for so many steps at the start
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
    seed: int = 0
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where the device computes in it
    accumulate: int = 1  # parts that a step's batch is cut into, one after another (docs/training.md)
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most; 0: none
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints
    max_unreadable: float = 0.01  # share of images that may be unreadable before the run stops


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


def check(recipe: Recipe) -> None:
    """Hold a recipe's settings against each other.

    Raises:
        ValueError: naming the keys of those that cannot stand together, and the way out.
    """
    _check_losses(recipe)
    optim, crops, run = recipe.optim, recipe.crops, recipe.run
    positive = {
        "optim.steps": optim.steps,
        "optim.batch": optim.batch,
        "run.accumulate": run.accumulate,
        "crops.globals.count": crops.globals.count,
        "run.log_every": run.log_every,
        "run.checkpoint_every": run.checkpoint_every,
        "run.keep": run.keep,
    }
    for key, value in positive.items():
        if value < 1:
            raise ValueError(f"{key}={value}: it must be 1 or more.")
    if optim.warmup >= optim.steps:
        raise ValueError(f"optim.warmup={optim.warmup} leaves nothing of optim.steps={optim.steps}.")
    if optim.batch % run.accumulate:
        raise ValueError(
            f"optim.batch={optim.batch} cannot be cut into run.accumulate={run.accumulate} equal parts."
        )
    for name, group in {"globals": crops.globals, "locals": crops.locals}.items():
        for key in ("blur", "solarize"):
            given = getattr(group, key)
            if len(given) not in (1, group.count) and group.count:
                raise ValueError(
                    f"crops.{name}.{key} gives {len(given)} probabilities for "
                    f"crops.{name}.count={group.count} crops: give one for all, or one a crop."
                )
    if len(crops.mean) != len(crops.std):
        raise ValueError(f"crops.mean has {len(crops.mean)} channels, crops.std has {len(crops.std)}.")
    if crops.blur_kernel % 2 == 0:
        raise ValueError(f"crops.blur_kernel={crops.blur_kernel} must be odd.")


def _check_losses(recipe: Recipe) -> None:
    if not recipe.losses:
        there = ", ".join(shelves.names("losses"))
        raise ValueError(f"losses is empty, so there is nothing to learn from. There is: {there}.")
    configs = {name: shelves.read_config("losses", name) for name in recipe.losses}
    masked = [name for name, cls in configs.items() if "masks" in getattr(cls, "uses", ())]
    if masked and recipe.masks is None:
        raise ValueError(f"losses.{masked[0]} learns from masked patches, but there is no section `masks`.")
    for key, value in {"masks": recipe.masks, "heads.patch": recipe.heads.patch}.items():
        if value is not None and not masked:
            raise ValueError(
                f"`{key}` is given, but no loss of this recipe reads it; take it out with {key}=null."
            )
    part = recipe.optim.batch // recipe.run.accumulate
    for name, cls in configs.items():
        least = getattr(cls, "least_images", 1)
        if part < least:
            raise ValueError(
                f"losses.{name} needs {least} images at a time, but optim.batch={recipe.optim.batch} in "
                f"run.accumulate={recipe.run.accumulate} parts gives {part}. Raise optim.batch, or drop it "
                f"with losses.{name}=null."
            )
