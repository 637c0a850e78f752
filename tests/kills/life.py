"""One life of a command, in a process that can be killed: run by `lives` (conftest.py), never collected.

It is executed as a file in a forked process, with LIFE as a global: `argv`, `cwd`, `log` (a file for what the
command prints), `environment`, `at` (None, or the number of a change of a file before which the process
sends itself a real signal), `signal`, `group` (whether its loader processes get it too) and `count` (a file
for the number of changes).
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

LIFE = globals()["LIFE"]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.utime"}
HOME = os.path.realpath(LIFE["cwd"]) + os.sep
changes = 0


def before_change(event, arguments):
    """Count what is about to change a file below the working folder; at the number `at`, the signal."""
    global changes
    if not (event in CHANGES or (event == "open" and arguments[2] & WRITES)):
        return
    path = arguments[0]
    if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(HOME):  # noqa: PTH100
        return
    changes += 1
    if changes == LIFE["at"]:
        (os.killpg if LIFE["group"] else os.kill)(os.getpid(), LIFE["signal"])


os.setsid()  # a group of its own, so that its loader processes can be killed with it
os.chdir(LIFE["cwd"])
os.environ.update(LIFE["environment"])
log = os.open(LIFE["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
os.dup2(log, 1)
os.dup2(log, 2)
multiprocessing.set_start_method("fork", force=True)  # the default of a command on Linux
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
sys.argv = ["dinokit", *LIFE["argv"]]
sys.addaudithook(before_change)
try:
    from dinokit.__main__ import command

    command()
finally:
    Path(LIFE["count"]).write_text(str(changes))
