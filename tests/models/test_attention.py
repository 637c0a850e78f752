"""attend() against one softmax over all rows with a mask, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinokit.models import attention, fused
from dinokit.models.attention import KERNELS, Attention, PackedBatch, unavailable_reason, use_kernel


def masked_softmax(qkv: torch.Tensor, heads: int, batch: PackedBatch) -> torch.Tensor:
    """Every row looks at every row, and those of other images are struck out."""
    image = torch.cat(
        [torch.arange(b).repeat_interleave(n) + 1000 * g for g, (b, n) in enumerate(batch.groups)]
    )
    same = image[:, None] == image[None, :]
    q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~same, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


DEVICES = [
    (torch.device("cpu"), torch.float32),
    pytest.param((torch.device("cuda"), torch.bfloat16), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("where", DEVICES, ids=str)
@pytest.mark.parametrize("attend", [attention.attend, fused.attend])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(
    groups=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4),
    heads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)
def test_no_row_looks_at_another_image_whatever_computes_it(where, kernel, attend, groups, heads, seed):
    device, dtype = where
    reason = unavailable_reason(kernel, device, dtype)
    if reason:
        pytest.skip(reason)
    batch, draw = PackedBatch(tuple(groups)), torch.Generator().manual_seed(seed)
    rows = sum(images * tokens for images, tokens in groups)
    qkv = torch.randn(rows, 3 * heads * 32, generator=draw).to(device, dtype).requires_grad_()
    exact = qkv.detach().double().cpu().requires_grad_()
    out, want = attend(qkv, heads, batch, kernel), masked_softmax(exact, heads, batch)
    weights = torch.randn(out.shape, generator=draw)
    (out * weights.to(device, dtype)).sum().backward()
    (want * weights.to(dtype).double()).sum().backward()
    tol = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(out.cpu().double(), want, rtol=tol, atol=tol)
    torch.testing.assert_close(qkv.grad.cpu().double(), exact.grad, rtol=tol, atol=tol)


def test_the_starts_of_images_are_where_their_rows_begin():
    assert PackedBatch(((2, 3), (1, 4))).starts(torch.device("cpu")).tolist() == [0, 3, 6, 10]


@pytest.mark.parametrize("kernel", ["xformers", "varlen"])
def test_a_kernel_that_is_not_here_is_refused_with_the_reason(kernel):
    layer = Attention(8, 2)
    with pytest.raises(ValueError, match=f"run.attention={kernel} cannot be used here: it needs CUDA"):
        use_kernel(layer, kernel, torch.device("cpu"), torch.float32)


def test_a_backbone_with_its_own_attention_takes_no_other():
    with pytest.raises(ValueError, match="has its own attention"):
        use_kernel(torch.nn.Linear(2, 2), "sdpa", torch.device("cpu"), torch.float32)
