"""dinokit submit profile=PROFILE [key=value ...] -- COMMAND: run a command as a job on a SLURM cluster.

The words after -- are those that you would type after `dinokit`. A run that must stop, at its time limit or
for a job with a higher priority, saves, starts again by itself and resumes exactly. See docs/slurm.md.

dinokit submit profile=gpu partition=a100 nodes=4 -- train dinov2_vitl14 data.path=DATA
dinokit submit profile=gpu gpus=1 after=1234 -- eval knn weights=runs/dinov2_vitl14
dinokit submit profile=gpu gpus=1 array='runs/dinov2_vitl14/teachers/*.safetensors' -- eval knn weights={}
dinokit submit status [JOB ...]       the jobs that were submitted from this folder, and their states
dinokit submit logs [JOB]             the log of a job; without a number, of the newest
dinokit submit cancel JOB [JOB ...]   a run saves before it ends

array=VALUES submits a job for each value: FROM-TO, A,B,C, or a pattern of files. In the command, {} is the
value, {name} its file name without ending, and {number} counts from 0. after=JOB[,JOB] waits until these jobs
have completed successfully.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dinokit import slurm
from dinokit.commands import Command, config_lines, read_command
from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe, parse_overrides, student_shares
from dinokit.config.students import check_keep, ranks_of
from dinokit.slurm import dotted_names, is_dotted
from dinokit.slurm.profile import Config, load_profile, profile_names

FLAGS = {"--dry-run": "print the batch script, and submit nothing"}
PROFILE_KEYS = [item.name for item in fields(Config)]
OWN_KEYS = ("profile", "array", "after")  # before --, besides the keys of a profile
PLACEHOLDERS = ("{}", "{name}", "{number}")


def run(command: Command) -> dict[str, Any]:
    actions = {"status": _status, "logs": _logs, "cancel": _cancel}
    if not command.words:
        return _submit(command)
    word, *jobs = command.words
    if word not in actions or command.settings or command.rest:
        near = registry.suggest(word, list(actions))
        raise ValueError(
            f"'{word}' is not of the form key=value.{near} To submit: dinokit submit profile=PROFILE -- "
            f"COMMAND. Submitted jobs: dinokit submit {'|'.join(actions)} [JOB]."
        )
    return actions[word](jobs)


def words() -> Sequence[str]:
    return "status", "logs", "cancel"


def describe(words: Sequence[str]) -> str:
    profiles = f"profiles: {', '.join(profile_names())}; or the path of a YAML file"
    return "\n".join([profiles, "keys of a profile:", *config_lines(Config)])


def _submit(command: Command) -> dict[str, Any]:
    pairs = [(text, *text.split("=", 1)) for text in command.settings]
    own = {key: value for _, key, value in pairs if key in OWN_KEYS}
    settings = [text for text, key, _ in pairs if key not in OWN_KEYS]
    if not command.rest:
        raise ValueError(
            "Which command? Give it after --, as in: dinokit submit profile=gpu -- train RECIPE."
        )
    hint = _hint_after(settings, command.rest[0])
    if "profile" not in own:
        raise ValueError(
            f"profile must be given. Profiles are: {', '.join(profile_names())}; or give a file's path.{hint}"
        )
    if hint:
        raise ValueError(f"The keys of a profile are: {', '.join(PROFILE_KEYS)}.{hint}")
    profile = load_profile(own["profile"], parse_overrides(settings))
    commands = _array(own.get("array"), command.rest)
    title = "-".join(Path(word).stem for word in command.rest[:2] if "=" not in word)
    given = [f"profile={own['profile']}", *settings]
    after = _dependencies(own.get("after", ""))
    return submit_commands(title, commands, profile, given, after, "--dry-run" in command.flags)


def submit_commands(
    title: str,
    commands: list[list[str]],
    profile: Config,
    settings: list[str],
    after: str = "",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Submit commands as a job, or an array of jobs, after all checks.

    Args:
        title: of the job and its folder.
        commands: the words after `dinokit`; all of the same command.
        profile: the resources.
        settings: how they were given, for the record.
        after: jobs that must end successfully first, as SLURM writes them.
        dry_run: print the batch script, and submit nothing.

    Raises:
        ValueError, LookupError, RuntimeError: as `dinokit submit`.
    """
    tasks, resumes = _tasks(commands[0][0], profile)
    modules = set[str]().union(*(_check(words, profile, tasks) for words in commands))
    from dinokit.slurm import submit

    title = re.sub(r"[^\w.+-]+", "-", title)  # a newline would begin another line of the batch script
    request = submit.JobRequest(title, commands, tasks, after, resumes)
    if dry_run:
        script = submit.batch_script(request, profile, (slurm.JOBS / f"DATE-{title}").absolute())
        print(script)
        return {"script": script}
    submit.check_cluster(profile)
    _check_dependencies(request.after)
    if resumes and not request.after:
        _refuse_queued(commands)
    folder = slurm.new_folder(title)
    try:
        slurm.copy_code(folder / "code", modules)
        request.commands = slurm.copy_recipes(folder / "recipes", commands)
        jobs = submit.submit_jobs(request, profile, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    number = slurm.write_record(folder, jobs, commands, settings).number
    array = f" ({jobs[0]} to {jobs[-1]})" if len(jobs) > 1 else ""
    print(f"job {number}{array}: nodes={profile.nodes}, processes a node: {tasks}, in {folder}")
    print(f"state: dinokit submit status {number}; log: dinokit submit logs {number}")
    return {"job": number, "jobs": jobs, "folder": folder}


def _dependencies(after: str) -> str:
    """'1,2' as SLURM writes it: '1:2'."""
    jobs = [job for job in after.split(",") if job]
    for job in jobs:
        if not re.fullmatch(r"\d+(_\d+)?", job):
            raise ValueError(
                f"after={after}: give numbers of jobs, as `dinokit submit status` shows them: after=1234."
            )
    return ":".join(jobs)


def _check_dependencies(after: str) -> None:
    """Refuse to wait for a job that failed, or that SLURM does not know and would treat as completed."""
    from dinokit.slurm import submit

    jobs_of = {each.number: each.jobs for each in slurm.read_records()}
    jobs = [job for number in filter(None, after.split(":")) for job in jobs_of.get(number, [number])]
    for job, state in submit.job_states(jobs).items():
        if state == "UNKNOWN" and not submit.job_exists(job):
            raise LookupError(
                f"after={job}: SLURM knows no such job, or has forgotten it. Jobs that were submitted from "
                f"here: dinokit submit status."
            )
        if state.split()[0] not in (*submit.ACTIVE, "COMPLETED", "UNKNOWN"):
            raise ValueError(
                f"after={job}: that job is {state}, so a job that waits for it would never run. Submit it "
                f"again, and wait for the new number."
            )


def _refuse_queued(commands: list[list[str]]) -> None:
    """Refuse commands that are already in the queue: two such jobs would write to the same files."""
    from dinokit.slurm import submit

    old = {j: w for each in slurm.read_records() for j, w in zip(each.jobs, each.commands, strict=True)}
    for job, state in submit.job_states([j for j, words in old.items() if words in commands]).items():
        if state.split()[0] in submit.ACTIVE:
            raise ValueError(
                f"Job {job} is {state} and runs the same command: {' '.join(old[job])}. after={job} waits "
                f"until it has ended; dinokit submit cancel {job} ends it."
            )


def _status(words: list[str]) -> dict[str, Any]:
    from dinokit.slurm.submit import job_states

    selected = slurm.find_jobs(words) if words else [(each, each.jobs) for each in slurm.read_records()]
    if not selected:
        print(f"Nothing was submitted from here (there is no {slurm.JOBS}).")
        return {"jobs": []}
    states = job_states([job for _, jobs in selected for job in jobs])
    found = []
    for each, jobs in selected:
        for job, command in zip(each.jobs, each.commands, strict=True):
            if job in jobs:
                print(f"{job:<12} {states[job]:<20} {each.submitted}  {' '.join(command)}")
                found.append({"job": job, "state": states[job], "command": command})
    return {"jobs": found}


def _logs(words: list[str]) -> dict[str, Any]:
    from dinokit.slurm.submit import job_states, log_files

    records = slurm.read_records()
    if not words and not records:
        raise LookupError(f"Nothing was submitted from here (there is no {slurm.JOBS}).")
    found: dict[str, Any] = {}
    for each, jobs in slurm.find_jobs(words or [records[-1].number]):
        for job in jobs:
            found[job] = paths = log_files(job, Path(each.folder))
            if not paths:
                print(f"job {job} is {job_states([job])[job]} and has written no log yet.")
                continue
            first, *others = paths
            print(f"== {first}\n{first.read_text(encoding='utf-8', errors='replace').rstrip()}")
            for path in others:  # process 0 logs the run; the other processes write only when they fail
                text = path.read_text(encoding="utf-8", errors="replace")
                lines = [line for line in text.splitlines() if not line.startswith("submitit ")]
                if lines:
                    print("\n".join([f"== {path}", *lines]))
    return {"logs": found}


def _cancel(words: list[str]) -> dict[str, Any]:
    from dinokit.slurm.submit import cancel_job

    if not words:
        raise ValueError("Which job? dinokit submit status lists them.")
    slurm.find_jobs(words)
    for word in words:
        cancel_job(word)
        print(f"job {word} is cancelled. A run saves first; dinokit submit with the same command resumes it.")
    return {"cancelled": words}


def _hint_after(settings: list[str], name: str) -> str:
    """A sentence if one of the settings before -- belongs to the command: where to put it.

    Such a key is not a profile's, and not similar to one, as node=2 is, unless a recipe has exactly this key.
    """
    recipe = {item.name for item in fields(Recipe)}
    for text in settings:
        key = _key(text)
        if key in recipe or (
            key not in PROFILE_KEYS and not get_close_matches(key, PROFILE_KEYS, n=1, cutoff=0.65)
        ):
            return f" Give settings of dinokit {name} after --: -- {name} ... {text}"
    return ""


def _array(array: str | None, words: list[str]) -> list[list[str]]:
    """The command for each value of an array; without an array, the command."""
    if array is None:
        return [words]
    if not any(placeholder in word for word in words for placeholder in PLACEHOLDERS):
        raise ValueError(f"array={array}, but the command has no {{}}: all its jobs would be the same.")
    if bounds := re.fullmatch(r"(\d+)-(\d+)", array):
        values = [str(n) for n in range(int(bounds[1]), int(bounds[2]) + 1)]
    elif any(mark in array for mark in "*?["):
        root = Path(array).anchor or "."
        values = sorted(str(path) for path in Path(root).glob(str(Path(array).relative_to(root))))
    else:
        values = [value for value in array.split(",") if value]
    if not values:
        raise ValueError(f"array={array} has no values: give FROM-TO, A,B,C, or a pattern of existing files.")
    return [[_fill(word, value, number) for word in words] for number, value in enumerate(values)]


def _fill(word: str, value: str, number: int) -> str:
    texts = dict(zip(PLACEHOLDERS, (value, Path(value).stem, str(number)), strict=True))
    return re.sub(r"{(name|number)?}", lambda match: texts[match[0]], word)


def _tasks(name: str, profile: Config) -> tuple[int, bool]:
    """Processes a node for a command, and whether the command resumes."""
    names = [each for each in registry.names("commands") if each != "submit"]
    if name not in names:
        near = " Leave that word out." if name == "dinokit" else registry.suggest(name, names)
        raise LookupError(f"There is no command '{name}' to submit.{near} Commands are: {', '.join(names)}.")
    module = registry.find("commands", name)
    multi_process = getattr(module, "MULTI_PROCESS", False)
    tasks = profile.tasks or (profile.gpus if multi_process else 1) or 1
    if not multi_process and profile.nodes * tasks > 1:
        raise ValueError(
            f"dinokit {name} works in one process, but nodes={profile.nodes} and tasks={tasks} ask for "
            f"{profile.nodes * tasks} processes, which would all do the same. Give nodes=1 tasks=1."
        )
    return tasks, getattr(module, "RESUMES", False)


def _check(words: Sequence[str], profile: Config, tasks: int) -> set[str]:
    """Raise the errors now that the job would raise when it starts.

    Returns:
        The dotted names of modules in the command.
    """
    name, rest = words[0], words[1:]
    if "--dry-run" in rest:
        raise ValueError(f"A dry run needs no job.{_hint_before(rest)}")
    module = registry.find("commands", name)
    try:
        command = read_command(name, rest)
        modules = dotted_names(parse_overrides(command.settings)) | set(filter(is_dotted, command.words))
        if name == "train":
            word = command.one_word("recipe", registry.recipe_names())
            alone = any(text.startswith("student=") for text in command.settings)
            share = {} if alone else student_shares(word, command.settings)
            chosen = [[f"student={key}"] for key in share] or [[]]
            recipes = [load_recipe(word, [*command.settings, *one]) for one in chosen]
            modules |= set().union(*(dotted_names(vars(recipe)) for recipe in recipes))
            if share:
                ranks_of(share, profile.nodes * tasks, recipes[0].optim.batch)
                check_keep(recipes[0])
            else:
                _check_batch(recipes[0], profile.nodes, tasks)
        elif hasattr(module, "check"):
            module.check(command)
    except ValueError as error:
        raise ValueError(f"{error}{_hint_before(rest)}") from None
    return modules


def _check_batch(recipe: Recipe, nodes: int, tasks: int) -> None:
    from dinokit.train.schedule import accumulation

    try:
        accumulation(recipe, nodes * tasks)
    except ValueError as error:
        batch = recipe.optim.batch
        possible = [n for n in range(1, 2 * nodes + 1) if batch % (n * tasks) == 0]
        each = f"{tasks} process{'es' if tasks > 1 else ''} a node"
        near = f" With {each}, nodes may be {', '.join(map(str, possible))}." if possible else ""
        raise ValueError(f"nodes={nodes} and {each}: {error}{near}") from None


def _hint_before(words: Sequence[str]) -> str:
    """A sentence if one of the words after -- belongs to the job: where to put it."""
    own = [text for text in words if _key(text) in (*PROFILE_KEYS, *OWN_KEYS, *FLAGS)]
    return f" Give settings of the job before --: {own[0]} -- ..." if own else ""


def _key(text: str) -> str:
    return re.split(r"[.=]", text)[0]
