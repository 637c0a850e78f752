"""dinokit COMMAND [key=value ...]: train, evaluate and use self-supervised visual features."""

import ast
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from dinokit import __version__
from dinokit.commands import LETTERS, OPTIONS, _outcome, parse, read_command
from dinokit.config import registry
from dinokit.runtime.files import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process.

    Returns:
        The exit status, as dinokit.commands._outcome says; an error is printed in one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except KeyboardInterrupt as stop:
        print(": ".join(["dinokit", "interrupted", *map(str, stop.args)]), file=sys.stderr)
        return _outcome.INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _outcome.reader_has_left():
            return 0
        if "--traceback" in argv:
            raise
        return _report(error, as_json="--json" in argv)
    return 0


def _report(error: Exception, as_json: bool) -> int:
    """Print an error. Returns the exit status."""
    status, text = _outcome.exit_status(error), _outcome.error_text(error)
    unexpected = status == _outcome.UNEXPECTED and not _outcome.foreign_place(error)
    if unexpected and not hasattr(error, "exit_status"):
        text = f"unexpected error: {type(error).__name__}: {text}"
        if not getattr(error, "__notes__", ()):  # it is in no run.log
            traceback.print_exception(error)
    text = "\n".join([text, *getattr(error, "__notes__", ())])
    print("dinokit: " + "\n    ".join(map(printable, text.splitlines())), file=sys.stderr)
    if as_json:
        print(_outcome.as_json({**getattr(error, "result", {}), "error": text, "status": status}))
    return status


def command() -> NoReturn:
    """The entry point of the program `dinokit`: main(), then exit.

    After main() the process ignores stop signals: a job whose process dies of a signal while it exits would
    be started again for nothing. Modules in the working folder can be named in settings, as with `python -m
    dinokit`; they come last, so that no file there takes the place of a library.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    status = main()
    if _outcome.reader_has_left():
        status = 0
    # The same as signals.STOP_SIGNALS, which cannot be imported without torch; Windows has only one of them.
    for name in {"SIGTERM", "SIGUSR1", "SIGUSR2"} & signal.Signals.__members__.keys():
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    sys.exit(status)


def _run(argv: Sequence[str]) -> None:
    if argv and argv[0] == "help":
        argv = [*argv[1:], "--help"]
    if not argv or argv[0].startswith("-"):
        flags = parse("", argv, [*OPTIONS, *LETTERS]).flags
        print(f"dinokit {__version__}" if flags.keys() & {"--version", "-V"} else _overview())
        return
    name, available = argv[0].replace("_", "-"), registry.names("commands")
    if name not in available:
        near = registry.suggest(name, available)
        raise LookupError(f"There is no command '{name}'.{near} Commands are: {', '.join(available)}.")
    module = registry.find("commands", name)
    command = read_command(name, argv[1:])
    if "--help" in command.flags:
        print(_help(module, command.words))
        return
    if "--version" in command.flags:
        print(f"dinokit {__version__}")
        return
    registry.trust(*filter(None, command.flags.get("--trust", "").split(",")))
    try:
        with _outcome.streams(command.flags):
            result = module.run(command)
    except (LookupError, ValueError) as error:
        if not (command.words or command.settings):
            error.add_note(f"As in: {_example(module, name)}")
        raise
    except KeyboardInterrupt:
        if getattr(module, "RESUMES", False):
            raise KeyboardInterrupt("the same command resumes") from None
        raise
    if "--json" in command.flags and result is not None:  # None: another process prints it
        print(_outcome.as_json(result))


def _overview() -> str:
    """The help without a command: the first line of every command's docstring. Imports none of them."""
    lines = [__doc__ or "", "", "    dinokit train data.path=PHOTOS minutes=60", ""]
    for name in registry.names("commands"):
        source = registry.locate("commands", name).read_text(encoding="utf-8")
        usage, _, purpose = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].partition(": ")
        lines += [usage, f"    {purpose}"]
    lines += ["", "Options of every command:"]
    letters = {option: f"{letter}, " for letter, option in LETTERS.items()}
    options = {f"{letters.get(option, '')}{option}": text for option, text in OPTIONS.items()}
    return "\n".join([*lines, *(f"    {option:<17}{text}" for option, text in options.items())])


def _example(module: ModuleType, name: str) -> str:
    """The first example in the docstring of a command."""
    lines = (module.__doc__ or "").splitlines()[1:]
    return next((line for line in lines if line.startswith(f"dinokit {name}")), f"dinokit help {name}")


def _help(module: ModuleType, words: Sequence[str]) -> str:
    """The help for one command: its docstring, its options, and what its describe() adds."""
    lines = [(module.__doc__ or "").strip()]
    lines += [f"{option}  {text}" for option, text in getattr(module, "FLAGS", {}).items()]
    lines += ["", *([module.describe(words)] if hasattr(module, "describe") else [])]
    if short := getattr(module, "SHORT", {}):
        lines += ["short forms: " + ", ".join(f"{key}= ({full})" for key, full in short.items())]
    return "\n".join([*lines, "options of every command: dinokit --help"])


if __name__ == "__main__":
    command()
