"""The heads: what they can learn, and what heads without time cannot."""

import pytest
import torch

from dinokit.video.probe import build_probe

KINDS = ("flat", "attentive")


def moving_dot(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 5, 6, 3): one of six places in a row is lit, and goes one to the right or to the left."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=rng)
    x = 0.1 * torch.randn(n, 5, 6, 3, generator=rng)
    for i, label in enumerate(labels.tolist()):
        for t in range(5):
            x[i, t, t + 1 if label else 5 - t, 0] += 2
    return x, labels


@pytest.mark.parametrize("kind", KINDS)
def test_without_time_any_order_of_the_frames_gives_the_same_logits(kind) -> None:
    torch.manual_seed(0)
    x, real = torch.randn(7, 5, 6, 3), torch.ones(7, 5, dtype=torch.bool)
    order = torch.randperm(5)
    for time in (False, True):
        head = build_probe(kind, 5, 6, 3, 4, time).eval()
        with torch.no_grad():
            change = (head(x, real) - head(x[:, order], real)).abs().max()
        assert change > 1e-3 if time else change <= 1e-5


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_repeated_frames_have_no_effect(kind, time) -> None:
    torch.manual_seed(0)
    x, real = torch.randn(4, 5, 6, 3), torch.tensor([[True] * 3 + [False] * 2] * 4)
    other = x.clone()
    other[:, 3:] = torch.randn(4, 2, 6, 3)
    head = build_probe(kind, 5, 6, 3, 4, time).eval()
    with torch.no_grad():
        assert torch.allclose(head(x, real), head(other, real), atol=1e-6)


def test_a_head_with_time_learns_a_direction_and_one_without_time_gives_no_pair() -> None:
    """Of a clip and its reversal one at most is right without time, whatever was learned."""
    x, y = moving_dot(256)
    test_x, test_y = moving_dot(64, seed=1)
    real = torch.ones(64, 5, dtype=torch.bool)
    pairs = {}
    for time in (False, True):
        torch.manual_seed(0)
        head = build_probe("flat", 5, 6, 3, 2, time)
        optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
        for step in range(60):
            rows = slice(step % 4 * 64, step % 4 * 64 + 64)
            loss = torch.nn.functional.cross_entropy(head(x[rows], real), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = head(test_x, real).argmax(1) == test_y
            back = head(test_x.flip(1), real).argmax(1) == 1 - test_y
        pairs[time] = (right & back).float().mean().item()
    assert pairs[False] == 0
    assert pairs[True] > 0.9


def test_an_unknown_head() -> None:
    with pytest.raises(ValueError, match="no head 'flatt'; there is: flat, attentive"):
        build_probe("flatt", 5, 6, 3, 2)
