"""The grid of heads against as multi_label separate trainings by torch's own layers, losses and optimiser."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinokit.eval._linear_grid import Head, LinearGrid

WIDTH, MAX_BLOCKS, CLASSES, BATCH = 5, 4, 7, 32
CPU = torch.device("cpu")
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
GRID = [Head(blocks, pool, lr) for blocks in (1, 4) for pool in (False, True) for lr in RATES]


def make_grid(heads=GRID, multi_label=False):
    return LinearGrid(heads, WIDTH, MAX_BLOCKS, CLASSES, multi_label, BATCH, 0, CPU)


def batches(steps, multi_label=False):
    rng = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(BATCH, (MAX_BLOCKS + 1) * WIDTH, generator=rng)
        y = torch.randint(CLASSES, (BATCH,), generator=rng)
        yield x, (F.one_hot(y, CLASSES) + F.one_hot(y.flip(0), CLASSES) > 0) if multi_label else y


def seen_by(head, x):
    """Class tokens of the last blocks and, with pool, the mean of the patches, put together one by one."""
    parts = [x[:, i * WIDTH : (i + 1) * WIDTH] for i in range(MAX_BLOCKS + 1)]
    return torch.cat(
        [*parts[MAX_BLOCKS - head.blocks : MAX_BLOCKS], *(parts[MAX_BLOCKS:] if head.pool else [])], dim=1
    )


def trained_alone(head, weight, bias, steps, multi_label):
    layer = nn.Linear(weight.shape[1], CLASSES)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=head.lr * BATCH / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in batches(steps, multi_label):
        logits = layer(seen_by(head, x))
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, y.float(), reduction="sum") / BATCH
        else:
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


def train(heads, steps, multi_label=False):
    for step, (x, y) in enumerate(batches(steps, multi_label)):
        heads.step(x, y, BATCH, 0.9, (1 + math.cos(math.pi * step / steps)) / 2)


@pytest.mark.parametrize("multi_label", [False, True])
def test_52_heads_at_once_are_52_trainings(multi_label):
    heads, steps = make_grid(multi_label=multi_label), 40
    first = {head: (weight, bias) for head, weight, bias in heads.classifiers()}
    assert len(first) == 52
    train(heads, steps, multi_label)
    for head, weight, bias in heads.classifiers():
        alone = trained_alone(head, *first[head], steps, multi_label)
        torch.testing.assert_close(weight, alone.weight.detach(), atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(bias, alone.bias.detach(), atol=2e-6, rtol=2e-5)
    moved = max((weight - first[head][0]).abs().max().item() for head, weight, _ in heads.classifiers())
    assert moved > 0.05


def test_a_head_learns_the_same_whoever_is_beside_it():
    whole, alone = make_grid(), make_grid([GRID[20]])
    for heads in (whole, alone):
        train(heads, 5)
    weight = next(weight for head, weight, _ in whole.classifiers() if head == GRID[20])
    torch.testing.assert_close(next(alone.classifiers())[1], weight)


def test_what_a_head_gets_right_is_counted_from_its_own_logits():
    heads = make_grid()
    train(heads, 5)
    x, y = next(batches(1))
    for head, (share, likely) in heads.accuracies(x, y, rows=10).items():
        logits = heads.logits_of(head, x)
        assert share == pytest.approx((logits.argmax(dim=1) == y).double().mean().item())
        assert likely == pytest.approx(-F.cross_entropy(logits, y).item(), rel=1e-5)


def test_heads_that_diverged_are_worth_less_than_nothing_and_spoil_no_other():
    grid = [Head(blocks, pool, lr) for blocks, pool in ((1, False), (4, True)) for lr in (1e-3, 1e38)]
    heads = make_grid(grid)
    train(heads, 5)
    x, y = next(batches(1))
    worth = heads.accuracies(x, y, rows=100)
    assert {head: share < 0 for head, (share, _) in worth.items()} == {head: head.lr > 1 for head in grid}


def test_inputs_of_other_blocks_lie_side_by_side_too():
    grid = [Head(blocks, pool, lr) for blocks in (1, 2, 3) for pool in (False, True) for lr in (0.01, 0.1)]
    heads, steps = make_grid(grid), 10
    first = {head: (weight, bias) for head, weight, bias in heads.classifiers()}
    train(heads, steps)
    for head, weight, bias in heads.classifiers():
        alone = trained_alone(head, *first[head], steps, multi_label=False)
        torch.testing.assert_close(weight, alone.weight.detach(), atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(bias, alone.bias.detach(), atol=2e-6, rtol=2e-5)
        x, _ = next(batches(1))
        with torch.no_grad():
            expected = alone(seen_by(head, x))
        torch.testing.assert_close(heads.logits_of(head, x), expected, atol=1e-5, rtol=1e-4)


def test_a_grid_with_holes_is_refused():
    with pytest.raises(ValueError, match="the same learning rates"):
        make_grid([Head(1, False, 0.1), Head(4, False, 0.2)])


def test_training_resumes_from_a_state_exactly():
    unbroken, first, second = make_grid(), make_grid(), make_grid()
    train(unbroken, 6)
    rows = list(batches(6))
    for step, (x, y) in enumerate(rows):
        if step == 4:
            second.load_state_dict(first.state_dict())
        heads = first if step < 4 else second
        heads.step(x, y, BATCH, 0.9, (1 + math.cos(math.pi * step / 6)) / 2)
    for (_, a, _), (_, b, _) in zip(unbroken.classifiers(), second.classifiers(), strict=True):
        assert torch.equal(a, b)
