"""dinokit eval EVALUATOR weights=FILE_OR_RUN [key=value ...]: judge frozen features; the last line is JSON.

Without train.* and test.*, the data that the weights were trained on is used, if it has labels. A source
given by its path alone is a folder with one sub-folder a class. backbone.name=NAME in place of weights=...
judges a backbone without training. device=cpu, cuda or auto says where.

dinokit eval knn weights=runs/photos train.path=LABELLED/train test.path=LABELLED/test
dinokit eval knn backbone.name=pixels train.path=LABELLED/train test.path=LABELLED/test
"""

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields

from dinokit import judge, shelves
from dinokit.config import parse_overrides, section_values
from dinokit.verbs import Command


def run(command: Command) -> None:
    what = command.one_word("evaluator", shelves.names("eval"))
    shelves.read_config("eval", what)
    values = parse_overrides(command.settings)
    weights, untrained = values.pop("weights", None), values.pop("backbone", None)
    device = str(values.pop("device", "auto"))
    if (weights is None) == (untrained is None):
        raise ValueError(
            "Give either weights=FILE_OR_RUN or backbone.name=NAME (a backbone without training)."
        )
    values = section_values("eval", what, values, "")
    data = None
    if weights is not None and any(values[key] is None for key in judge.source_fields(what)):
        data = judge.trained_on(weights)
    values = judge.with_data(what, values, data)
    scores = judge.run_evaluator(what, values, judge.load_judged(weights, untrained, device))
    print(json.dumps({"eval": what, "weights": weights or f"untrained {untrained['name']}", **scores}))


def describe(words: Sequence[str]) -> str:
    have = shelves.names("eval")
    if not words or words[0] not in have:
        return f"evaluators: {', '.join(have)}; dinokit eval NAME --help lists the keys"
    lines = [f"keys of {words[0]}:"]
    for f in fields(shelves.read_config("eval", words[0])):
        default = "" if f.default is MISSING else f" = {json.dumps(f.default, default=list)}"
        lines.append(f"    {f.name}{default}")
    return "\n".join(lines)
