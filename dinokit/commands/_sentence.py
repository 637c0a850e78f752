"""The result of an evaluator as a sentence, beside what guessing and raw pixels reach."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dinokit import evaluation
from dinokit.config import registry

FEW = 2_000  # images up to which raw pixels are evaluated too, which takes seconds
UNITS = {
    "mAP": "mean average precision {:.3f} of 1",
    "mIoU@1": "one click gives the mask of an object up to an overlap of {:.3f} of 1 (mIoU@1)",
    "cIoU": "what phrases ask for and the answers overlap by {:.3f} of 1 (cIoU)",
    "mIoU": "the classes of pixels overlap by {:.3f} of 1 (mIoU)",
    "rmse": "depth is wrong by {:.3g} (RMSE)",
    "pair_accuracy": "{:.3f} of the clips are right both forwards and backwards",
    "J&F mean": "the masks of objects agree by {:.3f} of 1 (J&F)",
}


def sentence(
    name: str, values: Mapping[str, Any], line: Mapping[str, Any], channels: int, processes: int = 1
) -> str:
    """What an evaluator found; "" if it has no score that a sentence is known for.

    Args:
        name: of the evaluator.
        values: its settings.
        line: its line in results.jsonl.
        channels: of the images.
        processes: that share the work. Of several only the first makes a sentence, so raw pixels are not
            evaluated then: the others would not take part.
    """
    accuracy = _accuracy(line)
    if not accuracy:
        return next((f"{name}: {text.format(line[key])}." for key, text in UNITS.items() if key in line), "")
    images = f"{line['images_test']:,.0f} images" if "images_test" in line else "the images"
    which = f" (by {accuracy.partition('@')[2]} neighbours)" if "@" in accuracy else ""
    against = []
    with suppress(ValueError, LookupError, OSError, ZeroDivisionError):
        classes = len(registry.build("data.sources", values["test"]).classes)
        against.append(f"guessing among {classes} classes {_percent(1 / classes)}")
        count = line.get("images_train", FEW) + line.get("images_test", FEW)
        if name == "knn" and processes == 1 and count <= FEW and line["weights"] != "backbone.name=pixels":
            section = {"name": "pixels", "channels": channels}
            pixels = evaluation.load_evaluated(None, section, "cpu")
            plain = evaluation.run_evaluator(name, {**values, "cache": None, "few_shot": ()}, pixels)
            against.append(f"raw pixels {_percent(plain[accuracy])}")
    compared = f"; {', '.join(against)}" if against else ""
    return f"{name}: {_percent(line[accuracy])} of {images} right{which}{compared}."


def _accuracy(line: Mapping[str, Any]) -> str:
    """The name of the score that stands for the others: of 20 neighbours, else the first."""
    names = [key for key in line if key.startswith("top1")]
    return next((key for key in names if key.startswith("top1@20")), names[0] if names else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
