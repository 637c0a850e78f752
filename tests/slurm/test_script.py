"""The batch script, run by bash with small programs in place of those of SLURM."""

import subprocess
from pathlib import Path

import pytest

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.slurm.profile import Config
from dinokit.slurm.submit import JobRequest, batch_script

TWO = (("train", "x"), ("train", "y"))


class Cluster:
    """Programs in place of srun, squeue and scontrol, which write down their arguments."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(self, profile, srun, state="RUNNING", restarts=0, commands=TWO[:1], resumes=True):
        """The exit status of the script, and the arguments of scontrol."""
        self.program("srun", f'echo "$@" > {self.folder}/srun\n{srun}')
        self.program("squeue", f"echo {state}")
        self.program("scontrol", f'echo "$@" >> {self.calls}')
        request = JobRequest("name", [list(words) for words in commands], 2, "", resumes)
        path = self.folder / "script.sh"
        path.write_text(batch_script(request, profile, self.folder / "a folder"))
        self.calls.write_text("")
        env = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "3",
            "SLURM_RESTART_COUNT": str(restarts), "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2",
        }  # fmt: skip
        process = subprocess.run(["bash", str(path)], env=env, timeout=60, capture_output=True, text=True)
        assert not process.stderr
        return process.returncode, self.calls.read_text().split()


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (130, "RUNNING", True),  # asked to stop, and saved
        (140, "RUNNING", True),  # SIGUSR2 while it started
        (130, "COMPLETING", False),  # cancelled, or requeued already
        (0, "RUNNING", False),  # finished
        (1, "RUNNING", False),  # failed
        (137, "RUNNING", False),  # a process was killed
        (143, "RUNNING", False),  # one failed, and the others were ended
    ],
)
def test_only_a_job_that_was_asked_to_stop_is_requeued(cluster, status, state, again):
    assert cluster.run(Config(), f"exit {status}", state) == (status, ["requeue", "12"] if again else [])


def test_of_an_array_only_the_stopped_job_is_requeued(cluster):
    assert cluster.run(Config(), "exit 130", commands=TWO) == (130, ["requeue", "10_2"])


def test_a_job_is_requeued_at_most_restarts_times(cluster):
    assert cluster.run(Config(restarts=3), "exit 130", restarts=2)[1] == ["requeue", "12"]
    assert cluster.run(Config(restarts=3), "exit 130", restarts=3)[1] == []
    assert cluster.run(Config(restarts=0), "exit 130")[1] == []


def test_a_command_that_does_not_resume_is_not_requeued(cluster):
    assert cluster.run(Config(), "exit 130", resumes=False) == (130, [])


def test_a_run_that_does_not_stop_is_requeued_before_the_limit(cluster):
    cluster.program("sleep", '[ "$1" = 31 ] || exit 9')  # of the minute, less half of the notice; at once
    ignores_signals = f"for i in {{1..100}}; do [ -s {cluster.calls} ] && exit 7; /bin/sleep 0.1; done"
    assert cluster.run(Config(hours=1 / 60, notice=59), ignores_signals) == (7, ["requeue", "12"])


def test_the_alarm_ends_with_the_script(cluster):
    cluster.program("sleep", f"echo $$ > {cluster.folder}/pid; exec /bin/sleep 86")
    assert cluster.run(Config(), f"until [ -s {cluster.folder}/pid ]; do /bin/sleep 0.05; done") == (0, [])
    number = (cluster.folder / "pid").read_text().strip()
    gone = f"for i in {{1..100}}; do kill -0 {number} 2>/dev/null || exit 0; /bin/sleep 0.05; done; exit 1"
    assert subprocess.run(["bash", "-c", gone]).returncode == 0


def test_setup_lines_come_before_the_command_and_can_change_what_was_set(cluster):
    profile = Config(setup=["export OMP_NUM_THREADS=7"], gpus=2)
    print_environment = f'echo "$OMP_NUM_THREADS $SRUN_CPUS_PER_TASK $PYTHONPATH" > {cluster.calls}'
    assert cluster.run(profile, print_environment)[1] == ["7", "3", f"{cluster.folder}/a", "folder/code"]
    assert "--kill-on-bad-exit=1" in (cluster.folder / "srun").read_text()


@pytest.mark.parametrize("folder", ["a\n#SBATCH --hold", "a%j"])
def test_a_folder_that_would_change_the_script_is_refused(folder, tmp_path):
    request = JobRequest("name", [["train", "x"]], 1, "", False)
    with pytest.raises(ValueError, match=r"Submit from a folder with another name\."):
        batch_script(request, Config(), tmp_path / folder)


def test_the_name_of_a_recipe_adds_no_line_to_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b\n#SBATCH --hold;.yaml").write_text(Path(registry.find_recipe("scenes_cpu")).read_text())
    words = ["submit", "profile=cpu", "--dry-run", "--", "train", "a b\n#SBATCH --hold;.yaml"]
    assert main(words) == 0
    script = capsys.readouterr().out
    assert "--job-name=train-a-b-SBATCH---hold-" in script
    assert not [line for line in script.splitlines() if line.startswith("#SBATCH --hold")]


def test_a_mistake_in_any_student_is_found_before_the_job(capsys):
    job = ["submit", "profile=cpu", "tasks=37", "--dry-run", "--", "train", "dinov3_distill"]
    job += ["teacher.frozen=run", "data.path=list"]
    assert main(job) == 0
    assert main([*job, "students.vitl16.backbone.widht=3"]) == 2
    assert "widht" in capsys.readouterr().err
