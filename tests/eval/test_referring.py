"""Scores of phrases and regions: hand counts, known answers, baselines, and what a head learns."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.objects import objects_of_ids
from dinokit.data.predictions import NAME, Predictions
from dinokit.data.scenes.captioned import COLOURS, SHAPES, Boards
from dinokit.eval.referring import Config, evaluate, image_scores, prototype, questions, scores
from dinokit.features import fingerprint
from dinokit.segment.encoder import Encoder, Items
from dinokit.segment.recipe import Config as Recipe
from dinokit.segment.recipe import Head, Optim, Prompts, Run, Unified
from dinokit.segment.saved import SavedHead, save_head
from dinokit.segment.training import train_head
from dinokit.segment.unified import UnifiedHead

MAPS = {"name": "captioned", "labels": "pair", "size": 64, "count": 400, "test_count": 60}
TEST = {"name": "maps", "maps": MAPS, "split": "test"}
TRAIN = {"name": "maps", "maps": MAPS, "split": "train"}
WORDS = (*COLOURS, *SHAPES)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return registry.build("models", {"name": "raw_patches", "size": 64, "patch": 8, "cell": 8}).eval()


def config(**values):
    return Config(**section_values("eval", "referring", {"test": TEST, "max_test": 12, **values}, ""))


def bars(*rows):
    """Masks (M, 1, 8): 1 at the columns from a to below b."""
    masks = torch.zeros(len(rows), 1, 8, dtype=torch.bool)
    for mask, (a, b) in zip(masks, rows, strict=True):
        mask[0, a:b] = True
    return masks


def test_scores_are_those_counted_by_hand():
    truth = bars((0, 4), (4, 8), (4, 8), (0, 0), (0, 0))
    found = bars((0, 3), (3, 6), (0, 4), (0, 1), (2, 6))
    rows = image_scores(found, truth, min_area=2)  # the fourth answer has one pixel: none
    # Of each phrase the others about other things: 1 with 2 and 3, 2 with 1, 3 with 1.
    assert rows == [[3, 4, 1, 0, 2, 2], [2, 5, 1, 0, 1, 1], [0, 8, 1, 0, 1, 0],
                    [0, 0, 0, 1, 0, 0], [0, 4, 0, 0, 0, 0]]  # fmt: skip
    found = scores(rows)
    assert found == pytest.approx({
        "cIoU": 5 / 17, "mIoU": (3 / 4 + 2 / 5) / 3, "P@0.5": 1 / 3, "target": 1, "swap": 3 / 4,
        "no target": 1 / 2, "phrases": 5,
    })  # fmt: skip
    assert scores(rows[3:]).keys() == {"no target", "phrases"}


def test_phrases_ask_for_the_things_of_the_board(backbone):
    """The board, which the evaluator never sees, says which things have the words."""
    items, boards = (
        Items(registry.build("data.objects", TEST), Encoder(backbone), 1.0),
        Boards(64, 0, {"test": 60}, (1, 4)),
    )
    absent = 0
    for index in range(8):
        board, picture = boards[index]
        for asked in questions(config(method="all"), items, index, np.random.default_rng(index)):
            things = [{COLOURS[t.colour], SHAPES[t.shape]} for t in board.things]
            fits = [number for number, has in enumerate(things, 1) if set(asked.phrase) <= has]
            mask = np.isin(picture.instances, fits)
            meant = [items[index].objects.mask(number) for number in asked.meant]
            assert (np.any(meant, axis=0) if meant else np.zeros_like(mask)).tolist() == mask.tolist()
            absent += not fits
    assert absent == 8


def test_with_all_words_a_text_and_a_region_ask_for_the_same(backbone):
    items = Items(registry.build("data.objects", TEST), Encoder(backbone), 1.0)
    for index in range(4):
        rows = {}
        for kind in ("text", "region", "both"):
            words = {} if kind == "region" else {"words": "all"}
            cfg = config(method="all", kind=kind, **words)
            asked = questions(cfg, items, index, np.random.default_rng(index))
            rows[kind] = [each.meant for each in asked if each.meant]
            for each in asked:
                if each.region is not None:
                    other, number = each.region
                    assert other.objects.labels[number] == items[index].objects.labels[each.meant[0]]
        assert rows["region"] == rows["both"]
        assert all(row in rows["text"] for row in rows["both"])


def test_an_answer_that_never_changes_has_no_swap_above_a_half(backbone):
    largest, every, drawn = (
        evaluate(config(method=method), backbone) for method in ("largest", "all", "random")
    )
    assert largest["swap"] <= 0.5
    assert every["swap"] <= 0.5
    for found in (largest, every, drawn):
        assert found["no target"] == 0
        assert found["target"] == 1
        assert 0 < found["cIoU"] < 0.9
    assert drawn == evaluate(config(method="random"), backbone)
    assert drawn != evaluate(config(method="random", seed=1), backbone)


class Squares:
    """Grey images with a red and a green square on whole patches."""

    classes = ("red square", "green square")

    def __len__(self):
        return 2

    def name(self, index):
        return f"squares {index}"

    def __getitem__(self, index):
        pixels, ids = np.full((64, 64, 3), 120, np.uint8), np.zeros((64, 64), np.uint8)
        for number, colour in ((1, (220, 30, 30)), (2, (30, 220, 30))):
            x, y = ((8, 40), (40, 16))[number - 1 if index else 2 - number]
            pixels[y : y + 16, x : x + 16], ids[y : y + 16, x : x + 16] = colour, number
        return Image.fromarray(pixels), objects_of_ids(ids, {1: 0, 2: 1})


def test_the_prototype_of_a_region_finds_its_colour(backbone):
    items = Items(Squares(), Encoder(backbone), 1.0)
    asked = questions(config(method="all", kind="region"), items, 0, np.random.default_rng(0))
    assert [each.meant for each in asked] == [[0], [1]]
    found = prototype(items[0], asked, np.random.default_rng(0)).numpy()
    truth = np.stack([items[0].objects.mask(number) for number in (0, 1)])
    assert ((found & truth).sum(axis=(1, 2)) / (found | truth).sum(axis=(1, 2)) > 0.8).all()


def head(folder, backbone, words=WORDS):
    torch.manual_seed(1)
    encoder = Encoder(backbone, 64)
    made = UnifiedHead(encoder.width, Head(hidden=32), Unified(embedding=8), words)
    sizes = {"samples": 8, "memory": 4, "embedding": 8}
    about = SavedHead("unified", {"hidden": 32}, 64, 1, fingerprint(backbone), TRAIN, 0, sizes, [*words])
    save_head(folder / "head.safetensors", made, about)
    return str(folder)


@pytest.mark.parametrize("kind", ["text", "region", "both"])
def test_a_head_is_evaluated(backbone, tmp_path, kind):
    found = evaluate(config(head=head(tmp_path, backbone), kind=kind, max_test=4), backbone)
    assert {"cIoU", "mIoU", "P@0.5", "target", "swap", "phrases", "images_test"} <= found.keys()
    assert ("no target" in found) == (kind == "text")


def test_clicks_and_boxes_of_a_unified_head_are_evaluated_as_a_promptable_ones(backbone, tmp_path):
    module = registry.find("eval", "promptable")
    values = {"test": TEST, "head": head(tmp_path, backbone), "max_test": 2, "clicks": 5}
    found = module.evaluate(module.Config(**section_values("eval", "promptable", values, "")), backbone)
    assert {"mIoU@1", "mIoU@5", "mIoU box"} <= found.keys()


def test_wrong_settings_get_words(backbone, tmp_path):
    with pytest.raises(ValueError, match="a head of kind unified that dinokit train-head trained"):
        evaluate(config(), backbone)
    with pytest.raises(ValueError, match="set kind=region or kind=both"):
        config(method="prototype")
    with pytest.raises(ValueError, match="words: only with kind=text or both"):
        config(method="prototype", kind="region", words="all")
    with pytest.raises(ValueError, match=r"does not know the words black, blue.* It knows: red, disc"):
        evaluate(config(head=head(tmp_path, backbone, ("red", "disc"))), backbone)
    with pytest.raises(ValueError, match="test images are train images too"):
        evaluate(config(head=head(tmp_path, backbone), test=TRAIN), backbone)
    with pytest.raises(ValueError, match="No test image has an object of min_area=4000"):
        evaluate(config(method="all", min_area=4000), backbone)


def test_a_few_phrases_are_kept_for_a_report(backbone, tmp_path):
    evaluate(config(method="all", out=str(tmp_path)), backbone)
    found = Predictions.read(tmp_path / NAME)
    assert found.classes == ["rest", "what is asked for"]
    assert ": maps" in found.samples[0].name or ": captioned test" in found.samples[0].name


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Scores of a head after a short training, and of what it must beat: on boards of two to four things."""
    maps = {**MAPS, "things": [2, 4]}
    train, test = ({"name": "maps", "maps": maps, "split": split} for split in ("train", "test"))
    torch.manual_seed(0)
    backbone = registry.build("models", {"name": "raw_patches", "size": 64, "patch": 8, "cell": 8}).eval()
    out = tmp_path_factory.mktemp("unified") / "run"
    cfg = Recipe(
        kind="unified",
        size=64,
        objects=train,
        prompts=Prompts(objects=4, rounds=1, min_area=24),
        unified=Unified(point=0.1, box=0, stroke=0.1, mask=0, region=0.3, text=0.5, absent=0.3),
        optim=Optim(steps=400, batch=6, warmup=50),
        run=Run(out=str(out), device="cpu"),
    )
    train_head(cfg, backbone, registry.build("data.objects", train))

    def scores_of(**values):
        return evaluate(config(test=test, max_test=60, **values), backbone)

    found = {kind: scores_of(head=str(out), kind=kind, words="all") for kind in ("text", "both")}
    found["region"] = scores_of(head=str(out), kind="region")
    found["phrases"] = scores_of(head=str(out))
    found |= {method: scores_of(method=method) for method in ("largest", "random", "all")}
    found["prototype"] = scores_of(method="prototype", kind="region", size=64)
    return found


@pytest.mark.slow
def test_words_find_their_things(learned):
    """Better than baselines that see true masks; and of two phrases each is nearer to its own things."""
    best = max(learned[method]["P@0.5"] for method in ("largest", "random", "all"))
    assert learned["phrases"]["P@0.5"] > best + 0.05
    assert learned["phrases"]["swap"] > 0.6


@pytest.mark.slow
def test_what_no_thing_fits_has_more_often_no_answer(learned):
    assert learned["phrases"]["no target"] > 1 - learned["phrases"]["target"] + 0.2


@pytest.mark.slow
def test_a_region_finds_its_class(learned):
    assert learned["region"]["cIoU"] > learned["prototype"]["cIoU"] + 0.1
    assert learned["region"]["swap"] > 0.6


@pytest.mark.slow
def test_words_and_a_region_together_are_no_worse_than_each(learned):
    alone = max(learned[kind]["mIoU"] for kind in ("text", "region"))
    assert learned["both"]["mIoU"] > alone - 0.02
