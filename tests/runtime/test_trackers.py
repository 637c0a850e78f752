"""Experiment trackers, read back by the libraries that own the files."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinokit.runtime import trackers
from dinokit.runtime.log import RunLog


def events(out):
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    return found


def curve(out, name):
    return [(event.step, round(event.value, 5)) for event in events(out).Scalars(name)]


def open_trackers(out, step, names=("tensorboard",), lines=None):
    return trackers.Trackers(names, out, {"optim": {"lr": 0.1}}, step, (lines or []).append)


def test_tensorboard_reads_curves_pictures_and_the_recipe(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[1, 2] = 255, 0, 128
    used = open_trackers(tmp_path, 0)
    for step in (1, 2):
        used.scalars(step, {"dino": 0.5 * step, "verdict": "healthy", "kl": float("nan"), "none": None})
    used.pictures(2, lambda: {"patches": picture})
    used.end()
    assert curve(tmp_path, "dino") == [(1, 0.5), (2, 1.0)]
    assert set(events(tmp_path).Tags()["scalars"]) == {"dino"}  # only what is a finite number
    (image,) = events(tmp_path).Images("patches")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    assert b'"lr": 0.1' in events(tmp_path).Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_after_a_resumption_each_step_is_there_once(tmp_path):
    first = open_trackers(tmp_path, 0)
    for step in range(1, 6):
        first.scalars(step, {"dino": 1.0})
    first.end()
    again = open_trackers(tmp_path, 3)
    for step in (4, 5, 6):
        again.scalars(step, {"dino": 2.0})
    again.end()
    assert curve(tmp_path, "dino") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


class Failing:
    """A tracker whose server goes away after two records."""

    def __init__(self):
        self.seen, self.ids = 0, []

    def start(self, out, settings, step, run_id):
        self.ids.append(run_id)
        return "its-name"

    def scalars(self, step, values):
        self.seen += 1
        if self.seen > 2:
            raise ConnectionError("no route to host")

    def pictures(self, step, pictures):
        pass

    def end(self):
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "failing", Failing)
    lines = []
    used = trackers.Trackers(["failing", "tensorboard"], tmp_path, {}, 0, lines.append)
    for step in range(5):
        used.scalars(step, {"dino": 1.0})
    used.end()
    assert lines == ["failing is left out from now on: ConnectionError: no route to host. The run goes on."]
    assert [step for step, _ in curve(tmp_path, "dino")] == [0, 1, 2, 3, 4]


def test_pictures_that_cannot_be_drawn_are_said_once(tmp_path):
    lines = []
    used = trackers.Trackers(["tensorboard"], tmp_path, {}, 0, lines.append)
    for step in (1, 2):
        used.pictures(step, lambda: {"patches": 1 / 0})
    assert lines == ["No pictures for trackers: ZeroDivisionError: division by zero. The run goes on."]
    used.scalars(3, {"dino": 1.0})
    used.end()
    assert curve(tmp_path, "dino") == [(3, 1.0)]


def test_a_run_resumes_under_the_name_that_the_tracker_gave_it(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(trackers.TRACKERS, "failing", lambda: made.append(Failing()) or made[-1])
    for step in (0, 4, 0):  # the third begins anew
        open_trackers(tmp_path, step, ["failing"])
    assert [tracker.ids for tracker in made] == [[""], ["its-name"], [""]]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"failing": "its-name"}


def test_without_trackers_nothing_is_drawn_or_written(tmp_path):
    used = open_trackers(tmp_path, 0, [])
    used.pictures(1, lambda: pytest.fail("drawn"))
    used.end()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_or_missing_tracker_is_named_with_what_helps(monkeypatch):
    with pytest.raises(ValueError, match=r"run.log=tensorbord: .* Did you mean 'tensorboard'\? There is:"):
        trackers.check_installed(["tensorbord"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"run.log=wandb needs the package wandb: pip install wandb"):
        trackers.check_installed(["wandb"])


def test_the_log_of_a_run_passes_its_records_on(tmp_path):
    with RunLog(tmp_path, steps=3, start=0, trackers=["tensorboard"], settings={}) as log:
        log.step(1, {"dino": 1.5})
        log.scores(1, "knn", {"top1@20": 0.25}, 1.0)
    assert curve(tmp_path, "dino") == [(1, 1.5)]
    assert curve(tmp_path, "knn/top1@20") == [(1, 0.25)]
