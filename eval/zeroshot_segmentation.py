"""Segmentation and pointing by words alone, with the map of a text alignment (`dinokit align`).

Each pixel gets the class whose words have the greatest cosine there; the maps of patches are enlarged
bilinearly (dino.txt, arXiv 2412.16334, with whole images as squares in place of windows). Scores with a class
for everything else and without one are not comparable: `background` says which class is left out.

Pointing asks less: is the place of the greatest cosine with the words of a class, among all places of the
image, on something of this class (the pointing game, arXiv 1608.00507)? Classes that the image shows are
asked for. Two places that read no words are the baselines: the centre, and the patch whose token is longest.

    C  classes     H, W  of an image     h, w  patches down and across
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.registry import check_at_least, source_field
from dinokit.data.dense import IGNORE
from dinokit.data.predictions import Sampler
from dinokit.data.transforms import to_tensor, to_uint8
from dinokit.eval import check_templates
from dinokit.eval._align import batches, class_words, of_classes
from dinokit.eval._dense import open_dense
from dinokit.eval._metrics import Confusion
from dinokit.features import device_of
from dinokit.language.aligned import Aligned, load_aligned
from dinokit.models import Backbone


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.dense", "test")
    align: str = ""  # the folder of a run of dinokit align, on these weights
    templates: tuple[str, ...] = ("a {}",)  # texts with {} in place of the class; vectors are averaged
    names: tuple[str, ...] = ()  # words of the classes, in their order; empty: their names
    background: str = ""  # a class that no words describe: its pixels are not evaluated, and nothing gets it
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    batch: int = 16  # images at a time
    out: str = ""  # folder for a few images with their truth and prediction, which a report shows

    def __post_init__(self) -> None:
        check_at_least(self, max_test=0, batch=1)
        check_templates(self.templates)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """The scores of the maps at the stored size of the images.

    Returns:
        'mIoU', 'mean accuracy', 'pixel accuracy', 'iou NAME' for each class; 'pointing', 'pointing centre'
        and 'pointing longest', shares of the classes of each image; 'classes_test', how many were asked
        for in all images, and 'images_test'.

    Raises:
        ValueError, LookupError: if images and alignment do not fit; the message names the key to set.
    """
    if not cfg.align:
        raise ValueError("align=RUN must be given: the folder of a run of dinokit align on these weights.")
    source = open_dense(cfg.test, "test", "mask", backbone, cfg.max_test)
    classes = list(source.classes)
    left_out = classes.index(cfg.background) if cfg.background in classes else None
    if cfg.background and left_out is None:
        raise ValueError(f"background={cfg.background} is none of the classes: {', '.join(classes)}.")
    aligned, device = load_aligned(cfg.align, backbone), device_of(backbone)
    words = class_words(cfg.names, classes)
    vectors = of_classes(aligned.text, words, cfg.templates)
    confusion, samples = Confusion(len(classes), device), Sampler(cfg.out, len(source), classes)
    points: list[tuple[bool, bool, bool]] = []
    number = 0
    for items in batches(source, cfg.batch):
        maps, longest = _maps(aligned, [image for image, _ in items], vectors)
        for (image, target), each, length in zip(items, maps, longest, strict=True):
            truth = torch.from_numpy(np.ascontiguousarray(target)).to(device)
            truth = truth if left_out is None else truth.masked_fill(truth == left_out, IGNORE)
            large = F.interpolate(each[None], tuple(truth.shape), mode="bilinear")[0]
            if left_out is not None:
                large[left_out] = -torch.inf
            predicted = large.argmax(dim=0)
            confusion.add(predicted, truth)
            points += pointing(large, F.interpolate(length[None, None], tuple(truth.shape))[0, 0], truth)
            pixels = to_tensor(image)[0]
            pixels = pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)
            samples.add(number, source.name(number), pixels, truth, predicted)
            number += 1
    samples.save()
    names = ("pointing", "pointing centre", "pointing longest")
    found = torch.tensor(points, dtype=torch.float64).mean(dim=0).tolist()
    scores = confusion.scores(classes) | dict(zip(names, found, strict=True))
    return scores | {"classes_test": len(points), "images_test": len(source)}


@torch.no_grad()
def _maps(aligned: Aligned, images: list[Any], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the patches with the classes, (b, C, h, w), and the lengths of frozen patches, (b, h, w)."""
    tokens = aligned.tokens(images)
    height, width = aligned.head.grid
    patches = tokens[:, -height * width :].float()
    return aligned.head.dense(tokens, vectors), patches.norm(dim=2).unflatten(1, (height, width))


def pointing(maps: Tensor, longest: Tensor, truth: Tensor) -> list[tuple[bool, bool, bool]]:
    """For each class of an image: whether its maximum, the centre and the longest patch lie on it.

    Args:
        maps: (C, H, W).
        longest: (H, W), greatest on the longest patch.
        truth: (H, W) classes, or IGNORE.
    """
    height, width = truth.shape
    flat = truth.flatten()
    fixed = [height // 2 * width + width // 2, int(_middle(longest == longest.max()))]
    places = {int(c): [int(maps[int(c)].argmax()), *fixed] for c in truth.unique() if int(c) != IGNORE}
    hits = [[bool(flat[place] == c) for place in each] for c, each in places.items()]
    return [(a, b, c) for a, b, c in hits]


def _middle(region: Tensor) -> Tensor:
    """The flat index of the pixel of a region (H, W) that is nearest to its mean place."""
    places = region.nonzero().double()
    nearest = (places - places.mean(dim=0)).square().sum(dim=1).argmin()
    return places[nearest, 0] * region.shape[1] + places[nearest, 1]
