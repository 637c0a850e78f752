"""The batch script, run for real by bash, with small programs in place of SLURM's."""

import subprocess

import pytest

from dinokit.slurm.profile import Config
from dinokit.slurm.submit import Asked, script

TWO = (("train", "x"), ("train", "y"))


class Cluster:
    """srun, squeue and scontrol as programs that do as they are told and write down what they were asked."""

    def __init__(self, folder):
        self.folder, self.asked = folder, folder / "asked"
        (folder / "bin").mkdir()

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(self, profile, srun, state="RUNNING", restarts=0, commands=TWO[:1], goes_on=True):
        """The exit status of the script, and what was asked of scontrol."""
        self.program("srun", f'echo "$@" > {self.folder}/srun\n{srun}')
        self.program("squeue", f"echo {state}")
        self.program("scontrol", f'echo "$@" >> {self.asked}')
        asked = Asked("name", [list(words) for words in commands], 2, "", goes_on)
        path = self.folder / "script.sh"
        path.write_text(script(asked, profile, self.folder / "a folder"))
        self.asked.write_text("")
        env = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "3",
            "SLURM_RESTART_COUNT": str(restarts), "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2",
        }  # fmt: skip
        done = subprocess.run(["bash", str(path)], env=env, timeout=60, capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, self.asked.read_text().split()


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (130, "RUNNING", True),  # told to stop, and saved
        (140, "RUNNING", True),  # SIGUSR2 while it started
        (130, "COMPLETING", False),  # cancelled, or requeued already
        (0, "RUNNING", False),  # done
        (1, "RUNNING", False),  # failed
        (137, "RUNNING", False),  # a process was killed
        (143, "RUNNING", False),  # one failed, and the others were ended
    ],
)
def test_what_was_told_to_stop_starts_again_and_nothing_else(cluster, status, state, again):
    assert cluster.run(Config(), f"exit {status}", state) == (status, ["requeue", "12"] if again else [])


def test_a_job_of_an_array_starts_again_alone(cluster):
    assert cluster.run(Config(), "exit 130", commands=TWO) == (130, ["requeue", "10_2"])


def test_it_starts_again_as_often_as_was_said(cluster):
    assert cluster.run(Config(restarts=3), "exit 130", restarts=2)[1] == ["requeue", "12"]
    assert cluster.run(Config(restarts=3), "exit 130", restarts=3)[1] == []
    assert cluster.run(Config(restarts=0), "exit 130")[1] == []


def test_a_command_that_would_begin_anew_is_not_started_again(cluster):
    assert cluster.run(Config(), "exit 130", goes_on=False) == (130, [])


def test_a_run_that_does_not_listen_is_requeued_before_the_limit(cluster):
    cluster.program("sleep", '[ "$1" = 31 ] || exit 9')  # of the minute, less half of the notice; at once
    deaf = f"for i in {{1..100}}; do [ -s {cluster.asked} ] && exit 7; /bin/sleep 0.1; done"
    assert cluster.run(Config(hours=1 / 60, notice=59), deaf) == (7, ["requeue", "12"])


def test_no_sleeper_outlives_the_script(cluster):
    cluster.program("sleep", f"echo $$ > {cluster.folder}/pid; exec /bin/sleep 86")
    assert cluster.run(Config(), f"until [ -s {cluster.folder}/pid ]; do /bin/sleep 0.05; done") == (0, [])
    number = (cluster.folder / "pid").read_text().strip()
    gone = f"for i in {{1..100}}; do kill -0 {number} 2>/dev/null || exit 0; /bin/sleep 0.05; done; exit 1"
    assert subprocess.run(["bash", "-c", gone]).returncode == 0


def test_setup_lines_come_before_the_command_and_can_change_what_was_set(cluster):
    profile = Config(setup=["export OMP_NUM_THREADS=7"], gpus=2)
    tell = f'echo "$OMP_NUM_THREADS $SRUN_CPUS_PER_TASK $PYTHONPATH" > {cluster.asked}'
    assert cluster.run(profile, tell)[1] == ["7", "3", f"{cluster.folder}/a", "folder/code"]
    assert "--kill-on-bad-exit=1" in (cluster.folder / "srun").read_text()
