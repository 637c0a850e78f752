"""What a run writes down."""

import contextlib
import json
import os
import pty
import sys
import threading
import time

import pytest

from dinokit.runtime.log import RunLog, short, sparkline, watch


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_drops_what_it_will_write_again(tmp_path):
    with RunLog(tmp_path, steps=10, start=0) as log:
        for step in (2, 4, 6):
            log.step(step, {"dino": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "di')  # killed while it wrote
    with RunLog(tmp_path, steps=10, start=4) as log:
        log.step(6, {"dino": 2.0})
    assert records(tmp_path) == [{"step": 2, "dino": 1.0}, {"step": 4, "dino": 1.0}, {"step": 6, "dino": 2.0}]


def test_without_a_terminal_there_are_plain_lines(tmp_path, capsys):
    with RunLog(tmp_path, steps=10, start=0) as log:
        log.info("hello [red]")
        log.step(5, {"dino": 1.23456, "lr": 0.001})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "hello [red]"
    assert out[1].startswith("step 5/10  dino 1.235  lr 0.001  left 0:00:0")
    written = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in written] == out


def test_the_curve_of_a_score_goes_on_after_a_resumption(tmp_path, capsys):
    with RunLog(tmp_path, steps=30, start=0) as log:
        log.scores(0, "knn", {"top1@20": 0.0, "images": 9}, 1.0)
        log.scores(10, "knn", {"top1@20": 0.4, "images": 9}, 1.0)
        log.scores(20, "knn", {"top1@20": 0.9, "images": 9}, 1.0)
    with RunLog(tmp_path, steps=30, start=10) as log:
        log.scores(20, "knn", {"top1@20": 0.8, "images": 9}, 1.25)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "knn after step 0: top1@20 0  images 9  (1.0 s)"
    assert out[-2] == "knn after step 20: top1@20 0.8  images 9  (1.2 s)"
    assert out[-1].startswith("knn/top1@20 so far: ")
    assert out[-1].endswith("0 0.4 0.8")


def test_a_curve_is_a_bar_for_each_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([-1.0, 1.0]) == "▁█"
    assert sparkline([0.0, 0.0]) == "▁▁"


def fail_after_a_line(folder):
    with RunLog(folder, steps=10, start=0) as log:
        log.info("before")
        raise RuntimeError


def test_the_log_remains_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError):
        fail_after_a_line(tmp_path)
    assert "before" in (tmp_path / "run.log").read_text()


@contextlib.contextmanager
def terminal(monkeypatch):
    """Standard output and error are a terminal of 60 columns; gives what tells what was written since."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    read = []

    def reader():  # a terminal that nobody reads is full after a few thousand characters
        with contextlib.suppress(OSError):  # how the other end's closing shows
            while text := os.read(ours, 1 << 16):
                read.append(text)

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)

        def written():
            file.write("\0")  # what was written before it has been read once it has come
            file.flush()
            while b"\0" not in b"".join(read):
                time.sleep(0.01)
            text = b"".join(read).decode()
            read.clear()
            return text

        yield written
        monkeypatch.undo()
    thread.join()
    os.close(ours)


def test_many_values_leave_the_bar_its_place_in_a_narrow_window(tmp_path, monkeypatch):
    names = [f"value_of_loss_{i}" for i in range(8)]
    with terminal(monkeypatch) as written, RunLog(tmp_path, steps=10, start=0) as log:
        log.step(3, dict.fromkeys(names, 1.23456))
        log.view.refresh()
        said = written()
    assert "3/10" in said
    assert all(name in said for name in names)


def test_the_bar_shows_speed_and_the_last_accuracy(tmp_path, monkeypatch):
    with terminal(monkeypatch) as written, RunLog(tmp_path, steps=10, start=0) as log:
        monkeypatch.setenv("COLUMNS", "120")
        log.record(2, {"knn/top1@20": 0.4321, "knn/top5@20": 0.9})
        log.step(3, {"dino": 1.0, "images_per_second": 123.4})
        log.view.refresh()
        said = written()
    assert "30%" in said
    assert "123 images/s  k-NN 0.432" in said


def test_the_console_shows_some_values_and_the_log_all(tmp_path, capsys):
    with RunLog(tmp_path, steps=10, start=0) as log:
        log.step(5, {"dino": 1.5, "grad_backbone": 3.0, "lr": 0.001}, shown={"dino", "lr"})
    assert capsys.readouterr().out.startswith("step 5/10  dino 1.5  lr 0.001  left 0:00:0")
    assert "dino 1.5  grad_backbone 3  lr 0.001" in (tmp_path / "run.log").read_text()


def test_an_error_says_where_its_traceback_is(tmp_path):
    with pytest.raises(RuntimeError) as error, RunLog(tmp_path, steps=10, start=0):
        raise RuntimeError("of somebody else")
    assert error.value.__notes__ == [f"The traceback is in {tmp_path / 'run.log'}."]
    assert "RuntimeError: of somebody else" in (tmp_path / "run.log").read_text()


def test_while_an_evaluator_shows_its_bar_that_of_the_run_is_away(tmp_path, monkeypatch):
    with terminal(monkeypatch) as written, RunLog(tmp_path, steps=10, start=0) as log:
        log.step(3, {"dino": 1.0})
        with log.paused():
            written()
            for _ in watch(range(2), 2, "features"):
                time.sleep(0.4)  # longer than a bar waits before it is drawn again
            during = written()
        log.view.refresh()
        after = written()
    assert "features" in during
    assert "3/10" not in during
    assert "3/10" in after


@pytest.mark.parametrize("harm", [b"\x80\xff\x00\n", b"some text\n", b"[1]\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_line_of_the_records_is_named_and_nothing_is_lost(tmp_path, harm):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + harm + b'{"step": 2}\n{"step": 3')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is no record .*move it away"):
        RunLog(tmp_path, 10, 2)
    assert path.read_bytes().startswith(b'{"step": 1}\n' + harm)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"), (999.96, "1000"), (1234.5, "1,234"), (123456.7, "123,457"), (7, "7"),
        (1e-7, "1e-07"), (-54321.0, "-54,321"), (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_a_large_number_has_no_exponent(value, text):
    assert short(value) == text
