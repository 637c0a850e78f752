"""Stochastic depth and the feed-forward parts."""

from itertools import product

import pytest
import torch

from dinokit.models.attention import PackedBatch
from dinokit.models.block import Block, SwiGLU, residual


def ones(rows: torch.Tensor, segments: PackedBatch) -> torch.Tensor:
    return torch.ones_like(rows)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.4, 0.9])
def test_dropped_branches_leave_the_mean_as_it_was(rate):
    segments = PackedBatch(((7, 3), (10, 2), (1, 4)))
    rows = torch.zeros(sum(b * n for b, n in segments.groups), 5)
    for added in segments.split(residual(rows, segments, rate, ones)):
        images = added.shape[0]
        torch.testing.assert_close(added.mean(), torch.ones(()))
        touched = (added != 0).flatten(1)
        assert (touched.all(dim=1) | ~touched.any(dim=1)).all()  # whole images
        assert touched.any(dim=1).sum() == max(int(images * (1 - rate)), 1)


def test_the_branch_sees_only_the_images_it_is_kept_for():
    seen = []
    segments = PackedBatch(((10, 3),))
    rows = torch.arange(10.0).repeat_interleave(3)[:, None]
    residual(rows, segments, 0.4, lambda x, s: seen.append((x, s)) or x)
    ((x, kept),) = seen
    assert kept.groups == ((6, 3),)
    assert (x.view(6, 3) == x.view(6, 3)[:, :1]).all()  # the tokens of an image stay together


def test_every_image_is_dropped_at_some_time():
    segments = PackedBatch(((8, 1),))
    kept = sum((residual(torch.zeros(8, 1), segments, 0.5, ones) != 0).float() for _ in range(400))
    assert kept.min() > 120
    assert kept.max() < 280


def test_gradients_flow_through_kept_and_dropped_images():
    x = torch.zeros(12, 2, requires_grad=True)
    residual(x, PackedBatch(((4, 3),)), 0.5, lambda rows, _: 3 * rows).sum().backward()
    assert sorted(x.grad.view(4, -1).mean(dim=1).tolist()) == pytest.approx([1, 1, 7, 7])


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6])
def test_rows_that_are_read_are_those_of_the_whole_block(rate, generator):
    block = Block(width=8, heads=2, ffn="mlp", layer_scale=0.5, drop_path=rate).train()
    segments = PackedBatch(((7, 3), (10, 2)))
    x, read = torch.randn(41, 8, generator=generator), torch.tensor([0, 4, 20, 21, 22, 40])
    torch.manual_seed(3)
    whole = block(x, segments)
    torch.manual_seed(3)
    torch.testing.assert_close(block(x, segments, read), whole[read])


def test_evaluation_drops_nothing():
    block = Block(width=8, heads=2, ffn="mlp", layer_scale=1.0, drop_path=0.9).eval()
    x, segments = torch.randn(12, 8), PackedBatch(((4, 3),))
    torch.testing.assert_close(block(x, segments), block(x, segments), rtol=0, atol=0)


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_is_as_wide_as_in_the_released_files(width, hidden):
    with torch.device("meta"):
        mlp = SwiGLU(width)
    assert mlp.w12.weight.shape == (2 * hidden, width)
    assert mlp.w3.weight.shape == (width, hidden)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_sum_in_place_is_the_sum(ffn):
    block = Block(width=8, heads=2, ffn=ffn, layer_scale=1.0, drop_path=0.0)
    x, segments, told = torch.randn(12, 8), PackedBatch(((4, 3),)), []
    for training, overwrite in ((True, True), (True, False), (False, True)):
        block.train(training).overwrite = overwrite
        block.zero_grad()
        out = block(x, segments)
        out.sum().backward()
        told.append((out, *[parameter.grad.clone() for parameter in block.parameters()]))
    for one, other in (told[:2], told[1:]):
        torch.testing.assert_close(one, other)


def test_a_branch_whose_result_is_the_sum_has_no_tensor_more():
    block = Block(width=8, heads=2, ffn="mlp", layer_scale=1.0, drop_path=0.0)
    x, segments, results = torch.randn(12, 8), PackedBatch(((4, 3),)), []
    branch = block.mlp.forward
    block.mlp.forward = lambda *given: results.append(branch(*given)) or results[-1]
    assert block(x, segments).data_ptr() == results[0].data_ptr()
    assert block.eval()(x, segments).data_ptr() != results[1].data_ptr()


def test_layers_of_others_may_read_what_they_gave():
    block = Block(width=8, heads=2, ffn="mlp", layer_scale=1.0, drop_path=0.0)
    x, segments = torch.randn(12, 8), PackedBatch(((4, 3),))
    block.mlp.fc2 = torch.nn.Sequential(block.mlp.fc2, torch.nn.Tanh())  # its backward pass reads its result
    block.ls1 = torch.nn.Tanh()
    block(x, segments).sum().backward()


PARTS = ["norm1", "attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc2"]


@pytest.mark.parametrize(("where", "scale"), [*product(PARTS, (0.0, 1.0)), ("ls1", 1.0), ("ls2", 1.0)])
@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)  # fmt: skip
def test_hooks_are_called_in_training_and_see_what_the_plain_block_gives(hook, where, scale, generator):
    """The plain one: modules called one by one, as they are without a gradient, and a sum of its own."""
    block = Block(width=8, heads=2, ffn="mlp", layer_scale=scale, drop_path=0.0)
    x, segments, seen = torch.randn(12, 8, generator=generator), PackedBatch(((4, 3),)), []
    want = block.eval()(x, segments).detach()
    getattr(block.get_submodule(where), hook)(lambda _, *tensors: seen.append([*flat(tensors)]))
    given = x.clone().requires_grad_()
    out = block.train()(given, segments)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    ((copies, tensors),) = [zip(*each, strict=True) for each in seen]
    torch.testing.assert_close(copies, tensors, rtol=0, atol=0)


def flat(tensors):
    """Each tensor in tuples of them, as it is now and as it is kept."""
    for each in tensors:
        if isinstance(each, tuple):
            yield from flat(each)
        elif isinstance(each, torch.Tensor):
            yield each.detach().clone(), each
