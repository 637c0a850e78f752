"""dinokit bench step|data|attention|eval [RECIPE] [key=value ...]: measure speed and memory on this machine.

The rate of matrix products, measured in the same run, is printed beside the results. With input=data, step
and data read the data of the recipe; with input=synthetic they need none.

dinokit bench step heads.cls.prototypes=65536 batch=8 --against plain
dinokit bench step scenes_cpu --against losses.ibot=null,masks=null
dinokit bench data
dinokit bench data input=data data.path=PHOTOS
dinokit bench attention dinov2_vitl16_short batch=2
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from dinokit.commands import RECIPE_KEYS, Command, key_lines
from dinokit.config import registry
from dinokit.config.load import Recipe, checked_values, load_recipe, parse_overrides
from dinokit.config.registry import check_at_least, suggest

if TYPE_CHECKING:
    from dinokit.bench.step import StepReport

SHORT = {key: full for key, full in RECIPE_KEYS.items() if key not in ("batch", "steps")}
FLAGS = {
    "--against=": "plain: run the step with every switch at its plainest in turn, and print the ratio; "
    "silent: run it without signals, metrics.jsonl and the trackers of run.log in turn; "
    "KEY=VALUE[,KEY=VALUE]: run it with these settings in turn",
}
KINDS = "step", "data", "attention", "eval"
READING = "step", "data"  # of these, those that images are read for
FIRST = "device", "precision", "threads", "matmul_fp32", "matmul_bf16"  # what the first line says


@dataclass
class Config:
    recipe: str = "small_photos"  # a name in configs/, or a path
    batch: int = 0  # images of a step; 0: 8, for data 32
    rounds: int = 5  # measurements, of which the median is printed
    input: Literal["synthetic", "data"] = "synthetic"  # images of step and data: made, or of the recipe

    def __post_init__(self) -> None:
        check_at_least(self, batch=0, rounds=1)


def run(command: Command) -> dict[str, Any]:
    kind, recipe, cfg = _read_settings(command)
    rounds, real = cfg.rounds, cfg.input == "data"
    against = command.flags.get("--against")
    if (against not in (None, "plain", "silent") and "=" not in str(against)) or (against and kind != "step"):
        raise ValueError(
            "--against takes `plain`, `silent` or KEY=VALUE, and only with `dinokit bench step`."
        )
    about = {"bench": kind, "recipe": recipe.name, "batch": recipe.optim.batch, "rounds": rounds}
    if kind == "step":
        other = _read_settings(_with(command, against))[1] if against and "=" in against else None
        return _step(about, recipe, real, against, other)
    if kind == "data":
        from dinokit.bench import bench_data

        results = bench_data(recipe, rounds, real)
    else:
        from dinokit.bench.step import bench_attention, bench_eval

        results = (bench_attention if kind == "attention" else bench_eval)(recipe, rounds)
    rest = {key: value for key, value in results.items() if key not in FIRST}
    print("\n".join([_first_line({**about, **results}), *_lines(rest)]))
    return {**about, **results}


def _read_settings(command: Command) -> tuple[str, Recipe, Config]:
    """What is measured, of which recipe, and how."""
    kind, *name = command.words or [""]
    if kind not in KINDS:
        near = suggest(kind, [*KINDS])
        raise ValueError(f"What should be measured?{near} There is: {', '.join(KINDS)}.")
    sections = [item.name for item in fields(Recipe)]
    settings = [text for text in command.settings if re.split(r"[.=]", text)[0] in sections]
    own = parse_overrides([text for text in command.settings if text not in settings])
    given = [*name, *([str(own["recipe"])] if "recipe" in own else [])]
    if len(given) > 1:
        raise ValueError(f"Several recipes are given: {', '.join(given)}. Leave all but one out.")
    own |= {"recipe": given[0]} if given else {}
    cfg = Config(**checked_values(Config, own, "", sections))
    for text in settings:
        if text.startswith("optim.batch="):
            raise ValueError(f"{text}: bench takes the number of images as {text.removeprefix('optim.')}.")
    _check_input(kind, cfg.input, [text for text in settings if text.startswith(("data.", "data="))])
    settings += [] if cfg.input == "data" else ["data={name: scenes}"]
    batch = cfg.batch or (32 if kind == "data" else 8)
    return kind, load_recipe(cfg.recipe, [*settings, f"optim.batch={batch}"]), cfg


def _with(command: Command, settings: str) -> Command:
    """The command with further settings. A comma divides them where KEY= follows it, in brackets too.

    Raises:
        ValueError: for a key of bench itself, which holds for both forms.
    """
    more = re.split(r",(?=[\w.]+=)", settings)
    for text in more:
        if text.partition("=")[0] in {item.name for item in fields(Config)}:
            raise ValueError(
                f"--against {text}: this is a key of bench, not of a recipe, and holds for both that are "
                f"compared: give {text} outside of --against."
            )
    return replace(command, settings=[*command.settings, *more])


def _check_input(kind: str, asked: str, about_data: Sequence[str]) -> None:
    """Refuse settings of images that would not be read."""
    unread = ["input=data"] if asked == "data" else about_data
    if unread and kind not in READING:
        raise ValueError(
            f"{unread[0]}: bench {kind} reads no images, for its time does not depend on what they show. "
            f"Leave it out; images are read by: {', '.join(f'bench {each}' for each in READING)}."
        )
    if asked != "data" and about_data:
        raise ValueError(f"{about_data[0]}: bench {kind} reads the recipe's data with input=data: add it.")


def words() -> Sequence[str]:
    return KINDS


def describe(words: Sequence[str]) -> str:
    recipes = f"recipes: {', '.join(registry.recipe_names())}"
    return "\n".join([recipes, "keys, besides those of the recipe:", *key_lines("commands", "bench")])


def _step(
    about: dict[str, Any], recipe: Recipe, real: bool, against: str | None, other: Recipe | None
) -> dict[str, Any]:
    """Measure a step as given, and in turn with it what `against` says; `other` is the recipe of settings."""
    from dinokit.bench import measured_on, settled
    from dinokit.bench.step import Records, bench_steps, plain
    from dinokit.runtime.trackers import check_installed

    recipe = settled(recipe)  # here, for both forms: each process might find another precision the faster one
    about = {**about, **measured_on(recipe.run.device, recipe.run.precision)}
    forms, records = {"as given": recipe}, list[Records]()
    if against == "plain":
        forms["plain"] = plain(recipe)
    elif against == "silent":
        check_installed(recipe.run.log)
        forms["silent"], records = recipe, ["all", "nothing"]
    elif against and other:
        forms[against] = settled(other)
    found = bench_steps(list(forms.values()), about["rounds"], real, records)
    reports = dict(zip(forms, found, strict=True))
    ratio = _share(reports) if against == "silent" else _ratio(reports, against) if against else {}
    results = {name: asdict(report) for name, report in reports.items()}
    print(_first_line({**about, **results["as given"]}))
    for name, report in reports.items():
        phases = ", ".join(f"{phase} {ms:.0f}" for phase, ms in report.milliseconds.items())
        print(
            f"{name}: {report.images_per_second:.2f} images/s, {report.peak_gib:.2f} GiB at the peak "
            f"({report.idle_gib:.2f} without any network), "
            f"{100 * report.share_of_matmul:.0f} % of the matmul rate\n    ms: {phases}"
        )
    for what, value in ratio.items():
        print(f"{what.replace('_', ' ')}: {value:.3g}")
    return {**about, **ratio, **results}


def _ratio(reports: "dict[str, StepReport]", against: str) -> dict[str, float]:
    from statistics import median

    ours, theirs = reports.values()
    pairs = zip(ours.seconds, theirs.seconds, strict=True)
    name = against if against == "plain" else "other"
    return {
        f"speed_against_{name}": median(slow / fast for fast, slow in pairs),
        f"memory_against_{name}": ours.peak_gib / theirs.peak_gib,
    }


def _share(reports: "dict[str, StepReport]") -> dict[str, float]:
    """How many times as long a step with all records takes, by the clock and in time of the CPU.

    Other programs change the latter less.
    """
    from statistics import median

    ours, theirs = reports.values()
    clocks = ("seconds", "cpu_seconds")
    return {
        f"{name}_against_silent": median(
            a / b for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True)
        )
        for name in clocks
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
    from dinokit.runtime.log import short

    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{key}: ")
        else:
            lines.append(f"{prefix}{key} {short(value)}")
    return lines
