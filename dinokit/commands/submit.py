"""dinokit submit profile=PROFILE [key=value ...] -- COMMAND: run a command as a job on a SLURM cluster.

What stands behind -- is what you would type behind `dinokit`. A run that must stop, at its time limit or for
a job with more rights, saves, starts again by itself and goes on exactly. docs/slurm.md tells the rest.

dinokit submit profile=gpu partition=a100 nodes=4 -- train dinov2_vitl14 data.path=DATA
dinokit submit profile=gpu gpus=1 after=1234 -- eval knn weights=runs/dinov2_vitl14
dinokit submit profile=gpu gpus=1 array='runs/dinov2_vitl14/teachers/*.safetensors' -- eval knn weights={}
dinokit submit status [JOB ...]       what was submitted from this folder, and how it goes
dinokit submit logs [JOB]             what a job said; without a number, the newest
dinokit submit cancel JOB [JOB ...]   a run saves before it ends

array=VALUES makes a job for each value: FROM-TO, A,B,C, or a pattern of files. In the command, {} is the
value, {name} its last part without ending, and {number} counts from 0. after=JOB[,JOB] waits until these have
ended well.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dinokit.commands import Command, _jobs
from dinokit.config import registry
from dinokit.config.load import parse_overrides

FLAGS = {"--dry-run": "print the batch script, and submit nothing"}


def run(command: Command) -> None:
    ways = {"status": _status, "logs": _logs, "cancel": _cancel}
    if not command.words:
        _submit(command)
        return
    word, *jobs = command.words
    if word not in ways or command.settings or command.rest:
        raise ValueError(
            f"'{word}' is not of the form key=value.{registry.suggest(word, list(ways))} To submit: dinokit "
            f"submit profile=PROFILE -- COMMAND. What was submitted: dinokit submit {'|'.join(ways)} [JOB]."
        )
    ways[word](jobs)


def describe(words: Sequence[str]) -> str:
    from dinokit.slurm.profile import profile_names

    lines = [f"profiles: {', '.join(profile_names())}; or the path of a YAML file", "keys of a profile:"]
    for item in fields(registry.read_config("slurm", "profile")):
        default = item.default_factory() if callable(item.default_factory) else item.default
        lines.append(f"    {item.name} = {default!r}")
    return "\n".join(lines)


def _submit(command: Command) -> None:
    from dinokit.slurm import record
    from dinokit.slurm.profile import load_profile, profile_names
    from dinokit.slurm.snapshot import copy_code, copy_recipes

    own = {key: value for key, value in (text.split("=", 1) for text in command.settings) if key in _jobs.OWN}
    settings = [text for text in command.settings if text.split("=", 1)[0] not in _jobs.OWN]
    if not command.rest:
        raise ValueError(
            "Which command? It stands behind --, as in: dinokit submit profile=gpu -- train RECIPE."
        )
    verb, behind = command.rest[0], _jobs.belongs_behind(settings, command.rest[0])
    if "profile" not in own:
        raise ValueError(
            f"profile must be given. There is: {', '.join(profile_names())}; or give a file's path.{behind}"
        )
    if behind:
        raise ValueError(f"A profile has: {', '.join(_jobs.profile_keys())}.{behind}")
    profile = load_profile(own["profile"], parse_overrides(settings))
    commands = _jobs.for_each(own.get("array"), command.rest)
    tasks, goes_on = _jobs.shape(verb, profile)
    named = set[str]().union(*(_jobs.check(words, profile, tasks) for words in commands))
    name = "-".join(Path(word).stem for word in command.rest[:2] if "=" not in word)
    from dinokit.slurm import submit

    asked = submit.Asked(name, commands, tasks, _earlier(own.get("after", "")), goes_on)
    if "--dry-run" in command.flags:
        print(submit.script(asked, profile, (record.JOBS / f"DATE-{name}").absolute()))
        return
    submit.check_cluster(profile)
    _check_earlier(asked.after)
    if goes_on and not asked.after:
        _not_twice(commands)
    folder = record.new_folder(name)
    try:
        copy_code(folder / "code", named)
        asked.commands = copy_recipes(folder / "recipes", commands)
        jobs = submit.send(asked, profile, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    done = record.write(folder, jobs, commands, [f"profile={own['profile']}", *settings])
    many = f" ({jobs[0]} to {jobs[-1]})" if len(jobs) > 1 else ""
    print(f"job {done.number}{many}: nodes={profile.nodes}, processes a node: {tasks}, in {folder}")
    print(
        f"how it goes: dinokit submit status {done.number}; what it says: dinokit submit logs {done.number}"
    )


def _earlier(after: str) -> str:
    """'1,2' as SLURM has it: '1:2'."""
    jobs = [job for job in after.split(",") if job]
    for job in jobs:
        if not re.fullmatch(r"\d+(_\d+)?", job):
            raise ValueError(
                f"after={after}: numbers of jobs, as `dinokit submit status` shows them: after=1234."
            )
    return ":".join(jobs)


def _check_earlier(after: str) -> None:
    """Refuse to wait for a job that has not ended well, or is not known: SLURM takes the latter for done."""
    from dinokit.slurm import record, submit

    have = {each.number: each.jobs for each in record.records()}
    jobs = [job for number in filter(None, after.split(":")) for job in have.get(number, [number])]
    for job, state in submit.states(jobs).items():
        if state == "UNKNOWN" and not submit.knows(job):
            raise LookupError(
                f"after={job}: SLURM knows no such job, or has forgotten it. Those submitted from here: "
                f"dinokit submit status."
            )
        if state.split()[0] not in (*submit.LIVE, "COMPLETED", "UNKNOWN"):
            raise ValueError(
                f"after={job}: that job is {state}, so one that waits for its good end would never run. "
                f"Submit it again, and wait for the new number."
            )


def _not_twice(commands: list[list[str]]) -> None:
    """Refuse what is in the queue already: two such jobs at once would write to the same place."""
    from dinokit.slurm import record, submit

    old = {j: w for each in record.records() for j, w in zip(each.jobs, each.commands, strict=True)}
    for job, state in submit.states([j for j, words in old.items() if words in commands]).items():
        if state.split()[0] in submit.LIVE:
            raise ValueError(
                f"Job {job} is {state} and does the same: {' '.join(old[job])}. after={job} waits until it "
                f"has ended; dinokit submit cancel {job} ends it."
            )


def _status(words: list[str]) -> None:
    from dinokit.slurm import record
    from dinokit.slurm.submit import states

    found = record.find(words) if words else [(each, each.jobs) for each in record.records()]
    if not found:
        print(f"Nothing was submitted from here (there is no {record.JOBS}).")
        return
    state = states([job for _, jobs in found for job in jobs])
    for each, jobs in found:
        lines = [(job, " ".join(command)) for job, command in zip(each.jobs, each.commands, strict=True)]
        for job, command in lines:
            if job in jobs:
                print(f"{job:<12} {state[job]:<20} {each.submitted}  {command}")


def _logs(words: list[str]) -> None:
    from dinokit.slurm import record
    from dinokit.slurm.submit import logs, states

    have = record.records()
    if not words and not have:
        raise LookupError(f"Nothing was submitted from here (there is no {record.JOBS}).")
    for each, jobs in record.find(words or [have[-1].number]):
        for job in jobs:
            first, *others = logs(job, Path(each.folder)) or [None]
            if first is None:
                print(f"job {job} is {states([job])[job]} and has said nothing yet.")
                continue
            print(f"== {first}\n{first.read_text(encoding='utf-8', errors='replace').rstrip()}")
            for path in others:  # only process 0 tells of a run; the others speak when they fail
                said = path.read_text(encoding="utf-8", errors="replace").splitlines()
                own = [line for line in said if not line.startswith("submitit ")]
                if own:
                    print("\n".join([f"== {path}", *own]))


def _cancel(words: list[str]) -> None:
    from dinokit.slurm import record
    from dinokit.slurm.submit import cancel

    if not words:
        raise ValueError("Which job? dinokit submit status lists them.")
    record.find(words)
    for word in words:
        cancel(word)
        print(
            f"job {word} is told to end; a run saves first, and dinokit submit with the same command goes on"
        )
