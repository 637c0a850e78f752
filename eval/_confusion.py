"""Which class was taken for which, and the scores that follow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinokit.data.dense import IGNORE
from dinokit.runtime.distributed import all_reduce_sum


class Confusion:
    """Counts of pixels by true and by given class."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # [true, given]

    def add(self, given: Tensor, truth: Tensor) -> None:
        """Count pixels; both of one shape, truth IGNORE where nothing is judged."""
        judged = truth != IGNORE
        pairs = truth[judged].long() * len(self.counts) + given[judged].long()
        self.counts += pairs.bincount(minlength=self.counts.numel()).view_as(self.counts)

    def scores(self, names: Sequence[str]) -> dict[str, float]:
        """Over all processes: mIoU, mean accuracy, pixel accuracy, and the IoU of each class.

        A class that is neither true nor given anywhere has no IoU, one that is not true anywhere no accuracy;
        means are over the others.

        Raises:
            ValueError: if no pixel was judged, or all are of one class.
        """
        counts = all_reduce_sum(self.counts.clone()).cpu().double()
        hit, true, given = counts.diagonal(), counts.sum(1), counts.sum(0)
        present = [name for name, n in zip(names, true.tolist(), strict=True) if n]
        if len(present) < 2:
            what = f"are all of class '{present[0]}'" if present else "are all left out of the judgement"
            raise ValueError(f"The pixels of the test images {what}: there is nothing to tell apart.")
        union = true + given - hit
        iou = hit / union  # 0 / 0 is nan
        each = {f"iou {name}": v for name, v in zip(names, iou.tolist(), strict=True) if v == v}
        return {
            "mIoU": iou[union > 0].mean().item(),
            "mean accuracy": (hit / true)[true > 0].mean().item(),
            "pixel accuracy": (hit.sum() / true.sum()).item(),
            **each,
        }
