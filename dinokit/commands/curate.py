"""dinokit curate RECIPE pool.path=HEAP [seeds.NAME.path=...] [against.NAME.path=...] out=DIR: a training set.

From a heap of images: copies go, images that show an evaluation set go, and what is like the seeds is taken;
without seeds, all that is left, or balance.images=COUNT of it, evenly. DIR/manifest.csv trains with
data.name=manifest data.path=DIR/manifest.csv; DIR/report.html shows what came and went. The same command goes
on where it stopped. stage=NAME ends after a stage; with part=I/N this machine does only its share of it.

dinokit curate curate_small weights=runs/photos pool.path=HEAP seeds.flowers.path=FLOWERS out=curated
dinokit curate curate_small weights=runs/photos pool.path=HEAP balance.images=10_000 out=balanced
dinokit curate curate_small pool.embeddings=vectors.npy seeds.mine.embeddings=mine.npy out=curated
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from dinokit.commands import Command, parse_part
from dinokit.config import registry
from dinokit.config.load import merged, parse_overrides, read_mapping, section_values
from dinokit.curate.seeds import Config as Seeds
from dinokit.curate.settings import SHARED, STAGES, Config

RESUMES = True


def run(command: Command) -> None:
    (cfg, sections, rules), until, (number, of) = check(command)
    from dinokit.curate.pipeline import curate
    from dinokit.curate.stages import Share, Stages

    out = Path(cfg.out)
    told = partial(print, flush=True)
    figures = curate(cfg, sections, rules, Stages(out, told, until, Share(number, of)))
    if until == STAGES[-1]:
        figures = {"manifest": str(out / "manifest.csv"), "report": str(out / "report.html")}
    print(json.dumps({"out": cfg.out, **figures}))


def check(command: Command) -> tuple[tuple[Config, Any, dict[str, Seeds]], str, tuple[int, int]]:
    """What read() gives, the last stage to do, and which part of how many."""
    path = registry.find_recipe(command.one_word("recipe", registry.recipe_names("curate")), kind="curate")
    changes = parse_overrides(command.settings)
    until = _stage(str(changes.pop("stage", STAGES[-1])))
    number, of = parse_part(str(changes.pop("part", "")))
    if of > 1 and until not in SHARED:
        raise ValueError(f"part={number}/{of} needs stage= with one of: {', '.join(SHARED)}.")
    return read(merged(read_mapping(path), changes)), until, (number, of)


def describe(words: list[str]) -> str:
    lines = [
        f"recipes: {', '.join(registry.recipe_names('curate'))}",
        f"stages: {', '.join(STAGES)}",
        "keys:",
    ]
    lines += [f"    {f.name}" for f in fields(Config)]
    lines.append(
        f"keys of seeds.NAME: {', '.join(f.name for f in fields(Seeds))}, embeddings, and a source's"
    )
    return "\n".join(lines)


def read(values: dict[str, Any]) -> tuple[Config, Any, dict[str, Seeds]]:
    """The settings, the sets by label, and how each set of seeds retrieves.

    Raises:
        ValueError, LookupError: for what cannot be; each names the key and the way out.
    """
    checked = section_values("curate", "settings", values, "")
    cfg = Config(**checked)
    own = {f.name for f in fields(Seeds)}
    sections = {"pool": _set("pool", cfg.pool)}
    rules = {}
    for name, section in cfg.seeds.items():
        section = _mapping(f"seeds.{name}", section)
        label = f"seeds.{name}"
        rules[name] = Seeds(**section_values("curate", "seeds", _among(section, own), label))
        sections[label] = _set(label, _among(section, section.keys() - own))
    for name, section in cfg.against.items():
        sections[f"against.{name}"] = _set(f"against.{name}", section)
    bare = [label for label, (_, embeddings) in sections.items() if not embeddings]
    if bare and not cfg.weights:
        raise ValueError(
            f"weights=FILE_OR_RUN must be given, to embed {', '.join(bare)}; or give {bare[0]}.embeddings."
        )
    given = [label for label, (_, embeddings) in sections.items() if embeddings]
    if cfg.dedup.weights and given:
        raise ValueError(
            f"dedup.weights embeds all sets, but {given[0]}.embeddings are given: leave out one."
        )
    return cfg, sections, rules


def _set(label: str, values: Any) -> tuple[dict[str, Any] | None, str]:
    """A source's section, completed, and the embeddings that are given."""
    values = dict(_mapping(label, values))
    embeddings = str(values.pop("embeddings", "") or "")
    if not values and embeddings:
        return None, embeddings
    name = str(values.pop("name", "folder"))
    try:
        return {"name": name, **section_values("data.sources", name, values, label)}, embeddings
    except LookupError as error:
        raise LookupError(f"{label}.name: {error}") from None


def _mapping(label: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{label}.path must be given: a folder of images; or {label}.embeddings.")
    return values


def _among(section: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key in keys}


def _stage(name: str) -> str:
    if name not in STAGES:
        have = ", ".join(STAGES)
        raise ValueError(f"stage={name}: there is no such stage.{registry.suggest(name, [*STAGES])} {have}.")
    return name
