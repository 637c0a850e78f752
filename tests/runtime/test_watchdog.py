"""A process without progress exits and prints why; one with progress, or with a paused watchdog, does not."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from dinokit.runtime.launch import Watchdog

def sleep_for_ever():
    time.sleep(60)

with Watchdog(2 / 60) as watchdog:
    for _ in range(5):
        watchdog.reset()
        time.sleep(0.6)
    watchdog.pause()
    time.sleep(3)
    print("alive", flush=True)
    watchdog.reset()
    sleep_for_ever()
"""


@pytest.mark.slow
def test_a_process_that_stands_still_says_which_setting_ends_it_and_where_it_is():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (1, "alive\n")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("process 0 made no step for run.timeout_minutes=0.0333333, and exits.")
    assert lines[1] == "Timeout (0:00:02)!"
    assert any(line.endswith("in sleep_for_ever") for line in lines)
    assert result.stderr.count("made no step") == 1


@pytest.mark.slow
def test_a_block_that_ends_leaves_neither_thread_nor_clock():
    program = PROGRAM.replace("    sleep_for_ever()", "") + "time.sleep(3)\nimport threading\n"
    program += "print(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "alive\n1\n", "")
