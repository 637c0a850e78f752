"""Runs that break at awkward moments, and recipes that leave things out."""

import json
import shutil

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.runtime.log import RunLog
from dinokit.train import trainer
from dinokit.train.checkpoint import Checkpoints
from dinokit.train.health import Verdict
from dinokit.train.trainer import Evaluator


def train(recipe, evaluators=()):
    return trainer.train(recipe, registry.build("data.sources", recipe.data), evaluators)


def die(*_, **__):
    raise SystemError("killed")


def test_a_kill_between_weights_and_checkpoint_is_made_good(tiny, same_run, monkeypatch):
    whole, real = train(tiny("whole")), Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *a, **k: die() if a[1] == 6 else real(*a, **k))
        with pytest.raises(SystemError):
            train(tiny("broken"))
    same_run(whole, train(tiny("broken")))


def test_a_kill_between_the_last_evaluation_and_its_verdict_is_made_good(tiny, same_run, monkeypatch):
    monkeypatch.setattr(trainer, "diagnose", lambda *_: Verdict("noise", "raise the batch"))
    evaluators, real = [Evaluator("e", 3, lambda _: {"x": 1.0})], RunLog.record

    def record(log, step, values):
        return die() if step == 6 and "verdict" in values else real(log, step, values)

    whole = train(tiny("whole"), evaluators)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "record", record)
        with pytest.raises(SystemError):
            train(tiny("broken"), evaluators)
    broken = train(tiny("broken"), evaluators)
    same_run(whole, broken)
    same_run(whole, train(tiny("broken"), evaluators))  # and no second verdict


def test_a_run_goes_on_where_its_folder_was_moved(tiny, same_run, cut_short, tmp_path):
    whole = train(tiny("whole"))
    cut_short(tiny("old"))
    old, moved = tmp_path / "old", tmp_path / "moved"
    old.rename(moved)
    assert train(load_recipe(moved / "recipe.yaml")) == moved
    same_run(whole, moved)
    assert not old.exists()
    assert load_recipe(moved / "recipe.yaml", [f"run.out={old}"]).run.out == str(old)


def test_a_copied_recipe_alone_means_the_folder_that_it_names(tiny, tmp_path):
    out = train(tiny("a", "optim.steps=1", "optim.warmup=0"))
    copy = tmp_path / "recipe.yaml"
    copy.write_bytes((out / "recipe.yaml").read_bytes())
    assert load_recipe(copy).run.out == str(out)


def test_a_run_killed_before_its_first_checkpoint_is_logged_once(tiny, records):
    calls = []

    def evaluate(_):
        calls.append(0)
        return die() if len(calls) == 2 else {"x": 1.0}

    with pytest.raises(SystemError):
        train(tiny("a"), [Evaluator("e", 1, evaluate)])
    out = train(tiny("a"), [Evaluator("e", 3, evaluate)])
    assert [r["step"] for r in records(out) if "e/x" in r] == [0, 3, 6]


@pytest.mark.parametrize("lost", ["the marks", "the checkpoints", "their folder"])
def test_a_run_whose_checkpoints_are_lost_does_not_begin_again_unless_asked(tiny, records, lost):
    out = train(tiny("a", "run.checkpoint_every=6"))
    kept = (out / "metrics.jsonl").read_bytes()
    for path in list((out / "checkpoints").iterdir()):
        (path / "complete.json").unlink()
        if lost != "the marks":
            shutil.rmtree(path)
    if lost == "their folder":
        (out / "checkpoints").rmdir()
    named = (
        "step_0000006 is damaged" if lost == "the marks" else "no checkpoint to resume from.*run.resume=never"
    )
    for choice in ("auto", "must"):
        with pytest.raises(ValueError, match=named):
            train(tiny("a", f"run.resume={choice}"))
    assert (out / "metrics.jsonl").read_bytes() == kept
    train(tiny("a", "run.resume=never"))
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4, 5, 6]
    assert "begins at step 0" in (out / "run.log").read_text()
    assert load_recipe(out / "recipe.yaml").run.resume == "auto"
    train(tiny("a", "run.resume=must"))


def test_a_new_run_may_not_be_one_that_must_resume(tiny, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        train(tiny("a", "run.resume=must"))
    assert not (tmp_path / "a").exists()


def test_what_a_killed_write_left_is_cleared_away(tiny):
    out = train(tiny("a"))
    left = out / "checkpoints" / ".step_0000009.part"
    left.mkdir()
    (left / "shard").write_bytes(b"half")
    train(tiny("a"))
    assert not left.exists()


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_a_run_goes_on_exactly_with_either_kind_of_target(tiny, same_run, monkeypatch, targets):
    given = [f"losses.dino.targets={targets}", f"losses.ibot.targets={targets}"]
    whole, real = train(tiny("whole", *given)), Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *a, **k: die() if a[1] == 4 else real(*a, **k))
        with pytest.raises(SystemError):
            train(tiny("broken", *given))
    same_run(whole, train(tiny("broken", *given)))


@pytest.mark.parametrize("gone", ["dino", "ibot"])
def test_a_head_that_no_loss_reads_is_no_trouble(tiny, records, gone):
    rest = ["masks=null"] if gone == "ibot" else ["heads.patch.prototypes=16"]
    out = train(tiny("a", f"losses.{gone}=null", *rest))
    assert gone not in records(out)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_trains_and_goes_on(tiny, records, monkeypatch, precision):
    given = ["run.device=cuda", f"run.precision={precision}", "run.accumulate=2", "run.workers=1"]
    real = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *a, **k: die() if a[1] == 4 else real(*a, **k))
        with pytest.raises(SystemError):
            train(tiny("a", *given))
    out = train(tiny("a", *given))
    assert [r["step"] for r in records(out)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "env.json").read_text())["cuda"][0] == torch.cuda.get_device_name(0)
