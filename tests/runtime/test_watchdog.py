"""A process without progress exits and prints why; one with progress, or with a paused watchdog, does not."""

import os
import signal
import subprocess
import sys
import time

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
    assert any(line.endswith("in sleep_for_ever") for line in lines)
    assert result.stderr.count("made no step") == 1


@pytest.mark.slow
def test_a_block_that_ends_leaves_neither_thread_nor_clock():
    program = PROGRAM.replace("    sleep_for_ever()", "") + "time.sleep(3)\nimport threading\n"
    program += "print(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "alive\n1\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["reset", "hang"])
def test_time_in_which_a_process_is_suspended_does_not_count(end):
    """It is suspended for longer than it may stand still. When it goes on it has the rest of its time."""
    program = """
import sys, time
from dinokit.runtime.launch import Watchdog

def sleep_for_ever():
    time.sleep(60)

with Watchdog(4 / 60) as watchdog:
    watchdog.reset()
    print("begins", flush=True)
    end = sys.stdin.readline().strip()
    time.sleep(1)  # a step
    print("goes on", flush=True)
    if end == "hang":
        sleep_for_ever()
    watchdog.reset()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        assert process.stdout.readline() == "begins\n"
        process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(6)
        process.stdin.write(f"{end}\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=120)
    assert output == "goes on\n"
    assert process.returncode == (end == "hang")
    if end == "hang":
        assert errors.startswith("process 0 made no step")
        assert "in sleep_for_ever" in errors
    else:
        assert errors == ""


@pytest.mark.slow
def test_a_process_that_hangs_with_the_lock_of_python_exits_too():
    """A pattern that needs exponential time: the module `re` holds the lock all the while."""
    program = """
import re
from dinokit.runtime.launch import Watchdog

with Watchdog(1 / 60, 1) as watchdog:
    watchdog.reset()
    re.match("(a+)+b", 60 * "a")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith("Timeout (0:00:02)!")
