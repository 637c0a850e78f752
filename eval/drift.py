"""How far features have moved from those of other weights, on the same images: what a run has left behind.

For each image the cosine between its class token now and then, as it comes and after the mean of the images
is taken off. A class token has a large part that all images share, so the first hardly falls when all that
tells images apart is lost; the second does.

    N  images     D  width
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from dinokit.config import registry
from dinokit.data.sources import ImageSource
from dinokit.features import device_of, extract, spread
from dinokit.models import Backbone
from dinokit.runtime.device import DTYPES, pick_precision
from dinokit.weights import load_backbone


@dataclass
class Config:
    test: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "test", "labels": False}
    )
    against: str = field(default="", metadata={"start": True})  # FILE_OR_RUN; in a run, its start
    size: int = 0  # pixels; 0: what the backbone was trained on
    resize: int = 0  # pixels of the shorter side before the centre is cut out; 0: 256 / 224 of `size`
    batch: int = 256  # images, for the backbone
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    max_test: int = 1_000  # images, drawn evenly from the set; 0: all


def drift(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over images of the cosine between rows of two (N, D), and of that without their means: (), ()."""
    plain = F.cosine_similarity(now, then, dim=1).mean()
    return plain, F.cosine_similarity(now - now.mean(dim=0), then - then.mean(dim=0), dim=1).mean()


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Both cosines.

    Returns:
        'cosine', 'cosine_centred': 1 if nothing has moved. 'images_test': how many could be read.

    Raises:
        ValueError, LookupError: if `against` is not given, or is a backbone of another width; if the images
            cannot be read.
    """
    if not cfg.against:
        raise ValueError(
            "against=FILE_OR_RUN must be given: the weights to compare with. In a recipe it is what the run "
            "began with, so it needs backbone.weights; or take this evaluator out with evals.drift=null."
        )
    other = load_backbone(cfg.against).to(device_of(backbone))
    if other.width != backbone.width:
        raise ValueError(
            f"against={cfg.against} has features of {other.width} numbers, and these weights have "
            f"{backbone.width}: they cannot be compared."
        )
    section = dict(cfg.test or {})
    if "channels" in section:
        section["channels"] = backbone.channels
    source: ImageSource = spread(registry.build("data.sources", section), cfg.max_test)
    size = cfg.size or backbone.input.size
    resize = cfg.resize or round(size * 256 / 224)
    dtype = DTYPES[pick_precision(cfg.precision, device_of(backbone))]
    now, then = (extract(b, source, resize, size, cfg.batch, cfg.workers, dtype) for b in (backbone, other))
    plain, centred = drift(now.x, then.x)
    return {"cosine": plain.item(), "cosine_centred": centred.item(), "images_test": len(now.x)}
