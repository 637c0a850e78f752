"""A run is read while it trains: whoever reads sees a whole file or none, and never disturbs the training."""

import pytest

from dinokit.features import fingerprint
from dinokit.runtime.log import read_records
from dinokit.weights import load_backbone

pytestmark = pytest.mark.slow
WORDS = ["run.out=run", "optim.steps=100", "run.checkpoint_every=1"]


def test_weights_and_records_are_whole_at_every_moment_of_a_training(lives, recipe, tmp_path):
    run = tmp_path / "run"
    process = lives.start(tmp_path, ["train", recipe, *WORDS])
    seen, steps = [], []
    while process.is_alive():
        try:
            seen.append(fingerprint(load_backbone(run)))
        except LookupError:
            assert not seen, "the weights were there, and then were not"
        if (run / "metrics.jsonl").exists():
            steps += [record["step"] for record in read_records(run)][-1:]
    lives.end(process, 0)
    assert len(set(seen)) > 1  # so it was read between two checkpoints at least
    assert steps == sorted(steps)


def test_a_training_whose_weights_are_read_has_the_files_of_one_that_is_left_alone(scenario, recipe):
    training = scenario(["train", recipe, *WORDS])
    cwd = training.new("read")
    process = training.lives.start(cwd, training.commands[0])
    while process.is_alive():
        try:
            load_backbone(cwd / "run")
        except LookupError:
            continue
    training.lives.end(process, 0)
    training.compare(cwd)
