"""Checkpoints are whole or not there."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from dinokit.train import checkpoint
from dinokit.train.checkpoint import Checkpoints, load, newest, shapes, verify


def write(folder, *steps, keep=2, keep_every=0, **tensors):
    with Checkpoints(folder, keep, keep_every) as saved:
        for step in steps:
            given = tensors or {"x": torch.full((3,), float(step)), "one": torch.tensor(7.0)}
            saved.save(step, given, {"names": ["a"]})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def read(found):
    verify(found)
    targets = {name: torch.zeros(shape) for name, shape in shapes(found).items()}
    load(found, targets)
    return targets


def test_what_is_saved_comes_back_and_the_oldest_go(tmp_path):
    write(tmp_path, 1, 20, 300)
    assert names(tmp_path) == ["step_0000020", "step_0000300"]
    found = newest(tmp_path)
    assert (found.step, found.values) == (300, {"names": ["a"]})
    got = read(found)
    assert torch.equal(got["x"], torch.full((3,), 300.0))
    assert torch.equal(got["one"], torch.tensor(7.0))


def test_old_ones_that_a_killed_process_had_no_time_to_remove_go_at_the_next_start(tmp_path):
    write(tmp_path, 1, 2, 3, keep=3)
    write(tmp_path, keep=1)
    assert names(tmp_path) == ["step_0000003"]


def test_one_every_so_many_steps_stays_for_good(tmp_path):
    write(tmp_path, 10, 15, 20, 25, 30, 35, keep=1, keep_every=20)
    assert names(tmp_path) == ["step_0000020", "step_0000035"]


def test_what_is_changed_after_the_call_is_not_saved(tmp_path):
    x = torch.zeros(10**6)
    with Checkpoints(tmp_path, 1) as saved:
        saved.save(1, {"x": x}, {})
        x.fill_(1)  # while it may still be written
    assert not read(newest(tmp_path))["x"].any()


@pytest.mark.parametrize("harm", ["a bit", "cut", "gone"])
def test_a_damaged_file_is_reported_and_never_loaded(tmp_path, harm):
    write(tmp_path, 5, x=torch.ones(1000))
    (file,) = (tmp_path / "step_0000005").glob("*.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-7] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(whole if harm == "a bit" else whole[:2000])
    messages = {"a bit": "does not match its checksum", "cut": "has 2000 bytes, not", "gone": "is missing"}
    with pytest.raises(ValueError, match=rf"step_0000005 is damaged: .*{messages[harm]}.*Move it away"):
        read(newest(tmp_path))


def test_a_folder_that_was_not_written_to_its_end_is_no_checkpoint(tmp_path):
    write(tmp_path, 1)
    half = tmp_path / ".step_0000009.part"
    half.mkdir()
    save_file({"x": torch.zeros(3)}, half / "shard-00001-model-00001-of-00001.safetensors")
    assert newest(tmp_path).step == 1
    assert newest(tmp_path / "nothing") is None


def damage(mark, way):
    text = mark.read_text()
    mark.unlink()
    if way == "a folder":
        mark.mkdir()
    elif way == "a FIFO":
        os.mkfifo(mark)
    elif way == "a bit of any":
        place = random.Random(text).randrange(len(text))
        mark.write_text(text[:place] + chr(ord(text[place]) ^ 4) + text[place + 1 :])
    elif way != "missing":
        ways = {"cut": text[: len(text) // 2], "empty": "", "binary": "\udcff\0", "deep": "[" * 200_000}
        ways["no checksum"] = text.replace('"sha256": "', '"sha251": "', 1)
        ways["another"] = text.replace('"a"', '"b"')
        mark.write_text(ways[way], errors="surrogateescape")


WAYS = [
    "a folder",
    "a FIFO",
    "a bit of any",
    "missing",
    "cut",
    "empty",
    "binary",
    "deep",
    "no checksum",
    "another",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_whose_mark_cannot_be_read_is_an_error_that_names_it(tmp_path, way):
    write(tmp_path, 1, 9)
    damage(tmp_path / "step_0000009" / checkpoint.MARK, way)
    with pytest.raises(ValueError, match=r"step_0000009 is damaged: complete.json .*move the folder away"):
        newest(tmp_path)
    (tmp_path / "step_0000009").rename(tmp_path / "away")
    assert newest(tmp_path).step == 1


def test_a_shard_that_was_put_beside_the_others_is_not_read(tmp_path):
    write(tmp_path, 1)
    save_file(
        {"x": torch.ones(3)}, tmp_path / "step_0000001" / "shard-00002-model-00001-of-00001.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"shard-00002-model-00001-of-00001\.safetensors does not belong to it"
    ):
        read(newest(tmp_path))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    write(tmp_path, 1)
    folder = tmp_path / "step_0000001"
    assert all(p.suffix in (".safetensors", ".json") for p in folder.iterdir())
    json.loads((folder / checkpoint.MARK).read_text())

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    (file,) = folder.glob("*.safetensors")
    torch.save({"bomb": Bomb()}, file)
    with pytest.raises(ValueError, match="damaged"):
        read(newest(tmp_path))
    assert not (tmp_path / "exploded").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from dinokit.train.checkpoint import Checkpoints

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond it fails as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with Checkpoints(Path(sys.argv[1]), keep=1) as saved:
        saved.save(2, {"x": torch.zeros(10**6)}, {})
except OSError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_last_good_one_and_says_so(tmp_path):
    write(tmp_path, 1, keep=1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert f"{tmp_path / 'step_0000002'} could not be written: a file may not be so large" in done.stdout
    assert "The last good one is" in done.stdout
    assert names(tmp_path) == ["step_0000001"]
    assert newest(tmp_path).step == 1


def kill_in_the_middle(together, folder, first, seconds):
    """Save from step `first` on, be killed after so long. Returns the last step whose save was begun."""
    together.log.write_text("")
    (process,) = together.start(1, "save_for_ever", str(folder), first)
    while not together.output() and process.is_alive():
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.join()
    return int(together.output().split()[-1])


def check_after_a_kill(folder, begun):
    found = newest(folder)
    got = read(found)
    assert found.step >= begun - 1  # one was perhaps being written, the one before it was whole
    assert got["x"].unique().tolist() == got["y"].unique().tolist() == [float(found.step)]
    return found.step


def test_a_kill_in_the_middle_of_a_write_leaves_the_last_good_one(tmp_path, together):
    write(tmp_path / "run", 1, x=torch.ones(3), y=torch.ones(3))
    check_after_a_kill(tmp_path / "run", kill_in_the_middle(together, tmp_path / "run", 2, 0.3))


@pytest.mark.slow
def test_twenty_kills_never_leave_one_that_does_not_load_and_lose_one_at_most(tmp_path, together):
    rng, step = random.Random(0), 1
    write(tmp_path / "run", step, x=torch.ones(3), y=torch.ones(3))
    for _ in range(20):
        step = check_after_a_kill(
            tmp_path / "run", kill_in_the_middle(together, tmp_path / "run", step + 1, rng.random())
        )
    assert step > 20


@pytest.mark.slow
def test_two_processes_killed_again_and_again_end_where_an_unbroken_run_ends(
    tmp_path, recipe_file, photos, together, same_run
):
    def words(out):
        return [
            f"data.path={photos}",
            f"run.out={tmp_path / out}",
            "run.checkpoint_every=1",
            "optim.steps=40",
        ]

    together(2, "train", str(recipe_file), words("whole"))
    rng, kills = random.Random(0), 0
    while True:
        processes = together.start(2, "train", str(recipe_file), words("broken"))
        before = newest(tmp_path / "broken" / "checkpoints")
        reached = before.step if before else 0
        while processes[0].is_alive() and kills < 4:
            now = newest(tmp_path / "broken" / "checkpoints")
            if now and now.step > reached:
                break
            time.sleep(0.02)
        if kills == 4:
            break
        time.sleep(rng.random() / 4)
        for process in processes:
            process.kill()
            process.join()
        verify(newest(tmp_path / "broken" / "checkpoints"))
        kills += 1
    assert together.end(processes) == [0, 0]
    same_run(tmp_path / "whole", tmp_path / "broken")
