"""Runs `dinokit extract`: in this process, in several that it starts, or in those of a launcher."""

import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinokit.commands import parse_part
from dinokit.config import registry
from dinokit.features import Extraction, ExtractSpec, open_store
from dinokit.features.store import missing_shards, shard_range
from dinokit.features.store_writers import unreadable_names
from dinokit.runtime.device import DTYPES, pick_device, pick_precision
from dinokit.runtime.distributed import launch
from dinokit.runtime.files import write_text
from dinokit.weights import load_backbone

if TYPE_CHECKING:
    from dinokit.commands.extract import Config

OnProgress = Callable[[int, Sequence[str]], None]


def begin(config: "Config") -> tuple[int, int]:
    """Create the folder, or check that it can be resumed. Returns the numbers of images: all, and done.

    Raises:
        ValueError, LookupError: for wrong settings, or if the folder holds other features.
    """
    world = launch().world
    if config.processes > 1 and world > 1:
        raise ValueError(
            f"processes={config.processes}, but a launcher started {world} processes already: leave out one."
        )
    extraction = _make(config, torch.device("cpu"), clean=world == 1 and not config.part)
    images, size = len(extraction.source), extraction.about["shard"]
    lost = sum(len(shard_range(n, size, images)) for n in missing_shards(extraction.out, extraction.about))
    return images, images - lost


def compute(config: "Config", on_progress: OnProgress) -> None:
    """Compute all missing features, or this process's share of them."""
    ours = launch()
    if config.processes > 1:
        _run_processes(config, on_progress)
    else:
        _work(config, ours.rank, ours.world, ours.local_rank, on_progress)


def end(config: "Config") -> dict[str, Any]:
    """Write the names of unreadable images to OUT/unreadable.txt. Returns a summary of the store."""
    out = Path(config.out)
    about = json.loads((out / "store.json").read_text(encoding="utf-8"))
    if (launch().world > 1 or config.part) and missing_shards(
        out, about
    ):  # other processes are still working
        return {"complete": False}
    if config.format == "parquet":
        names = list(unreadable_names(out))
    else:
        store = open_store(out)
        names = [name for name, good in zip(store.iter_names(), store.valid, strict=True) if not good]
    write_text(out / "unreadable.txt", "".join(f"{name}\n" for name in names))
    shapes = {token: entry["shape"] for token, entry in about["tokens"].items()}
    return {"images": about["images"], "unreadable": len(names), **shapes}


def _make(config: "Config", device: torch.device, clean: bool) -> Extraction:
    backbone = load_backbone(config.weights).to(device)
    section = dict(config.data or {})
    if "channels" in section:
        section["channels"] = backbone.channels
    source = registry.build("data.sources", section)
    spec = ExtractSpec(
        tuple(config.tokens), config.layers, config.fit, config.size, config.resize, config.dtype,
        config.format, config.shard,
    )  # fmt: skip
    metadata = {"weights": config.weights, "data": section, "precision": config.precision}
    return Extraction(Path(config.out), backbone, source, spec, metadata, clean)


def _work(config: "Config", rank: int, world: int, local_rank: int, on_progress: OnProgress) -> None:
    device = pick_device(config.device)
    if device.type == "cuda" and ":" not in config.device:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    precision = DTYPES[pick_precision(config.precision, device)]
    extraction = _make(config, device, clean=False)
    number, of = parse_part(config.part)
    extraction.run(config.batch, config.workers, precision, on_progress, number + of * rank, of * world)


def _run_processes(config: "Config", on_progress: OnProgress) -> None:
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
                    raise RuntimeError(unreadable[0])
                on_progress(images, unreadable)
    finally:
        for child in links.values():
            child.terminate()
        for child in links.values():
            child.join()


def _child(config: "Config", rank: int, link: "Connection[Any, Any]") -> None:
    torch.set_num_threads(max(torch.get_num_threads() // config.processes, 1))
    try:
        _work(config, rank, config.processes, rank, lambda n, names: link.send((n, list(names))))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        with suppress(BrokenPipeError):  # the process that started this one has ended
            link.send((-1, [str(error)]))


def _process_error(code: int) -> RuntimeError:
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    return RuntimeError(
        f"One of the processes ended {how}; out of memory is the usual reason: try a smaller batch, or fewer "
        f"processes. Finished shards stay, and the same command resumes."
    )
