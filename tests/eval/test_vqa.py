"""Questions on pictures: what the columns measure, with readers that are no networks."""

import json

import numpy as np
import pytest

from dinokit.config import registry
from dinokit.data.scenes.captioned import CaptionedWorld
from dinokit.data.scenes.sentences import FAMILIES, quad
from dinokit.eval import vqa
from dinokit.language.model import ABOUT, about, build_model, save_model
from dinokit.language.recipe import Config, Language
from dinokit.models import build

transformers = pytest.importorskip("transformers")

RAW = {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}


class Reader:
    """Answers as a function of picture and question does."""

    def __init__(self, answer):
        self.answer = answer

    def answers(self, talks, batch, blank):
        for talk in talks:
            image = np.zeros_like(talk.images[0]) if blank else talk.images[0]
            yield self.answer(image.tobytes(), talk.turns[-1].text.replace("<image>", "").strip())


CFG = vqa.Config(count=12, groups=6, size=32)


def test_a_reader_of_the_question_alone_has_no_group_and_one_who_knows_all_has_every_group():
    world, known, guesses = CaptionedWorld(32, 0, "test"), {}, {}
    for family in FAMILIES:
        for number in range(CFG.groups):
            group = quad(world, family, number)
            for board, answers in zip(group.boards, group.answers, strict=True):
                for text, answer in zip(group.questions, answers, strict=True):
                    known[world.draw(board).image.tobytes(), text] = answer
                    guesses.setdefault(text, answer)
    rows = {}
    vqa._add_groups(rows, CFG, FAMILIES, Reader(lambda image, text: known[image, text]), False, " group")
    vqa._add_groups(rows, CFG, FAMILIES, Reader(lambda image, text: guesses[text]), False, " blind")
    for family in FAMILIES:
        assert rows[f"{family} group"] == [1.0] * CFG.groups
        assert rows[f"{family} blind"] == [0.0] * CFG.groups


def test_the_other_picture_answers_other_questions():
    items = list(vqa.items_of(CFG, ("where", "colour"), "test"))
    assert [item.family for item in items] == ["where"] * 12 + ["colour"] * 12
    table = {(i.image.tobytes(), i.text.removeprefix("<image> ")): i.answer for i in items}
    reader = Reader(lambda image, text: table.get((image, text), ""))
    images, others = [item.image for item in items], [item.other for item in items]
    assert vqa._right(CFG, reader, items, images, False, "") == [1.0] * 24
    assert sum(vqa._right(CFG, reader, items, others, False, "")) == 0
    assert sum(vqa._right(CFG, reader, items, images, True, "")) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model on raw patches, and the folder of its run."""
    out, backbone = tmp_path_factory.mktemp("run"), build(RAW)
    cfg = Config(language=Language(width=32, depth=2, heads=2, hidden=48))
    save_model(build_model(cfg, backbone), out / "model", about(cfg, backbone))
    return out


def test_an_untrained_model_has_every_column_and_no_answer(run):
    cfg = vqa.Config(model=str(run), blind=str(run), families=("count", "exist"), count=3, groups=1, size=32)
    scores = vqa.evaluate(cfg, build(RAW))
    ways = ("", " shuffled", " blank", " novel", " group", " text-only", " text-only group")
    assert set(scores) == {f"{f}{w}" for f in ("all", "count", "exist") for w in ways} | {
        "questions",
        "groups",
    }
    assert scores["all"] == 0


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    """An untrained model on smaller patches, which knows the words of boxes, and the folder of its run."""
    out, backbone = tmp_path_factory.mktemp("boxed"), build({**RAW, "patch": 4})
    small = Language(width=32, depth=2, heads=2, hidden=48)
    cfg = Config(language=small, stages={"one": {"data": {"families": ["ground"]}}, "no": None})
    save_model(build_model(cfg, backbone), out / "model", about(cfg, backbone))
    return out


def test_models_on_other_backbones_have_columns_of_their_own(run, boxed):
    cfg = vqa.Config(
        model=str(run), beside={"small": str(boxed)}, families=("exist",), count=2, groups=1, size=32
    )
    scores = vqa.evaluate(cfg, build(RAW))
    assert {"all small", "exist small", "exist small group"} <= set(scores)
    with pytest.raises(ValueError, match=r"beside.blank: there is a column 'blank'"):
        vqa.Config(beside={"blank": "runs/chat"})
    with pytest.raises(LookupError, match="has no model that answers"):
        vqa.evaluate(vqa.Config(model=str(run), beside={"none": str(run / "none")}), build(RAW))


def test_questions_about_boxes_need_a_model_that_knows_their_words(run, boxed):
    cfg = vqa.Config(model=str(boxed), families=("ground", "point"), count=3, groups=1, size=32)
    scores = vqa.evaluate(cfg, build({**RAW, "patch": 4}))
    assert {"ground", "point novel", "ground group", "ground centre"} <= set(scores)
    cfg = vqa.Config(model=str(boxed), beside={"other": str(run)}, families=("ground",), count=1, size=32)
    with pytest.raises(ValueError, match="a question of 'other': the language model does not know 'box'"):
        vqa.evaluate(cfg, build({**RAW, "patch": 4}))
    with pytest.raises(ValueError, match="the language model does not know 'box'"):
        vqa.evaluate(vqa.Config(model=str(run), families=("ground",), count=1, size=32), build(RAW))


def test_a_box_is_right_from_an_overlap_of_half_on():
    assert vqa.is_right("red", "red")
    assert not vqa.is_right("red", "[0.00, 0.00, 1.00, 1.00]")
    box = "[0.00, 0.00, 0.50, 0.50]"
    assert vqa.is_right(box, "[0.0, 0.0, 0.5, 0.3]")  # 0.6 of the area
    assert not vqa.is_right(box, "[0.0, 0.0, 0.5, 0.25]")  # exactly half is not above
    for nothing in ("", "top left", "[0.5, 0.5, 0.0, 0.0]"):
        assert not vqa.is_right(box, nothing)
    # Of mean size in the middle: it overlaps none of four corners, and is the fifth box itself.
    edges = [(0.0, 0.0), (0.8, 0.0), (0.0, 0.8), (0.8, 0.8), (0.4, 0.4)]
    boxes = [f"[{x:.2f}, {y:.2f}, {x + 0.2:.2f}, {y + 0.2:.2f}]" for x, y in edges]
    assert vqa._centre(boxes) == {"ground centre": [0, 0, 0, 0, 1]}
    assert vqa._centre([]) == {}


def test_a_model_on_another_backbone_is_refused(run):
    other = build({**RAW, "cell": 8})
    with pytest.raises(ValueError, match="trained on another backbone than the one that is evaluated"):
        vqa.evaluate(vqa.Config(model=str(run), count=1, size=32), other)
    with pytest.raises(ValueError, match="model=RUN must be given"):
        vqa.evaluate(vqa.Config(), build(RAW))
    with pytest.raises(LookupError, match="has no model that answers"):
        vqa.evaluate(vqa.Config(model=str(run / "none")), build(RAW))
    assert json.loads((run / "model" / ABOUT).read_text())["connector"]["name"] == "mlp"
    assert "vqa" in registry.names("eval")
