"""dinokit bench step|data|attention|eval [RECIPE] [key=value ...]: measure speed and memory on this machine.

The rate of matrix products, measured in the same run, is printed beside the results. RECIPE is small_photos
unless you give one. batch=N is short for optim.batch=N (default 8; for data 32). rounds=N is the number of
measurements (default 5), of which the median is printed. With input=data, step and data read the data of the
recipe; with input=synthetic (default) they need none.

dinokit bench step heads.cls.prototypes=65536 batch=8 --against plain
dinokit bench data
dinokit bench data input=data data.path=PHOTOS
dinokit bench attention dinov2_vitl16_short batch=2
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command
from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe

if TYPE_CHECKING:
    from dinokit.bench.step import StepReport

FLAGS = {
    "--json": "print only one line of JSON",
    "--against=": "plain: run the step with every switch at its plainest in turn, and print the ratio",
}
KINDS = "step", "data", "attention", "eval"
READING = "step", "data"  # of these, those that images are read for
INPUTS = "synthetic", "data"
FIRST = "device", "precision", "threads", "matmul_fp32", "matmul_bf16"  # what the first line says


def run(command: Command) -> None:
    kind, recipe, rounds, real = _read_settings(command)
    against = command.flags.get("--against")
    if against not in (None, "plain") or (against and kind != "step"):
        raise ValueError("--against takes `plain`, and only with `dinokit bench step`.")
    about = {"bench": kind, "recipe": recipe.name, "batch": recipe.optim.batch, "rounds": rounds}
    if kind == "step":
        _step(about, recipe, real, bool(against), "--json" in command.flags)
        return
    if kind == "data":
        from dinokit.bench.data import bench_data

        results = bench_data(recipe, rounds, real)
    elif kind == "attention":
        from dinokit.bench.step import bench_attention

        results = bench_attention(recipe, rounds)
    else:
        from dinokit.bench.step import bench_eval

        results = bench_eval(recipe, rounds)
    if "--json" in command.flags:
        print(json.dumps({**about, **results}))
        return
    rest = {key: value for key, value in results.items() if key not in FIRST}
    print("\n".join([_first_line({**about, **results}), *_lines(rest)]))


def _read_settings(command: Command) -> tuple[str, Recipe, int, bool]:
    words = list(command.words)
    if not words or words[0] not in KINDS:
        near = registry.suggest(words[0], list(KINDS)) if words else ""
        raise ValueError(f"What should be measured?{near} There is: {', '.join(KINDS)}.")
    if len(words) > 2:
        raise ValueError(f"'{words[2]}' is not of the form key=value.")
    own = {"recipe": "", "batch": "32" if words[0] == "data" else "8", "rounds": "5", "input": INPUTS[0]}
    settings = []
    for setting in command.settings:
        key, _, value = setting.partition("=")
        if key in own:
            own[key] = value
        else:
            settings.append(setting)
    _refuse_keys(settings, list(own))
    if len(words) == 2 and own["recipe"]:
        raise ValueError(f"Two recipes are given, {words[1]} and recipe={own['recipe']}. Leave one out.")
    for key in ("batch", "rounds"):
        if not own[key].isdecimal() or not int(own[key]):
            raise ValueError(f"{key}={own[key]}: it must be a whole number, 1 or more.")
    real = _reads(words[0], own["input"], settings)
    if not real:
        settings.append("data={name: scenes}")
    name = own["recipe"] or (words[1:] or ["small_photos"])[0]
    recipe = load_recipe(name, [*settings, f"optim.batch={own['batch']}"])
    return words[0], recipe, int(own["rounds"]), real


def _refuse_keys(settings: Sequence[str], own: list[str]) -> None:
    """Refuse those that neither bench nor a recipe has; what is inside a recipe's section, load_recipe()."""
    sections = [item.name for item in fields(Recipe)]
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "optim.batch":
            raise ValueError(f"{setting}: bench takes the number of images as batch={value}.")
        top = key.partition(".")[0]
        if top not in sections:
            raise ValueError(
                f"{setting}: there is no key '{top}'.{registry.suggest(top, [*own, *sections])} There is: "
                f"{', '.join(own)}; and of the recipe: {', '.join(sections)}."
            )


def _reads(kind: str, asked: str, settings: Sequence[str]) -> bool:
    """Whether the recipe's data is to be read."""
    if asked not in INPUTS:
        raise ValueError(
            f"input={asked}: there is no such input.{registry.suggest(asked, list(INPUTS))} "
            f"There is: {', '.join(INPUTS)}."
        )
    about_data = [setting for setting in settings if setting.startswith(("data.", "data="))]
    unread = ["input=data"] if asked == "data" else about_data
    if unread and kind not in READING:
        raise ValueError(
            f"{unread[0]}: bench {kind} reads no images, for its time does not depend on what they show. "
            f"Leave it out; images are read by: {', '.join(f'bench {each}' for each in READING)}."
        )
    if asked != "data" and about_data:
        raise ValueError(
            f"{about_data[0]}: bench {kind} reads the recipe's data with input=data only; add it."
        )
    return asked == "data"


def _step(about: dict[str, Any], recipe: Recipe, real: bool, against: bool, as_json: bool) -> None:
    from dinokit.bench import measured_on, settled
    from dinokit.bench.step import bench_steps, plain

    recipe = settled(recipe)  # here, for both forms: each process might find another precision the faster one
    about = {**about, **measured_on(recipe.run.device, recipe.run.precision)}
    forms = {"as given": recipe, **({"plain": plain(recipe)} if against else {})}
    reports = dict(zip(forms, bench_steps(list(forms.values()), about["rounds"], real), strict=True))
    ratio = _ratio(reports) if against else {}
    results = {name: asdict(report) for name, report in reports.items()}
    if as_json:
        print(json.dumps({**about, **ratio, **results}))
        return
    print(_first_line({**about, **results["as given"]}))
    for name, report in reports.items():
        phases = ", ".join(f"{phase} {ms:.0f}" for phase, ms in report.milliseconds.items())
        print(
            f"{name}: {report.images_per_second:.2f} images/s, {report.peak_gib:.2f} GiB at the peak "
            f"({report.idle_gib:.2f} without any network), "
            f"{100 * report.share_of_matmul:.0f} % of the matmul rate\n    ms: {phases}"
        )
    for what, value in ratio.items():
        print(f"{what.replace('_', ' ')}: {value:.2f}")


def _ratio(reports: "dict[str, StepReport]") -> dict[str, float]:
    from statistics import median

    ours, theirs = reports.values()
    pairs = zip(ours.seconds, theirs.seconds, strict=True)
    return {
        "speed_against_plain": median(slow / fast for fast, slow in pairs),
        "memory_against_plain": ours.peak_gib / theirs.peak_gib,
    }


def _first_line(about: dict[str, Any]) -> str:
    threads, rounds = (_count(about[what], what) for what in ("threads", "rounds"))
    return (
        f"{about['recipe']}, batch {about['batch']}, {about['precision']} on {about['device']} ({threads}), "
        f"{rounds}; this machine multiplies at {about['matmul_fp32'] / 1e9:.0f} (fp32) and "
        f"{about['matmul_bf16'] / 1e9:.0f} (bf16) GFLOP/s"
    )


def _count(number: int, things: str) -> str:
    return f"{number} {things if number > 1 else things.removesuffix('s')}"


def _lines(values: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{key}: ")
        else:
            lines.append(
                f"{prefix}{key} {value:,.4g}" if isinstance(value, float) else f"{prefix}{key} {value}"
            )
    return lines
