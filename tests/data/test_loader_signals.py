"""Ctrl-C and a scheduler's warning, sent to a run and all its loader processes at once."""

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

SCRIPT = """
import signal, sys, time
import numpy as np
from dinokit.config.load import CropGroup, Crops
from dinokit.data.loader import training_loader


class Source:
    classes = ()

    def __len__(self):
        return 50

    def __getitem__(self, index):
        time.sleep(0.02)
        return np.zeros((20, 20, 3), np.uint8), -1

    def name(self, index):
        return str(index)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
crops = Crops(globals=CropGroup(size=8), locals=CropGroup(count=0), blur_kernel=3)
batches = iter(training_loader(Source(), crops, None, seed=0, start_step=0, steps=10**6, batch=2, workers=2))
"""


def start(folder: Path, rest: str) -> subprocess.Popen[str]:
    """A process group of its own that runs SCRIPT and `rest`, and has printed its first lines."""
    (folder / "run.py").write_text(SCRIPT + rest)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore:This DataLoader will create", str(folder / "run.py")],  # on one core
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert list(islice(process.stdout, 3)) == ["0\n", "1\n", "2\n"]
    return process


def test_ctrl_c_is_answered_by_one_process_only(tmp_path: Path) -> None:
    rest = (
        "try:\n"
        "    for batch in batches: print(batch.step, flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
    )
    process = start(tmp_path, rest)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process at once
    out, err = process.communicate(timeout=300)
    assert out.splitlines()[-1] == "stopped"
    assert "Traceback" not in err
    assert process.returncode == 0


def test_ctrl_c_while_a_batch_is_received_leaves_the_workers_silent(tmp_path: Path) -> None:
    """The connection closes before the main process has asked for its tensor."""
    rest = (
        "from multiprocessing import connection\n"
        "for _ in range(3): print(next(batches).step, flush=True)\n"
        "connect = connection.Client\n"
        "def interrupted(*args, **kwargs):\n"
        "    connect(*args, **kwargs).close()\n"
        "    raise KeyboardInterrupt\n"
        "connection.Client = interrupted\n"
        "try:\n"
        "    while True: next(batches)\n"  # the next one may have been received already
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.5)\n"
        "    print('stopped')\n"
    )
    out, err = start(tmp_path, rest).communicate(timeout=300)
    assert out.splitlines()[-1] == "stopped"
    assert err == ""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs to know who sent a signal")
def test_a_schedulers_warning_leaves_time_for_more_steps_and_an_end_in_order(tmp_path: Path) -> None:
    """The batches are still referred to at the end: Python then asks the workers to end, and waits."""
    rest = (
        "warned = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: warned.append(1))\n"
        "for _ in range(3): print(next(batches).step, flush=True)\n"
        "while not warned: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "for _ in range(20): print(next(batches).step, flush=True)\n"
    )
    process = start(tmp_path, rest)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert out.splitlines()[-1] == "22"
    assert "Traceback" not in err
    assert process.returncode == 0
