"""What the emulated GPU sees, each beside the same on the CPU."""

import pytest
import torch
from torch import nn


@pytest.mark.parametrize(
    ("what", "work"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.any())),
        ("_local_scalar_dense", lambda x: float(x[0, 0])),
        ("to the CPU", lambda x: x.tolist()),
        ("to the CPU", lambda x: torch.zeros(2, 3).copy_(x)),
        ("nonzero", lambda x: x.nonzero()),
        ("by a mask", lambda x: x[x > 0]),
        ("from pageable memory", lambda x: x[[1, 0]]),
        ("by an index on the CPU", lambda x: x[torch.tensor([1, 0])]),
        ("bincount", lambda x: x.flatten().long().bincount()),
        ("from pageable memory", lambda x: x + torch.ones(3).to(x.device)),
        ("from pageable memory", lambda x: x + torch.tensor([1.0, 2, 3], device=x.device)),
        ("from pageable memory", lambda x: torch.ones(2**15).to(x.device, non_blocking=True)),
    ],
)
def test_a_wait_is_noted(emulated, what, work):
    with emulated() as gpu:
        x = torch.arange(6.0).view(2, 3).to("cuda:0")
        gpu.waits.clear()
        work(x)
    assert what in gpu.waits[0]


def test_no_wait_is_noted_where_there_is_none(emulated):
    with emulated() as gpu:
        small = torch.ones(3).to("cuda:0", non_blocking=True)
        large = torch.ones(2**15).pin_memory().to("cuda:0", non_blocking=True)
        made = torch.full((3,), 2.0, device="cuda:0") + torch.arange(3, device="cuda:0")
        assert {x.device.type for x in (small, large, made, made * 2, made[:1], made.view(3, 1))} == {"cuda"}
        made[small > 0] = 0.0  # by a kernel with a mask
        made.index_select(0, torch.arange(2, device="cuda:0")).add_(1)
        with pytest.raises(RuntimeError, match="one device, but"):
            small + torch.ones(3)
    assert gpu.uploads == [(3,), (2**15,)]
    assert gpu.waits in ([], ["aten.index_put_.default by a mask"])


def test_without_numbers_a_read_raises(emulated):
    with emulated("meta"):
        x = torch.ones(2, 3).to("cuda:0")
        assert (x @ x.T).shape == (2, 2)
        with pytest.raises((RuntimeError, NotImplementedError)):
            x.sum().item()


def test_its_backward_pass_is_that_of_autograd(emulated):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    x, shared = torch.randn(5, 4), nn.Parameter(torch.randn(3))

    def loss(net, x, shared):
        y = net(x) * shared
        _, second = y.split([1, 2], dim=1)  # an output that nothing reads has no gradient
        return (y.softmax(dim=1) * shared).sum() + second.unbind(1)[0].square().sum()

    loss(net, x, shared).backward()
    want = [p.grad.clone() for p in (*net.parameters(), shared)]
    net.zero_grad(set_to_none=True)
    with emulated():
        there, gain = net.to("cuda:0"), nn.Parameter(shared.detach().to("cuda:0"))
        loss(there, x.to("cuda:0"), gain).backward()
        for p, expected in zip((*there.parameters(), gain), want, strict=True):
            assert p.grad.device.type == "cuda"
            torch.testing.assert_close(p.grad.cpu(), expected)
