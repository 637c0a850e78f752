"""The functions of `import dinokit`. The commands do the same work by the same code.

`model` is a backbone, or whatever load_backbone() reads: a run, a file, a folder; or the name of a released
model that is downloaded. A path is loaded to a GPU if there is one; a backbone stays on its device.
`images` are what dinokit.data.sources.memory.as_source() takes: the path of a file, folder or shards, a
Pillow image, an array, a tensor, a list of these, a Dataset of torch, or a section of a recipe.

b  images     C  channels     D  width     N  patches     h, w  sides in pixels
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinokit import evaluation, results
from dinokit.commands import Command
from dinokit.commands import train as train_command
from dinokit.commands.export import Config as ExportConfig
from dinokit.commands.export import export as export_backbone
from dinokit.config import registry
from dinokit.config.load import checked_values, section_values
from dinokit.config.values import source_of
from dinokit.curate.image_sets import ImageSearch
from dinokit.data.decode import SUFFIXES as IMAGE_SUFFIXES
from dinokit.data.loader import image_loader
from dinokit.data.sampler import RangeSampler
from dinokit.data.sources import ImageSource, sizes_hash
from dinokit.data.sources.memory import as_source
from dinokit.data.transforms import Preprocessing
from dinokit.features import Extraction, ExtractSpec, Store, device_of, frozen, normalised, open_store
from dinokit.features.extract_store import forward_blocks, select_blocks, select_fit, token_rows
from dinokit.hub import RELEASED
from dinokit.hub.entry import fetch, released_backbone
from dinokit.models import Backbone
from dinokit.models import build as build_backbone
from dinokit.prediction import Prediction
from dinokit.prediction import predict as predict_labels
from dinokit.runtime.device import DTYPES, pick_device, pick_precision
from dinokit.runtime.distributed import cache_folder, gather_objects
from dinokit.runtime.launch import folder_lock
from dinokit.runtime.signals import Stopped
from dinokit.weights import load_backbone

Model = Backbone | str | Path
Fit = Literal["crop", "pad", "resize"]
AutoPrecision = Literal["auto", "fp32", "bf16", "fp16"]


def list_models(pattern: str = "*") -> list[str]:
    """The names that create_model() takes: released models, then kinds of backbones to train.

    Args:
        pattern: such as 'dinov2*'.
    """
    return [name for name in (*RELEASED, *registry.names("models")) if fnmatch(name, pattern)]


def create_model(name: str, pretrained: bool = False, **settings: Any) -> Backbone:
    """A backbone on the CPU, in eval mode.

    Args:
        name: one of list_models().
        pretrained: the released weights, downloaded once into the cache of torch.hub.
        settings: keys of the backbone's section of a recipe, such as width=192; for a released model the
            official ones, such as img_size=224.

    Raises:
        LookupError: if there is no such model.
        ValueError, TypeError: for wrong settings, or if `pretrained` is asked of one without weights.
    """
    if name in RELEASED:
        return released_backbone(RELEASED[name], pretrained, None, settings).eval()
    if name not in registry.names("models") and "." not in name:
        near = registry.suggest(name, list_models())
        raise LookupError(f"There is no model '{name}'.{near} There is: {', '.join(list_models())}.")
    if pretrained:
        raise ValueError(f"'{name}' has no released weights; released are {', '.join(RELEASED)}.")
    return build_backbone({"name": name, **section_values("models", name, settings, "")}).eval()


def transform(model: Model, size: int = 0, fit: Fit = "crop", resize: int = 0) -> Preprocessing:
    """The preprocessing of a backbone's images, as encode() and the commands use it.

    Args:
        model: see above.
        size: pixels of the crop, or of the longer side; 0: as trained, or as the image is.
        fit: crop (the centre), pad or resize (the whole image): dinokit.data.transforms.FitTransform.
        resize: pixels of the shorter side before a crop; 0: 256 / 224 of `size`.
    """
    backbone = _backbone(model)
    spec = ExtractSpec(fit=fit, size=size, resize=resize)
    return Preprocessing(
        select_fit(spec, backbone), backbone.channels, backbone.input.mean, backbone.input.std
    )


def encode(
    model: Model, images: Any, tokens: str | Sequence[str] = "cls", layers: str | Sequence[int] = "last",
    fit: Fit = "crop", size: int = 0, batch: int = 64, workers: int = 0, precision: AutoPrecision = "auto",
) -> Any:  # fmt: skip
    """Features of images, in memory and in their order.

    Args:
        model: see above.
        images: see above; of one image b is 1.
        tokens: cls, mean (of the patches), patch or registers; or several.
        layers: 'last', 'last4', or numbers of blocks from 0: more than one adds an axis before D.
        fit: as for transform().
        size: as for transform().
        batch: images at a time.
        workers: processes that load images; -1: one a core but one.
        precision: of the backbone: fp32, bf16, fp16, or auto, as in training.

    Returns:
        (b, D) float32 on the CPU; (b, N, D) for patch and registers; by name if `tokens` is a list.

    Raises:
        ValueError: if an image cannot be read, or the grids of patches differ: extract() does both.
    """
    backbone = _backbone(model)
    source = as_source(images, backbone.channels)
    names = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    spec = ExtractSpec(names, layers, fit, size)
    blocks, cut = select_blocks(layers, backbone), select_fit(spec, backbone)
    device, dtype = device_of(backbone), DTYPES[pick_precision(precision, device_of(backbone))]
    loader = image_loader(source, cut, RangeSampler([range(len(source))], batch), workers)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with frozen(backbone), torch.inference_mode():
        for loaded in loader:
            if loaded.errors:
                raise ValueError(f"{loaded.errors[0]} (dinokit.extract() goes on without such images)")
            rows: dict[str, list[Any]] = {name: [None] * len(loaded.labels) for name in names}
            for pixels, places in loaded.groups:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    x = normalised(backbone, pixels.to(device))
                    layer_tokens = forward_blocks(backbone, [x], blocks)[0]
                for name in names:
                    values = token_rows(name, layer_tokens).float().cpu()
                    for place, row in zip(places.tolist(), values, strict=True):
                        rows[name][place] = row
            for name in names:
                found[name] += rows[name]
    stacked = {name: _stack(each, name) for name, each in found.items()}
    return stacked[tokens] if isinstance(tokens, str) else stacked


def _stack(rows: list[Tensor], name: str) -> Tensor:
    if len({row.shape for row in rows}) > 1:
        raise ValueError(
            f"The images have {name} tokens of different numbers with this fit: give one image at a time, "
            f"fit='crop', or use dinokit.extract()."
        )
    return torch.stack(rows).clone() if rows else torch.empty(0)


def extract(
    model: Model, images: Any, out: str | Path, tokens: str | Sequence[str] = "cls",
    layers: str | Sequence[int] = "last", fit: Fit = "crop", size: int = 0,
    dtype: Literal["float16", "float32"] = "float16", batch: int = 64, workers: int = -1,
    precision: AutoPrecision = "auto",
) -> Store:  # fmt: skip
    """Write the features of images into the folder `out`, as `dinokit extract`, or resume it. Returns it.

    Unreadable images get rows of NaN. Arguments as of encode(); dtype is that of the numbers on disk.

    Raises:
        ValueError: if the folder has features of other images, weights or settings.
    """
    backbone = _backbone(model)
    source = as_source(images, backbone.channels)
    names = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    about: dict[str, Any] = {"weights": "" if isinstance(model, Backbone) else str(model)}
    about |= {"data": _section(images), "precision": precision, "sizes": sizes_hash(source)}
    with folder_lock(Path(out), ""):
        spec = ExtractSpec(names, layers, fit, size, dtype=dtype)
        work = Extraction(Path(out), backbone, source, spec, about)
        work.run(batch, workers, DTYPES[pick_precision(precision, device_of(backbone))])
    return open_store(out)


def train(
    data: Any = None, recipe: str | Path = "", settings: Mapping[str, Any] | None = None, *,
    out: str | Path = "", minutes: float = 0.0,
    callbacks: Sequence[Callable[[int, Mapping[str, float], Backbone], object]] = (),
) -> Path:  # fmt: skip
    """Train a backbone, as `dinokit train`; the same call resumes. Returns the folder of the run.

    Args:
        data: images, see above; None: those of the recipe.
        recipe: a name or a file; empty: one is chosen for the images and this machine.
        settings: of the recipe, by dotted keys: {"optim.steps": 500}.
        out: the folder of the run, run.out.
        minutes: of training, where the recipe is chosen.
        callbacks: functions that get the steps done, values by name (losses when they are logged, scores as
            'knn/top1@20'), and the teacher. The run stops if one returns True, and the same call resumes it.
            Of several processes each calls them, with equal losses and scores; True in one stops all.

    Raises:
        ValueError, LookupError: for wrong settings or images.
        KeyboardInterrupt: after Ctrl-C, when all is saved.
    """
    if callable(callbacks):
        raise ValueError("callbacks is one function: give a list of them, as callbacks=[FUNCTION].")
    words, given = [str(recipe)] if recipe else [], None
    values = dict(settings or {})
    if data is not None and (section := _section(data)) is not None:
        values |= {f"data.{key}": value for key, value in section.items() if key != "name" or recipe}
        if "name" in section and not recipe and section["name"] != "folder":
            values["data.name"] = section["name"]
    elif data is not None:
        channels = int(values.get("backbone.channels", 3))
        given = as_source(data, channels)
        values |= {"data.name": "memory", "data.about": f"{len(given)} images: {given.name(0)} ..."}
        if not hasattr(given, "stored"):  # no files that could be decoded at a smaller size
            values.setdefault("crops.decode", "whole")
    values |= {"run.out": str(out)} if out else {}
    values |= {"minutes": minutes} if minutes else {}
    stopped_at: list[int] = []  # by a callback

    def watched(step: int, numbers: Mapping[str, float], backbone: Backbone) -> bool:
        answers = [callback(step, numbers, backbone) for callback in callbacks]  # all are called
        if any(gather_objects(any(answer is True for answer in answers))):  # in any process
            stopped_at.append(step)
        return bool(stopped_at)

    texts = [f"{key}={_text(value)}" for key, value in _flat(values)]
    checked, seconds = train_command.recipe_and_speed(Command(words, texts), given)
    try:
        train_command.pretrain(checked, given, [watched] if callbacks else [], seconds)
    except Stopped:
        if not stopped_at:
            raise
        return Path(checked.run.out)
    train_command.write_report(checked)
    return Path(checked.run.out)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """As YAML reads it; texts are quoted only where they must be, for others read them as they are."""
    plain = isinstance(value, str) and not re.search(r"^[\[{&*!|>%@`\"'#,?-]|: | #|:$", value)
    return str(value) if plain else json.dumps(value, default=str)


def evaluate(
    model: Model, evaluator: str = "knn", *, train: Any = None, test: Any = None,
    out: str | Path | None = None, **settings: Any,
) -> dict[str, float]:  # fmt: skip
    """Scores of frozen features, as `dinokit eval`.

    Args:
        model: see above.
        evaluator: a name of `dinokit.eval`, or a module of another package.
        train: labelled images; a folder has one sub-folder a class. None: those of the run that made the
            weights, which is then given by its path.
        test: likewise.
        out: a folder for results.jsonl and heads; None writes nothing but the cache of features.
        settings: keys of the evaluator, such as k=[20].

    Raises:
        ValueError, LookupError: if the data or settings do not fit; the message names the key.
    """
    path = None if isinstance(model, Backbone) else str(model)
    backbone = _backbone(model)
    sources = {key: each for key, each in (("train", train), ("test", test)) if each is not None}
    plain = {key: _section(each, labels=True) for key, each in sources.items()}
    known = {f.name for f in fields(registry.read_config("eval", evaluator))}
    if out is not None and "out" in known:
        settings.setdefault("out", str(Path(out) / evaluator))
    given = {key: section for key, section in plain.items() if section is not None}
    values = section_values("eval", evaluator, {**settings, **given}, "")
    for key, section in plain.items():
        if section is None:  # in memory
            source = as_source(sources[key], backbone.channels)
            values[key] = {"name": "memory", "images": source, "channels": backbone.channels}
    missing = [key for key in evaluation.source_fields(evaluator) if values[key] is None]
    data = evaluation.training_data(path) if path and missing else None
    values = evaluation.with_data(evaluator, values, data)
    if "cache" in known and "cache" not in settings and None not in plain.values():
        values["cache"] = str(cache_folder())
    scores = evaluation.run_evaluator(evaluator, values, backbone)
    if out is not None:
        values |= {key: {"name": "memory"} for key, section in plain.items() if section is None}
        about = evaluation.describe_evaluated(path, backbone)
        about["transform"] = evaluation.transform_of(values, backbone)
        results.append(out, results.record(evaluator, path or "in memory", scores, values, about))
    return scores


def predict(model: Model, images: Any, *, head: str | Path = "", labelled: Any = None, k: int = 20,
            batch: int = 64, workers: int = 0) -> list[Prediction]:  # fmt: skip
    """Labels of images, as `dinokit predict`: by a saved head, or by the votes of labelled images.

    Args:
        model: see above.
        images: see above.
        head: a file that `dinokit eval linear` or `logreg` saved.
        labelled: in place of a head: images with labels; a folder has one sub-folder a class.
        k: neighbours that vote.
        batch: images at a time.
        workers: processes that load images.

    Returns:
        For each image its name, label and probability; a label of "" for one that cannot be read.

    Raises:
        ValueError, LookupError: if the head is of other weights, or neither or both are given.
    """
    backbone = _backbone(model)
    bank = None if labelled is None else _labelled(labelled, backbone)
    source = as_source(images, backbone.channels)
    return list(predict_labels(backbone, source, head, bank, k, batch, workers))


def _labelled(images: Any, backbone: Backbone) -> ImageSource:
    section = _section(images, labels=True)
    return as_source(images if section is None else section, backbone.channels)


def search(
    index: str | Path, images: Any, k: int = 12, model: Model | None = None
) -> list[list[tuple[str, float]]]:
    """The stored images most similar to each of `images`, as `dinokit search`.

    Args:
        index: a folder that extract(), `dinokit extract` or `dinokit curate` wrote.
        images: see above.
        k: images to find for each.
        model: that made the index; None: the weights that it names.

    Returns:
        For each image the names of those found, with their cosines, largest first.
    """
    opened = ImageSearch(Path(index))
    queries = opened.embed(_backbone(opened.weights if model is None else model), images)
    similarity, found = opened.search(queries, k)
    return [
        [(opened.name(n), value) for n, value in zip(numbers, values, strict=True) if n >= 0]
        for numbers, values in zip(found.tolist(), similarity.tolist(), strict=True)
    ]


def export(model: Model, to: str, out: str | Path, **settings: Any) -> list[str]:
    """Write a backbone for timm, hf, dinov2 or onnx, as `dinokit export`.

    Args:
        model: see above.
        to: the format.
        out: the file or folder to write.
        settings: more keys of the command, such as size, licence and push.

    Returns:
        Sentences: the files, the largest difference of the features, how to open them.

    Raises:
        ValueError, RuntimeError: if the format has no such backbone, or a library is missing, which is named.
    """
    given, weights = None, ""
    if isinstance(model, Backbone):
        given = model if device_of(model).type == "cpu" else deepcopy(model).cpu()
    elif Path(model).exists():
        weights = str(model)
    else:
        given = _backbone(model).cpu()
    values = {"weights": weights, "to": to, "out": str(out), **settings}
    return list(export_backbone(ExportConfig(**checked_values(ExportConfig, values)), given))


def _backbone(model: Model) -> Backbone:
    if isinstance(model, Backbone):
        return model
    if str(model) in RELEASED and not Path(model).exists():
        model = fetch(RELEASED[str(model)].url, "weights")
    return load_backbone(model).to(pick_device("auto"))


def _section(images: Any, labels: bool = False) -> dict[str, Any] | None:
    """The section of a recipe that gives these images; None for images in memory or a single file."""
    if isinstance(images, Mapping) and "name" in images:
        return dict(images)
    if not isinstance(images, str | Path) or Path(images).suffix.lower() in IMAGE_SUFFIXES:
        return None
    name = source_of(str(images))
    by_folder = {"labels": "folders"} if labels and name == "folder" else {}
    return {"name": name, "path": str(images), **by_folder}
