"""Colour: jitter, grey, blur, solarise, normalise, for a whole batch of crops on the device that trains.

The numbers are drawn in the worker, a short row a crop (`draw`), so that they depend on the crop's place in
the run alone; the pixels are changed where they are needed (`Photometric`). The rows stay on the CPU: they
decide which crops an operation touches, and asking the device would make it wait.

The operations are those of torchvision.transforms.v2, on floats in [0, 1], in DINO's order (arXiv
2104.14294).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinokit.config import CropGroup, Crops

# Columns of a row of parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factor, factor, factor, share of a turn
ORDER = 4  # four columns: which of the above comes first, ..., last; NONE where there is none
GRAY, SIGMA, SOLARIZE = 8, 9, 10  # 0 or 1; pixels, 0 is no blur; 0 or 1
COLUMNS = 11
NONE = -1
ORDERS = tuple(permutations(range(4)))
LUMA = 0.2989, 0.587, 0.114  # how bright red, green and blue look (ITU-R BT.601)
TILE = 2**18  # numbers coloured at a time on a CPU: 1 MB and its temporaries stay in a core's cache


def draw(cfg: Crops, group: CropGroup, crop: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """What is done to crop number `crop` of `group`. Returns (COLUMNS,).

    It draws the same count of random numbers whatever the settings, so changing one probability leaves the
    other draws as they were.
    """
    u = rng.random(11).tolist()
    row = [1.0, 1.0, 1.0, 0.0, NONE, NONE, NONE, NONE, 0.0, 0.0, 0.0]
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
    return np.array(row, dtype=np.float32)


def _of_crop(probabilities: tuple[float, ...], crop: int) -> float:
    return probabilities[crop if len(probabilities) > 1 else 0]


class Photometric:
    """Colours crops as their rows of parameters say, and normalises them.

    Raises:
        ValueError: if hue, saturation or gray are asked for and the images are not RGB, or if half of the
            blur's kernel is no smaller than a crop, which is mirrored that far at its edges.
    """

    def __init__(self, cfg: Crops) -> None:
        wrong = [key for key in ("hue", "saturation", "gray") if getattr(cfg, key) > 0]
        if len(cfg.mean) != 3 and wrong:
            raise ValueError(
                f"crops.mean has {len(cfg.mean)} channels, but {', '.join(f'crops.{key}' for key in wrong)} "
                f"mean something for red, green and blue only. "
                f"Set {' '.join(f'crops.{key}=0' for key in wrong)}."
            )
        for name, group in {"globals": cfg.globals, "locals": cfg.locals}.items():
            if group.count and max(group.blur) > 0 and group.size <= cfg.blur_kernel // 2:
                raise ValueError(
                    f"crops.blur_kernel={cfg.blur_kernel} is too wide for crops.{name}.size={group.size}: "
                    f"half of it must be smaller than a crop."
                )
        self.cfg = cfg

    def __call__(self, crops: Tensor, params: Tensor) -> Tensor:
        """Returns float32 (b, C, S, S).

        Args:
            crops: (b, C, S, S), uint8 or float in [0, 1].
            params: (b, COLUMNS), on the CPU: rows made by `draw`.
        """
        coloured = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        on_cpu = crops.device.type == "cpu"
        rows = max(1, TILE // crops.shape[1:].numel() if on_cpu else len(crops))
        for source, row, x in zip(crops.split(rows), params.split(rows), coloured.split(rows), strict=True):
            x.copy_(source)
            if source.dtype == torch.uint8:
                x.mul_(1 / 255)
            self._colour(x, row)
        return coloured

    def _colour(self, x: Tensor, params: Tensor) -> None:
        jitter: tuple[Operation, ...] = _brightness, _contrast, _saturation, _hue
        for order in params[:, ORDER : ORDER + 4].int().T.tolist():
            for column in sorted(set(order) - {NONE}):
                _apply(jitter[column], x, [at == column for at in order], params[:, column])
        _apply(_gray, x, params[:, GRAY].tolist(), params[:, GRAY])
        _apply(partial(_blur, kernel=self.cfg.blur_kernel), x, params[:, SIGMA].tolist(), params[:, SIGMA])
        solarize = partial(_solarize, threshold=self.cfg.solarize_threshold)
        _apply(solarize, x, params[:, SOLARIZE].tolist(), params[:, SOLARIZE])
        mean, std = torch.tensor(self.cfg.mean), torch.tensor(self.cfg.std)
        x.sub_(_send(mean, x)).mul_(_send(1 / std, x))


# Each operation changes its crops x (m, C, S, S) in place, by a number a crop (m, 1, 1, 1).
Operation = Callable[[Tensor, Tensor], object]


def _apply(operation: Operation, x: Tensor, chosen: Sequence[float], numbers: Tensor) -> None:
    """Run `operation` on the crops of x (b, C, S, S) whose `chosen` is not 0; numbers (b,), on the CPU."""
    rows = [row for row, wanted in enumerate(chosen) if wanted]
    if not rows:
        return
    if len(rows) == len(x):
        operation(x, _send(numbers, x).view(-1, 1, 1, 1))
    else:
        here = torch.tensor(rows)
        there = here.to(x.device, non_blocking=True)
        part = x.index_select(0, there)
        operation(part, _send(numbers[here], x).view(-1, 1, 1, 1))
        x.index_copy_(0, there, part)


def _send(numbers: Tensor, x: Tensor) -> Tensor:
    """`numbers` (C,) from the CPU to where x is, without waiting; (1, C, 1, 1), to fit its channels."""
    return numbers.to(x.device, non_blocking=True).view(1, -1, 1, 1)


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = x.mean(dim=(2, 3), keepdim=True)  # the mean of the grey image is the grey of the mean colour
    x.mul_(factor).add_(_luma(mean) * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    gray = _luma(x)
    x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def _gray(x: Tensor, _: Tensor) -> None:
    x.copy_(_luma(x))


def _luma(x: Tensor) -> Tensor:
    """How bright each pixel is: (m, C, h, w) -> (m, 1, h, w). Without three channels, their mean."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    gray = x[:, :1] * LUMA[0]
    return gray.add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def _hue(x: Tensor, share: Tensor) -> None:
    """Turn the colour of each pixel by a share of the circle; its largest and smallest channel stay.

    On a circle of six, red, green and blue stand at 0, 2 and 4. With `high` and `low` the pixel's largest and
    smallest channel, and `chroma` their difference, its hue is |2 + (g + b - r - high) / chroma| from red,
    towards green if g > b; and a channel at distance d from the hue is high - chroma * clamp(d - 1, 0, 1).
    Both follow from the definition of HSV by cases, and need none.
    """
    red, green, blue = x.unbind(1)  # (m, h, w)
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    hue = (green + blue).sub_(red).sub_(high)
    chroma = high.sub_(low).clamp_min_(1e-8)
    hue.div_(chroma).add_(2).copysign_(green - blue)  # -3 to 3
    low.sub_(chroma)
    places = torch.arange(0, 6, 2, device=x.device).view(1, 3, 1, 1)
    turn = torch.remainder(6 * share - places + 3, 6) - 3  # (m, 3, 1, 1), -3 to 3
    far = (hue[:, None] + turn).abs_().sub_(3).abs_()  # 3 - d, as hue + turn is in [-6, 6]
    torch.addcmul(low[:, None], chroma[:, None], far.clamp_(1, 2), out=x)


def _blur(x: Tensor, sigma: Tensor, kernel: int) -> None:
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


def _solarize(x: Tensor, _: Tensor, threshold: float) -> None:
    bright = torch.ge(
        x, threshold, out=torch.empty_like(x)
    )  # as 0 and 1: a where() is ten times slower on a CPU
    x.addcmul_(bright, torch.sub(1, x, alpha=2))
