"""glibc's heap, in processes of their own: what they begin with, and what that is good for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinokit.runtime import allocator

pytestmark = pytest.mark.skipif(allocator._glibc() is None, reason="of glibc alone")

# Tensors of one size, some of which stay, and small ones in between, as in the forward pass of a network.
STEPS = """
import sys, torch
from dinokit.runtime import allocator

if "again" in sys.argv:
    allocator.begin_again()
torch.set_num_threads(1)
allocator.keep_freed()

def held():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1]) / 1024

def step():
    kept = []
    for _ in range(40):
        x, y = torch.ones(2**20), torch.ones(2**20)
        kept += [y.relu(), [torch.ones(1 + i % 24) for i in range(200)]]
    return held()

before = held()
print(max(step() for _ in range(4)) - before)
"""


def ran(*arguments: str, tunables: str | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key != allocator.VARIABLE}
    env |= {allocator.VARIABLE: tunables} if tunables else {}
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, env=env, timeout=120
    ).stdout.strip()


@pytest.mark.parametrize(
    ("there", "then"),
    [
        (None, "glibc.malloc.tcache_count=0"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.tcache_count=0"),
        ("glibc.malloc.tcache_count=3", "glibc.malloc.tcache_count=3"),
    ],
)
def test_a_program_begins_again_once_as_the_same_process_with_its_arguments(there, then):
    code = (
        "import os, sys; print(os.getpid()); from dinokit.runtime import allocator; allocator.begin_again();"
        "print(os.environ[allocator.VARIABLE], sys.argv[1:])"
    )
    said = ran("-c", code, "a b", "--c", tunables=there).splitlines()
    assert len(set(said[:-1])) == 1
    assert len(said) == (2 if there == then else 3)
    assert said[-1] == f"{then} ['a b', '--c']"


@pytest.mark.parametrize(
    "lost",
    ["os.environ.pop(allocator.VARIABLE, None)", "sys.executable = '/no/python'", "sys.executable = ''"],
)
def test_a_program_that_cannot_begin_again_goes_on(lost):
    code = (
        f"import os, sys; from dinokit.runtime import allocator; {lost}; allocator.begin_again(); print('on')"
    )
    assert ran("-c", code) == "on"


def test_holes_fit_the_next_tensor_of_their_size():
    """160 MiB stay in a step, and two tensors more for a moment; what is held above that are gaps."""
    assert float(ran("-c", STEPS, "again")) < 0.85 * float(ran("-c", STEPS))


@pytest.mark.parametrize(
    ("there", "then"),
    [
        (None, f"{allocator.KEY}=0"),
        ("glibc.malloc.arena_max=2", f"glibc.malloc.arena_max=2:{allocator.KEY}=0"),
    ],
)
def test_children_begin_as_they_are_told_and_the_parent_stays(there, then, monkeypatch):
    code = ["-c", f"import os; print(os.environ.get({allocator.VARIABLE!r}))"]
    monkeypatch.delenv(allocator.VARIABLE, raising=False)
    if there:
        monkeypatch.setenv(allocator.VARIABLE, there)

    def child() -> str:
        return subprocess.run([sys.executable, *code], check=True, capture_output=True, text=True).stdout

    with allocator.for_children(True):
        assert child().strip() == then
    with allocator.for_children(False):
        assert child().strip() == str(there)
    assert os.environ.get(allocator.VARIABLE) == there


def test_what_else_the_environment_is_told_stays(monkeypatch):
    monkeypatch.setenv("DINOKIT_CHANGED", "before")
    monkeypatch.setenv("DINOKIT_DROPPED", "before")
    with allocator.for_children(True):
        os.environ["DINOKIT_CHANGED"] = "after"
        del os.environ["DINOKIT_DROPPED"]
    assert os.environ["DINOKIT_CHANGED"] == "after"
    assert "DINOKIT_DROPPED" not in os.environ


@pytest.mark.parametrize("keep", [True, False])
def test_a_training_from_the_command_line_begins_so_unless_it_is_told_not_to(keep, tmp_path):
    settings = [
        "scenes_cpu", f"run.out={tmp_path}/run", "run.device=cpu", "run.workers=0", "evals=null",
        f"run.keep_memory={keep}".lower(),
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != allocator.VARIABLE}
    run = subprocess.Popen([sys.executable, "-m", "dinokit", "train", *settings], env=env)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "run" / "recipe.yaml").exists() and run.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        began_with = Path(f"/proc/{run.pid}/environ").read_bytes()
        assert (f"{allocator.KEY}=0".encode() in began_with) == keep
    finally:
        run.kill()
        run.wait()
