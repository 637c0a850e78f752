"""language/losses.py against loops over Python floats, alone and in two processes, and at its ends."""

import math
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dinokit.language.losses import (
    LARGEST_SCALE,
    ContrastLoss,
    clip_loss,
    matches,
    sigmoid_loss,
    step_figures,
)

NUMBERS = torch.tensor([4, 7, 4, 9, 2, 7])  # two texts occur twice
CAPTIONS = torch.tensor([[4, 7, -1], [7, 1, -1], [4, -1, -1], [9, 2, 5], [2, -1, -1], [7, -1, -1]])
KINDS = pytest.mark.parametrize("kind", ["clip", "sigmoid"])


def rows(seed, count=6, width=5):
    x = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(x, dim=1)


def loop(kind, images, texts, captions, numbers, scale, bias):
    """Either loss, one pair at a time."""
    n = len(images)
    true = [[numbers[j] in captions[i] for j in range(n)] for i in range(n)]
    cosine = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in texts] for x in images]
    if kind == "sigmoid":
        total = 0.0
        for i in range(n):
            for j in range(n):
                z = 1 if true[i][j] else -1
                total += math.log(1 + math.exp(-z * (scale * cosine[i][j] + bias)))
        return total / n
    total = 0.0
    for i in range(n):
        row = [scale * c for c in cosine[i]]
        column = [scale * cosine[k][i] for k in range(n)]
        for logits, target in ((row, true[i]), (column, [true[k][i] for k in range(n)])):
            log_sum = math.log(sum(map(math.exp, logits)))
            right = [log_sum - x for x, t in zip(logits, target, strict=True) if t]
            total += sum(right) / len(right)
    return total / (2 * n)


def value(kind, images, texts, captions, numbers, scale, bias):
    if kind == "clip":
        return clip_loss(images, texts, captions, numbers, scale)
    return sigmoid_loss(images, texts, captions, numbers, scale, bias)


@KINDS
def test_equals_a_loop_over_floats(kind):
    images, texts = rows(0), rows(1)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (7.0, -3.0))
    got = value(kind, images, texts, CAPTIONS, NUMBERS, scale, bias).item()
    lists = images.tolist(), texts.tolist(), CAPTIONS.tolist(), NUMBERS.tolist()
    assert got == pytest.approx(loop(kind, *lists, 7.0, -3.0), rel=1e-12)
    alone = torch.arange(6)  # without repeated captions, the usual cross entropy of the diagonal
    if kind == "clip":
        logits = 7 * images @ texts.T
        usual = (
            nn.functional.cross_entropy(logits, alone) + nn.functional.cross_entropy(logits.T, alone)
        ) / 2
        torch.testing.assert_close(clip_loss(images, texts, alone[:, None], alone, scale), usual)


def test_matches_are_captions_of_the_image_wherever_they_were_drawn():
    found = [[int(j) for j in row.nonzero()] for row in matches(CAPTIONS, NUMBERS)]
    assert found == [[0, 1, 2, 5], [1, 5], [0, 2], [3, 4], [4], [1, 5]]
    figures = step_figures(rows(0), rows(0), CAPTIONS, NUMBERS)
    assert figures["top1"] == 1  # each image is its own text
    assert figures["repeated"].item() == pytest.approx(7 / 6)


@KINDS
def test_a_scale_beyond_100_is_taken_back_and_can_fall_again(kind):
    loss = ContrastLoss(kind)
    assert loss.log_scale.item() == pytest.approx(math.log(1 / 0.07 if kind == "clip" else 10))
    assert (loss.bias is None) == (kind == "clip")
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    loss(rows(0).half(), rows(1).half(), CAPTIONS, NUMBERS).backward()
    assert loss.log_scale.item() == pytest.approx(LARGEST_SCALE)
    assert loss.log_scale.grad.isfinite()
    assert loss.log_scale.grad != 0


def test_a_repeated_caption_is_no_false_negative():
    """Two images with one caption, alike: the least of CLIP's loss is ln 2, and both pairs of SigLIP pull."""
    images = texts = torch.ones(2, 1, dtype=torch.float64)
    numbers, scale = torch.tensor([3, 3]), torch.tensor(5.0)
    same = clip_loss(images, texts, numbers[:, None], numbers, scale)
    assert same.item() == pytest.approx(math.log(2))  # the entropy of a target that two share
    images.requires_grad_()
    sigmoid_loss(images, texts, numbers[:, None], numbers, scale, torch.tensor(0.0)).backward()
    assert (images.grad < 0).all()  # both pairs pull


def gradients(kind, images, texts, captions, numbers):
    """The loss and its gradients, of a small net before it."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"image": nn.Linear(5, 4), "text": nn.Linear(5, 4), "loss": ContrastLoss(kind)}
    ).double()
    loss = net["loss"](net["image"](images), net["text"](texts), captions, numbers)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters()}


def half(rank, store, kind, queue):
    """One of two processes, with half of the rows; then the mean over both, as in data-parallel training."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = slice(3 * rank, 3 * rank + 3)
    loss, grads = gradients(kind, rows(0)[part], rows(1)[part], CAPTIONS[part], NUMBERS[part])
    for x in (loss, *grads.values()):
        dist.all_reduce(x)
    if rank == 0:
        queue.put((loss.item() / 2, {name: (x / 2).tolist() for name, x in grads.items()}))
    dist.barrier()
    dist.destroy_process_group()


@KINDS
def test_two_processes_with_half_of_the_rows_have_the_loss_and_gradients_of_one(kind, tmp_path):
    context = get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=half, args=(rank, str(tmp_path / "store"), kind, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    loss, grads = queue.get(timeout=300)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    want, expected = gradients(kind, rows(0), rows(1), CAPTIONS, NUMBERS)
    assert loss == pytest.approx(want.item(), abs=1e-9)
    assert grads.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(torch.tensor(grads[name], dtype=x.dtype), x, rtol=0, atol=1e-9)
        assert x.any(), name
