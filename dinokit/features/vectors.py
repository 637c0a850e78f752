"""One vector an image of a source, in the source's order.

N  images that could be read     W  numbers an image: the backbone's width, for its class token alone
"""

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from dinokit.data.loader import image_loader
from dinokit.data.sampler import RangeSampler
from dinokit.data.sources import ImageLike, ImageSource
from dinokit.data.transforms import CenterCrop, Transform
from dinokit.features.fingerprint import images_stamp
from dinokit.features.frozen import device_of, frozen, normalised
from dinokit.features.halfway import Halfway
from dinokit.features.reading import Reading
from dinokit.models import Backbone
from dinokit.runtime.distributed import all_reduce_sum, rank, world_size
from dinokit.runtime.log import watch

CLASS_TOKEN = Reading()


@dataclass
class Features:
    """On the backbone's device; the same in every process."""

    x: Tensor  # (N, W) float32, after the final norm, at its own length
    y: Tensor  # (N,) int64 labels, -1 without one
    unreadable: list[str]  # names of the images that are left out, because they could not be read


class Part:
    """Some images of a source: those at `places`, in that order."""

    def __init__(self, source: ImageSource, places: Sequence[int]) -> None:
        self.source, self.places = source, places
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[ImageLike, int]:
        return self.source[self.places[index]]

    def name(self, index: int) -> str:
        """As the source calls it."""
        return self.source.name(self.places[index])

    def stamp(self) -> str | None:
        """The source's stamp with a hash of the places; None if the source has no stamp."""
        stamp = images_stamp(self.source)
        places = blake2b(repr(list(self.places)).encode(), digest_size=16).hexdigest()
        return None if stamp is None else f"{stamp} {places}"


def spread(source: ImageSource, count: int) -> ImageSource:
    """`count` images of a source: one drawn from each of so many equal parts, the same every time.

    A fixed stride would meet one class alone where the classes go round and round. 0, or more than there are,
    means all.
    """
    n, draw = len(source), random.Random(0)
    if not 0 < count < n:
        return source
    return Part(source, [draw.randrange(i * n // count, (i + 1) * n // count) for i in range(count)])


def extract(
    backbone: Backbone,
    source: ImageSource,
    resize: int,
    size: int,
    batch: int = 256,
    workers: int = 0,
    precision: torch.dtype | None = None,
    reading: Reading = CLASS_TOKEN,
    cut: Transform | None = None,
    draw: int = 0,
    halfway: Halfway | None = None,
) -> Features:
    """Features of the centre, or another view, of each image. Leaves the backbone as it was.

    With several processes all must call this; each reads its share of the images, and all get all features.

    Args:
        backbone: on the device to compute on.
        source: images, with or without labels.
        resize: pixels of the shorter side before the centre is cut out.
        size: pixels, the side of that centre; a multiple of the backbone's patch.
        batch: images at a time.
        workers: processes that load images.
        precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.
        reading: what is kept of the tokens.
        cut: what is shown of an image in place of its centre, (C, size, size).
        draw: the number of the draw, for a `cut` that draws.
        halfway: where rows are kept until all are there, and taken up.

    Raises:
        ValueError: if the size or the channels do not fit the backbone, no image can be read, or a feature is
            not finite.
    """
    if size < 1 or size % backbone.patch:
        raise ValueError(f"size={size} is no multiple of the backbone's patch, {backbone.patch} pixels.")
    if resize < size:
        raise ValueError(f"resize={resize} leaves no crop of size={size}: it must be at least as large.")
    device = device_of(backbone)
    x = torch.zeros(len(source), reading.width(backbone), device=device)
    y, seen = torch.zeros(2, len(source), dtype=torch.int64, device=device)
    share = range(rank(), len(source), world_size())  # disjoint, so that the sum over processes is the whole
    done = halfway.take_up(x, y, seen) if halfway else 0
    order = RangeSampler([share[done:]], batch, draw)
    views = image_loader(source, cut or CenterCrop(resize, size), order, workers)
    views = watch(views, math.ceil(done / batch) + len(order), "features", math.ceil(done / batch))
    with frozen(backbone), torch.inference_mode(), halfway.kept(x, y) if halfway else nullcontext():
        for part in views:
            done += len(part.indices)
            if not part.groups:
                continue
            crops = normalised(backbone, part.images.to(device))
            with torch.autocast(device.type, precision, enabled=precision is not None):
                rows = reading(backbone, crops)
            places = part.indices[part.valid].to(device)
            x[places], y[places], seen[places] = rows, part.labels[part.valid].to(device), 1
            if halfway:
                halfway.add(places, done, x, y)
    return _together(source, x, y, seen, precision)


def _together(
    source: ImageSource, x: Tensor, y: Tensor, seen: Tensor, precision: torch.dtype | None
) -> Features:
    """What all processes have, each zeros where it looked at no image: (N, W), (N,) and (N,)."""
    x, y, whole = all_reduce_sum(x), all_reduce_sum(y), all_reduce_sum(seen) > 0
    lost = [source.name(int(i)) for i in (~whole).nonzero()]
    if len(lost) == len(source):
        raise ValueError(f"None of the {len(source)} images can be read{_first_reason(source)}.")
    x, y = (x[whole], y[whole]) if lost else (x, y)
    _refuse_broken(x, precision)
    return Features(x, y, lost)


def _refuse_broken(x: Tensor, precision: torch.dtype | None) -> None:
    broken = int((~x.isfinite()).any(dim=1).sum())
    if broken:
        hint = " or float16 is too narrow for them: try precision=bf16" if precision == torch.float16 else ""
        raise ValueError(
            f"Features of {broken} of {len(x)} images are not finite: the weights are broken{hint}."
        )


def _first_reason(source: ImageSource) -> str:
    try:
        source[0]
    except (OSError, ValueError) as error:
        return f": {str(error).rstrip('.')}"
    return ""
