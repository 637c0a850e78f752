"""AdamW against the formula over Python floats, and against torch.optim."""

import math
import subprocess
import sys

import pytest
import torch

from dinokit.train.adamw import AdamW

BETAS, EPS = (0.9, 0.95), 1e-8


def test_a_number_moves_as_the_formula_says():
    p = torch.tensor([0.7], requires_grad=True)
    opt = AdamW([{"params": [p], "lr": 0.0, "weight_decay": 0.0}], BETAS)
    x, mean, square = 0.7, 0.0, 0.0
    for t, grad in enumerate([0.3, -2.0, 0.05, 1.5], start=1):
        lr, decay = 0.1 / t, 0.04 * t
        opt.param_groups[0] |= {"lr": lr, "weight_decay": decay}
        p.grad = torch.tensor([grad])
        opt.step()
        x -= lr * decay * x
        mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
        square = BETAS[1] * square + (1 - BETAS[1]) * grad**2
        root = math.sqrt(square / (1 - BETAS[1] ** t)) + EPS
        x -= lr * mean / (1 - BETAS[0] ** t) / root
        assert p.item() == pytest.approx(x, rel=1e-6)


def groups(generator):
    shapes = [[(5, 3), (3,)], [(4,)], [(2, 2)]]
    params = [[torch.randn(s, generator=generator).requires_grad_() for s in some] for some in shapes]
    return [
        {"params": some, "lr": 0.01 * i, "weight_decay": 0.1 * i} for i, some in enumerate(params, start=1)
    ]


def test_groups_and_missing_gradients_are_as_in_torch(generator):
    ours = groups(generator)
    theirs = [{**g, "params": [p.detach().clone().requires_grad_() for p in g["params"]]} for g in ours]
    one, two = AdamW(ours, BETAS), torch.optim.AdamW(theirs, lr=0.0, betas=BETAS, eps=EPS, fused=True)
    pairs = [
        pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["params"], b["params"], strict=True)
    ]
    for step in range(6):
        one.zero_grad()
        two.zero_grad()
        for i, (p, q) in enumerate(pairs):
            if step % (i + 1) == 0:  # each its own number of steps
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
        one.step()
        two.step()
        for p, q in pairs:
            assert torch.equal(p, q)
            assert set(one.state[p]) == set(two.state[q])
            assert all(torch.equal(one.state[p][key], x) for key, x in two.state[q].items())
    one.zero_grad()
    assert all(p.grad is None for p, _ in pairs)


def test_an_overflow_leaves_everything_as_it_was(generator):
    ours = groups(generator)
    opt, scaler = AdamW(ours, BETAS), torch.amp.GradScaler("cpu")
    params = [p for g in ours for p in g["params"]]
    for overflows in (False, True, False):
        scaler.scale(sum((p**2).sum() for p in params)).backward()
        if overflows:
            params[0].grad[0, 0] = torch.inf
        before = [p.detach().clone() for p in params]
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert all(torch.equal(p, old) == overflows for p, old in zip(params, before, strict=True))
        opt.zero_grad()
    assert {opt.state[p]["step"].item() for p in params} == {2}


def test_a_training_step_does_not_import_the_compiler():
    """It would take 0.1 GiB and a second."""
    words = """
import sys
import torch
from dinokit.config.load import load_recipe
from dinokit.bench.step import Form

small = ["backbone.width=16", "backbone.heads=2", "heads.cls.prototypes=8", "run.device=cpu", "optim.batch=2"]
form = Form(load_recipe("scenes_cpu", small), 2, False)
form.step(next(form.batches))
print(sorted({"torch._dynamo", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
