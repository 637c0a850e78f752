"""dinokit predict weights=FILE_OR_RUN head=FOLDER [IMAGE_OR_FOLDER ...] [key=value ...]: label images.

head is what `dinokit eval linear` or `dinokit eval logreg` saved in the run's folder, or in its out=FOLDER.
labelled.path=FOLDER in its place, one sub-folder a class, lets the k nearest labelled images vote. Images are
files and folders, or data.path, data.name and what that takes. The columns are file, label and probability;
an image that cannot be read has neither of the last two. Without out=FILE.csv the table is printed, and with
--json it is the list "labels" of the object.

dinokit predict weights=runs/photos head=runs/photos/linear NEW out=labels.csv
dinokit predict weights=runs/photos labelled.path=LABELLED k=10 a.jpg b.jpg
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from dinokit.commands import Command, image_files, key_lines
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least
from dinokit.config.values import with_source
from dinokit.runtime.files import atomic, check_target, file_cell, printable, text_cell

if TYPE_CHECKING:
    from dinokit.prediction import Prediction


@dataclass
class Config:
    weights: str = "???"  # whatever load_backbone() reads
    head: str = ""  # a classifier that eval linear or eval logreg saved, or its folder
    labelled: dict[str, Any] | None = field(
        default=None, metadata={"registry": "data.sources", "split": "train"}
    )
    data: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources"})
    out: str = ""  # the CSV; empty: printed
    k: int = 20  # labelled images that vote
    batch: int = 64  # images at a time
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most

    def __post_init__(self) -> None:
        check_at_least(self, k=1, batch=1)
        if bool(self.head) == bool(self.labelled):
            raise ValueError(
                "Give either head=FILE_OR_FOLDER, which dinokit eval linear or logreg saves, or "
                "labelled.path=FOLDER with one sub-folder a class."
            )


def run(command: Command) -> dict[str, Any]:
    values = parse_overrides(command.settings)
    if isinstance(values.get("data"), dict):
        values["data"] = with_source(values["data"])
    cfg = Config(**checked_values(Config, values))
    if bool(command.words) == bool(cfg.data):
        raise ValueError("Which images? Give files or folders, or data.path, and not both.")
    if cfg.out:
        check_target(cfg.out)
    from dinokit.data.sources.memory import as_source
    from dinokit.prediction import predict
    from dinokit.runtime.device import pick_device
    from dinokit.weights import load_backbone

    backbone = load_backbone(cfg.weights).to(pick_device(cfg.device))
    labelled = as_source(cfg.labelled, backbone.channels) if cfg.labelled else None
    source = as_source(cfg.data or image_files(command.words), backbone.channels)
    rows = list(predict(backbone, source, cfg.head, labelled, cfg.k, cfg.batch, cfg.workers, cfg.precision))
    if cfg.out:
        with (
            atomic(Path(cfg.out)) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            _write(rows, file)
    else:
        _write(
            [row._replace(file=printable(row.file), label=printable(row.label)) for row in rows], sys.stdout
        )
    unreadable = sum(not row.label for row in rows)
    some = f", {unreadable} of them cannot be read" if unreadable else ""
    where = f": {cfg.out}" if cfg.out else ""
    print(f"{len(rows)} images{some}{where}", file=sys.stderr)
    result: dict[str, Any] = {"images": len(rows), "unreadable": unreadable, "out": cfg.out}
    if not cfg.out:
        result["labels"] = [
            {
                "file": row.file,
                "label": row.label or None,
                "probability": round(row.probability, 6) if row.label else None,
            }
            for row in rows
        ]
    return result


def _write(rows: "Sequence[Prediction]", file: IO[str]) -> None:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["file", "label", "probability"])
    for row in rows:
        table.writerow(
            [file_cell(row.file), text_cell(row.label), f"{row.probability:.4f}" if row.label else ""]
        )


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "predict")])
