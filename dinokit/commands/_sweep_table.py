"""The table and the plot at the end of `dinokit sweep`."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dinokit.runtime.files import atomic

EARLIER = 3  # columns of the table before the last score
LINES = "-", "--", ":", "-."  # of curves, after the ten colours


@dataclass
class Point:
    """A score of a run."""

    images: int  # seen so far
    minutes: float  # of training so far, without evaluations
    score: float


@dataclass
class Result:
    """What a run has come to."""

    row: str
    seed: int | None
    out: str
    state: str  # finished, unfinished, not begun
    curve: list[Point]
    verdict: str  # what is wrong with it, by train/health.py


def score_at(curve: Sequence[Point], key: str, x: float) -> float | None:
    """The score at so many images or minutes, linear between two evaluations; None outside of the curve."""
    for a, b in itertools.pairwise(curve):
        left, right = getattr(a, key), getattr(b, key)
        if left <= x <= right:
            return a.score + (b.score - a.score) * ((x - left) / (right - left) if right > left else 1.0)
    return None


def table_of(groups: Mapping[str, Sequence[Result]], less_is_better: bool) -> list[dict[str, str]]:
    """A line for each row, the best last score first; means over the finished seeds, if there are any."""
    scored = {}
    for row, group in groups.items():
        begun = [result for result in group if result.curve]
        scored[row] = [result for result in begun if result.state == "finished"] or begun
    ends = [result.curve[-1] for group in scored.values() for result in group]
    images, minutes = max(end.images for end in ends), min(end.minutes for end in ends)
    lines = []
    for row, group in groups.items():
        curves = [result.curve for result in scored[row]]
        last = [curve[-1].score for curve in curves]
        line = {"row": row, "runs": f"{sum(r.state == 'finished' for r in group)}/{len(group)}"}
        line |= {"score": _mean(last), "spread": f"{stdev(last):.3f}" if len(last) > 1 else ""}
        line["at first"] = _mean([curve[0].score for curve in curves])
        for x in sorted({round(images * part / (EARLIER + 1)) for part in range(1, EARLIER + 1)}):
            line[f"at {x:,} images"] = _mean([score_at(curve, "images", x) for curve in curves])
        line[f"at {minutes:.1f} min"] = _mean([score_at(curve, "minutes", minutes) for curve in curves])
        line["images"] = f"{fmean([c[-1].images for c in curves]):,.0f}" if curves else ""
        line["minutes"] = f"{fmean([c[-1].minutes for c in curves]):.1f}" if curves else ""
        line["verdict"] = ", ".join(dict.fromkeys(r.verdict for r in group if r.verdict))
        lines.append(line)
    sign = 1 if less_is_better else -1
    return sorted(lines, key=lambda line: sign * float(line["score"] or sign * inf))  # without a score: last


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3f}" if known else ""


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    rows = [list(table[0]), *(list(line.values()) for line in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def plot(groups: Mapping[str, Sequence[Result]], metric: str, out: Path) -> None:
    """Two plots side by side, as SVG and PNG: the score against images seen, and against minutes.

    Args:
        groups: the results of every row, in the order of the legend; a line is the mean over seeds, as far as
            all of them are, and the band is from the smallest to the largest.
        metric: the label.
        out: the folder.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (row, group) in enumerate(groups.items()):
        steps = list(zip(*(result.curve for result in group if result.curve), strict=False))
        scores = [[point.score for point in points] for points in steps]
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
        for axis, key in zip(axes, ("images", "minutes"), strict=True):
            x = [fmean(getattr(point, key) for point in points) for points in steps]
            axis.plot(x, [fmean(each) for each in scores], marker=".", label=row.replace("$", r"\$"), **style)
            low, high = [min(each) for each in scores], [max(each) for each in scores]
            axis.fill_between(x, low, high, alpha=0.15, linewidth=0, color=style["color"])
    for axis, label in zip(axes, ("images seen", "minutes of training, without evaluations"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    for ending in ("svg", "png"):
        with atomic(out / f"curves.{ending}") as temporary:
            figure.savefig(temporary, format=ending, dpi=120)
