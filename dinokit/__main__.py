"""dinokit VERB [WHAT] [key=value ...]: train, judge and use self-supervised visual features."""

import ast
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from dinokit import __version__
from dinokit.commands import parse
from dinokit.config import registry

FLAGS = {
    "--help": "what a verb takes",
    "--version": "of dinokit",
    "--traceback": "show where in the code an error arose",
}


def overview() -> str:
    """The help: this module's first line, and that of every verb. Imports none of them."""
    lines = [__doc__ or "", ""]
    for verb in registry.names("commands"):
        source = registry.locate("commands", verb).read_text(encoding="utf-8")
        call, _, what = ((ast.get_docstring(ast.parse(source)) or "").splitlines()[0]).partition(": ")
        lines += [call, f"    {what}"]
    lines += ["", "With any verb:", *(f"    {flag:<13}{what}" for flag, what in FLAGS.items())]
    return "\n".join(lines)


def answer(argv: Sequence[str]) -> None:
    """Run what a command line asks for."""
    if not argv or argv[0].startswith("-"):
        command = parse("", argv, [*FLAGS, "-h"])
        print(f"dinokit {__version__}" if "--version" in command.flags else overview())
        return
    verb = argv[0]
    if verb not in registry.names("commands"):
        have = registry.names("commands")
        raise LookupError(
            f"There is no verb '{verb}'.{registry.suggest(verb, have)} Verbs are: {', '.join(have)}."
        )
    module = registry.find("commands", verb)
    own: dict[str, str] = getattr(module, "FLAGS", {})
    command = parse(verb, argv[1:], [*FLAGS, "-h", *own])
    if command.flags.keys() & {"--help", "-h"}:
        more = [module.describe(command.words)] if hasattr(module, "describe") else []
        print(
            "\n".join(
                [
                    (module.__doc__ or "").strip(),
                    *(f"{flag}  {what}" for flag, what in own.items()),
                    "",
                    *more,
                ]
            )
        )
        return
    try:
        module.run(command)
    except KeyboardInterrupt:
        if getattr(module, "RESUMES", False):
            raise KeyboardInterrupt("the same command goes on") from None
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit status: 0, or 2 if something was asked that cannot be done.

    Args:
        argv: the words; None: those of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        answer(argv)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        if "--traceback" in argv:
            raise
        print(f"dinokit: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(": ".join(["dinokit", "interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    return 0


def command() -> NoReturn:
    """What a shell or a scheduler starts: main(), and then nothing that could be told to stop.

    A job whose process dies of a signal while it ends would be started again, for nothing.
    """
    status = main()
    # Those of signals.STOP_SIGNALS, which is not imported: it takes PyTorch, and Windows has one of them.
    for name in {"SIGTERM", "SIGUSR1", "SIGUSR2"} & signal.Signals.__members__.keys():
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    command()
