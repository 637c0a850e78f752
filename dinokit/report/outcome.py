"""What a run came to: a verdict in words, and the plan beside what happened."""

from dataclasses import dataclass
from math import inf

from dinokit import results
from dinokit.report.run import Run, keys_of
from dinokit.runtime.log import clock, short

RISE = 0.02  # of an accuracy: more than the noise of 1,000 test images


@dataclass
class Summary:
    """What a run came to, in words."""

    headline: str
    kind: str  # good, bad or neither: ""
    sentences: list[str]


def summary(run: Run) -> Summary:
    """Progress, scores and verdicts of a run in sentences."""
    steps, batch = run.recipe.optim.steps, run.recipe.optim.batch
    seconds = run.seconds()
    sentences = [f"{run.steps:,} of {steps:,} steps, {run.steps * batch:,} images seen"]
    if seconds:
        sentences[0] += (
            f", {run.steps * batch / seconds:,.0f} images per second, {seconds / 60:,.1f} minutes of steps"
        )
    sentences[0] += "."
    if run.steps < steps:
        sentences.append(f"Not finished. To resume: dinokit train {run.folder}/recipe.yaml")
    scores = [key for key in keys_of([run]) if "/" in key and not key.startswith("health/")]
    changes = {key: run.curve(key)[1] for key in scores}
    for key, values in changes.items():
        best = results.best(key.partition("/")[2], values)
        sentences.append(f"{key}: {values[0]:.4g} at first, {values[-1]:.4g} at last, best {best:.4g}.")
    skipped = [str(record["step"]) for record in run.records if "skipped" in record]
    if skipped:
        sentences.append(
            f"Skipped steps, whose losses or gradients were not finite: {len(skipped)}; metrics.jsonl "
            f"names their images. To see why: dinokit train {run.folder}/recipe.yaml replay={skipped[0]}"
        )
    verdicts = {r["step"]: r for r in run.records if isinstance(r.get("verdict"), str)}
    sentences += [
        f"Verdict after step {step}: {r['verdict']}: {r.get('advice', 'see run.log.')}"
        for step, r in verdicts.items()
    ]
    if not verdicts and "feature_rank" in keys_of([run]):
        sentences.append("The checks of signals that ran found nothing wrong.")
    if run.steps in verdicts:
        return Summary(f"Something is wrong: {verdicts[run.steps]['verdict']}", "bad", sentences)
    accuracy = next((values for key, values in changes.items() if key.startswith("knn/")), [])
    if len(accuracy) > 1:
        weights = run.recipe.backbone.get("weights") or run.recipe.teacher.start
        headline, kind = _headline(accuracy[0], accuracy[-1], weights)
        if run.steps < steps:
            headline = f"Not finished. So far: {headline}"
        return Summary(headline, kind, sentences)
    if not changes and run.steps >= steps:
        sentences.append(
            "No accuracy is known, because no labelled images were evaluated. If you have some, with one "
            f"sub-folder a class: dinokit eval knn weights={run.folder} train.path=LABELLED/train "
            "test.path=LABELLED/test. Without labels, look at the nearest neighbours and the map below."
        )
    if run.steps < steps:
        return Summary(f"Not finished: {run.steps:,} of {steps:,} steps.", "", sentences)
    return Summary("Trained." if changes else "Trained without an evaluation.", "", sentences)


def _headline(first: float, last: float, weights: object) -> tuple[str, str]:
    """The headline and its kind, from the k-NN accuracy at both ends of a run that began with `weights`."""
    if not weights:
        learnt = last > first + RISE
        return (
            ("It learns: the k-NN accuracy rose.", "good")
            if learnt
            else ("The k-NN accuracy did not rise.", "bad")
        )
    # Trained weights already know much: that these do not get worse is what may be asked of the first steps.
    if last > first + RISE:
        return "It improved the weights that it began with: the k-NN accuracy rose.", "good"
    if last < first - RISE:
        return (
            f"The k-NN accuracy fell from {first:.3f} to {last:.3f}: the weights that it began with, "
            f"{weights}, are better. A lower optim.lr or fewer steps keep more of them."
        ), "bad"
    return f"The k-NN accuracy stayed that of the weights that it began with: {first:.3f} and {last:.3f}.", ""


def plan_and_outcome(run: Run) -> list[tuple[str, str, str]]:
    """Rows of a table: what, as planned before the first step, as measured."""
    steps, batch = run.recipe.optim.steps, run.recipe.optim.batch
    rows = [
        ("steps", f"{steps:,}", f"{run.steps:,}"),
        ("images seen", f"{steps * batch:,}", f"{run.steps * batch:,}"),
    ]
    planned, seconds = _number(run, "seconds_per_step"), run.seconds()
    way = "a few steps that were timed before"
    logged, speeds = run.curve("images_per_second")
    if not planned and speeds and speeds[0] > 0:
        planned, way = batch / speeds[0], f"its first {logged[0]} step{'s' * (logged[0] > 1)}"
    speed, time = "not timed before the run", "not timed before the run"
    if planned:
        speed, time = short(batch / planned), f"{clock(planned * steps)}, by {way}"
    rows.append(("images per second", speed, short(run.steps * batch / seconds) if seconds else "not known"))
    rows.append(("time of the steps", time, clock(seconds) if seconds else "not known"))
    _, peaks = run.curve("memory_gib")
    memory = _number(run, "memory_gib")
    rows.append(
        (
            "peak memory of a process",
            f"about {memory:.2f} GiB for weights, optimiser and a backward pass"
            if memory
            else "not recorded",
            f"{max(peaks):.2f} GiB"
            + (", programs and images included" if run.plan.get("device") == "cpu" else "")
            if peaks
            else "not known",
        )
    )
    return rows


def _number(run: Run, key: str) -> float:
    """A number above 0 in plan.json; 0 if there is none."""
    value = run.plan.get(key)
    return float(value) if isinstance(value, int | float) and 0 < value < inf else 0.0
