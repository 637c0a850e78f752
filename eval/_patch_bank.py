"""Patches of training images with the classes of their pixels: segmentation without a trained decoder.

N  patches in the bank     D  width     C  classes     k  neighbours     h, w  patches down and across
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.data.dense import IGNORE, DenseSource
from dinokit.data.dense_transforms import resize_image, resize_map, shorter_side_to
from dinokit.eval._dense import DenseBackbone, read_pairs
from dinokit.features.tokens import padding
from dinokit.runtime.log import watch

BLOCK = 1024  # queries at a time: with 100,000 patches in the bank, a block of cosines is 400 MiB


@dataclass
class PatchBank:
    """Patches on the backbone's device."""

    x: Tensor  # (N, D) float32
    shares: Tensor  # (N, C) float32: of the labelled pixels of a patch, the share of each class
    image: Tensor  # (N,) int64: the number of the image


def fill_bank(
    dense: DenseBackbone, source: DenseSource, resize: int, limit: int, workers: int, seed: int
) -> PatchBank:
    """Patches of all pairs that have a labelled pixel; of each image an equal share of `limit` patches.

    Raises:
        ValueError: if no pixel is labelled, or a pair cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    share = max(1, limit // len(source))
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for pair in read_pairs(source, workers, "patches of training images"):
        size = shorter_side_to(pair.image, resize)
        x = patch_rows(dense, resize_image(pair.image.float() / 255, *size))
        counts = patch_counts(resize_map(pair.target, *size), dense.backbone.patch, len(source.classes))
        chosen = counts.sum(dim=1).nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:share]]
        labelled = counts[chosen].to(x.device)
        image = torch.full((len(chosen),), pair.index)
        rows.append((x[chosen.to(x.device)], labelled / labelled.sum(1, keepdim=True), image))
    x, shares, image = (torch.cat(column) for column in zip(*rows, strict=True))
    if not len(x):
        raise ValueError("No pixel of the training images is labelled: check `ignore` and the masks' ids.")
    return PatchBank(x, shares, image)


def patch_rows(dense: DenseBackbone, image: Tensor) -> Tensor:
    """Features of the patches of one image (C, H, W), row by row: (h w, D)."""
    return dense(image[None])[0].patches[0].flatten(1).T.contiguous()


def patch_counts(ids: Tensor, patch: int, classes: int) -> Tensor:
    """Number of pixels of each class in each patch: ids (H, W) -> (h w, C), padded as in `dense`."""
    left, right, top, bottom = padding(ids.shape[0], ids.shape[1], patch)
    ids = F.pad(ids.long(), (left, right, top, bottom), value=IGNORE)
    blocks = (
        ids.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    )
    index = torch.arange(len(blocks))[:, None] * classes + blocks
    counts = index[blocks != IGNORE].bincount(minlength=len(blocks) * classes)
    return counts.view(-1, classes).float()


def grid_to_image(rows: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Values (h w, C) of the patches of an image of `height` x `width`, at its pixels: (C, height, width)."""
    left, right, top, bottom = padding(height, width, patch)
    h, w = (height + top + bottom) // patch, (width + left + right) // patch
    x = rows.T.unflatten(1, (h, w))[None]
    x = F.interpolate(x, (h * patch, w * patch), mode="bilinear", align_corners=False)
    return x[0, :, top : top + height, left : left + width]


def knn_classifier(bank: PatchBank, k: int, temp: float) -> Callable[[Tensor], Tensor]:
    """A function from patches (Q, D) to shares of the classes (Q, C), by the k nearest patches in the bank.

    Each neighbour by cosine votes with weight softmax(cosine / temp) for the classes of its pixels, by their
    share: in-context segmentation (Balazevic et al., arXiv 2306.01667). The search is exact.
    """
    keys, k = F.normalize(bank.x, dim=1), min(k, len(bank.x))

    def classify(x: Tensor) -> Tensor:
        shares = []
        for block in F.normalize(x, dim=1).split(BLOCK):
            cosines, indices = (block @ keys.T).topk(k, dim=1)
            weights = (cosines / temp).softmax(dim=1)
            shares.append(torch.einsum("qk,qkc->qc", weights, bank.shares[indices]))
        return torch.cat(shares)

    return classify


def regression_classifier(
    bank: PatchBank, cs: list[float], held_out: float
) -> tuple[Callable[[Tensor], Tensor], float]:
    """Multinomial logistic regression from patches (Q, D) to shares of the classes (Q, C), and its C.

    Features are standardised. The objective is C times the sum of the cross-entropies, plus half the square
    of the weights (not of the biases), by L-BFGS. C is chosen on the patches of a share of the
    images, by mean IoU of the largest class of each patch; then the regression is fitted to all patches.

    Args:
        bank: training patches.
        cs: C, ascending.
        held_out: share of the images to choose C on.
    """
    mean, std = bank.x.mean(dim=0), bank.x.std(dim=0).clamp_min(1e-6)
    x = (bank.x - mean) / std
    best = cs[0]
    if len(cs) > 1:
        last = bank.image >= bank.image.max() + 1 - max(1, round(held_out * (int(bank.image.max()) + 1)))
        last = last.to(x.device)  # the patches of the last images
        truth, scores, weights = bank.shares[last].argmax(1), [], None
        for c in watch(cs, len(cs), "logistic regression"):
            weights = _fit_regression(x[~last], bank.shares[~last], c, weights)
            scores.append(_mean_iou((_with_bias(x[last]) @ weights).argmax(1), truth, bank.shares.shape[1]))
        best = cs[max(range(len(cs)), key=lambda i: scores[i])]
    weights = _fit_regression(x, bank.shares, best, None)
    return lambda rows: (_with_bias((rows - mean) / std) @ weights).softmax(dim=1), best


def _fit_regression(x: Tensor, shares: Tensor, c: float, start: Tensor | None) -> Tensor:
    """(D + 1, C) weights, the last row the biases."""
    x, scale = _with_bias(x), 1 / (c * len(x))  # divided by C N, the objective is of size 1
    w = start.clone() if start is not None else x.new_zeros(x.shape[1], shares.shape[1])
    w.requires_grad_(True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w, shares) + scale / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()


def _with_bias(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    counts = (truth * classes + predicted).bincount(minlength=classes**2).view(classes, classes).double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal() / union)[union > 0].mean().item()
