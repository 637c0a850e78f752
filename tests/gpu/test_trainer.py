"""A whole run on the emulated GPU: it is that of the CPU, also where it is interrupted and resumed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager

from dinokit.config import registry
from dinokit.runtime.launch import Watchdog
from dinokit.runtime.log import read_records
from dinokit.train.step import Step
from dinokit.train.trainer import Evaluator, Trainer
from dinokit.weights import load_backbone

GPU = torch.device("cuda:0")
TIMING = {"images_per_second", "data_wait", "memory_gib", "seconds"}


def width(backbone):
    """An evaluator that looks at every token."""
    crops = torch.ones(2, 3, 32, 32, device=next(backbone.parameters()).device)
    tokens = backbone([crops], [None])[0]
    return {"norm": float(tokens.cls.norm() + tokens.patches.norm())}


def fit(recipe, device):
    source = registry.build("data.sources", recipe.data)
    with Watchdog(10) as watchdog:
        Trainer(recipe, source, [Evaluator("probe", 3, width)], device, watchdog, None, (), None).fit()


def records(recipe):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_records(Path(recipe.run.out))]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize(
    "words",
    [
        ("run.accumulate=2", "run.precision=bf16", "run.attention=sdpa"),
        pytest.param((), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_interrupted_is_that_of_the_cpu(emulated, tiny, tmp_path, monkeypatch, words):
    there, here = (tiny(*words, f"run.out={tmp_path / name}", "data.count=40") for name in ("gpu", "cpu"))
    fit(here, torch.device("cpu"))
    real = Step.__call__

    def interrupted(self, batch):
        if batch.step == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    # Not emulated: PyTorch's stager copies storages, and the tensors here have none.
    monkeypatch.setattr(DefaultStager, "stage", lambda _, tensors: {k: v.cpu() for k, v in tensors.items()})
    card = SimpleNamespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with emulated():
        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fit(there, GPU)
        fit(there, GPU)
    tol = 5e-2 if "run.precision=bf16" in words else 1e-3
    for ours, theirs in zip(records(there), records(here), strict=True):
        assert ours == pytest.approx(theirs, rel=tol, abs=tol)
    ours, theirs = (load_backbone(recipe.run.out).state_dict() for recipe in (there, here))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tol, atol=tol)
