"""A run has its folder for itself, until it ends, in whatever way it ends. Real processes, real locks."""

import errno
import fcntl
import os
import signal
import time
from contextlib import nullcontext

import pytest

from dinokit.__main__ import main
from dinokit.runtime import launch as lock_module
from dinokit.runtime.launch import LOCK, folder_lock, run_lock
from dinokit.runtime.log import RunLog


def stay(out, job, with_child, ready):
    """Hold the folder for ever; with a forked child, as a data loader's worker is, that lives longer."""
    os.environ["SLURM_JOB_ID"] = job
    with run_lock(out):
        child = 0
        if with_child:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        ready.send(child)
        time.sleep(60)


@pytest.fixture
def other(tmp_path, together):
    """start(job, with_child): another process that has tmp_path; gives it, and its child's number."""
    started, children = [], []

    def start(job="", with_child=False):
        context = together.context
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=stay, args=(tmp_path, job, with_child, theirs))
        process.start()
        started.append(process)
        children.append(ours.recv())
        return process, children[-1]

    yield start
    for process in started:
        process.kill()
        process.join()
    for child in filter(None, children):
        os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path, other):
    process, _ = other("77")
    with (
        pytest.raises(ValueError, match=rf"in use by process {process.pid} on \S+, job 77\. Two runs"),
        run_lock(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK).exists()


def test_a_killed_run_leaves_the_folder_free_even_while_its_workers_live(tmp_path, other):
    process, child = other(with_child=True)
    process.kill()
    process.join()
    os.kill(child, 0)
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_nothing_is_left_when_a_run_ends(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path / "run"):
        raise KeyboardInterrupt
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path / "mine"):
        raise KeyboardInterrupt
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_job_that_starts_again_waits_for_what_its_dead_node_held(tmp_path, other, monkeypatch):
    process, _ = other("77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    tries = []

    def sleep(seconds):
        tries.append(seconds)
        if len(tries) == 2:
            process.kill()
            process.join()

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    with run_lock(tmp_path):
        assert len(tries) == 2
    other("77")
    monkeypatch.setattr(lock_module, "LEASE", -1.0)
    with pytest.raises(ValueError, match="in use by"), run_lock(tmp_path):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_the_folder(tmp_path, monkeypatch):
    """The one before removes its file as we open it: we would lock what nobody else can find."""
    real, times = fcntl.lockf, []

    def lockf(file, how):
        if not times:
            (tmp_path / LOCK).unlink()
        times.append(how)
        real(file, how)

    monkeypatch.setattr(lock_module.fcntl, "lockf", lockf)
    with run_lock(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert len(times) == 2


def test_without_locks_a_run_works_and_says_so(tmp_path, monkeypatch, capsys):
    def lockf(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "lockf", lockf)
    with run_lock(tmp_path):
        assert not list(tmp_path.iterdir())
    assert "no file locks here" in capsys.readouterr().err


def test_one_message_names_the_other_run_and_all_processes_end(
    recipe_file, photos, together, other, tmp_path
):
    process, _ = other()
    given = [f"data.path={photos}", f"run.out={tmp_path}"]
    output = together(2, "train", str(recipe_file), given, status=(1, 2))
    assert output.count(f"is in use by process {process.pid}") == 1
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("name", [LOCK, "run.log"])
def test_what_a_link_in_the_folder_points_to_is_never_changed(tmp_path, name):
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("mine")
    out.mkdir()
    (out / name).symlink_to(precious)
    with (
        pytest.raises(ValueError, match="is a link, and what it points to would be changed: remove it"),
        run_lock(out) if name == LOCK else nullcontext(),
    ):
        RunLog(out, 10, 1).record(1, {})
    assert precious.read_text() == "mine"


def hold_part(out, part, ready):
    with folder_lock(out, part):
        ready.send("")
        time.sleep(60)


def test_parts_are_written_together_but_no_part_twice_and_not_beside_the_whole(tmp_path, together):
    ours, theirs = together.context.Pipe(duplex=False)
    process = together.context.Process(target=hold_part, args=(tmp_path, "0-4", theirs))
    process.start()
    ours.recv()
    try:
        for part in ("", "0-4"):
            with (
                pytest.raises(ValueError, match=f"by process {process.pid}"),
                folder_lock(tmp_path, part),
            ):
                pass
        with folder_lock(tmp_path, "1-4"):
            pass
    finally:
        process.kill()
        process.join()
    with folder_lock(tmp_path):
        pass


def test_a_second_extraction_into_a_folder_is_refused_and_both_files_stay(tmp_path, together, photos, capsys):
    out = tmp_path / "store"
    ours, theirs = together.context.Pipe(duplex=False)
    process = together.context.Process(target=hold_part, args=(out, "", theirs))
    process.start()
    ours.recv()
    (out / ".shard.part").touch()  # what the first is writing
    try:
        assert main(["extract", "weights=x", f"data.path={photos}", f"out={out}"]) == 2
    finally:
        process.kill()
        process.join()
    assert f"in use by process {process.pid}" in capsys.readouterr().err
    assert (out / ".shard.part").exists()


def test_a_name_cannot_forge_a_line_of_the_log(tmp_path, capsys):
    with RunLog(tmp_path, 10, 0) as log:
        log.info("cannot be read: a\nb\x1b[2J\u2028.png")
    assert (tmp_path / "run.log").read_text().count("\n") == 1
    assert r"a\nb\x1b[2J\u2028.png" in capsys.readouterr().out
    assert main(["train", "a\nfinished: all is well"]) == 2
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("finished")]
