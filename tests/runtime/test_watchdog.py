"""A process that stands still ends and says why; one that moves, or was told to wait, does not."""

import subprocess
import sys

PROGRAM = """
import sys, time
from dinokit.runtime.watchdog import Watchdog

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


def test_a_process_that_stands_still_says_which_setting_ends_it_and_where_it_is():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    said = done.stderr.splitlines()
    assert said[0].startswith("process 0 made no step for run.timeout_minutes=0.0333333, and exits.")
    assert said[1] == "Timeout (0:00:02)!"
    assert any(line.endswith("in sleep_for_ever") for line in said)
    assert done.stderr.count("made no step") == 1


def test_a_block_that_ends_leaves_neither_thread_nor_clock():
    program = PROGRAM.replace("    sleep_for_ever()", "") + "time.sleep(3)\nimport threading\n"
    program += "print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n1\n", "")
