"""Experiment trackers, read back by the libraries that own the files."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace
from urllib.request import urlopen

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


def open_trackers(out, step, names=("tensorboard",)):
    return trackers.Trackers(names, out, {"optim": {"lr": 0.1}}, step, [].append)


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
    (line,) = lines
    assert line.startswith("failing is left out from now on: ConnectionError: no route to host. ")
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


class NeverAnswers(BaseHTTPRequestHandler):
    """A server that takes requests and keeps their senders waiting."""

    def do_GET(self):
        self.server.asked.set()
        self.server.released.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def hanging_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), NeverAnswers)
    server.asked, server.released = Event(), Event()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


class Remote:
    """A tracker that asks a server in one of its methods, as those do that are not on this machine."""

    def __init__(self, server, asks):
        self.url, self.asks, self.seen = f"http://127.0.0.1:{server.server_port}/", asks, []

    def called(self, method, step=None):
        self.seen.append((method, step))
        if method == self.asks:
            urlopen(self.url).read()  # without a timeout

    def start(self, out, settings, step, run_id):
        self.called("start")
        return "its-name"

    def scalars(self, step, values):
        self.called("scalars", step)

    def pictures(self, step, pictures):
        self.called("pictures", step)

    def end(self):
        self.called("end")


@pytest.mark.parametrize("asks", ["start", "scalars", "pictures", "end"])
def test_a_server_that_never_answers_does_not_keep_a_run_waiting(tmp_path, monkeypatch, hanging_server, asks):
    remote, near, lines = Remote(hanging_server, asks), Remote(hanging_server, "nothing"), []
    monkeypatch.setitem(trackers.TRACKERS, "remote", lambda: remote)
    monkeypatch.setitem(trackers.TRACKERS, "near", lambda: near)
    monkeypatch.setattr(trackers, "SECONDS", 1.0)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    used = trackers.Trackers(["remote", "near"], tmp_path, {}, 0, lines.append)
    used.scalars(1, {"dino": 1.0})
    used.pictures(1, lambda: {"patches": np.zeros((4, 4, 3), np.uint8)})
    if asks in ("scalars", "pictures"):
        assert hanging_server.asked.wait(300)
        time.sleep(1.1)
    used.scalars(2, {"dino": 2.0})
    used.end()
    lost = {"scalars": 2, "pictures": 1}.get(asks, 0)  # of those that were given to it until then
    text = f" {lost} records were not passed on." if lost else ""
    assert lines == [
        *(["Waiting for remote: 0 records to pass on."] if asks == "end" else []),
        f"remote is left out from now on: it did not answer for 1 s.{text} The run goes on.",
    ]
    assert near.seen == [("start", None), ("scalars", 1), ("pictures", 1), ("scalars", 2), ("end", None)]
    assert remote.seen[-1][0] == asks  # nothing comes after the call that hangs
    ids = json.loads((tmp_path / "trackers.json").read_text())
    assert ids == {"near": "its-name", **({} if asks == "start" else {"remote": "its-name"})}


def test_a_tracker_that_is_too_slow_is_left_out_when_too_much_waits_for_it(
    tmp_path, monkeypatch, hanging_server
):
    remote, lines = Remote(hanging_server, "scalars"), []
    monkeypatch.setitem(trackers.TRACKERS, "remote", lambda: remote)
    monkeypatch.setattr(trackers, "QUEUED", 5)
    used = trackers.Trackers(["remote"], tmp_path, {}, 0, lines.append)
    thread = used.active["remote"].thread
    used.scalars(0, {"dino": 1.0})
    assert hanging_server.asked.wait(300)
    for step in range(1, 9):
        used.scalars(step, {"dino": 1.0})
    used.end()
    assert lines == [
        "remote is left out from now on: it is 5 records behind. 6 records were not passed on. "
        "The run goes on."
    ]
    hanging_server.released.set()
    thread.join(300)
    assert not thread.is_alive()
    assert remote.seen == [("start", None), ("scalars", 0)]  # nothing more, although the server answers now


def test_a_tracker_that_is_slow_but_answers_is_waited_for_at_the_end(tmp_path, monkeypatch):
    seen = []
    clock = SimpleNamespace(monotonic=lambda: 0.3 * len(seen))  # s; a record takes 0.3, on any machine
    monkeypatch.setattr(trackers, "time", clock)

    class Slow(Failing):
        def scalars(self, step, values):
            time.sleep(0.05)
            seen.append(step)

        def end(self):
            seen.append("end")

    monkeypatch.setitem(trackers.TRACKERS, "slow", Slow)
    monkeypatch.setattr(trackers, "SECONDS", 0.4)  # less than all records take together
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    lines = []
    used = trackers.Trackers(["slow"], tmp_path, {}, 0, lines.append)
    for step in range(20):
        used.scalars(step, {"dino": 1.0})
    used.end()
    assert seen == [*range(20), "end"]
    (line,) = lines
    assert line.startswith("Waiting for slow: ")


def test_what_waits_is_passed_on_in_order_before_the_end(tmp_path, monkeypatch, hanging_server):
    remote = Remote(hanging_server, "nothing")
    monkeypatch.setitem(trackers.TRACKERS, "remote", lambda: remote)
    used = trackers.Trackers(["remote"], tmp_path, {}, 0, pytest.fail)
    for step in range(100):
        used.scalars(step, {"dino": 1.0})
    used.end()
    assert remote.seen == [("start", None), *(("scalars", step) for step in range(100)), ("end", None)]
