"""dinokit COMMAND [key=value ...]: train, evaluate and use self-supervised visual features."""

import ast
import signal
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from dinokit import __version__
from dinokit.commands import parse
from dinokit.config import registry
from dinokit.runtime.files import printable

OPTIONS = {
    "--help": "help for a command: usage, keys, examples",
    "--version": "the version of dinokit",
    "--traceback": "show the Python traceback of an error",
    "--trust=": "packages, as a,b, whose modules a file of weights may name",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process.

    Returns:
        The exit status: 0; 2 for an error, which is printed in one line; 130 after a stop signal.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        if "--traceback" in argv:
            raise
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        if place := _foreign_place(error):  # not written to be read alone, as ours are
            text = f"{type(error).__name__}: {text} ({place}; --traceback shows more)"
        print("dinokit: " + "\n    ".join(map(printable, text.splitlines())), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(": ".join(["dinokit", "interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    return 0


def _foreign_place(error: BaseException) -> str:
    """The last line of the user's own code that an error came through; "" if there is none."""
    ours = {Path(str(files(name))).resolve() for name in ("dinokit", "dinokit.eval", "dinokit.slurm")}
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        above = set(Path(frame.filename).resolve().parents)
        packages = {folder / name for folder in map(Path, sys.path) for name in registry.trusted()}
        foreign = not above & (ours | libraries) and "site-packages" not in frame.filename
        if (foreign or above & packages) and Path(frame.filename).is_file():
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return ""


def command() -> NoReturn:
    """The entry point of the program `dinokit`: main(), then exit.

    After main() the process ignores stop signals: a job whose process dies of a signal while it exits would
    be started again for nothing.
    """
    status = main()
    # The same as signals.STOP_SIGNALS, which cannot be imported without torch; Windows has only one of them.
    for name in {"SIGTERM", "SIGUSR1", "SIGUSR2"} & signal.Signals.__members__.keys():
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    sys.exit(status)


def _run(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        flags = parse("", argv, [*OPTIONS, "-h"]).flags
        print(f"dinokit {__version__}" if "--version" in flags else _overview())
        return
    name, available = argv[0], registry.names("commands")
    if name not in available:
        near = registry.suggest(name, available)
        raise LookupError(f"There is no command '{name}'.{near} Commands are: {', '.join(available)}.")
    module = registry.find("commands", name)
    command = parse(name, argv[1:], [*OPTIONS, "-h", *getattr(module, "FLAGS", {})])
    if command.flags.keys() & {"--help", "-h"}:
        print(_help(module, command.words))
        return
    registry.trust(*filter(None, command.flags.get("--trust", "").split(",")))
    try:
        module.run(command)
    except KeyboardInterrupt:
        if getattr(module, "RESUMES", False):
            raise KeyboardInterrupt("the same command resumes") from None
        raise


def _overview() -> str:
    """The help without a command: the first line of every command's docstring. Imports none of them."""
    lines = [__doc__ or "", ""]
    for name in registry.names("commands"):
        source = registry.locate("commands", name).read_text(encoding="utf-8")
        usage, _, purpose = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].partition(": ")
        lines += [usage, f"    {purpose}"]
    lines += ["", "Options of every command:"]
    return "\n".join([*lines, *(f"    {option:<13}{text}" for option, text in OPTIONS.items())])


def _help(module: ModuleType, words: Sequence[str]) -> str:
    """The help for one command: its docstring, its options, and what its describe() adds."""
    lines = [(module.__doc__ or "").strip()]
    lines += [f"{option}  {text}" for option, text in getattr(module, "FLAGS", {}).items()]
    return "\n".join([*lines, "", *([module.describe(words)] if hasattr(module, "describe") else [])])


if __name__ == "__main__":
    command()
