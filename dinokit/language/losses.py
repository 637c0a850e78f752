"""Losses that bring images and texts together: the contrast of CLIP and the pairs of SigLIP, over processes.

A text may be true of several images, and an image has several texts: `matches` says which pairs are. CLIP
(arXiv 2103.00020) then shares the target of a row equally among its matches; SigLIP (arXiv 2303.15343) takes
each pair for itself. Texts and images of all processes are gathered with their gradients. Each process gives
the loss of its own rows; the loss of all is the mean over processes, as is the gradient that data-parallel
training makes of them.

    b  images of a process, and of texts as many     B  of all processes     E  width     K  texts of an image
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.runtime.distributed import all_gather_rows

CLIP_SCALE, SIGLIP_SCALE, SIGLIP_BIAS = math.log(1 / 0.07), math.log(10), -10.0  # at the start
LARGEST_SCALE = math.log(100)


def matches(captions: Tensor, texts: Tensor) -> Tensor:
    """Which texts are true of which images.

    Args:
        captions: (b, K) numbers of all captions of each image; -1 where it has fewer.
        texts: (B,) numbers of the texts of a step; equal texts have equal numbers.

    Returns:
        (b, B) bool.
    """
    return (captions[:, :, None] == texts).any(dim=1)


def clip_loss(images: Tensor, texts: Tensor, captions: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross entropy of a process's rows, in float32 or more.

    Args:
        images: (b, E) on the unit sphere.
        texts: (b, E) on the unit sphere; row i is a caption of image i.
        captions: (b, K), as for matches().
        numbers: (b,) of the texts.
        scale: what cosines are multiplied by.

    Returns:
        A number: half the mean over images, among all texts, and half that over texts, among all images.
    """
    images, texts = _full(images), _full(texts)
    every_image, every_text = all_gather_rows(images), all_gather_rows(texts)
    every_number, every_caption = all_gather_rows(numbers), all_gather_rows(captions)
    of_images = _cross_entropy(scale * images @ every_text.T, matches(captions, every_number))
    of_texts = _cross_entropy(scale * texts @ every_image.T, matches(every_caption, numbers).T)
    return (of_images + of_texts) / 2


def sigmoid_loss(
    images: Tensor, texts: Tensor, captions: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """The sum over pairs of -log sigmoid(z (scale cosine + bias)), z = 1 or -1, over the number of images.

    Args:
        images: (b, E) on the unit sphere.
        texts: (t, E) on the unit sphere, equally many in each process; a text may be true of no image.
        captions: (b, K), as for matches().
        numbers: (t,) of the texts.
        scale: what cosines are multiplied by.
        bias: added to the products.

    Returns:
        A number, of this process's images with all texts.
    """
    images, every_text = _full(images), all_gather_rows(_full(texts))
    sign = 2.0 * matches(captions, all_gather_rows(numbers)) - 1
    return -F.logsigmoid(sign * (scale * images @ every_text.T + bias)).sum() / len(images)


class ContrastLoss(nn.Module):
    """One of the two losses with its learned scale, at most 100, and for `sigmoid` its learned bias."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(CLIP_SCALE if kind == "clip" else SIGLIP_SCALE))
        self.bias = nn.Parameter(torch.tensor(SIGLIP_BIAS)) if kind == "sigmoid" else None

    def forward(self, images: Tensor, texts: Tensor, captions: Tensor, numbers: Tensor) -> Tensor:
        """Rows of any length, which are normalised; the others as for clip_loss() or sigmoid_loss()."""
        with torch.no_grad():  # in place, as CLIP does: clamped in the function it has no way back
            self.log_scale.clamp_(0, LARGEST_SCALE)
        images, texts = (F.normalize(_full(x), dim=1) for x in (images, texts))
        scale = self.log_scale.exp()
        if self.bias is None:
            return clip_loss(images, texts, captions, numbers, scale)
        return sigmoid_loss(images, texts, captions, numbers, scale, self.bias)


@torch.no_grad()
def step_figures(images: Tensor, texts: Tensor, captions: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """Figures of a step for the log, of a process's images among the texts of all.

    Returns:
        'top1', the share whose nearest text is true of them; 'repeated', the mean number of true texts beyond
        their own, each of which would be a false negative if captions were not compared.
    """
    every_text, every_number = all_gather_rows(texts.detach()), all_gather_rows(numbers)
    true = matches(captions, every_number)
    nearest = (images @ F.normalize(every_text, dim=1).T).argmax(dim=1, keepdim=True)
    own = true.gather(1, nearest).float().mean()
    return {"top1": own, "repeated": true.sum(dim=1).float().mean() - 1}


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cross_entropy(logits: Tensor, true: Tensor) -> Tensor:
    """The mean over rows (b, B), whose target is shared equally by what is true."""
    log_shares = logits.log_softmax(dim=1)
    return -(torch.where(true, log_shares, 0).sum(dim=1) / true.sum(dim=1)).mean()
