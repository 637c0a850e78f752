"""dinokit extract weights=FILE_OR_RUN data.path=IMAGES out=DIR [key=value ...]: save features of images.

The same command resumes after a stop. Unreadable images are listed, and their rows are NaN. Images are read
from a folder unless data.name is given. fit=crop takes the centre of an image; fit=pad and fit=resize take
all of it, on a grid of whole patches. Python reads DIR with dinokit.features.open_store(DIR).

dinokit extract weights=runs/photos data.path=PHOTOS out=features tokens=cls,mean
dinokit extract weights=vits14.pth data.path=PHOTOS out=dense tokens=patch layers=last4 fit=resize size=518
dinokit extract weights=vits14.pth data.name=tar data.path=SHARDS out=features format=parquet processes=4
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dinokit.commands import Command, FailedError, _outcome, key_lines, parse_part
from dinokit.config import registry
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.values import with_source
from dinokit.runtime.files import printable, write_text

if TYPE_CHECKING:
    import torch

    from dinokit.features import Extraction

MULTI_PROCESS = RESUMES = True
TOKENS = ["cls", "mean", "patch", "registers"]
SHOWN = 20  # unreadable images named on the screen
OnProgress = Callable[[int, Sequence[str]], None]  # number of new images, and what is wrong with some


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


def run(command: Command) -> dict[str, Any]:
    config = check(command)
    from dinokit.runtime.distributed import launch
    from dinokit.runtime.launch import folder_lock

    (number, of), ours = parse_part(config.part), launch()
    shares = of * ours.world
    with folder_lock(Path(config.out), f"{number + of * ours.rank}-{shares}" if shares > 1 else ""):
        images, done = _begin(config)
        some = f", {done} of them done already" if done else ""
        print(f"{images} images{some}, out={config.out}", flush=True)
        screen = Screen(images, done)
        with screen.progress:
            _compute(config, screen)
        result = {"out": config.out, **_end(config), **screen.speed()}
        command.show(result)
        return result


def check(command: Command) -> Config:
    """Read and check the settings without importing torch."""
    command.no_words(" Images are given as data.path=PATH, weights as weights=FILE_OR_RUN.")
    values = parse_overrides(command.settings)
    if isinstance(values.get("tokens"), str):
        values["tokens"] = values["tokens"].split(",")
    if isinstance(values.get("data"), dict):
        values["data"] = with_source(values["data"])
    config = Config(**checked_values(Config, values))
    parse_part(config.part)
    _refuse_inside(config)
    for token in config.tokens:
        if token not in TOKENS:
            raise ValueError(
                f"tokens: no '{token}'.{registry.suggest(token, TOKENS)} There is: {', '.join(TOKENS)}."
            )
    return config


def _refuse_inside(config: Config) -> None:
    """Refuse features inside the folder of the images: on resume their .npy files would be images."""
    section = config.data or {}
    if config.format != "npy" or section.get("name") != "folder" or "path" not in section:
        return
    out, images = (Path(each).expanduser().resolve() for each in (config.out, str(section["path"])))
    if out.is_relative_to(images):
        raise ValueError(
            f"out={config.out} is inside data.path={section['path']}, where .npy files are images. "
            f"Choose an out beside it."
        )


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
        from dinokit.runtime.log import short

        self.done += images
        for text in names[: max(SHOWN - self.unreadable, 0)]:
            self.progress.console.print(printable(text), markup=False, soft_wrap=True)
        self.unreadable += len(names)
        speed = f"{short(self.speed().get('images_per_second', 0.0))} images/s"
        self.progress.update(self.task, completed=self.done, speed=speed)
        if self.progress.disable and time.monotonic() - self.printed_at > 30:
            self.printed_at = time.monotonic()
            print(f"{self.done} of {self.images} images, {speed}", flush=True)

    def speed(self) -> dict[str, float]:
        """Images a second; nothing if all features were there already."""
        if self.done == self.first:
            return {}
        seconds = max(time.monotonic() - self.begun, 1e-9)
        return {"images_per_second": round((self.done - self.first) / seconds, 2)}


def _begin(config: Config) -> tuple[int, int]:
    """Create the folder, or check that it can be resumed. Returns the numbers of images: all, and done.

    Raises:
        ValueError, LookupError: for wrong settings, or if the folder holds other features.
    """
    from dinokit.features.store import missing_shards, shard_range
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.distributed import launch

    pick_device(config.device)  # one that does not exist is refused before there is a folder
    world = launch().world
    if config.processes > 1 and world > 1:
        raise ValueError(
            f"processes={config.processes}, but a launcher started {world} processes already: leave out one."
        )
    extraction = _make(config, "cpu", clean=world == 1 and not config.part, first=True)
    images, size = len(extraction.source), extraction.about["shard"]
    lost = sum(len(shard_range(n, size, images)) for n in missing_shards(extraction.out, extraction.about))
    return images, images - lost


def _compute(config: Config, on_progress: OnProgress) -> None:
    """Compute all missing features, or this process's share of them."""
    from dinokit.runtime.distributed import launch

    ours = launch()
    if config.processes > 1:
        _run_processes(config, on_progress)
    else:
        _work(config, ours.rank, ours.world, ours.local_rank, on_progress)


def _end(config: Config) -> dict[str, Any]:
    """Write the names of unreadable images to OUT/unreadable.txt. Returns a summary of the store."""
    from dinokit.features.store import missing_shards, open_store
    from dinokit.features.store_parquet import unreadable_names
    from dinokit.runtime.distributed import launch

    out = Path(config.out)
    about = json.loads((out / "store.json").read_text(encoding="utf-8"))
    if (launch().world > 1 or config.part) and missing_shards(out, about):
        return {"complete": False}  # other processes are still working
    if config.format == "parquet":
        names = list(unreadable_names(out))
    else:
        store = open_store(out)
        names = [name for name, good in zip(store.iter_names(), store.valid, strict=True) if not good]
    write_text(out / "unreadable.txt", "".join(f"{printable(name)}\n" for name in names))
    shapes = {token: entry["shape"] for token, entry in about["tokens"].items()}
    return {"images": about["images"], "unreadable": len(names), **shapes}


def _make(config: Config, device: "str | torch.device", clean: bool, first: bool = False) -> "Extraction":
    from dinokit.data.sources import sizes_hash
    from dinokit.features import Extraction, ExtractSpec
    from dinokit.weights import load_backbone

    backbone = load_backbone(config.weights).to(device)
    section = dict(config.data or {})
    if "channels" in section:
        section["channels"] = backbone.channels
    source = registry.build("data.sources", section)
    spec = ExtractSpec(
        tuple(config.tokens), config.layers, config.fit, config.size, config.resize, config.dtype,
        config.format, config.shard,
    )  # fmt: skip
    metadata: dict[str, Any] = {"weights": config.weights, "data": section, "precision": config.precision}
    if first:  # once in a command: it asks the file system for every file
        metadata["sizes"] = sizes_hash(source)
    return Extraction(Path(config.out), backbone, source, spec, metadata, clean)


def _work(config: Config, rank: int, world: int, local_rank: int, on_progress: OnProgress) -> None:
    import torch

    from dinokit.runtime.device import DTYPES, pick_device, pick_precision

    device = pick_device(config.device)
    if device.type == "cuda" and ":" not in config.device:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    precision = DTYPES[pick_precision(config.precision, device)]
    extraction = _make(config, device, clean=False)
    number, of = parse_part(config.part)
    extraction.run(config.batch, config.workers, precision, on_progress, number + of * rank, of * world)


def _run_processes(config: Config, on_progress: OnProgress) -> None:
    """Start the processes and report their progress.

    Raises:
        RuntimeError: if one fails; the others are ended. Finished shards stay.
    """
    context = multiprocessing.get_context("spawn")
    links: dict[Any, Any] = {}
    try:
        for rank in range(config.processes):
            ours, theirs = context.Pipe(duplex=False)
            links[ours] = context.Process(target=_child, args=(config, rank, theirs))
            links[ours].start()
            theirs.close()
        while links:
            ready: list[Any] = list(wait(list(links)))
            for link in ready:
                try:
                    images, unreadable = link.recv()
                except EOFError:
                    child = links.pop(link)
                    child.join()
                    if child.exitcode:
                        raise _process_error(child.exitcode) from None
                    continue
                if images < 0:
                    raise FailedError(unreadable[0], -images)
                on_progress(images, unreadable)
    finally:
        for child in links.values():
            child.terminate()
        for child in links.values():
            child.join()


def _child(config: Config, rank: int, link: "Connection[Any, Any]") -> None:
    import torch

    torch.set_num_threads(max(torch.get_num_threads() // config.processes, 1))
    try:
        _work(config, rank, config.processes, rank, lambda n, names: link.send((n, list(names))))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        with suppress(BrokenPipeError):  # the process that started this one has ended
            link.send((-_outcome.exit_status(error), [str(error)]))


def _process_error(code: int) -> RuntimeError:
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    return RuntimeError(
        f"One of the processes ended {how}; out of memory is the usual reason: try a smaller batch, or fewer "
        f"processes. Finished shards stay, and the same command resumes."
    )
