"""Each faster form against the plain one, in values and gradients, and what the backward pass keeps."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinokit.models import fused
from dinokit.models.attention import LayerScale, PackedBatch
from dinokit.models.block import Block
from dinokit.models.fused import scaled_linear
from dinokit.models.head import Prototypes
from dinokit.models.vit import Config, VisionTransformer

BATCH = PackedBatch(((7, 3), (10, 2)))


def make_block(ffn: str = "mlp", layer_scale: float = 0.5, drop_path: float = 0.0) -> Block:
    torch.manual_seed(0)
    return Block(8, 2, ffn, layer_scale, drop_path).double()


def installed(module: nn.Module) -> nn.Module:
    """A copy that computes the faster forms."""
    module = copy.deepcopy(module)
    fused.install(module)
    return module


def results(module: nn.Module, *args, **kwargs) -> list[torch.Tensor]:
    """The value of a module and the gradients of its parameters and of its first argument, of one seed."""
    x = args[0].detach().clone().requires_grad_()
    torch.manual_seed(3)
    out = module(x, *args[1:], **kwargs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("drop_path", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_block_is_the_plain_block(ffn, layer_scale, drop_path, generator):
    block = make_block(ffn, layer_scale, drop_path)
    x = torch.randn(41, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(results(installed(block), x, BATCH), results(block, x, BATCH))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_autocast_gives_what_it_gives_in_the_plain_block(ffn, generator):
    block = make_block(ffn).float()
    x = torch.randn(41, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = results(installed(block), x, BATCH), results(block, x, BATCH)
    assert [y.dtype for y in got] == [y.dtype for y in want]
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("drop_path", [0.0, 0.3, 0.6])
def test_rows_that_are_read_are_those_of_the_whole_block(drop_path, generator):
    block = installed(make_block(drop_path=drop_path))
    x = torch.randn(41, 8, generator=generator, dtype=torch.float64)
    read = torch.tensor([0, 4, 20, 21, 22, 40])
    torch.manual_seed(3)
    want = block(x, BATCH)[read]
    torch.manual_seed(3)
    torch.testing.assert_close(block(x, BATCH, read), want)
    block.attn.register_forward_hook(lambda *_: None)  # the plain form
    torch.manual_seed(3)
    torch.testing.assert_close(block(x, BATCH, read), want)


def test_the_branch_is_computed_only_for_the_images_that_keep_it():
    block, seen = make_block(drop_path=0.4), []
    x = torch.arange(10.0).repeat_interleave(3)[:, None]
    fused._residual(
        x, PackedBatch(((10, 3),)), block.drop_path, lambda rows, b: seen.append((rows, b)) or rows
    )
    ((rows, batch),) = seen
    assert batch.groups == ((6, 3),)
    assert (rows.view(6, 3) == rows.view(6, 3)[:, :1]).all()  # the tokens of an image stay together


def test_a_copy_of_an_installed_network_computes_with_its_own_weights(generator):
    block = installed(make_block())
    other, x = copy.deepcopy(block), torch.randn(41, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        other.attn.proj.weight.zero_()
    assert not torch.allclose(other(x, BATCH), block(x, BATCH))


def small(**values) -> VisionTransformer:
    defaults = {"size": 32, "width": 24, "depth": 2, "heads": 3, "patch": 8, "layer_scale": 1.0}
    return VisionTransformer(Config(**{**defaults, **values})).eval()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_tokens_that_are_read_are_those_of_a_call_with_the_same_gradients(ffn, generator):
    plain = small(registers=2, ffn=ffn).double()
    crops = [
        torch.randn(b, 3, h, w, generator=generator, dtype=torch.float64)
        for b, h, w in ((3, 32, 32), (2, 16, 24))
    ]
    masks = [torch.rand(3, 16, generator=generator) < 0.4, None]
    places, grads, reads = torch.tensor([0, 5, 15, 16, 40, 47]), [], []
    for vit in (plain, installed(plain)):
        read = vit.read(crops, masks, places)
        reads.append(read)
        torch.cat([*read.cls, read.patches]).square().sum().backward()
        grads.append([p.grad for p in vit.parameters()])
    torch.testing.assert_close(*reads)
    torch.testing.assert_close(*grads)
    whole = plain(crops, masks)
    torch.testing.assert_close(reads[0].cls, [tokens.cls for tokens in whole])
    torch.testing.assert_close(reads[0].patches, whole[0].patches.flatten(0, 1)[places])


def test_the_last_block_computes_little_more_than_what_is_read(generator, monkeypatch):
    vit, rows = installed(small()), []
    feed_forward = fused._feed_forward
    monkeypatch.setattr(
        fused, "_feed_forward", lambda block, x: rows.append(len(x)) or feed_forward(block, x)
    )
    crops = [torch.randn(3, 3, 32, 32, generator=generator), torch.randn(5, 3, 16, 16, generator=generator)]
    vit.read(crops, [None, None], torch.tensor([7, 30]))
    assert rows == [3 * 17 + 5 * 5, 3 + 5 + 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prototypes_are_the_plain_ones(dtype, generator):
    plain = Prototypes(5, 7, norm_last_layer=False)
    with torch.no_grad():
        plain.weight_g.copy_(torch.rand(7, 1, generator=generator))
    out = torch.randn(7, 5, generator=generator).to(dtype)
    grads = [
        torch.autograd.grad((module(dtype) * out).float().sum(), list(module.parameters()))
        for module in (plain, installed(plain))
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(installed(plain)(dtype), plain(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


PLACES = ["norm1", "attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc2"]


@pytest.mark.parametrize(("where", "scale"), [*product(PLACES, (0.0, 1.0)), ("ls1", 1.0), ("ls2", 1.0)])
@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)  # fmt: skip
def test_hooks_are_called_and_see_what_the_plain_block_gives(hook, where, scale, generator):
    plain = make_block(layer_scale=scale)
    x, seen = torch.randn(41, 8, generator=generator, dtype=torch.float64), []
    for block in (plain, installed(plain)):
        tensors: list[torch.Tensor] = []
        getattr(block.get_submodule(where), hook)(lambda _, *args, to=tensors: to.extend(flat(args)))
        block(x.clone().requires_grad_(), BATCH).square().sum().backward()
        seen.append(tensors)
    assert seen[0]
    torch.testing.assert_close(*seen)


def flat(args):
    """Each tensor in nested tuples."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from flat(arg)
        elif isinstance(arg, torch.Tensor):
            yield arg.detach().clone()


@pytest.mark.parametrize("where", ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2", "ls1", "norm2"])
def test_replaced_layers_are_called(where, generator):
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (2 * self.inner(x)).tanh()

    block = make_block()
    parent, _, name = where.rpartition(".")
    setattr(block.get_submodule(parent), name, Doubled(block.get_submodule(where)))
    x = torch.randn(41, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(results(installed(block), x, BATCH), results(block, x, BATCH))


def count_saved(run):
    """How many tensors as large as the hidden rows the backward pass keeps, and the result."""
    found = {}

    def pack(x):
        if x.numel() >= 40 * 12:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return len(found), out


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
def test_scaled_linear_is_its_operations_one_by_one(gelu, with_gain):
    torch.manual_seed(0)
    linear, scale = nn.Linear(12, 5).double(), LayerScale(5, 1.0).double() if with_gain else nn.Identity()
    if with_gain:
        nn.init.normal_(scale.gamma)
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    want = scale(linear(F.gelu(x) if gelu else x))
    got = scaled_linear(x, linear, scale, gelu=gelu)
    torch.testing.assert_close(got, want)
    weights, inputs = torch.randn_like(want), [x, *linear.parameters(), *scale.parameters()]
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*grads)


def test_the_result_of_the_gelu_is_not_saved_for_backward():
    linear, x = nn.Linear(12, 5), torch.randn(40, 12, requires_grad=True)
    assert count_saved(lambda: scaled_linear(x, linear, nn.Identity(), gelu=True))[0] == 1
    assert count_saved(lambda: linear(F.gelu(x)))[0] == 2


def test_a_tiny_gain_survives_fp16():
    linear, scale = nn.Linear(12, 5).half(), LayerScale(5, 1e-6)
    x = torch.randn(40, 12).half()
    want = linear(x).float() * 1e-6
    torch.testing.assert_close(scaled_linear(x, linear, scale), want)
    folded = F.linear(
        x, linear.weight * scale.gamma.half()[:, None], linear.bias * scale.gamma.half()
    ).float()
    assert not torch.allclose(folded, want, rtol=1e-2)  # what it must not be computed from
