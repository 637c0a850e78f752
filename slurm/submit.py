"""A job by submitit, the only file that imports it: how one is written, sent, asked after and ended.

submitit writes the batch script and, for each job, a pickle of become(COMMAND). SLURM starts one process a
task, which reads the pickle and turns into `dinokit COMMAND`. From there on the job is that command line:
signals reach it, and its exit status reaches the batch script, which alone decides whether it runs again.

    it was told to stop          by the notice before the time limit, a preemption with grace or scancel
                                 --signal: it saved and ended, as after Ctrl-C; the script requeues the job
    it did not listen in time    the script requeues the job half a minute before the limit
    scontrol requeue, preemption by requeue: SLURM itself tells it to stop, and then runs the job again
    it was cancelled             it saved, and that is all
    it failed                    so does the job: whoever sent it reads the log and sends it again
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import FailedJobError

from dinokit.config.registry import suggest
from dinokit.slurm.profile import Config

LAST = 30  # seconds before the limit when a job that did not listen is requeued
# What srun ends with if its processes were told to stop: 130 is dinokit's own status, the others SIGUSR1's
# and SIGUSR2's, while a process starts. SIGTERM's is none: srun sends that to the rest if one has failed.
STOPPED = "130|138|140"
LIVE = "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED"  # may yet run


@dataclass
class Asked:
    """What is to be run, and how."""

    name: str  # of the job
    commands: list[list[str]]  # behind `dinokit`; several are an array
    tasks: int  # processes a node
    after: str = ""  # jobs that must have ended well before, 'ID' or 'ID:ID'
    goes_on: bool = False  # whether the command, given again, goes on where it stopped


def become(command: Sequence[str]) -> NoReturn:
    """In the job: turn this process into `dinokit COMMAND`."""
    os.execv(sys.executable, [sys.executable, "-m", "dinokit", *command])


def script(asked: Asked, profile: Config, folder: Path) -> str:
    """The batch script; it can be written where there is no SLURM."""
    executor = _executor(asked, profile, folder)
    if len(asked.commands) > 1:
        executor.parameters["map_count"] = len(asked.commands)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def check_cluster(profile: Config) -> None:
    """Look whether there is a cluster here, with the profile's partition and so many nodes in it.

    Raises:
        LookupError: if there is no such partition; it lists those that there are.
        ValueError: if it never has so many nodes: the job would wait for ever.
        RuntimeError: if there is no SLURM here, or none that answers.
    """
    if shutil.which("sbatch") is None:
        raise RuntimeError(
            "There is no SLURM here: the program sbatch was not found. Log in to a machine of the cluster "
            "from which jobs are submitted (at some sites after `module load slurm`). --dry-run needs none."
        )
    rows = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%P|%D").splitlines()]
    own = [name.removesuffix("*") for name, _ in rows if name.endswith("*")]  # marked: the default
    have = {name.removesuffix("*"): int(nodes) for name, nodes in rows}
    asked = list(filter(None, profile.partition.split(","))) or own
    for name in asked:
        if name not in have:
            raise LookupError(
                f"There is no partition '{name}'.{suggest(name, list(have))} sinfo has: {', '.join(have)}."
            )
    most = max((have[name] for name in asked), default=profile.nodes)
    if profile.nodes > most:
        raise ValueError(f"nodes={profile.nodes}, but partition {', '.join(asked)} has {most}.")


def send(asked: Asked, profile: Config, folder: Path) -> list[str]:
    """Hand a job, or an array of jobs, to SLURM. Returns their numbers.

    Raises:
        RuntimeError: if SLURM refuses; with its words.
    """
    try:
        jobs = _executor(asked, profile, folder).map_array(become, asked.commands)
    except FailedJobError as error:
        raise RuntimeError(f"SLURM refuses the job: {' '.join(str(error).split())}") from None
    return [job.job_id for job in jobs]


def states(jobs: Sequence[str]) -> dict[str, str]:
    """SLURM's word for each job: PENDING (WHY), RUNNING, COMPLETED, FAILED, ...; UNKNOWN if it forgot it.

    Raises:
        RuntimeError: if there is no SLURM that answers.
    """
    queue = [
        line.split("|")
        for line in _ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
    ]
    found = {job: f"{state} ({why})" if state == "PENDING" else state for job, state, why in queue}
    gone: list[SlurmJob[Any]] = [
        SlurmJob(folder=".", job_id=job, tasks=[0]) for job in jobs if job not in found
    ]
    ended = {job.job_id: job.state.split()[0] for job in gone}  # without 'by 1000' behind CANCELLED
    return {job: found.get(job) or ended[job] for job in jobs}


def knows(job: str) -> bool:
    """Whether SLURM has a job in its queue, or had a little while ago; other people's too."""
    return not subprocess.run(["scontrol", "show", "job", job], capture_output=True, check=False).returncode


def cancel(job: str) -> None:
    """End a job, or all jobs of an array by its number.

    Raises:
        RuntimeError: if SLURM cannot; with its words.
    """
    _ask("scancel", job)


def logs(job: str, folder: Path) -> list[Path]:
    """What a job's processes said, a file each, in the order of rank; the first has the batch script too."""
    return sorted(folder.glob(f"{job}_*_log.out"), key=lambda path: (len(path.name), path.name))


class _Anywhere(SlurmExecutor):
    """submitit's, which refuses to be made where there is no srun; but a script is only text."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _executor(asked: Asked, profile: Config, folder: Path) -> SlurmExecutor:
    python = shlex.quote(f"{Path(profile.venv).expanduser()}/bin/python" if profile.venv else sys.executable)
    if profile.container:
        python = f"apptainer exec --nv {shlex.quote(profile.container)} python3"
    given: dict[str, Any] = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "gpus_per_node": profile.gpus,
        "dependency": f"afterok:{asked.after}" if asked.after else "",
    }
    options: dict[str, Any] = {"requeue" if profile.restarts else "no-requeue": True}
    if asked.after:
        options["kill-on-invalid-dep"] = "yes"
    executor = _Anywhere(folder=folder, python=python)
    executor.update_parameters(
        job_name=asked.name,
        time=profile.minutes,
        nodes=profile.nodes,
        ntasks_per_node=asked.tasks,
        cpus_per_task=profile.cpus,
        mem=f"{profile.memory:g}G" if profile.memory else "0",
        signal_delay_s=profile.notice,
        wckey=None,  # not submitit's name, which a site may not know
        array_parallelism=profile.at_once or len(asked.commands),
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=1"],  # when one process fails, the others would wait for it
        setup=_before(asked, profile, folder),
        teardown=_behind(asked, profile),
        additional_parameters={**options, **profile.sbatch},
        **{key: value for key, value in given.items() if value},
    )
    return executor


def _before(asked: Asked, profile: Config, folder: Path) -> list[str]:
    """Lines before the command: where the code is, how many threads; and an alarm, if it may run again."""
    code = shlex.quote(f"{folder}/code")
    first, more = " ".join(shlex.join(asked.commands[0]).split()), len(asked.commands) - 1
    lines = [
        f"# Each process becomes: dinokit {first}" + (f"; there are {more} more such jobs" if more else ""),
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export PYTHONSAFEPATH=1  # else the code in the working folder would be found first",
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT  # of another launcher",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        *profile.setup,
    ]
    if asked.goes_on and profile.restarts:
        array = len(asked.commands) > 1
        job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
        seconds = 60 * profile.minutes - min(LAST, profile.notice // 2)
        lines += [
            f'job="{job}"',
            'again() { [ "${SLURM_RESTART_COUNT:-0}" -lt '
            f'{profile.restarts} ] && scontrol requeue "$job"; }}',
            "(trap exit TERM; trap 'kill $! 2>/dev/null' EXIT; "
            f"sleep {seconds} & wait $! && again) & alarm=$!",
        ]
    return lines


def _behind(asked: Asked, profile: Config) -> list[str]:
    """Lines behind the command: what was told to stop runs again, unless the job was cancelled."""
    lines = ["status=$?"]
    if asked.goes_on and profile.restarts:
        lines += [
            "kill $alarm 2>/dev/null",
            f"case $status in {STOPPED})",
            '    [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ] && again ;;',
            "esac",
        ]
    return [*lines, "exit $status"]


def _ask(*words: str) -> str:
    """What a program of SLURM answers."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise RuntimeError(f"There is no SLURM here: the program {words[0]} was not found.") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"SLURM does not answer: {' '.join(words)} took more than a minute.") from None
    if done.returncode:
        raise RuntimeError(f"SLURM's {' '.join(words)} fails: {' '.join(done.stderr.split())}")
    return done.stdout
