"""Make the environment of this clone, and print the absolute path of its interpreter: what `make` runs first.

The packages that dinokit needs (torch and the rest: gigabytes) are installed once, in a cache that all clones share:
${DINOKIT_CACHE:-~/.cache/dinokit}/HASH, where HASH stands for what was asked for. The clone gets a thin .venv which
sees them and holds dinokit alone, editable. A lock keeps two runs apart; a marker, written last, tells a whole
environment from half of one.
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

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def main():
    check_python()
    cache = Path(os.environ.get("DINOKIT_CACHE") or "~/.cache/dinokit").expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        wait_for(lock)
        thin_environment(shared_environment(cache))
    sys.stdout.write(f"{ROOT / '.venv/bin/python'}\n")


def check_python():
    other = "Name another one, as in: make test PYTHON=python3.12"
    if sys.version_info < (3, 11):
        sys.exit(f"dinokit needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}. {other}")
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        sys.exit(
            f"{sys.executable} cannot make virtual environments: it lacks venv or ensurepip. "
            f"On Debian and Ubuntu: apt install python3-venv. {other}"
        )


def wait_for(lock):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("Another run is making an environment; waiting for it.")
        fcntl.flock(lock, fcntl.LOCK_EX)


def requirements():
    """What pyproject.toml asks for: to build dinokit, to run it, and the extras that its tests need."""
    import tomllib

    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = asked["project"]["optional-dependencies"]
    return [*asked["build-system"]["requires"], *asked["project"]["dependencies"], *extras["cpu"], *extras["dev"]]


def shared_environment(cache):
    """The folder with every package but dinokit, made if it is not there."""
    asked = "\n".join(requirements())
    machine = f"{platform.python_version()} {sys.platform} {platform.machine()}"
    folder = cache / digest(asked, CONSTRAINTS.read_text(encoding="utf-8"), machine)
    if (folder / ".complete").exists() and (folder / "bin/python").exists():
        return folder
    say(f"Installing torch and the other packages into {folder}; this once, it takes minutes and about 6 GB.")
    make_environment(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(asked)
        file.flush()
        pip(folder / "bin/python", "install", "--requirement", file.name, "--constraint", str(CONSTRAINTS))
    (folder / ".complete").touch()
    return folder


def thin_environment(shared):
    """The clone's .venv over the folder `shared`, made again if either or pyproject.toml has changed."""
    folder = ROOT / ".venv"
    marker = folder / ".complete"
    state = digest(str(shared), str(ROOT), (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if marker.exists() and marker.read_text() == state:
        return
    say(f"Making {folder}.")
    make_environment(folder, "--without-pip")
    python = folder / "bin/python"
    packages, packages_shared = (site_packages(where / "bin/python") for where in (folder, shared))
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({str(packages_shared)!r})\n")
    (folder / "bin/ruff").symlink_to(shared / "bin/ruff")  # a program, not a module: looked for beside the interpreter
    pip(
        shared / "bin/python", "--python", str(python), "install", "--no-deps", "--no-build-isolation",
        "--editable", str(ROOT),
    )  # fmt: skip
    marker.write_text(state)


def make_environment(folder, *options):
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-I", "-m", "venv", *options, str(folder))


def site_packages(python):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-I", "-c", code], text=True).strip())


def pip(python, *arguments):
    run(str(python), "-I", "-m", "pip", "-qq", "--disable-pip-version-check", *arguments)


def run(*command):
    """Run a command; its words go to stderr, because stdout is for the path alone."""
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"This failed, so the environment is not ready: {' '.join(command)}")


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def say(text):
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
