"""dinokit bench step|data|attention|eval [RECIPE] [key=value ...]: how fast things are on this machine.

Each figure stands beside the machine's own rate of matrix products, measured in the same run. RECIPE is
small_photos unless you give one. Of the keys, batch=N is short for optim.batch=N; rounds=N is how many times
each figure is taken (the median counts); input=data reads the recipe's data, input=synthetic needs none.

dinokit bench step heads.cls.prototypes=65536 batch=8 --against plain
dinokit bench data
dinokit bench data input=data data.path=PHOTOS
dinokit bench attention dinov2_vitl16_short batch=2
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dinokit import shelves
from dinokit.config import Recipe, load_recipe
from dinokit.verbs import Command

if TYPE_CHECKING:
    from dinokit.bench.step import StepReport

FLAGS = {
    "--json": "print one line of JSON and nothing else",
    "--against=": "plain: run the plainest form of the step in turn, and print the ratio",
}
KINDS = "step", "data", "attention", "eval"
INPUTS = "synthetic", "data"


def run(command: Command) -> None:
    kind, recipe, rounds, real = _asked(command)
    against = command.flags.get("--against")
    if against not in (None, "plain") or (against and kind != "step"):
        raise ValueError("--against takes `plain`, and only with `dinokit bench step`.")
    if kind == "step":
        _step(recipe, rounds, real, bool(against), "--json" in command.flags)
        return
    if kind == "data":
        from dinokit.bench.data import bench_data

        found = bench_data(recipe, rounds, real)
    elif kind == "attention":
        from dinokit.bench.attention import bench_attention

        found = bench_attention(recipe, rounds)
    else:
        from dinokit.bench.evaluation import bench_eval

        found = bench_eval(recipe, rounds)
    found = {"bench": kind, "recipe": recipe.name, "batch": recipe.optim.batch, **found}
    print(json.dumps(found) if "--json" in command.flags else "\n".join(_lines(found)))


def _asked(command: Command) -> tuple[str, Recipe, int, bool]:
    words = list(command.words)
    if not words or words[0] not in KINDS:
        near = shelves.suggest(words[0], list(KINDS)) if words else ""
        raise ValueError(f"What is to be measured?{near} There is: {', '.join(KINDS)}.")
    own = {"recipe": "small_photos", "batch": "8", "rounds": "5", "input": INPUTS[0]}
    settings = []
    for setting in command.settings:
        key, _, value = setting.partition("=")
        if key in own:
            own[key] = value
        elif key == "optim.batch":
            raise ValueError(
                f"{setting}: bench takes the number of images as batch={setting.partition('=')[2]}."
            )
        else:
            settings.append(setting)
    if len(words) > 2:
        raise ValueError(f"'{words[2]}' is not of the form key=value.")
    if own["input"] not in INPUTS:
        raise ValueError(f"input={own['input']}: there is: {', '.join(INPUTS)}.")
    for key in ("batch", "rounds"):
        if not own[key].isdecimal() or not int(own[key]):
            raise ValueError(f"{key}={own[key]}: it must be a whole number, 1 or more.")
    if own["input"] == "synthetic":
        settings.append("data={name: scenes}")
    recipe = load_recipe((words[1:] or [own["recipe"]])[0], [*settings, f"optim.batch={own['batch']}"])
    return words[0], recipe, int(own["rounds"]), own["input"] == "data"


def _step(recipe: Recipe, rounds: int, real: bool, against: bool, as_json: bool) -> None:
    from dinokit.bench.step import bench_steps, plain

    forms = {"as given": recipe, **({"plain": plain(recipe)} if against else {})}
    reports = dict(zip(forms, bench_steps(list(forms.values()), rounds, real), strict=True))
    ratio = _ratio(reports) if against else {}
    if as_json:
        found = {name: asdict(report) for name, report in reports.items()}
        about = {"bench": "step", "recipe": recipe.name, "batch": recipe.optim.batch}
        print(json.dumps({**about, **ratio, **found}))
        return
    first = next(iter(reports.values()))
    print(
        f"{recipe.name}, batch {recipe.optim.batch}, {rounds} rounds; this machine multiplies at "
        f"{first.matmul_fp32 / 1e9:.0f} (fp32) and {first.matmul_bf16 / 1e9:.0f} (bf16) GFLOP/s"
    )
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


def _lines(values: dict[str, Any], where: str = "") -> list[str]:
    done = []
    for key, value in values.items():
        if isinstance(value, dict):
            done += _lines(value, f"{where}{key}: ")
        else:
            done.append(f"{where}{key} {value:,.4g}" if isinstance(value, float) else f"{where}{key} {value}")
    return done
