"""Classification by words alone: no labelled image is learnt from.

A text alignment (`dinokit align`) turns images and the names of classes into vectors; an image gets the class
of the greatest cosine. The vector of a class is the mean over templates (CLIP, arXiv 2103.00020, section
3.1.4). Images are seen whole, as squares: a centre crop changes figures on ImageNet by about a point.

    N  images     C  classes     E  width of the common space
"""

from dataclasses import dataclass
from typing import Any

import torch

from dinokit.config.registry import check_at_least, source_field
from dinokit.eval import check_templates
from dinokit.eval._align import class_words, of_classes, vectors_of
from dinokit.eval._images import one_class, open_source
from dinokit.eval._metrics import class_scores
from dinokit.language.aligned import load_aligned
from dinokit.models import Backbone


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.sources", "test")
    align: str = ""  # the folder of a run of dinokit align, on these weights
    templates: tuple[str, ...] = ("a {}",)  # texts with {} in place of the class; vectors are averaged
    names: tuple[str, ...] = ()  # words of the classes, in their order; empty: their names
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    batch: int = 64  # images at a time

    def __post_init__(self) -> None:
        check_at_least(self, max_test=0, batch=1)
        check_templates(self.templates)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """The accuracy of the nearest class.

    Returns:
        'top1', 'mean_per_class', and 'top5' if there are more than five classes; with several templates 'top1
        first template', of the first alone; 'images_test'.

    Raises:
        ValueError, LookupError: if images and alignment do not fit; the message names the key to set.
    """
    if not cfg.align:
        raise ValueError("align=RUN must be given: the folder of a run of dinokit align on these weights.")
    source = open_source(cfg.test, "test", backbone, cfg.max_test)
    if len(source.classes) < 2:
        raise one_class(source.classes[0])
    aligned = load_aligned(cfg.align, backbone)
    words = class_words(cfg.names, source.classes)

    def text(texts: list[str]) -> torch.Tensor:
        return aligned.text(texts).cpu()

    x, y = vectors_of(aligned, source, cfg.batch)
    labelled = y >= 0
    scores = class_scores(x[labelled] @ of_classes(text, words, cfg.templates).T, y[labelled])
    if len(cfg.templates) > 1:
        first = x[labelled] @ of_classes(text, words, cfg.templates[:1]).T
        scores["top1 first template"] = class_scores(first, y[labelled])["top1"]
    return scores | {"images_test": int(labelled.sum())}
