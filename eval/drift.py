"""How far features have moved from those of other weights, on the same images.

For each image: the cosine between its class token now and before, as computed and after the mean over images
is subtracted. A class token has a large component that all images share, so the first cosine hardly falls
when everything that distinguishes images is lost; the second does.

    N  images     D  width
"""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import source_field
from dinokit.eval import ImageConfig
from dinokit.eval._images import image_features, open_source
from dinokit.features import device_of
from dinokit.models import Backbone
from dinokit.weights import load_backbone


@dataclass
class Config(ImageConfig):
    test: dict[str, Any] | None = source_field("data.sources", "test", labels=False)
    max_test: int = 1_000  # images, drawn evenly from the set; 0: all
    against: str = field(default="", metadata={"start": True})  # FILE_OR_RUN; in a run, its initial weights


def drift(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over images of the cosine between rows of two (N, D), plain and centred: (), ()."""
    plain = F.cosine_similarity(now, before, dim=1).mean()
    return plain, F.cosine_similarity(now - now.mean(dim=0), before - before.mean(dim=0), dim=1).mean()


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
            "against=FILE_OR_RUN must be given: the weights to compare with. In a recipe these are the "
            "initial weights, so it needs backbone.weights; or take this evaluator out with evals.drift=null."
        )
    other = load_backbone(cfg.against).to(device_of(backbone))
    if other.width != backbone.width:
        raise ValueError(
            f"against={cfg.against} has features of {other.width} numbers, and these weights have "
            f"{backbone.width}: they cannot be compared."
        )
    source = open_source(cfg.test, "test", backbone, cfg.max_test, labelled=False)
    now, before = (image_features(cfg, "test", b, source, labelled=False) for b in (backbone, other))
    plain, centred = drift(now.x, before.x)
    return {"cosine": plain.item(), "cosine_centred": centred.item(), "images_test": len(now.x)}
