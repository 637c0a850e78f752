"""Features of all images of a source, to disk: shard by shard, in its order, resumed where it stopped.

What a shard holds depends on its images and on the settings alone, and no batch reaches over two shards: so a
run that was killed, or shared out over processes, leaves the same bytes as one that was not.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dinokit
from dinokit.data.loader import ImageBatch, image_loader
from dinokit.data.sampler import RangeSampler
from dinokit.data.sources import ImageSource
from dinokit.features.fingerprint import fingerprint
from dinokit.features.folder import begin
from dinokit.features.layout import FORMAT, RECORD, shard_range, shard_size
from dinokit.features.parquet import ParquetShard
from dinokit.features.shards import NpyShard, in_words
from dinokit.features.spec import ExtractSpec, blocks_of, fit_of, layers_of, row_of, rows_of
from dinokit.features.store import Store, missing, open_store
from dinokit.features.tokens import device_of, frozen, normalised
from dinokit.models import Backbone

Told = Callable[[int, Sequence[str]], None]  # how many more images are done, and what is wrong with some


def extract_to(
    out: str | Path, backbone: Backbone, source: ImageSource, wanted: ExtractSpec | None = None, **how: Any
) -> Store:
    """Write the features of all images of a source, or go on with a store that was begun.

    Args:
        out: the store's folder.
        backbone: on the device to compute on; left as it is.
        source: images, with or without labels; unreadable ones get rows of NaN.
        wanted: what to compute.
        how: as of Extraction.run: batch, workers, precision, told.

    Returns:
        The store, opened.

    Raises:
        ValueError: if the settings do not fit the backbone or what is in `out`, or a feature is not finite.
        OSError: if it cannot be written.
    """
    wanted = wanted or ExtractSpec()
    if wanted.files != "npy":
        raise ValueError("extract_to() opens what it wrote, and Parquet is for others to read: files=npy.")
    extraction = Extraction(Path(out), backbone, source, wanted)
    extraction.run(**how)
    return open_store(out)


class Extraction:
    """One store in the making. Making it looks at the settings; run() computes.

    Args:
        out: the store's folder.
        backbone: on the device to compute on.
        source: the images.
        wanted: what to compute.
        told: what else store.json shall say: where weights and images came from.
    """

    def __init__(
        self,
        out: Path,
        backbone: Backbone,
        source: ImageSource,
        wanted: ExtractSpec,
        told: dict[str, Any] | None = None,
        clean: bool = True,
    ) -> None:
        self.out, self.backbone, self.source, self.wanted = out, backbone, source, wanted
        self.blocks = blocks_of(wanted.layers, backbone)
        self.fit = fit_of(wanted, backbone)
        self.rows = rows_of(wanted, backbone, self.blocks, self.fit)
        self.about = self._about(told or {})
        begin(out, self.about, (source.name(i) for i in range(len(source))), clean)

    def run(
        self,
        batch: int = 64,
        workers: int = 0,
        precision: torch.dtype | None = None,
        told: Told = lambda images, wrong: None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Compute this process's part of the shards that are missing.

        Args:
            batch: images at a time.
            workers: processes that load images; -1: one a core but one, 16 at most.
            precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.
            told: called after every batch.
            rank: the number of this process, of `world`; each has every world-th missing shard.
            world: the number of processes.
        """
        shards = -(-len(self.source) // self.about["shard"])
        mine = [number for number in missing(self.out, self.about) if number % world == rank]
        ranges = [shard_range(n, self.about["shard"], len(self.source)) for n in mine]
        device = device_of(self.backbone)
        batches = RangeSampler(ranges, batch)
        loader = image_loader(self.source, self.fit, batches, workers, device.type == "cuda")
        with frozen(self.backbone), torch.inference_mode():
            computed = _ahead(self._compute(part, device, precision) for part in loader)
            for number, images in zip(mine, ranges, strict=True):
                try:
                    with self._shard(number) as shard:
                        while images:
                            part, tokens = next(computed)
                            images = images[len(part.labels) :]
                            shard.append(*self._assemble(part, tokens))
                            told(len(part.labels), part.errors)
                except OSError as error:
                    lost = len(missing(self.out, self.about))
                    raise in_words(error, self.out, shards - lost, shards) from None

    def _compute(
        self, part: ImageBatch, device: torch.device, precision: torch.dtype | None
    ) -> tuple[ImageBatch, list[dict[str, Tensor]]]:
        """For each group of images of one shape, its rows of every token, on the device."""
        crops = [normalised(self.backbone, x.to(device, non_blocking=True)) for x, _ in part.groups]
        with torch.autocast(device.type, precision, enabled=precision is not None):
            layers = layers_of(self.backbone, crops, self.blocks)
        dtype = getattr(torch, self.wanted.dtype)
        return part, [{t: row_of(t, group).to(dtype) for t in self.wanted.tokens} for group in layers]

    def _assemble(
        self, part: ImageBatch, groups: list[dict[str, Tensor]]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        """The groups' rows as arrays in the order of the images, their records, and their names."""
        count = len(part.labels)
        records = np.zeros(count, RECORD)
        records["label"] = part.labels.numpy()
        arrays: dict[str, np.ndarray] = {}
        loose: list[np.ndarray] = []
        for token, (row, dtype) in self.rows.items():
            if self.wanted.differ(token):
                loose = [np.empty((0, *row), dtype)] * count
            else:
                arrays[token] = np.full((count, *row), np.nan, dtype)
        for (crops, places), rows in zip(part.groups, groups, strict=True):
            at = places.numpy()
            records["valid"][at] = True
            records["rows"][at] = crops.shape[2] // self.backbone.patch
            records["columns"][at] = crops.shape[3] // self.backbone.patch
            for token, tensor in rows.items():
                array = tensor.cpu().numpy()
                self._check_finite(array, token)
                if self.wanted.differ(token):
                    for place, patches in zip(at.tolist(), array, strict=True):
                        loose[place] = patches
                else:
                    arrays[token][at] = array
        if loose:
            arrays["patch"] = np.concatenate(loose)
        return arrays, records, [self.source.name(i) for i in part.indices.tolist()]

    def _shard(self, number: int) -> NpyShard | ParquetShard:
        if self.wanted.files == "parquet":
            return ParquetShard(self.out, number, json.dumps(self.about))
        return NpyShard(self.out, number, self.rows)

    def _about(self, told: dict[str, Any]) -> dict[str, Any]:
        images, wanted = len(self.source), self.wanted
        size = max(int(np.prod(row)) * dtype.itemsize for row, dtype in self.rows.values())
        if self.wanted.differ("patch") and "patch" in self.rows:
            size *= (max(self.fit.size, self.backbone.input.size) // self.backbone.patch) ** 2
        shown = self.backbone.input
        return {
            "format": FORMAT,
            "files": wanted.files,
            "images": images,
            "shard": wanted.shard or shard_size(size),
            "tokens": {
                token: {
                    "shape": [images, None, *row] if self.wanted.differ(token) else [images, *row],
                    "dtype": wanted.dtype,
                }
                for token, (row, _) in self.rows.items()
            },
            "layers": self.blocks,
            "width": self.backbone.width,
            "patch": self.backbone.patch,
            "transform": {
                "fit": self.fit.how,
                "size": self.fit.size,
                "resize": self.fit.resize if self.fit.how == "crop" else None,
                "interpolation": "bicubic, antialiased",
                "mean": list(shown.mean),
                "std": list(shown.std),
            },
            "classes": list(self.source.classes),
            "fingerprint": fingerprint(self.backbone),
            "dinokit": dinokit.__version__,
            **told,
        }

    def _check_finite(self, array: np.ndarray, token: str) -> None:
        if not np.isfinite(array).all():
            hint = "; or float16 is too narrow: dtype=float32" if array.dtype == np.float16 else ""
            raise ValueError(f"Features ({token}) are not finite: the weights are broken{hint}.")


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Each item once the next one is begun: the device computes while the last results are written."""
    before = next(items, None)
    for item in items:
        yield before
        before = item
    if before is not None:
        yield before
