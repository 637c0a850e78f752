"""What a run writes down."""

import json

import pytest

from dinokit.log import RunLog


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
        log.say("hello [red]")
        log.step(5, {"dino": 1.23456, "lr": 0.001})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "hello [red]"
    assert out[1].startswith("step 5/10  dino 1.235  lr 0.001  left 0:00:0")
    written = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in written] == out


def fail_after_a_line(folder):
    with RunLog(folder, steps=10, start=0) as log:
        log.say("before")
        raise RuntimeError


def test_the_log_is_kept_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError):
        fail_after_a_line(tmp_path)
    assert "before" in (tmp_path / "run.log").read_text()
