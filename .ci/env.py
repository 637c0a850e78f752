"""Make the environment of this clone, and print the absolute path of its interpreter: what `make` runs first.

The packages that dinokit needs (torch and the rest: gigabytes) are installed once, in a cache for all clones:
${DINOKIT_CACHE:-~/.cache/dinokit}/HASH, where HASH stands for what was asked for. The clone gets a thin .venv
which sees them and holds dinokit alone, editable. A lock keeps two runs apart; a marker, written last, tells
a whole environment from half of one.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

OTHER = "Name another one, as in: make test PYTHON=python3.12"
try:
    import tomllib  # came with Python 3.11, the oldest that dinokit runs on
except ModuleNotFoundError:
    sys.exit(f"dinokit needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}. {OTHER}")

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
# tested: those of constraints.txt; lowest: the lowest of each that pyproject.toml allows; newest: any.
VERSIONS = os.environ.get("DINOKIT_VERSIONS") or "tested"


def main() -> None:
    if VERSIONS not in ("tested", "lowest", "newest"):
        sys.exit(f"DINOKIT_VERSIONS={VERSIONS}: it must be tested, lowest or newest.")
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        sys.exit(
            f"{sys.executable} cannot make virtual environments: it lacks venv or ensurepip. "
            f"On Debian and Ubuntu: apt install python3-venv. {OTHER}"
        )
    cache = Path(os.environ.get("DINOKIT_CACHE") or "~/.cache/dinokit").expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        wait_for(lock)
        make_thin(make_shared(cache))
    sys.stdout.write(f"{ROOT / '.venv/bin/python'}\n")


def wait_for(lock: TextIO) -> None:
    os.set_inheritable(lock.fileno(), True)  # so that a pip which outlives this process keeps the lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("Another run is making an environment; waiting for it.")
        fcntl.flock(lock, fcntl.LOCK_EX)


def requirements() -> list[str]:
    """What pyproject.toml asks for to build dinokit, to run it, and to make its tests and documentation."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build, project = asked["build-system"], asked["project"]
    extras = project["optional-dependencies"]
    run_time, tools = [*project["dependencies"], *extras["cpu"]], [*extras["dev"], *extras["docs"]]
    if VERSIONS == "lowest":
        # Of what users install, also by extras, which `dev` repeats; not of pytest and the like.
        users = {each for name in extras.keys() - {"dev", "docs", "gpu"} for each in extras[name]}
        run_time = [lowest(each) for each in run_time]
        tools = [lowest(each) if each in users else each for each in tools]
    return [*build["requires"], *run_time, *tools]


def lowest(requirement: str) -> str:
    return requirement.replace(">=", "==", 1)


def make_shared(cache: Path) -> Path:
    """The folder with every package but dinokit, made if it is not there."""
    asked = "\n".join(requirements())
    machine = f"{sys.implementation.cache_tag} {sys.platform} {platform.machine()}"
    constraints = CONSTRAINTS.read_text(encoding="utf-8") if VERSIONS == "tested" else ""
    folder = cache / digest(asked, constraints, machine)
    if (folder / ".complete").exists() and (folder / "bin/python").exists():
        return folder
    say(f"Installing torch and the rest into {folder}: once, for minutes, about 6 GB on Linux.")
    make_venv(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(asked)
        file.flush()
        tested = ["--constraint", str(CONSTRAINTS)] if constraints else []
        pip(folder, "install", "--requirement", file.name, *tested)
    (folder / ".complete").touch()
    return folder


def make_thin(shared: Path) -> None:
    """The clone's .venv over `shared`, made again if that, pyproject.toml or the clone's path changes."""
    folder = ROOT / ".venv"
    marker = folder / ".complete"
    state = digest(
        "with torchrun", str(shared), str(ROOT), (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    if (folder / "bin/python").exists() and marker.exists() and marker.read_text() == state:
        return
    say(f"Making {folder}.")
    make_venv(folder, "--without-pip")
    packages = site_packages(folder)
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({str(site_packages(shared))!r})\n")
    (folder / "bin/ruff").symlink_to(shared / "bin/ruff")  # a program: `python -m ruff` looks for it there
    python = str(folder / "bin/python")
    pip(shared, "--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    # A folder `dinokit` that Python is started above, such as the clone, would hide the editable package.
    (packages / "dinokit").symlink_to(ROOT / "dinokit")
    torchrun = folder / "bin/torchrun"
    torchrun.write_text(f"#!{python}\nimport sys\nfrom torch.distributed.run import main\nsys.exit(main())\n")
    torchrun.chmod(0o755)
    marker.write_text(state)


def make_venv(folder: Path, *options: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-I", "-m", "venv", *options, str(folder))


def site_packages(folder: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(folder / "bin/python"), "-I", "-c", code], text=True).strip())


def pip(folder: Path, *arguments: str) -> None:
    run(str(folder / "bin/python"), "-I", "-m", "pip", "-qq", "--disable-pip-version-check", *arguments)


def run(*command: str) -> None:
    """Run a command; its words go to stderr, because stdout is for the path alone."""
    done = subprocess.run(command, stdout=sys.stderr, close_fds=False, check=False)
    if done.returncode:
        sys.exit(f"This failed, so the environment is not ready: {' '.join(command)}")


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
