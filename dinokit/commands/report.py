"""dinokit report RUN [RUN...]: write RUN/report.html, one page about a run, or several side by side.

The page has a verdict in words, the curves of metrics.jsonl, all results, crops of training images, patch
features as colours, attention maps, nearest neighbours, the recipe and the system. It loads nothing, so it
can be sent by mail. A training writes it at its end (run.report=false does not). out=FILE is another place.

dinokit report runs/photos
dinokit report runs/photos runs/try out=both.html
"""

from typing import Any

from dinokit.commands import Command
from dinokit.config.load import parse_overrides

KEYS = {"out": "the file to write; report.html in the first run, if not given", "device": "cpu, cuda or auto"}


def run(command: Command) -> None:
    settings: dict[str, Any] = parse_overrides(command.settings)
    wrong = set(settings) - set(KEYS)
    if wrong:
        raise ValueError(f"dinokit report has no key '{sorted(wrong)[0]}'; it has: {', '.join(KEYS)}.")
    if not command.words:
        raise ValueError("Which run? Give one or more folders: dinokit report runs/photos")
    from dinokit.report import write_report

    print(write_report(command.words, settings.get("out"), str(settings.get("device", "auto"))))
