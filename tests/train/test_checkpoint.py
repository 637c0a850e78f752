"""Checkpoints are whole or not there."""

import os
import subprocess
import sys
import time

import pytest
import torch

from dinokit.train import checkpoint


def test_what_is_saved_comes_back_and_the_oldest_go(tmp_path):
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, {"x": torch.full((3,), float(step)), "names": ["a"]}, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_0000020.pt", "step_0000300.pt"]
    state = checkpoint.load(checkpoint.latest(tmp_path), torch.device("cpu"))
    assert state["step"] == 300
    assert state["names"] == ["a"]
    assert torch.equal(state["x"], torch.full((3,), 300.0))


def test_a_broken_file_is_told_apart(tmp_path):
    path = checkpoint.save(tmp_path, 5, {"x": torch.zeros(1000)}, keep=1)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"step_0000005.pt cannot be read.*Move it away"):
        checkpoint.load(path, torch.device("cpu"))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    path = tmp_path / "step_0000001.pt"
    torch.save({"step": 1, "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path, torch.device("cpu"))
    assert not (tmp_path / "exploded").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from dinokit.train import checkpoint

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond it fails as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    checkpoint.save(Path(sys.argv[1]), 2, {"x": torch.zeros(10**6)}, keep=1)
except OSError as error:
    print(error)
    sys.exit(7)
"""

SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
from dinokit.train import checkpoint

print("go", flush=True)
for i in range(2, 10**6):
    checkpoint.save(Path(sys.argv[1]), i, {"x": torch.zeros(2 * 10**6)}, keep=2)
"""


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(3)}, keep=1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "last good one is" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001.pt"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_last_good_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(3)}, keep=1)
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.5)
    process.kill()
    process.communicate()
    state = checkpoint.load(checkpoint.latest(tmp_path), torch.device("cpu"))
    assert state["step"] >= 1
