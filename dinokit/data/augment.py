"""Colour: jitter, grey, blur, solarise, normalise, for a whole batch of crops on the device that trains.

The numbers are drawn in the worker, a short row a crop (`draw`), so that they depend on the crop's place in
the run alone; the pixels are changed where they are needed (`Photometric`). An operation touches the crops
that drew it: the rows stay on the CPU, as asking the device which they are would make it wait. Compiled, each
operation runs on every crop, and its result is kept where it was drawn: shapes never change, and operations
that meet are joined into one pass.

The order of operations is DINO's (arXiv 2104.14294).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinokit.config.load import CropGroup, Crops
from dinokit.data import colours

# Columns of a row of parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factor, factor, factor, share of a turn
ORDER = 4  # four columns: which of the above comes first, ..., last; NONE where there is none
GRAY, SIGMA, SOLARIZE = 8, 9, 10  # 0 or 1; pixels, 0 is no blur; 0 or 1
COLUMNS = 11
NONE = -1
ORDERS = tuple(permutations(range(4)))
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

    Args:
        cfg: the settings of the rows: what these rule out is not looked for in a row.
        compiled: whether to compile it, for each shape that comes (tens of seconds, at the first batch).

    Raises:
        ValueError: if hue, saturation or gray are asked for and the images are not RGB, or if half of the
            blur's kernel is no smaller than a crop, which is mirrored that far at its edges.
    """

    def __init__(self, cfg: Crops, compiled: bool = False) -> None:
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
        self._run = (
            torch.compile(self._everywhere, dynamic=False, fullgraph=True) if compiled else self._where_drawn
        )

    def __call__(self, crops: Tensor, params: Tensor) -> Tensor:
        """Returns float32 (b, C, S, S).

        Args:
            crops: (b, C, S, S), uint8 or float in [0, 1].
            params: (b, COLUMNS), on the CPU: rows made by `draw`.
        """
        return self._run(crops, params)

    def _where_drawn(self, crops: Tensor, params: Tensor) -> Tensor:
        """Each operation on the crops that drew it, in place."""
        coloured = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        on_cpu = crops.device.type == "cpu"
        size = max(1, TILE // crops.shape[1:].numel() if on_cpu else len(crops))
        rows = _side_by_side(params) if on_cpu else list(range(len(crops)))
        steps = [(op, drawn.tolist(), n) for op, drawn, n in self._steps(params[rows], crops.shape[-1])]
        for begin in range(0, len(crops), size):
            tile = slice(begin, begin + size)
            place = _place(rows[tile], crops)
            source = _take(crops, place)
            here = isinstance(place, slice)
            x = coloured[place] if here else torch.empty_like(source, dtype=torch.float32)
            x.copy_(source)
            if crops.dtype == torch.uint8:
                x.mul_(1 / 255)
            for operation, drawn, numbers in steps:
                _change(operation, x, drawn[tile], numbers[tile])
            self._normalise(x)
            if not here:
                coloured[place] = x
        return coloured

    def _everywhere(self, crops: Tensor, params: Tensor) -> Tensor:
        """Each operation on every crop, its result kept for the crops that drew it. To be compiled."""
        x = crops * (1 / 255) if crops.dtype == torch.uint8 else crops.float()
        params = params.to(crops.device, non_blocking=True)
        for operation, drawn, numbers in self._steps(params, crops.shape[-1]):
            changed = x.clone()
            operation(changed, numbers.view(-1, 1, 1, 1))
            x = torch.where(drawn.view(-1, 1, 1, 1), changed, x)
        return self._normalise(x.clone())

    def _steps(self, params: Tensor, size: int) -> "Iterator[tuple[Operation, Tensor, Tensor]]":
        """In turn: an operation, which of the crops drew it (b,) bool, and its numbers (b,).

        size: the crops' side in pixels; so small ones as cannot be mirrored are of a group without blur.
        """
        cfg = self.cfg
        strengths = cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue
        jitter: tuple[Operation, ...] = (
            colours.brightness,
            colours.contrast,
            colours.saturation,
            colours.hue,
        )
        possible = [column for column, strength in enumerate(strengths) if strength > 0 and cfg.jitter > 0]
        for place in range(len(possible)):
            for column in possible:
                yield jitter[column], params[:, ORDER + place] == column, params[:, column]
        groups = cfg.globals, cfg.locals
        if cfg.gray > 0:
            yield colours.gray, params[:, GRAY] > 0, params[:, GRAY]
        if size > cfg.blur_kernel // 2 and any(max(group.blur) > 0 for group in groups):
            yield partial(colours.blur, kernel=cfg.blur_kernel), params[:, SIGMA] > 0, params[:, SIGMA]
        if any(max(group.solarize) > 0 for group in groups):
            solarize = partial(colours.solarize, threshold=cfg.solarize_threshold)
            yield solarize, params[:, SOLARIZE] > 0, params[:, SOLARIZE]

    def _normalise(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor(self.cfg.mean), torch.tensor(self.cfg.std)
        return x.sub_(_send(mean, x)).mul_(_send(1 / std, x))


Operation = Callable[[Tensor, Tensor], object]


def _side_by_side(params: Tensor) -> list[int]:
    """The rows of params, those with one order of operations next to each other."""
    orders = params[:, ORDER : ORDER + 4] @ torch.tensor([125.0, 25.0, 5.0, 1.0])
    return cast(list[int], orders.argsort(stable=True).tolist())


def _change(operation: Operation, x: Tensor, drawn: Sequence[bool], numbers: Tensor) -> None:
    """Run `operation` on those crops of x (b, C, S, S) that drew it; numbers (b,), on the CPU."""
    rows = [row for row, wanted in enumerate(drawn) if wanted]
    if rows:
        place = _place(rows, x)
        part = _take(x, place)
        operation(part, _send(numbers[rows], x).view(-1, 1, 1, 1))
        if not isinstance(place, slice):
            x.index_copy_(0, place, part)


def _place(rows: Sequence[int], x: Tensor) -> slice | Tensor:
    """Those rows of x: as a slice if they follow one another, which is no copy; else by number."""
    first, last = rows[0], rows[-1]
    if list(rows) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(rows).to(x.device, non_blocking=True)


def _take(x: Tensor, place: slice | Tensor) -> Tensor:
    return x[place] if isinstance(place, slice) else x.index_select(0, place)


def _send(numbers: Tensor, x: Tensor) -> Tensor:
    """`numbers` (C,) from the CPU to where x is, without waiting; (1, C, 1, 1), to fit its channels."""
    return numbers.to(x.device, non_blocking=True).view(1, -1, 1, 1)
