"""dinokit report RUN [RUN...] [key=value ...]: write RUN/report.html, a page with curves and pictures.

The page has a verdict in words, the curves of metrics.jsonl, all results, crops of training images, patch
features as colours, attention maps, nearest neighbours, facts about the images, the recipe and the system.
Several runs stand side by side. The page loads nothing, so it can be sent by mail. A training writes it at
its end (run.report=false turns that off).

dinokit report runs/photos
dinokit report runs/photos runs/try out=both.html
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinokit.commands import Command, key_lines
from dinokit.config.load import checked_values, parse_overrides


@dataclass
class Config:
    out: str = ""  # the file to write; empty: report.html in the first run
    device: str = "auto"  # cpu, cuda or auto


def run(command: Command) -> dict[str, Any]:
    cfg = Config(**checked_values(Config, parse_overrides(command.settings)))
    if not command.words:
        found = sorted(str(file.parent) for file in Path("runs").glob("*/recipe.yaml"))
        there = f" Here is: {', '.join(found)}." if found else ""
        raise ValueError(f"Which run? Give one or more folders of runs: dinokit report runs/photos.{there}")
    from dinokit.report import write_report

    out = write_report(command.words, cfg.out or None, cfg.device)
    print(out)
    return {"out": out}


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "report")])
