"""How much memory a process has held, against blocks of a known size; and what a CPU multiplies faster in."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinokit.runtime import device
from dinokit.runtime.device import _multiplies_faster, peak_memory, pick_precision

CPU = torch.device("cpu")


def test_a_process_knows_its_peak():
    before = peak_memory(CPU)
    block = torch.ones(2**26)  # 256 MiB
    assert peak_memory(CPU) >= before
    assert peak_memory(CPU) > 0.25
    del block


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the count of others has it")
def test_what_the_parent_held_is_not_counted():
    block = torch.ones(3 * 2**27)  # 1.5 GiB, more than PyTorch itself
    code = "import torch, dinokit.runtime.device as d; print(d.peak_memory(torch.device('cpu')))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0.05 < float(result.stdout) < 1
    del block


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_macos_counts_in_bytes_and_others_in_kib(system, unit, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)  # no /proc
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert peak_memory(CPU) == 3


def test_a_cpu_is_tried_and_left_as_it_was():
    threads = torch.get_num_threads()
    assert _multiplies_faster(torch.float32, torch.int64)  # by far: no library multiplies integers
    assert not _multiplies_faster(torch.int64, torch.float32)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("faster", "auto"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_auto_is_what_a_cpu_multiplies_faster_in_and_what_is_given_stays(faster, auto, monkeypatch):
    """A CPU of either kind is made up, for the tests run on one."""
    monkeypatch.setattr(device, "_multiplies_faster", lambda one, other: one is faster)
    assert pick_precision("auto", CPU) == auto
    assert [pick_precision(name, CPU) for name in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]


def test_auto_is_fp32_where_nothing_else_was_tried():
    assert pick_precision("auto", torch.device("mps")) == "fp32"


FAULTS = """
import resource, sys, torch
from dinokit.config.recipe import Run
from dinokit.runtime.device import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory(Run(device="cpu", keep_memory=sys.argv[1] == "True"))
counts = []
for _ in range(8):
    torch.ones(2**25)  # 128 MiB
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(counts, counts[1:])))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="needs glibc",
)
def test_freed_memory_is_reused_for_the_next_tensor_of_that_size():
    """A block that went back to the kernel costs page faults when it comes again.

    Of several blocks the cheapest counts: where the addresses that follow are taken, some blocks are new.
    """
    command = [sys.executable, "-c", FAULTS]
    kept, returned = (
        int(subprocess.run([*command, keep], check=True, capture_output=True).stdout)
        for keep in ("True", "False")
    )
    assert kept < returned / 10
