"""Features of windows of the training images, made once and held: for training without augmentation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinokit.data.dense import DenseSource
from dinokit.data.dense_transforms import pad_image, pad_map
from dinokit.data.loader import dense_loader
from dinokit.data.sampler import image_at
from dinokit.eval._fit import Shown
from dinokit.eval._look import Look
from dinokit.eval._windows import windows
from dinokit.features import Map
from dinokit.runtime.distributed import rank, world_size
from dinokit.runtime.log import watch

AT_ONCE = 16  # windows for the backbone


@dataclass
class Cache:
    """n windows: maps of each block, in float16, and the truth of every pixel; on the backbone's device."""

    maps: list[Map]  # patches (n, D, h, w), cls (n, D)
    truth: Tensor  # (n, H, W)

    def batches(self, seed: int, batch: int, start: int, steps: int) -> Iterator[Shown]:
        """This process's part of steps `start` to `steps` - 1; the windows go round in an order of `seed`."""
        n, share = len(self.truth), batch // world_size()
        for step in range(start, steps):
            first = step * batch + rank() * share
            rows = torch.tensor(
                [image_at(seed, first + i, n) for i in range(share)], device=self.truth.device
            )
            yield [Map(m.patches[rows].float(), m.cls[rows].float()) for m in self.maps], self.truth[rows]


def fill_cache(
    look: Look,
    pairs: DenseSource,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    crop: tuple[int, int],
    stride: tuple[int, int],
    nothing: int,
    most_gib: float,
    workers: int,
) -> Cache:
    """Show all windows of all pairs to the backbone. Each process does it all: the images are few.

    Args:
        look: the backbone.
        pairs: training images.
        prepare: of an image (C, H, W) uint8 and its map (H, W), what is cut into windows.
        crop: height and width of a window.
        stride: down and across, between two windows.
        nothing: the truth beyond an image that is smaller than a window.
        most_gib: memory that the cache may take.
        workers: processes that load images.

    Raises:
        ValueError: if the cache would be larger, or a pair cannot be read.
    """
    parts: list[list[Map]] = []
    truths: list[Tensor] = []
    images: list[Tensor] = []
    colour = tuple(look.backbone.input.mean)
    size = 0.0
    for pair in watch(
        dense_loader(pairs, range(len(pairs)), workers), len(pairs), "features of training images"
    ):
        image, target = prepare(pair.image, pair.target)
        for top, left, bottom, right in windows(*target.shape, crop, stride):
            window = image[:, top:bottom, left:right].float() / 255
            images.append(pad_image(window, crop, colour))
            truths.append(pad_map(target[top:bottom, left:right], crop, nothing))
            if len(images) == AT_ONCE:
                parts.append(_shown(look, images))
                images = []
                size += sum(x.nbytes for m in parts[-1] for x in (m.patches, m.cls))
                size += AT_ONCE * truths[-1].nbytes
        if size > most_gib * 2**30:
            whole = size / 2**30 * len(pairs) / (pair.index + 1)
            raise ValueError(
                f"Features of all training windows would take about {whole:.1f} GiB, more than "
                f"cache_gib={most_gib:g}. Raise it, take fewer images by max_train or a smaller crop, or set "
                f"augment=true, which computes them at every step."
            )
    if images:
        parts.append(_shown(look, images))
    maps = [
        Map(torch.cat([p[i].patches for p in parts]), torch.cat([p[i].cls for p in parts]))
        for i in range(len(look.blocks))
    ]
    return Cache(maps, torch.stack(truths).to(look.device))


def _shown(look: Look, images: list[Tensor]) -> list[Map]:
    return [Map(m.patches.half(), m.cls.half()) for m in look(torch.stack(images))]
