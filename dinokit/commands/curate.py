"""dinokit curate RECIPE pool.path=POOL out=DIR [key=value ...]: select a training set from a pool of images.

Builds a training set from a pool of images. It removes duplicates and images that show an evaluation image
(against.NAME.path), then takes the images that are similar to the seeds (seeds.NAME.path). Without seeds it
takes all that are left, or balance.images=COUNT of them, drawn evenly. DIR/manifest.csv trains with
data.name=manifest data.path=DIR/manifest.csv; DIR/report.html shows what was removed and selected. The same
command resumes after a stop. stage=NAME ends after a stage; with part=I/N this machine computes only its
share of it.

dinokit curate curate_small weights=runs/photos pool.path=POOL seeds.flowers.path=FLOWERS out=curated
dinokit curate curate_small weights=runs/photos pool.path=POOL balance.images=10_000 out=balanced
dinokit curate curate_small pool.embeddings=vectors.npy seeds.mine.embeddings=mine.npy out=curated
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from dinokit.commands import Command, config_lines, parse_part
from dinokit.config import registry
from dinokit.config.load import checked_values, merge_settings, parse_overrides, read_mapping, section_values
from dinokit.config.values import validated, with_source
from dinokit.curate.settings import OLD_STAGES, SHARED, STAGES, Config, Seeds, Share

RESUMES = True


def words() -> list[str]:
    return registry.recipe_names("curate")


def run(command: Command) -> dict[str, Any]:
    (cfg, sections, rules), until, (number, of) = check(command)
    from dinokit.curate.pipeline import curate
    from dinokit.runtime.launch import folder_lock

    with folder_lock(Path(cfg.out), f"{number}-{of}" if of > 1 else ""):
        figures = curate(cfg, sections, rules, partial(print, flush=True), until, Share(number, of))
    if until == STAGES[-1]:
        out = Path(cfg.out)
        figures = {"manifest": str(out / "manifest.csv"), "report": str(out / "report.html")}
    result = {"out": cfg.out, **figures}
    command.show(result)
    return result


def check(command: Command) -> tuple[tuple[Config, Any, dict[str, Seeds]], str, tuple[int, int]]:
    """What read_settings() returns, the last stage to run, and which part of how many."""
    path = registry.find_recipe(command.one_word("recipe", registry.recipe_names("curate")), kind="curate")
    changes = parse_overrides(command.settings)
    until = _stage(str(changes.pop("stage", STAGES[-1])))
    number, of = parse_part(str(changes.pop("part", "")))
    if of > 1 and until not in SHARED:
        raise ValueError(f"part={number}/{of} needs stage= with one of: {', '.join(SHARED)}.")
    return read_settings(merge_settings(read_mapping(path), changes)), until, (number, of)


def describe(words: list[str]) -> str:
    recipes = f"recipes: {', '.join(registry.recipe_names('curate'))}"
    seeds = "keys of seeds.NAME, besides embeddings and those of a source:"
    lines = [recipes, f"stages: {', '.join(STAGES)}", "keys:", *config_lines(Config), seeds]
    return "\n".join([*lines, *config_lines(Seeds)])


def read_settings(values: dict[str, Any]) -> tuple[Config, Any, dict[str, Seeds]]:
    """The settings; by label of a set, its source and embeddings; by name, how each set of seeds retrieves.

    Raises:
        ValueError, LookupError: for settings that cannot work; each names the key and the way out.
    """
    cfg = Config(**checked_values(Config, values))
    sections, rules = {"pool": _source_section("pool", cfg.pool)}, {}
    for name, section in cfg.seeds.items():
        label = f"seeds.{name}"
        rule: dict[str, Any] = {}
        if isinstance(section, Mapping) and section:
            rule = {f.name: section[f.name] for f in fields(Seeds) if f.name in section}
            section = {key: value for key, value in section.items() if key not in rule}
        rules[name] = Seeds(**validated(Seeds, rule, label))
        sections[label] = _source_section(label, section)
    for name, section in cfg.against.items():
        sections[f"against.{name}"] = _source_section(f"against.{name}", section)
    without = [label for label, (_, embeddings) in sections.items() if not embeddings]
    if without and not cfg.weights:
        raise ValueError(
            f"weights=FILE_OR_RUN must be given, to embed {', '.join(without)}; or give "
            f"{without[0]}.embeddings."
        )
    given = [label for label, (_, embeddings) in sections.items() if embeddings]
    if cfg.dedup.weights and given:
        raise ValueError(
            f"dedup.weights embeds all sets, but {given[0]}.embeddings are given: leave out one of them."
        )
    return cfg, sections, rules


def _source_section(label: str, section: Any) -> tuple[dict[str, Any] | None, str]:
    """The completed section of a source, or None, and the embeddings that are given, or ''."""
    values = dict(section) if isinstance(section, Mapping) else {}
    embeddings = str(values.pop("embeddings", "") or "")
    if not values:
        if embeddings:
            return None, embeddings
        raise ValueError(f"{label}.path must be given: a folder of images; or {label}.embeddings.")
    values = with_source(values)
    name = str(values.pop("name"))
    try:
        return {"name": name, **section_values("data.sources", name, values, label)}, embeddings
    except LookupError as error:
        raise LookupError(f"{label}.name: {error}") from None


def _stage(name: str) -> str:
    if name in OLD_STAGES:
        print(f"stage={name} is now called stage={OLD_STAGES[name]}.")
        name = OLD_STAGES[name]
    if name not in STAGES:
        near = registry.suggest(name, [*STAGES])
        raise ValueError(f"stage={name}: there is no such stage.{near} Stages are: {', '.join(STAGES)}.")
    return name
