"""attend() against one softmax over all rows with a mask, in float64."""

import pytest
import torch

from dinokit.layers.attention import Segments, attend


def masked_softmax(qkv: torch.Tensor, heads: int, segments: Segments) -> torch.Tensor:
    """Every row looks at every row, and those of other images are struck out."""
    image = torch.cat(
        [torch.arange(b).repeat_interleave(n) + 1000 * g for g, (b, n) in enumerate(segments.groups)]
    )
    same = image[:, None] == image[None, :]
    q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~same, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("groups", [((2, 5),), ((3, 1), (1, 7)), ((2, 4), (5, 4), (1, 9))])
def test_no_row_looks_at_another_image(groups, generator):
    segments = Segments(groups)
    rows = sum(b * n for b, n in groups)
    qkv = torch.randn(rows, 3 * 12, dtype=torch.float64, generator=generator).requires_grad_()
    other = qkv.detach().clone().requires_grad_()
    out, want = attend(qkv, 3, segments), masked_softmax(other, 3, segments)
    torch.testing.assert_close(out, want)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(qkv.grad, other.grad)
