"""Writes, submits, queries and cancels jobs with submitit; the only file that imports it.

submitit writes the batch script and, for each job, a pickle of exec_dinokit(COMMAND). SLURM starts one
process a task, which reads the pickle and becomes `dinokit COMMAND`. So signals reach that command line
directly, and its exit status reaches the batch script. The script alone decides whether the job runs again:

    asked to stop by a signal    (notice before the time limit, preemption with grace, scancel --signal): the
                                 command saved and ended, as after Ctrl-C. The script requeues the job
    did not stop in time         the script requeues the job half a minute before the limit
    scontrol requeue, preemption by requeue: SLURM itself asks it to stop, and runs the job again
    cancelled                    the command saved; the job ends
    failed                       the job fails: read the log, and submit it again
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

REQUEUE_MARGIN = 30  # seconds before the limit when a job that did not stop is requeued
# Exit statuses of srun after a request to stop: 130 is dinokit's own, 138 and 140 are those of SIGUSR1 and
# SIGUSR2 while a process starts. SIGTERM's is not one: srun sends it to the other processes if one failed.
STOPPED = "130|138|140"
# States of jobs that still run, or may run again.
ACTIVE = "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED"


@dataclass
class JobRequest:
    """A job, or an array of jobs, to submit."""

    name: str
    commands: list[list[str]]  # the words after `dinokit`; several commands make an array
    tasks: int  # processes a node
    after: str = ""  # jobs that must end successfully first: 'ID' or 'ID:ID'
    resumes: bool = False  # whether the command resumes when it is given again


def exec_dinokit(command: Sequence[str]) -> NoReturn:
    """Replace this process by `dinokit COMMAND`; called in the job."""
    os.execv(sys.executable, [sys.executable, "-m", "dinokit", *command])


def batch_script(request: JobRequest, profile: Config, folder: Path) -> str:
    """The text of the batch script; needs no SLURM. Raises ValueError as submit_jobs()."""
    executor = _executor(request, profile, folder)
    if len(request.commands) > 1:
        executor.parameters["map_count"] = len(request.commands)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def check_cluster(profile: Config) -> None:
    """Check that this machine has SLURM, with the profile's partition and enough nodes in it.

    Raises:
        LookupError: if there is no such partition; the message lists the partitions.
        ValueError: if the partition has too few nodes: the job would wait for ever.
        RuntimeError: if there is no SLURM here, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise RuntimeError(
            "There is no SLURM here: the program sbatch was not found. Log in to a machine of the cluster "
            "from which jobs are submitted (at some sites after `module load slurm`). --dry-run works here."
        )
    rows = [line.split("|") for line in _run_slurm("sinfo", "--noheader", "--format=%P|%D").splitlines()]
    default = [name.removesuffix("*") for name, _ in rows if name.endswith("*")]
    nodes_of = {name.removesuffix("*"): int(nodes) for name, nodes in rows}
    names = list(filter(None, profile.partition.split(","))) or default
    for name in names:
        if name not in nodes_of:
            raise LookupError(
                f"There is no partition '{name}'.{suggest(name, list(nodes_of))} sinfo has: "
                f"{', '.join(nodes_of)}."
            )
    most = max((nodes_of[name] for name in names), default=profile.nodes)
    if profile.nodes > most:
        raise ValueError(f"nodes={profile.nodes}, but partition {', '.join(names)} has {most}.")


def submit_jobs(request: JobRequest, profile: Config, folder: Path) -> list[str]:
    """Submit a job, or an array of jobs, to SLURM. Returns their numbers.

    Raises:
        ValueError: if the name of the folder has a character that SLURM or the script reads otherwise.
        RuntimeError: if SLURM refuses; with its message.
    """
    try:
        jobs = _executor(request, profile, folder).map_array(exec_dinokit, request.commands)
    except FailedJobError as error:
        raise RuntimeError(f"SLURM refuses the job: {' '.join(str(error).split())}") from None
    return [job.job_id for job in jobs]


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """The state of each job: PENDING (REASON), RUNNING, COMPLETED, FAILED, ...; UNKNOWN if SLURM forgot it.

    Raises:
        RuntimeError: if SLURM does not answer.
    """
    queue = [
        line.split("|")
        for line in _run_slurm("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
    ]
    queued = {job: f"{state} ({why})" if state == "PENDING" else state for job, state, why in queue}
    others: list[SlurmJob[Any]] = [
        SlurmJob(folder=".", job_id=job, tasks=[0]) for job in jobs if job not in queued
    ]
    ended = {job.job_id: job.state.split()[0] for job in others}  # 'CANCELLED by 1000' without 'by 1000'
    return {job: queued.get(job) or ended[job] for job in jobs}


def job_exists(job: str) -> bool:
    """Whether a job is in SLURM's queue, or was a short time ago; jobs of other users too."""
    return not subprocess.run(["scontrol", "show", "job", job], capture_output=True, check=False).returncode


def cancel_job(job: str) -> None:
    """Cancel a job, or all jobs of an array by its number.

    Raises:
        RuntimeError: if SLURM cannot cancel it; with its message.
    """
    _run_slurm("scancel", job)


def log_files(job: str, folder: Path) -> list[Path]:
    """The logs of a job's processes, by rank; the first also has the output of the batch script."""
    return sorted(folder.glob(f"{job}_*_log.out"), key=lambda path: (len(path.name), path.name))


class _OfflineExecutor(SlurmExecutor):
    """An executor that can also be made without srun, to write a script."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _executor(request: JobRequest, profile: Config, folder: Path) -> SlurmExecutor:
    if not str(folder).isprintable() or "%" in str(folder):
        raise ValueError(
            f"The folder of the jobs would be {str(folder)!r}. A control character would become a line of "
            f"the batch script, and SLURM replaces % in its logs. Submit from a folder with another name."
        )
    python = shlex.quote(f"{Path(profile.venv).expanduser()}/bin/python" if profile.venv else sys.executable)
    if profile.container:
        python = f"apptainer exec --nv {shlex.quote(profile.container)} python3"
    given: dict[str, Any] = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "gpus_per_node": profile.gpus,
        "dependency": f"afterok:{request.after}" if request.after else "",
    }
    options: dict[str, Any] = {"requeue" if profile.restarts else "no-requeue": True}
    if request.after:
        options["kill-on-invalid-dep"] = "yes"
    executor = _OfflineExecutor(folder=folder, python=python)
    executor.update_parameters(
        job_name=request.name,
        time=profile.minutes,
        nodes=profile.nodes,
        ntasks_per_node=request.tasks,
        cpus_per_task=profile.cpus,
        mem=f"{profile.memory:g}G" if profile.memory else "0",
        signal_delay_s=profile.notice,
        wckey=None,  # submitit would give its own name, which a site may refuse
        array_parallelism=profile.at_once or len(request.commands),
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=1"],  # otherwise, when one process fails, the others wait for it
        setup=_setup(request, profile, folder),
        teardown=_teardown(request, profile),
        additional_parameters={**options, **profile.sbatch},
        **{key: value for key, value in given.items() if value},
    )
    return executor


def _setup(request: JobRequest, profile: Config, folder: Path) -> list[str]:
    """Lines before the command: the code, the threads, and an alarm if the job may be requeued."""
    code = shlex.quote(f"{folder}/code")
    first, more = " ".join(shlex.join(request.commands[0]).split()), len(request.commands) - 1
    lines = [
        f"# Each process becomes: dinokit {first}" + (f"; the array has {more} more jobs" if more else ""),
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export PYTHONSAFEPATH=1  # otherwise Python finds the code in the working folder first",
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT  # of another launcher",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        *profile.setup,
    ]
    if request.resumes and profile.restarts:
        array = len(request.commands) > 1
        job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
        seconds = 60 * profile.minutes - min(REQUEUE_MARGIN, profile.notice // 2)
        lines += [
            f'job="{job}"',
            'again() { [ "${SLURM_RESTART_COUNT:-0}" -lt '
            f'{profile.restarts} ] && scontrol requeue "$job"; }}',
            "(trap exit TERM; trap 'kill $! 2>/dev/null' EXIT; "
            f"sleep {seconds} & wait $! && again) & alarm=$!",
        ]
    return lines


def _teardown(request: JobRequest, profile: Config) -> list[str]:
    """Lines after the command: requeue the job if it was asked to stop, unless it was cancelled."""
    lines = ["status=$?"]
    if request.resumes and profile.restarts:
        lines += [
            "kill $alarm 2>/dev/null",
            f"case $status in {STOPPED})",
            '    [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ] && again ;;',
            "esac",
        ]
    return [*lines, "exit $status"]


def _run_slurm(*words: str) -> str:
    """The output of a program of SLURM."""
    try:
        process = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise RuntimeError(f"There is no SLURM here: the program {words[0]} was not found.") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"SLURM does not answer: {' '.join(words)} took more than a minute.") from None
    if process.returncode:
        raise RuntimeError(f"SLURM's {' '.join(words)} fails: {' '.join(process.stderr.split())}")
    return process.stdout
