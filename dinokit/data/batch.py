"""What a training step is given: the crops of B images, how to colour them, and what is masked.

Crops are crop-major: crop 0 of all images, then crop 1 of all images, and so on; row g * B + i is crop g of
image i.

Letters: B images in this batch on this process, G global crops, L local crops, C channels, N patches,
P columns of colour parameters, M masked patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Sample:
    """One image of a step, made in a worker."""

    step: int
    global_crops: Tensor  # (G, C, S, S) uint8 or float32
    local_crops: Tensor  # (L, C, s, s)
    global_colour: Tensor  # (G, P) float32
    local_colour: Tensor  # (L, P)
    masks: Tensor | None  # (G, N) bool
    unreadable: dict[str, str] = field(default_factory=dict)  # images passed over before this one, and why


@dataclass
class Batch:
    """B images of a step. The colour parameters stay on the CPU, where `Photometric` reads them."""

    step: int
    images: int  # B
    global_crops: Tensor  # (G*B, C, S, S) uint8, or float32 in [0, 1]
    local_crops: Tensor  # (L*B, C, s, s); L may be 0
    global_colour: Tensor  # (G*B, P) float32
    local_colour: Tensor  # (L*B, P) float32
    masks: Tensor | None  # (G*B, N) bool; none without masked losses
    masked: Tensor  # (M,) int64: places in the flattened masks that are masked
    mask_weight: Tensor  # (M,) float32: one over the number of masked patches in the same crop
    unreadable: dict[str, str] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its pixels and masks on `device`, without waiting if its memory is pinned."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with its pixels and masks in page-locked memory. The DataLoader calls it."""
        return self._each(Tensor.pin_memory)

    def split(self, parts: int) -> "list[Batch]":
        """As `parts` batches of equally many images, in order, for gradient accumulation.

        Split before moving to a device: which patches are masked is found anew, and a GPU would have to be
        waited for.

        Raises:
            ValueError: if the images cannot be split so.
        """
        if parts < 1 or self.images % parts:
            raise ValueError(f"a batch of {self.images} images cannot be cut into {parts} equal parts.")
        if parts == 1:
            return [self]
        size = self.images // parts
        return [self._part(i * size, size) for i in range(parts)]

    def _part(self, start: int, size: int) -> "Batch":
        def take(x: Tensor) -> Tensor:
            rows = x.unflatten(0, (-1, self.images)) if len(x) else x[:, None]
            return rows[:, start : start + size].flatten(0, 1)

        masks = None if self.masks is None else take(self.masks)
        masked, weight = _masked(masks)
        return Batch(
            step=self.step, images=size,
            global_crops=take(self.global_crops), local_crops=take(self.local_crops),
            global_colour=take(self.global_colour), local_colour=take(self.local_colour),
            masks=masks, masked=masked, mask_weight=weight,
            unreadable=self.unreadable if start == 0 else {},  # named once
        )  # fmt: skip

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            global_crops=change(self.global_crops),
            local_crops=change(self.local_crops),
            masks=None if self.masks is None else change(self.masks),
            masked=change(self.masked),
            mask_weight=change(self.mask_weight),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one step as a batch."""
    masks = [sample.masks for sample in samples if sample.masks is not None]
    stacked = _crop_major(masks) if masks else None
    masked, weight = _masked(stacked)
    return Batch(
        step=samples[0].step,
        images=len(samples),
        global_crops=_crop_major([sample.global_crops for sample in samples]),
        local_crops=_crop_major([sample.local_crops for sample in samples]),
        global_colour=_crop_major([sample.global_colour for sample in samples]),
        local_colour=_crop_major([sample.local_colour for sample in samples]),
        masks=stacked,
        masked=masked,
        mask_weight=weight,
        unreadable={name: why for sample in samples for name, why in sample.unreadable.items()},
    )


def stack(rows: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.stack(), with uint8 rows brought to [0, 1] among floats: a source may mix depths."""
    if len({row.dtype for row in rows}) > 1:
        rows = [row.float() / 255 if row.dtype == torch.uint8 else row for row in rows]
    return torch.stack(list(rows), dim=dim)


def _crop_major(rows: Sequence[Tensor]) -> Tensor:
    """B tensors (crops, ...) -> (crops * B, ...)."""
    return stack(rows, dim=1).flatten(0, 1)


def _masked(masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where (G*B, N) masks are true, flattened, and one over the count in the same row: (M,), (M,)."""
    if masks is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    masked = masks.flatten().nonzero().flatten()
    weight = 1 / masks.sum(dim=1).clamp(min=1).float()  # (G*B,)
    return masked, weight[masked // masks.shape[1]]
