"""State of unfinished work: saved, read back, never taken from other settings or from a damaged file."""

import re
import subprocess
import sys

import pytest
import torch

from dinokit.runtime import partial as module
from dinokit.runtime.partial import PartialResult
from dinokit.runtime.signals import Stopped


def test_a_saved_state_is_read_back_until_it_is_removed(tmp_path):
    PartialResult(tmp_path / "new", "work", "a").save({"x": torch.arange(3), "step": 2})
    state = PartialResult(tmp_path / "new", "work", "a").load()
    assert (state["x"].tolist(), state["step"]) == ([0, 1, 2], 2)
    assert PartialResult(tmp_path / "new", "work", "b").load() is None
    PartialResult(tmp_path / "new", "work", "a").remove()
    assert not list((tmp_path / "new").iterdir())


def test_without_a_folder_nothing_is_saved():
    work = PartialResult(None, "work", "a")
    work.save({"x": 1})
    work.append({"x": 1})
    assert (work.load(), list(work.load_pieces())) == (None, [])
    work.remove()


def test_a_stop_signal_saves_and_an_error_does_not(tmp_path):
    work = PartialResult(tmp_path, "work", "a")
    with pytest.raises(ZeroDivisionError), work.saved_on_exit(lambda: {"x": 1}):
        raise ZeroDivisionError
    assert work.load() is None
    with pytest.raises(Stopped), work.saved_on_exit(lambda: {"x": 2}):
        raise Stopped
    assert work.load() == {"x": 2}


def test_pieces_come_back_in_order_up_to_a_damaged_one_and_are_continued(tmp_path):
    first = PartialResult(tmp_path, "work", "a")
    for number in range(3):
        first.append({"number": number})
    files = sorted(tmp_path.iterdir())
    files[2].write_bytes(files[2].read_bytes()[:-1])
    second = PartialResult(tmp_path, "work", "a")
    assert [piece["number"] for piece in second.load_pieces()] == [0, 1]
    second.append({"number": 7})
    third = PartialResult(tmp_path, "work", "a")
    assert [piece["number"] for piece in third.load_pieces()] == [0, 1, 7]
    assert third.load() is None


def test_pieces_belong_to_a_process_and_are_removed_for_all(tmp_path, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module, "world_size", lambda: 2)
        PartialResult(tmp_path, "work", "a").append({"rank": rank})
    assert [piece["rank"] for piece in PartialResult(tmp_path, "work", "a").load_pieces()] == [0]
    monkeypatch.setattr(module, "world_size", lambda: 1)
    alone = PartialResult(tmp_path, "work", "a")
    assert list(alone.load_pieces()) == []
    alone.remove()
    assert not list(tmp_path.iterdir())


def test_a_damaged_number_is_noticed_and_the_work_done_again(tmp_path):
    work = PartialResult(tmp_path, "work", "a")
    work.save({"x": torch.arange(10_000)})
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert work.load() is None


FULL_DISK = """
import resource, signal, sys
import torch
from dinokit.runtime.partial import PartialResult

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond it fails as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    PartialResult(sys.argv[1], "work", "a").save({"x": torch.zeros(10**6)})
except OSError as error:
    print(error)
"""


def test_on_a_full_disk_the_error_says_what_may_be_done_and_the_old_state_stays(tmp_path):
    PartialResult(tmp_path, "work", "a").save({"step": 2})
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert f"{tmp_path / '.work_'}" in result.stdout, result.stderr
    assert re.search(r"needs more than \S+ bytes. Free some space, or set out=ANOTHER", result.stdout)
    assert PartialResult(tmp_path, "work", "a").load() == {"step": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not be saved .* Ask for another"):
        PartialResult(tmp_path / "file", "work", "a", advice="Ask for another.").save({"x": 1})
