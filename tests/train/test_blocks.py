"""What a step waits for, keeps and computes again."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinokit.data.loader import loader
from dinokit.data.sources.scenes import Config, build
from dinokit.train.loop import block_masks
from dinokit.train.step import Step


def batches(recipe, step, steps):
    masks = block_masks(recipe, step.model.student.backbone)
    return loader(
        build(Config(size=48)), recipe.crops, masks, seed=0, start_step=0, steps=steps, batch=4, workers=0
    )


class Fetches(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_fetch_is_seen():
    with Fetches() as fetches:
        torch.ones(1).item()
        torch.ones(2).nonzero()
    assert len(fetches.found) == 2


@pytest.mark.parametrize(
    ("targets", "precision"), [("sinkhorn", "fp32"), ("centering", "fp32"), ("sinkhorn", "fp16")]
)
def test_a_step_asks_its_tensors_for_no_number(tiny, targets, precision):
    words = [f"losses.{name}.targets={targets}" for name in ("dino", "ibot")]
    recipe = tiny("run", *words, f"run.precision={precision}")
    step = Step(recipe, torch.device("cpu"))
    first, second = batches(recipe, step, 2)
    step(first)  # the optimiser makes its state
    with Fetches() as fetches:
        step(second)
    assert fetches.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_a_step_never_waits_for_the_gpu(tiny, targets):
    recipe = tiny("run", f"losses.dino.targets={targets}", "run.precision=bf16")
    step = Step(recipe, torch.device("cuda"))
    first, second = (batch.pin_memory() for batch in batches(recipe, step, 2))
    step(first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kept(recipe):
    """Bytes that a forward pass keeps for the backward pass, and the losses."""
    torch.manual_seed(0)
    step = Step(recipe, torch.device("cpu"))
    seen, sizes = step.coloured(next(iter(batches(recipe, step, 1)))), {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = step.model(seen, 0.05)
    return sum(sizes.values()), losses


def test_checkpointing_keeps_less_and_changes_nothing(tiny):
    ways = {way: kept(tiny("run", f"run.checkpointing={way}")) for way in ("none", "full")}
    assert ways["full"][0] < ways["none"][0] / 2
    for name, value in ways["none"][1].items():
        torch.testing.assert_close(ways["full"][1][name], value, rtol=0, atol=0)
