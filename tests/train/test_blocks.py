"""What a step waits for, keeps, computes again and compiles."""

import pytest
import torch
from torch.compiler import config
from torch.utils._python_dispatch import TorchDispatchMode

from dinokit.config import registry
from dinokit.data.loader import training_loader
from dinokit.data.sources.scenes import Config, build
from dinokit.losses import chunked
from dinokit.train import trainer
from dinokit.train.networks import block_masks
from dinokit.train.step import Step
from dinokit.train.trainer import Evaluator


def batches(recipe, step, steps):
    masks = block_masks(recipe, step.model.student.backbone)
    return training_loader(
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


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        ([], [2]),
        (["losses.ibot.targets=centering"], [1]),
        (["losses.dino.targets=centering"], [1]),
        (["losses.ibot.phase=[0.5,1]"], [1]),
        (["losses.dino.targets=centering", "losses.ibot.targets=centering"], []),
    ],
    ids=str,
)
def test_a_step_balances_the_targets_of_its_own_losses_alone(tiny, monkeypatch, words, heads):
    found, real = [], chunked.sinkhorn_knopp

    def count(teachers, *args, **kwargs):
        found.append(len(teachers))
        return real(teachers, *args, **kwargs)

    monkeypatch.setattr(chunked, "sinkhorn_knopp", count)
    step = Step(tiny("run", *words), torch.device("cpu"))
    step(next(iter(batches(step.recipe, step, 1))))
    assert found == heads


def saved_bytes(recipe, counting):
    """Bytes that a forward pass leaves for the backward pass, and the losses."""
    torch.manual_seed(0)
    step = Step(recipe, torch.device("cpu"))
    seen = step.augment(next(iter(batches(recipe, step, 1))))
    with counting() as living:
        losses = step.model(seen, 0.05)
    return living.now, losses


def test_checkpointing_keeps_less_and_changes_nothing(tiny, living):
    names = ("none", "selective", "full")
    ways = {way: saved_bytes(tiny("run", f"run.checkpointing={way}"), living) for way in names}
    assert ways["full"][0] < ways["selective"][0] * 0.9 < ways["none"][0] * 0.9**2
    for way in ("selective", "full"):
        for name, value in ways["none"][1].items():
            torch.testing.assert_close(ways[way][1][name], value, rtol=0, atol=0)


@pytest.fixture
def graphs():
    """What is compiled meanwhile; it is computed operation by operation."""
    found = []

    def keep(graph, _):
        found.append(graph)
        return graph

    torch.compiler.reset()
    with config.patch(recompile_limit=8), torch.compiler.set_stance("default", force_backend=keep):
        yield found
    torch.compiler.reset()


# The compiler looks at .grad, and would hide the warning itself were it no error.
COMPILES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 2),  # student and teacher
        (["run.tokens=all"], 2),
        (["run.checkpointing=selective"], 2),
        (["run.checkpointing=full"], 2),
        (["backbone.depth=10", "backbone.drop_path_uniform=false"], 10),  # ten rates, but for the last block
    ],
    ids=str,
)
def test_graphs_are_few_and_made_in_the_first_step(tiny, graphs, overrides, expected):
    recipe = tiny("run", "run.compile=blocks", *overrides)
    step = Step(recipe, torch.device("cpu"))
    masked, made = set(), []
    for batch in batches(recipe, step, 3):
        step(batch)
        masked.add(len(batch.masked))
        made.append(len(graphs))
    assert len(masked) == 3
    assert made == [expected] * 3
    # What is computed again is not left out: the student's block is a graph too.
    inside = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert ("tag_activation_checkpoint" in inside) == (recipe.run.checkpointing != "none")


@COMPILES
def test_an_evaluation_is_not_compiled(tiny, graphs):
    def evaluate(backbone):
        for images in (1, 2, 3):
            backbone.layers(torch.rand(images, 3, 32, 32), [0, 1])
        return {"x": 0.0}

    recipe = tiny("run", "run.compile=blocks", "optim.steps=2", "optim.warmup=0")
    trainer.train(recipe, registry.build("data.sources", recipe.data), [Evaluator("probe", 1, evaluate)])
    assert len(graphs) == 2
