"""Logistic regression against scikit-learn's, coefficient by coefficient; then whole evaluations."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinokit.config.load import section_values
from dinokit.eval import logreg
from dinokit.eval.logreg import Config, evaluate, solve


def blobs(n=200, width=6, classes=4, shift=0.0):
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, width)) + rng.normal(size=(classes, width))[y] + shift
    return torch.from_numpy(x), torch.from_numpy(y)


def config(**values):
    return Config(**section_values("eval", "logreg", {"workers": 0, **values}, "logreg"))


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
def test_the_coefficients_are_scikit_learns(c, classes):
    x, y = blobs(classes=classes, shift=3.0)
    weight, bias = solve(x, y, classes, c, 1000, 1e-9)
    other = LogisticRegression(C=c, tol=1e-9, max_iter=50_000, solver="newton-cg").fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), other.coef_, atol=1e-3)
    free = bias.numpy() - bias.numpy().mean()  # a number added to all biases changes nothing
    np.testing.assert_allclose(free, other.intercept_ - other.intercept_.mean(), atol=1e-3)


def test_where_it_starts_does_not_matter():
    x, y = blobs()
    near = solve(x, y, 4, 0.3, 1000, 1e-9)
    for a, b in zip(solve(x, y, 4, 1.0, 1000, 1e-9, near), solve(x, y, 4, 1.0, 1000, 1e-9), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_at_the_minimum_the_slope_of_the_objective_is_nought():
    x, y = blobs()
    weight, bias = (each.requires_grad_() for each in solve(x, y, 4, 2.0, 1000, 1e-9))
    logits = x @ weight.T + bias
    value = 2.0 * torch.nn.functional.cross_entropy(logits, y, reduction="sum") + weight.square().sum() / 2
    value.backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def test_colours_are_distinguished_by_colour(colours, mean):
    scores = evaluate(config(**colours, count=5), mean)
    assert scores["top1"] == scores["mean_per_class"] == 1.0
    assert 1e-6 <= scores["C"] <= 1e5
    assert (scores["images_train"], scores["images_test"]) == (30, 12)


def test_the_penalty_is_the_strongest_of_those_that_are_best_where_it_is_chosen(colours, mean):
    scores = evaluate(config(**colours, powers=[-3, 1], count=5, select="test"), mean)
    assert scores["top1_optimistic"] == 1.0
    single = [
        evaluate(config(**colours, powers=[p, p], count=1, select="test"), mean)["top1_optimistic"]
        for p in range(-3, 2)
    ]
    assert scores["C"] == pytest.approx(10.0 ** (single.index(1.0) - 3))


def test_images_to_choose_on_are_trained_on_in_the_end(colours, mean):
    scores = evaluate(
        config(train=colours["train"], test=colours["test"], select_on={**colours["train"]}), mean
    )
    assert scores["images_train"] == 60
    with pytest.raises(ValueError, match="12 of 12 test images are select_on images too"):
        evaluate(config(train=colours["train"], test=colours["test"], select_on=colours["test"]), mean)


@pytest.mark.parametrize(("values", "words"), [({"powers": [2, 1]}, "powers"), ({"count": 0}, "count=0")])
def test_settings_that_lead_nowhere_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        config(**values)


def test_a_c_that_was_tried_is_not_tried_again(colours, mean, tmp_path, monkeypatch):
    # A new one each time: that it counts its calls would make it another backbone.
    values = {**colours, "powers": [-3, 1], "count": 6}
    whole = evaluate(config(**values), type(mean)())
    tried = []

    def watched(stop):
        def solve_until(x, y, classes, c, *rest):
            if len(tried) == stop:
                raise KeyboardInterrupt
            tried.append(c)
            return solve(x, y, classes, c, *rest)

        return solve_until

    out = str(tmp_path / "out")
    monkeypatch.setattr(logreg, "solve", watched(4))
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(**values, out=out), type(mean)())
    assert len(list((tmp_path / "out").iterdir())) == 1
    tried.clear()
    monkeypatch.setattr(logreg, "solve", watched(None))
    assert evaluate(config(**values, out=out), type(mean)()) == whole
    assert len(tried) == 6 - 4 + 1  # and once the best one, on all images
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classifier.safetensors"]


KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from conftest import Mean
from dinokit.config.load import section_values
from dinokit.eval import logreg
torch.set_num_threads(1)
rank = int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
solve, tried = logreg.solve, []
def solve_two(*args):
    if len(tried) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    tried.append(args)
    return solve(*args)
logreg.solve = solve_two
logreg.evaluate(logreg.Config(**section_values("eval", "logreg", json.loads(sys.argv[2]), "")), Mean())
"""


@pytest.mark.slow
def test_what_two_processes_tried_until_they_were_killed_one_does_not_try_again(
    colours, mean, tmp_path, monkeypatch
):
    values = {**colours, "powers": [-3, 1], "count": 7, "workers": 0, "held_out": 0.2}
    given = [
        str(Path(__file__).parent),
        json.dumps({**values, "out": str(tmp_path / "out")}),
        str(tmp_path / "meet"),
    ]
    both = [subprocess.Popen([sys.executable, "-c", KILLED, *given, str(rank)]) for rank in (0, 1)]
    assert -9 in [process.wait(300) for process in both]  # the other may find itself alone
    whole, tried = evaluate(config(**values), type(mean)()), []

    def watched(x, y, classes, c, *rest):
        tried.append(c)
        return solve(x, y, classes, c, *rest)

    monkeypatch.setattr(logreg, "solve", watched)
    assert evaluate(config(**values, out=str(tmp_path / "out")), type(mean)()) == whole
    assert len(tried) == 7 - 4 + 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classifier.safetensors"]
