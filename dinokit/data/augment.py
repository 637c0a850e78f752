"""Colour augmentation of a batch of crops: jitter, grayscale, blur, solarisation, normalisation.

The order of operations is that of DINO (arXiv 2104.14294). The operations equal those of
torchvision.transforms.v2 on floats in [0, 1], but take one number per crop and work in place.

Workers draw the parameters, a short row per crop (`draw`), as a function of the crop's place in the run; the
device that trains applies them (`Photometric`). An operation runs on the crops that drew it: the rows stay on
the CPU, because reading them from the device would make the CPU wait. Compiled, each operation runs on every
crop and its result is selected where it was drawn, so shapes never change and adjacent operations are fused.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinokit.config.load import CropGroup, Crops

# Columns of a row of parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factor, factor, factor, fraction of the colour circle
ORDER = 4  # four columns: which of the above is applied first, ..., last; NONE for none
GRAY, SIGMA, SOLARIZE = 8, 9, 10  # 0 or 1; pixels, 0 for no blur; 0 or 1
TINT = 11  # three columns: a factor for red, green and blue
COLUMNS = 14
NONE = -1
ORDERS = tuple(permutations(range(4)))
TILE = 2**18  # numbers processed at a time on a CPU: 1 MB and its temporaries fit into a core's cache


def draw(cfg: Crops, group: CropGroup, crop: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The parameters of crop number `crop` of `group`: (COLUMNS,).

    The number of random draws does not depend on the settings, except that a tint takes three more. So
    changing one probability does not change the other draws.
    """
    u = rng.random(11).tolist()
    row = [1.0, 1.0, 1.0, 0.0, NONE, NONE, NONE, NONE, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    if u[0] < cfg.jitter:
        strengths = cfg.brightness, cfg.contrast, cfg.saturation
        for column, strength in enumerate(strengths):
            low = max(0.0, 1 - strength)
            row[column] = low + (1 + strength - low) * u[1 + column]
        row[HUE] = cfg.hue * (2 * u[4] - 1)
        order = [op for op in ORDERS[int(24 * u[5])] if (*strengths, cfg.hue)[op] > 0]
        row[ORDER : ORDER + len(order)] = order
    row[GRAY] = float(u[6] < cfg.gray)
    if u[7] < _of_crop(group.blur, crop):
        low, high = cfg.blur_sigma
        row[SIGMA] = low + (high - low) * u[8]
    row[SOLARIZE] = float(u[9] < _of_crop(group.solarize, crop))
    if cfg.tint:
        row[TINT:] = (1 + cfg.tint * (2 * rng.random(3) - 1)).tolist()
    return np.array(row, dtype=np.float32)


def _of_crop(probabilities: tuple[float, ...], crop: int) -> float:
    return probabilities[crop if len(probabilities) > 1 else 0]


class Photometric:
    """Applies rows of parameters to crops, and normalises them.

    Args:
        cfg: the settings that the rows were drawn with; operations that they exclude are not searched for.
        compiled: whether to compile, once per shape (tens of seconds, at the first batch).

    Raises:
        ValueError: if hue, saturation, gray or tint are set and the images are not RGB, or if half of the
            blur kernel is not smaller than a crop, because blur mirrors a crop that far at its edges.
    """

    def __init__(self, cfg: Crops, compiled: bool = False) -> None:
        wrong = [key for key in ("hue", "saturation", "gray", "tint") if getattr(cfg, key) > 0]
        if len(cfg.mean) != 3 and wrong:
            raise ValueError(
                f"crops.mean has {len(cfg.mean)} channels, but {', '.join(f'crops.{key}' for key in wrong)} "
                f"need red, green and blue. "
                f"Set {' '.join(f'crops.{key}=0' for key in wrong)}."
            )
        for name, group in {"globals": cfg.globals, "locals": cfg.locals}.items():
            if group.count and max(group.blur) > 0 and group.size <= cfg.blur_kernel // 2:
                raise ValueError(
                    f"crops.blur_kernel={cfg.blur_kernel} is too wide for crops.{name}.size={group.size}: "
                    f"half of it must be smaller than a crop."
                )
        self.cfg = cfg
        self._run = (
            torch.compile(self._apply_everywhere, dynamic=False, fullgraph=True)
            if compiled
            else self._apply_where_drawn
        )

    def __call__(self, crops: Tensor, params: Tensor) -> Tensor:
        """Returns float32 (b, C, S, S).

        Args:
            crops: (b, C, S, S), uint8 or float in [0, 1].
            params: (b, COLUMNS), on the CPU: rows made by `draw`.
        """
        return self._run(crops, params)

    def normalise(self, crops: Tensor) -> Tensor:
        """Crops (b, C, S, S), uint8 or float in [0, 1], as float32 without any colour augmentation."""
        return self._normalise(crops / 255 if crops.dtype == torch.uint8 else crops.float().clone())

    def _apply_where_drawn(self, crops: Tensor, params: Tensor) -> Tensor:
        """Each operation on the crops that drew it, in place."""
        coloured = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        on_cpu = crops.device.type == "cpu"
        size = max(1, TILE // crops.shape[1:].numel() if on_cpu else len(crops))
        rows = _grouped_by_order(params) if on_cpu else list(range(len(crops)))
        steps = [(op, drawn.tolist(), n) for op, drawn, n in self._operations(params[rows], crops.shape[-1])]
        for begin in range(0, len(crops), size):
            tile = slice(begin, begin + size)
            index = _index(rows[tile], crops)
            source = _take(crops, index)
            in_place = isinstance(index, slice)
            x = coloured[index] if in_place else torch.empty_like(source, dtype=torch.float32)
            x.copy_(source)
            if crops.dtype == torch.uint8:
                x.mul_(1 / 255)
            for operation, drawn, numbers in steps:
                _apply(operation, x, drawn[tile], numbers[tile])
            self._normalise(x)
            if not in_place:
                coloured[index] = x
        return coloured

    def _apply_everywhere(self, crops: Tensor, params: Tensor) -> Tensor:
        """Each operation on every crop; its result is selected for the crops that drew it. To be compiled."""
        x = crops * (1 / 255) if crops.dtype == torch.uint8 else crops.float()
        params = params.to(crops.device, non_blocking=True)
        for operation, drawn, numbers in self._operations(params, crops.shape[-1]):
            changed = x.clone()
            operation(changed, numbers.view(-1, 1, 1, 1))
            x = torch.where(drawn.view(-1, 1, 1, 1), changed, x)
        return self._normalise(x.clone())

    def _operations(self, params: Tensor, size: int) -> "Iterator[tuple[Operation, Tensor, Tensor]]":
        """In order: an operation, which of the crops drew it (b,) bool, and its parameters (b,).

        size: the crops' side in pixels; crops too small for the blur kernel are of a group without blur.
        """
        cfg = self.cfg
        strengths = cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue
        jitter: tuple[Operation, ...] = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        possible = [column for column, strength in enumerate(strengths) if strength > 0 and cfg.jitter > 0]
        for turn in range(len(possible)):
            for column in possible:
                yield jitter[column], params[:, ORDER + turn] == column, params[:, column]
        for channel in range(3 if cfg.tint > 0 else 0):
            factor = params[:, TINT + channel]
            yield partial(adjust_channel, channel=channel), factor != 1, factor
        groups = cfg.globals, cfg.locals
        if cfg.gray > 0:
            yield grayscale, params[:, GRAY] > 0, params[:, GRAY]
        if size > cfg.blur_kernel // 2 and any(max(group.blur) > 0 for group in groups):
            yield partial(blur, kernel=cfg.blur_kernel), params[:, SIGMA] > 0, params[:, SIGMA]
        if any(max(group.solarize) > 0 for group in groups):
            operation = partial(solarize, threshold=cfg.solarize_threshold)
            yield operation, params[:, SOLARIZE] > 0, params[:, SOLARIZE]

    def _normalise(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor(self.cfg.mean), torch.tensor(self.cfg.std)
        return x.sub_(_send(mean, x)).mul_(_send(1 / std, x))


Operation = Callable[[Tensor, Tensor], object]


def _grouped_by_order(params: Tensor) -> list[int]:
    """Row numbers of params; rows with the same order of operations are adjacent."""
    orders = params[:, ORDER : ORDER + 4] @ torch.tensor([125.0, 25.0, 5.0, 1.0])
    return cast(list[int], orders.argsort(stable=True).tolist())


def _apply(operation: Operation, x: Tensor, drawn: Sequence[bool], numbers: Tensor) -> None:
    """Run `operation` on the crops of x (b, C, S, S) that drew it; numbers (b,), on the CPU."""
    rows = [row for row, selected in enumerate(drawn) if selected]
    if rows:
        index = _index(rows, x)
        selected = _take(x, index)
        operation(selected, _send(numbers[rows], x).view(-1, 1, 1, 1))
        if not isinstance(index, slice):
            x.index_copy_(0, index, selected)


def _index(rows: Sequence[int], x: Tensor) -> slice | Tensor:
    """The rows of x as a slice if they are consecutive, which avoids a copy; else as indices."""
    first, last = rows[0], rows[-1]
    if list(rows) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(rows).to(x.device, non_blocking=True)


def _take(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _send(numbers: Tensor, x: Tensor) -> Tensor:
    """`numbers` (C,) from the CPU to the device of x, without waiting: (1, C, 1, 1)."""
    return numbers.to(x.device, non_blocking=True).view(1, -1, 1, 1)


# The operations. Each changes crops x (m, C, S, S) in place, by one number per crop (m, 1, 1, 1).

LUMA = 0.2989, 0.587, 0.114  # luminance of red, green and blue (ITU-R BT.601)


def adjust_brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> None:
    mean = x.mean(dim=(2, 3), keepdim=True)  # the mean of the grey image is the grey of the mean colour
    x.mul_(factor).add_(_luma(mean) * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> None:
    grey = _luma(x)
    x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def adjust_channel(x: Tensor, factor: Tensor, channel: int) -> None:
    x[:, channel : channel + 1].mul_(factor).clamp_(0, 1)


def grayscale(x: Tensor, _: Tensor) -> None:
    x.copy_(_luma(x))


def _luma(x: Tensor) -> Tensor:
    """Luminance of each pixel: (m, C, h, w) -> (m, 1, h, w); the mean for other than three channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    grey = x[:, :1] * LUMA[0]
    return grey.add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def adjust_hue(x: Tensor, fraction: Tensor) -> None:
    """Rotate the hue of each pixel by a fraction of the circle; its largest and smallest channel stay.

    On a circle of length six, red, green and blue are at 0, 2 and 4. With `high` and `low` the largest
    and smallest channel of the pixel, and `chroma` their difference, its hue is |2 + (g + b - r - high) /
    chroma| from red, towards green if g > b; and a channel at distance d from the hue is high - chroma *
    clamp(d - 1, 0, 1). Both follow from the definition of HSV, without its case distinctions.
    """
    red, green, blue = x.unbind(1)  # (m, h, w)
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    angle = (green + blue).sub_(red).sub_(high)
    chroma = high.sub_(low).clamp_min_(1e-8)
    angle.div_(chroma).add_(2).copysign_(green - blue)  # -3 to 3
    low.sub_(chroma)
    positions = torch.arange(0, 6, 2, device=x.device).view(1, 3, 1, 1)
    turn = torch.remainder(6 * fraction - positions + 3, 6) - 3  # (m, 3, 1, 1), -3 to 3
    torch.add(angle[:, None], turn, out=x)
    x.abs_().sub_(3).abs_()  # 3 - d, as angle + turn is in [-6, 6]
    x.clamp_(1, 2).mul_(chroma[:, None]).add_(low[:, None])


def blur(x: Tensor, sigma: Tensor, kernel: int) -> None:
    """A Gaussian cut off at `kernel` pixels, along rows and then columns, the crop mirrored at its edges."""
    taps = [torch.exp(-0.5 * (i / sigma) ** 2) for i in range(kernel // 2 + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    half, pair = len(taps) - 1, torch.empty_like(x)
    for dim, edges in ((3, (half, half, 0, 0)), (2, (0, 0, half, half))):
        wide, size = F.pad(x, edges, mode="reflect"), x.shape[dim]
        torch.mul(wide.narrow(dim, half, size), taps[0] / total, out=x)
        for i in range(1, half + 1):
            torch.add(wide.narrow(dim, half - i, size), wide.narrow(dim, half + i, size), out=pair)
            x.addcmul_(pair, taps[i] / total)


def solarize(x: Tensor, _: Tensor, threshold: float) -> None:
    # The mask is 0 and 1 in floats, because where() is ten times slower on a CPU.
    bright = torch.ge(x, threshold, out=torch.empty_like(x))
    x.addcmul_(bright, torch.sub(1, x, alpha=2))
