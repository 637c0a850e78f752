"""The clock against sleeping, which takes as long as it says."""

import time

import pytest
import torch

from dinokit import bench
from dinokit.bench import matmul_rate, medians, seconds, settled, wait
from dinokit.bench.step import Clock
from dinokit.config.load import load_recipe
from dinokit.runtime.device import pick_device, pick_precision

CPU = torch.device("cpu")


class Work:
    def outer(self):
        time.sleep(0.02)
        self.inner()
        self.inner()

    def inner(self):
        time.sleep(0.03)


def test_the_time_of_a_call_inside_another_is_its_own():
    work, clock = Work(), Clock(CPU)
    clock.watch(work, "outer", "out")
    clock.watch(work, "inner", "in")
    begun = time.perf_counter()
    work.outer()
    whole = time.perf_counter() - begun
    assert clock.seconds["in"] >= 0.06
    assert clock.seconds["out"] >= 0.02
    assert sum(clock.seconds.values()) <= whole  # no time counts twice


def test_a_median_is_of_the_calls_after_the_warm_up():
    calls = []
    assert seconds(lambda: calls.append(1), CPU, repeats=3, warm_up=2) >= 0
    assert len(calls) == 5


def test_medians_are_of_each_column():
    assert medians([{"a": 1, "b": 9}, {"a": 7, "b": 2}, {"a": 3, "b": 8}]) == {"a": 3, "b": 8}


def test_what_auto_is_here_is_settled_and_the_rest_stays():
    recipe = load_recipe("scenes_cpu", ["run.device=auto", "run.precision=auto"])
    run, device = settled(recipe).run, pick_device("auto")
    assert (run.device, run.precision) == (str(device), pick_precision("auto", device))
    given = load_recipe("scenes_cpu", ["run.device=cpu", "run.precision=bf16"])
    assert settled(given) == given


@pytest.mark.parametrize(("took", "side"), [(1e-4, 512), (10.0, 256)])
def test_the_rate_is_that_of_the_large_product_unless_that_would_take_minutes(monkeypatch, took, side):
    monkeypatch.setitem(bench.SIDE, "cpu", 512)
    times = iter([took, 3 * took, 2 * took] * 2)
    seen = []

    def once(work, device):
        seen.append(work().shape)
        return next(times)

    monkeypatch.setattr(bench, "once", once)
    assert matmul_rate(torch.float32, CPU) == pytest.approx(2 * side**3 / took)
    assert seen[-1] == (side, side)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_that_works_on_its_own_is_waited_for(kind, monkeypatch):
    waited = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_: waited.append(kind))
    wait(torch.device(kind))
    assert waited == [kind]
