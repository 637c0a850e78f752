"""What colour does to the pixels of crops: jitter, grey, blur, solarise.

Each operation changes its crops x (m, C, S, S) in place, by a number a crop (m, 1, 1, 1). They are those of
torchvision.transforms.v2, on floats in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = 0.2989, 0.587, 0.114  # how bright red, green and blue look (ITU-R BT.601)


def brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> None:
    mean = x.mean(dim=(2, 3), keepdim=True)  # the mean of the grey image is the grey of the mean colour
    x.mul_(factor).add_(_luma(mean) * (1 - factor)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> None:
    grey = _luma(x)
    x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def gray(x: Tensor, _: Tensor) -> None:
    x.copy_(_luma(x))


def _luma(x: Tensor) -> Tensor:
    """How bright each pixel is: (m, C, h, w) -> (m, 1, h, w). Without three channels, their mean."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    grey = x[:, :1] * LUMA[0]
    return grey.add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def hue(x: Tensor, share: Tensor) -> None:
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
    angle = (green + blue).sub_(red).sub_(high)
    chroma = high.sub_(low).clamp_min_(1e-8)
    angle.div_(chroma).add_(2).copysign_(green - blue)  # -3 to 3
    low.sub_(chroma)
    places = torch.arange(0, 6, 2, device=x.device).view(1, 3, 1, 1)
    turn = torch.remainder(6 * share - places + 3, 6) - 3  # (m, 3, 1, 1), -3 to 3
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
    # As 0 and 1: a where() is ten times slower on a CPU.
    bright = torch.ge(x, threshold, out=torch.empty_like(x))
    x.addcmul_(bright, torch.sub(1, x, alpha=2))
