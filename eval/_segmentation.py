"""What evaluators of segmentation share: their two sources, and the scores of predicted classes.

C  classes     H, W  of an image
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import resize_image, shorter_side_to
from dinokit.data.predictions import Sampler
from dinokit.eval import DenseConfig
from dinokit.eval._dense import open_dense, read_pairs
from dinokit.eval._metrics import Confusion
from dinokit.heads import to_size
from dinokit.models import Backbone

Predict = Callable[[Tensor], Tensor]  # an image (C, H, W) -> logits or shares of each pixel (classes, H, W)


def open_splits(cfg: DenseConfig, backbone: Backbone) -> tuple[DenseSource, DenseSource]:
    """The sources of training and test.

    Raises:
        ValueError: if one is missing, or their classes differ.
    """
    train = open_dense(cfg.train, "train", "mask", backbone, cfg.max_train)
    test = open_dense(cfg.test, "test", "mask", backbone, cfg.max_test)
    if list(train.classes) != list(test.classes):
        raise ValueError(
            f"The classes of train ({', '.join(train.classes[:5])} ...) and test "
            f"({', '.join(test.classes[:5])} ...) are not the same, or not in the same order."
        )
    return train, test


@torch.no_grad()
def segmentation_scores(
    cfg: DenseConfig, predict: Predict, test: DenseSource, device: torch.device,
    scales: Sequence[float] = (1.0,), flips: Sequence[bool] = (False,),
) -> dict[str, float]:  # fmt: skip
    """Scores over all test images at their stored size, as Confusion.scores(); a few are saved in cfg.out.

    Args:
        cfg: its `resize` is the shorter side, in pixels, of an image that `predict` sees.
        predict: see Predict.
        test: the images.
        device: of the predictions.
        scales: of `resize`; the shares of the classes at all scales, plain and mirrored, are averaged.
        flips: whether an image is mirrored.
    """
    confusion = Confusion(len(test.classes), device)
    several = len(scales) * len(flips) > 1
    samples = Sampler(cfg.out, len(test), test.classes)
    for pair in read_pairs(test, cfg.workers, "test images", share=True):
        image = pair.image.float() / 255
        total = torch.zeros((), device=device)
        for scale in scales:
            resized = resize_image(image, *shorter_side_to(image, round(cfg.resize * scale)))
            for flip in flips:
                logits = predict(resized.flip(-1) if flip else resized)
                logits = to_size((logits.flip(-1) if flip else logits)[None], *pair.target.shape)[0]
                total = total + (logits.softmax(dim=0) if several else logits)
        predicted = total.argmax(dim=0)
        confusion.add(predicted, pair.target.to(device))
        samples.add(pair.index, test.name(pair.index), pair.image, pair.target, predicted)
    samples.save()
    return confusion.scores(test.classes)
