"""dinokit extract weights=FILE_OR_RUN data.path=IMAGES out=DIR [key=value ...]: save features of images.

The same command resumes after a stop. Unreadable images are listed, and their rows are NaN. Images are read
from a folder unless data.name is given. fit=crop takes the centre of an image; fit=pad and fit=resize take
all of it, on a grid of whole patches. Python reads DIR with dinokit.features.open_store(DIR).

dinokit extract weights=runs/photos data.path=PHOTOS out=features tokens=cls,mean
dinokit extract weights=vits14.pth data.path=PHOTOS out=dense tokens=patch layers=last4 fit=resize size=518
dinokit extract weights=vits14.pth data.name=tar data.path=SHARDS out=features format=parquet processes=4
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.commands import Command, key_lines, parse_part
from dinokit.config.load import parse_overrides, section_values
from dinokit.config.registry import suggest

MULTI_PROCESS = RESUMES = True
TOKENS = ["cls", "mean", "patch", "registers"]
SHOWN = 20  # unreadable images named on the screen


@dataclass
class Config:
    weights: str = "???"  # whatever load_backbone() reads
    out: str = "???"  # the folder of the features
    data: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources"})
    tokens: tuple[str, ...] = ("cls",)  # of cls, mean (of the patches), patch, registers
    layers: Any = "last"  # last, last4 (or another number), or numbers of blocks from 0, as [2,5,8,11]
    fit: Literal["crop", "pad", "resize"] = "crop"  # how an image is shown
    size: int = 0  # pixels: of the crop (0: as trained), or of the longer side (0: as the image is)
    resize: int = 0  # pixels of the shorter side before the crop; 0: 256 / 224 of `size`
    dtype: Literal["float16", "float32"] = "float16"  # on disk
    format: Literal["npy", "parquet"] = "npy"
    shard: int = 0  # images in a shard; 0: 4,096, or fewer if they would make more than 256 MiB
    batch: int = 64  # images at a time
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the backbone; auto: as in training
    device: str = "auto"
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most
    processes: int = 1  # that share the work, each with a device of its own where there are several
    part: str = ""  # I/N, as 0/16: only every N-th shard; other jobs do the others, into the same folder

    def __post_init__(self) -> None:
        for key, least in {"size": 0, "resize": 0, "shard": 0, "batch": 1, "processes": 1}.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}, but it must be {least} or more.")
        if not self.data:
            raise ValueError("data.path must be given: a folder of images; or data.name and what it takes.")


def run(command: Command) -> None:
    config = check(command)
    from dinokit.commands import _extraction

    images, done = _extraction.begin(config)
    print(f"{images} images, {done} of them done already, out={config.out}", flush=True)
    screen = Screen(images, done)
    with screen.progress:
        _extraction.compute(config, screen)
    print(json.dumps({"out": config.out, **_extraction.end(config), **screen.speed()}))


def check(command: Command) -> Config:
    """Read and check the settings without importing torch."""
    command.no_words(" The weights are given as weights=FILE_OR_RUN.")
    values = parse_overrides(command.settings)
    if isinstance(values.get("tokens"), str):
        values["tokens"] = values["tokens"].split(",")
    if isinstance(values.get("data"), dict):
        values["data"] = {"name": "folder", **values["data"]}
    config = Config(**section_values("commands", "extract", values, ""))
    parse_part(config.part)
    for token in config.tokens:
        if token not in TOKENS:
            raise ValueError(f"tokens: no '{token}'.{suggest(token, TOKENS)} There is: {', '.join(TOKENS)}.")
    return config


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "extract")])


class Screen:
    """Shows progress, as a bar or as a line every half minute, and the first unreadable images."""

    def __init__(self, images: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.images, self.first, self.done, self.unreadable = images, done, done, 0
        self.begun = self.printed_at = time.monotonic()
        speed = TextColumn("{task.fields[speed]}")
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), speed)
        self.progress = Progress(*columns, disable=not sys.stdout.isatty())
        self.task = self.progress.add_task("", total=images, completed=done, speed="")

    def __call__(self, images: int, names: Sequence[str]) -> None:
        self.done += images
        for text in names[: max(SHOWN - self.unreadable, 0)]:
            self.progress.console.print(text, markup=False, soft_wrap=True)
        self.unreadable += len(names)
        speed = f"{self.speed()['images_per_second']:.4g} images/s"
        self.progress.update(self.task, completed=self.done, speed=speed)
        if self.progress.disable and time.monotonic() - self.printed_at > 30:
            self.printed_at = time.monotonic()
            print(f"{self.done} of {self.images} images, {speed}", flush=True)

    def speed(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.begun, 1e-9)
        return {"images_per_second": round((self.done - self.first) / seconds, 2)}
