"""A run has its folder for itself, until it ends, in whatever way it ends. Real processes, real locks."""

import errno
import fcntl
import os
import signal
import time

import pytest

from dinokit.runtime import launch as lock_module
from dinokit.runtime.launch import LOCK, run_lock


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
