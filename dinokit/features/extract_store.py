"""Extracts features of all images of a source into a store on disk: shard by shard, and resumes.

The content of a shard depends only on its images and the settings, and no batch has images of two shards. So
a run that was killed, or that is shared by several processes, writes the same bytes as a run that was not.

g  images of one shape     L  blocks     D  width     C  channels
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import dinokit
from dinokit.data.loader import ImageBatch, image_loader
from dinokit.data.sampler import RangeSampler
from dinokit.data.sources import ImageSource, sizes_hash
from dinokit.data.transforms import FitTransform
from dinokit.features.store import (
    FORMAT,
    RECORD,
    TOKENS,
    Store,
    missing_shards,
    open_store,
    shard_count,
    shard_range,
    shard_size,
)
from dinokit.features.store_parquet import parquet_shard
from dinokit.features.store_write import Append, npy_shard, prepare_folder
from dinokit.features.tokens import block_tokens, device_of, fingerprint, frozen, normalised
from dinokit.models import Backbone, Tokens
from dinokit.runtime.files import DiskFullError

OnProgress = Callable[[int, Sequence[str]], None]  # number of new images, and what is wrong with some of them


class SettingError(ValueError):
    """A setting that does not fit the backbone or the images."""

    exit_status = 2


@dataclass(frozen=True)
class ExtractSpec:
    """What to extract, and how to store it.

    Attributes:
        tokens: some of cls, mean (of the patches), patch, registers.
        layers: 'last', 'lastN', or the indices of blocks, from 0.
        fit: how an image is shown: crop, pad or resize (dinokit.data.transforms.FitTransform).
        size: pixels; 0: for crop the size that the backbone was trained with, else the size of the image.
        resize: pixels of the shorter side before a crop; 0: 256 / 224 of `size`.
        dtype: of the stored numbers.
        files: npy or parquet.
        shard: images in a shard; 0: 4,096, or fewer if a file would have more than 256 MiB.
    """

    tokens: tuple[str, ...] = ("cls",)
    layers: str | Sequence[int] = "last"
    fit: Literal["crop", "pad", "resize"] = "crop"
    size: int = 0
    resize: int = 0
    dtype: Literal["float16", "float32"] = "float16"
    files: Literal["npy", "parquet"] = "npy"
    shard: int = 0

    def varies(self, token: str) -> bool:
        """Whether the number of these tokens differs from image to image."""
        return token == "patch" and self.fit != "crop"


def extract_to(
    out: str | Path, backbone: Backbone, source: ImageSource, spec: ExtractSpec | None = None, **run: Any
) -> Store:
    """Write the features of all images of a source to a store, or resume an incomplete store.

    Args:
        out: the store's folder.
        backbone: on the device to compute on; it does not change.
        source: images, with or without labels; unreadable ones get rows of NaN.
        spec: what to extract.
        run: arguments of Extraction.run: batch, workers, precision, on_progress.

    Returns:
        The store, opened.

    Raises:
        ValueError: if the settings do not fit the backbone or the content of `out`, or a feature is not
            finite.
        OSError: if it cannot be written.
    """
    spec = spec or ExtractSpec()
    if spec.files != "npy":
        raise ValueError("extract_to() opens the store, and Parquet is for other readers: files=npy.")
    Extraction(Path(out), backbone, source, spec, {"sizes": sizes_hash(source)}).run(**run)
    return open_store(out)


class Extraction:
    """The extraction of one store. The constructor checks the settings; run() computes.

    Args:
        out: the store's folder.
        backbone: on the device to compute on.
        source: the images.
        spec: what to extract.
        metadata: more entries of store.json: where weights and images came from.
        clean: whether to delete temporary files of a killed process; not while other processes write.
    """

    def __init__(
        self,
        out: Path,
        backbone: Backbone,
        source: ImageSource,
        spec: ExtractSpec,
        metadata: dict[str, Any] | None = None,
        clean: bool = True,
    ) -> None:
        self.out, self.backbone, self.source, self.spec = out, backbone, source, spec
        self.blocks = select_blocks(spec.layers, backbone)
        self.fit = select_fit(spec, backbone)
        self.rows = row_shapes(spec, backbone, self.blocks, self.fit)
        self.about = self._describe(metadata or {})
        prepare_folder(out, self.about, (source.name(i) for i in range(len(source))), clean)

    def run(
        self,
        batch: int = 64,
        workers: int = 0,
        precision: torch.dtype | None = None,
        on_progress: OnProgress = lambda images, wrong: None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Compute this process's share of the missing shards.

        Args:
            batch: images at a time.
            workers: loader processes; -1: one per core but one, at most 16.
            precision: bfloat16 or float16 runs the backbone in autocast; None leaves it in float32.
            on_progress: called after every batch.
            rank: the number of this process, of `world`; each has every world-th missing shard.
            world: the number of processes.
        """
        mine = [number for number in missing_shards(self.out, self.about) if number % world == rank]
        ranges = [shard_range(n, self.about["shard"], len(self.source)) for n in mine]
        device = device_of(self.backbone)
        batches = RangeSampler(ranges, batch)
        loader = image_loader(self.source, self.fit, batches, workers, device.type == "cuda")
        with frozen(self.backbone), torch.inference_mode():
            computed = _one_ahead(self._compute(images, device, precision) for images in loader)
            for number, images in zip(mine, ranges, strict=True):
                try:
                    with self._shard(number) as append:
                        while images:
                            loaded, tokens = next(computed)
                            images = images[len(loaded.labels) :]
                            append(*self._assemble(loaded, tokens))
                            on_progress(len(loaded.labels), loaded.errors)
                except OSError as error:
                    shards = shard_count(self.about)
                    complete = shards - len(missing_shards(self.out, self.about))
                    raise _write_error(error, self.out, complete, shards) from None

    def _compute(
        self, images: ImageBatch, device: torch.device, precision: torch.dtype | None
    ) -> tuple[ImageBatch, list[dict[str, Tensor]]]:
        """For each group of images of one shape, its rows of every token, on the device."""
        crops = [normalised(self.backbone, x.to(device, non_blocking=True)) for x, _ in images.groups]
        with torch.autocast(device.type, precision, enabled=precision is not None):
            layers = forward_blocks(self.backbone, crops, self.blocks)
        dtype = getattr(torch, self.spec.dtype)
        return images, [{t: token_rows(t, group).to(dtype) for t in self.spec.tokens} for group in layers]

    def _assemble(
        self, images: ImageBatch, groups: list[dict[str, Tensor]]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        """The rows of all groups as arrays in the order of the images, their records, and their names."""
        count = len(images.labels)
        records = np.zeros(count, RECORD)
        records["label"] = images.labels.numpy()
        arrays: dict[str, np.ndarray] = {}
        patches: list[np.ndarray] = []
        for token, (row, dtype) in self.rows.items():
            if self.spec.varies(token):
                patches = [np.empty((0, *row), dtype)] * count
            else:
                arrays[token] = np.full((count, *row), np.nan, dtype)
        for (crops, places), rows in zip(images.groups, groups, strict=True):
            at = places.numpy()
            records["valid"][at] = True
            records["rows"][at] = crops.shape[2] // self.backbone.patch
            records["columns"][at] = crops.shape[3] // self.backbone.patch
            for token, tensor in rows.items():
                array = tensor.cpu().numpy()
                _check_finite(array, token)
                if self.spec.varies(token):
                    for place, of_image in zip(at.tolist(), array, strict=True):
                        patches[place] = of_image
                else:
                    arrays[token][at] = array
        if patches:
            arrays["patch"] = np.concatenate(patches)
        return arrays, records, [self.source.name(i) for i in images.indices.tolist()]

    def _shard(self, number: int) -> AbstractContextManager[Append]:
        if self.spec.files == "parquet":
            return parquet_shard(self.out, number, json.dumps(self.about))
        return npy_shard(self.out, number, self.rows)

    def _describe(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The content of store.json."""
        images, spec, trained_with = len(self.source), self.spec, self.backbone.input
        size = max(int(np.prod(row)) * dtype.itemsize for row, dtype in self.rows.values())
        if self.spec.varies("patch") and "patch" in self.rows:
            size *= (max(self.fit.size, self.backbone.input.size) // self.backbone.patch) ** 2
        return {
            "format": FORMAT,
            "files": spec.files,
            "images": images,
            "shard": spec.shard or shard_size(size),
            "tokens": {
                token: {
                    "shape": [images, None, *row] if self.spec.varies(token) else [images, *row],
                    "dtype": spec.dtype,
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
                "mean": list(trained_with.mean),
                "std": list(trained_with.std),
            },
            "classes": list(self.source.classes),
            "fingerprint": fingerprint(self.backbone),
            "dinokit": dinokit.__version__,
            **metadata,
        }


def select_blocks(layers: str | Sequence[int], backbone: Backbone) -> list[int]:
    """The indices of the blocks that 'last', 'lastN', or a list of indices means, in the order of depth.

    Raises:
        SettingError: if there are no such blocks, or the backbone gives its last block only.
    """
    depth = len(backbone.blocks)
    if isinstance(layers, str):
        count = layers.removeprefix("last") or "1"
        if not layers.startswith("last") or not count.isdecimal() or int(count) < 1:
            raise SettingError(
                f"layers={layers}: give last, last4 (or another number), or a list such as [2,5]."
            )
        blocks = list(range(depth - int(count), depth)) if count != "1" else [max(depth - 1, 0)]
    else:
        blocks = sorted(set(layers))
    if blocks and not 0 <= blocks[0] <= blocks[-1] <= max(depth - 1, 0):
        raise SettingError(f"layers={layers}: the backbone has {depth} blocks, numbered from 0.")
    if not blocks or (blocks != [max(depth - 1, 0)] and not backbone.has_layers):
        raise SettingError(f"layers={layers}: {type(backbone).__name__} gives its last block only.")
    return blocks


def select_fit(spec: ExtractSpec, backbone: Backbone) -> FitTransform:
    """The transform of images.

    Raises:
        SettingError: if a size does not fit the patch, or a token is unknown.
    """
    unknown = [token for token in spec.tokens if token not in TOKENS]
    if unknown or not spec.tokens:
        raise SettingError(f"tokens={','.join(spec.tokens)}: there is {', '.join(TOKENS)}.")
    size = spec.size or (backbone.input.size if spec.fit == "crop" else 0)
    fit = FitTransform(spec.fit, size, spec.resize or round(size * 256 / 224), backbone.patch)
    if fit.how == "crop" and (fit.size < 1 or fit.size % fit.patch):
        nearest = max(round(fit.size / fit.patch), 1) * fit.patch
        raise SettingError(
            f"size={fit.size} is not a multiple of the backbone's patch, {fit.patch} pixels; the nearest is "
            f"{nearest}. fit=pad and fit=resize take any size."
        )
    if fit.how == "crop" and fit.resize < fit.size:
        raise SettingError(
            f"resize={fit.resize} leaves no crop of size={fit.size}: it must be at least as large."
        )
    return fit


def forward_blocks(backbone: Backbone, crops: list[Tensor], blocks: list[int]) -> list[list[Tokens]]:
    """For each group of crops (g, C, h, w), the tokens after each of the blocks."""
    if not crops:
        return []
    if blocks == [max(len(backbone.blocks) - 1, 0)]:
        return [[tokens] for tokens in backbone(crops, [None] * len(crops))]
    return [block_tokens(backbone, x, blocks) for x in crops]


def token_rows(token: str, layers: list[Tokens]) -> Tensor:
    """The rows (g, ..., [L,] D) of one token from the Tokens of each block."""
    if token == "mean":
        each = [tokens.patches.float().mean(dim=1) for tokens in layers]
    else:
        name = "patches" if token == "patch" else token
        each = [getattr(tokens, name) for tokens in layers]
    return each[0] if len(each) == 1 else torch.stack(each, dim=-2)


def row_shapes(
    spec: ExtractSpec, backbone: Backbone, blocks: list[int], fit: FitTransform
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the row of an image, for each token; of one patch, if the grids differ.

    Raises:
        SettingError: if the backbone has no such tokens.
    """
    side = fit.size if fit.how == "crop" else fit.patch
    blank = torch.zeros(1, backbone.channels, side, side, device=device_of(backbone))
    with frozen(backbone), torch.inference_mode():
        tokens = forward_blocks(backbone, [blank], blocks)[0]
    shapes = {}
    for token in spec.tokens:
        row = tuple(token_rows(token, tokens).shape[1:])
        if 0 in row or (token == "mean" and not tokens[0].patches.shape[1]):
            raise SettingError(f"tokens={token}: this backbone has none.")
        shapes[token] = (row[1:] if spec.varies(token) else row, np.dtype(spec.dtype))
    return shapes


def _check_finite(array: np.ndarray, token: str) -> None:
    if not np.isfinite(array).all():
        hint = "; or float16 is too narrow: dtype=float32" if array.dtype == np.float16 else ""
        raise ValueError(f"Features ({token}) are not finite: the weights are broken{hint}.")


def _write_error(error: OSError, out: Path, complete: int, shards: int) -> OSError:
    """An error of writing, with what is saved and how to continue."""
    full = isinstance(error, DiskFullError)
    why = error.fact if isinstance(error, DiskFullError) else str(error)
    return OSError(
        f"A shard of features could not be written to {out}: {why}. {complete} of {shards} shards are "
        f"complete and stay. {'Free some space' if full else 'Correct that'}; the same command then resumes."
    )


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Each item after the next one was started: the device computes while the last results are written."""
    before = next(items, None)
    for item in items:
        yield before
        before = item
    if before is not None:
        yield before
