"""The unified head: what holds for any weights, and what it is asked in training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinokit.config import registry
from dinokit.data.scenes.captioned import COLOURS, SHAPES, Boards
from dinokit.segment.encoder import Encoder, Items
from dinokit.segment.prompts import Prompt, empty_prompt, mask_logits
from dinokit.segment.questions import UnifiedTask, draw_kinds, draw_question, random_stroke, shifted
from dinokit.segment.recipe import Config, Head, Optim, Prompts, Run, Unified
from dinokit.segment.unified import (
    UnifiedHead,
    as_words,
    draw_absent,
    draw_phrase,
    mean_cell,
    read_phrase,
    sample_cells,
    shares_of,
    vocabulary,
    words_of,
)

WORDS = ("red", "blue", "disc", "cross")
CAPTIONED = {
    "name": "maps",
    "split": "train",
    "maps": {"name": "captioned", "labels": "pair", "size": 64, "count": 40},
}


def random_head(more=None, words=WORDS):
    torch.manual_seed(1)
    sizes = more or Unified(samples=5, memory=3, embedding=8)
    head = UnifiedHead(12, Head(hidden=32), sizes, words).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return head


@pytest.fixture
def head():
    return random_head()


@pytest.fixture
def asked(head, embedded, prompt):
    """The objects of `prompt`, with more: a stroke and words, words and a region, a region and a mask."""
    torch.manual_seed(3)
    strokes = torch.zeros(3, 4, 4)
    strokes[0, 1, :3] = 0.2
    shares = torch.zeros(2, 4, 4)
    shares[0, 2:, 1:], shares[1, 0, 0] = 1, 0.3
    region = torch.full((3, 6, 64), math.nan)
    region[1:] = head.refer(torch.randn(2, 64, 4, 4), shares).detach()
    masks = torch.full((3, 1, 16, 16), math.nan)
    masks[2] = torch.randn(1, 16, 16)
    words = torch.stack([as_words(phrase, WORDS) for phrase in (("red", "disc"), ("cross",), ())])
    return replace(prompt, masks=masks, strokes=strokes, region=region, words=words)


def close(a, b, rows=slice(None)):
    for name in ("logits", "quality", "words"):
        torch.testing.assert_close(getattr(a, name)[rows], getattr(b, name), rtol=1e-4, atol=1e-5)


# Regions as patches.


def test_a_mask_of_whole_patches_is_these_patches():
    torch.manual_seed(0)
    cells, mask = torch.randn(1, 6, 4, 4), torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 8:24, 16:24] = True
    shares = shares_of(mask, (4, 4))
    found, used, places = sample_cells(cells, shares, 5)
    assert used.tolist() == [[True, True, False, False, False]]
    assert places[0, :2].tolist() == [6, 10]
    assert torch.equal(found[0, :2], torch.stack([cells[0, :, 1, 2], cells[0, :, 2, 2]]))
    torch.testing.assert_close(mean_cell(cells, shares)[0], (cells[0, :, 1, 2] + cells[0, :, 2, 2]) / 2)
    torch.testing.assert_close(mean_cell(cells, torch.ones(1, 4, 4))[0], cells[0].mean(dim=(1, 2)))


def test_a_thin_stroke_and_a_single_pixel_have_patches_and_nothing_has_none():
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, 9, 8:32] = masks[1, 31, 0] = True
    _, used, places = sample_cells(torch.zeros(3, 6, 4, 4), shares_of(masks, (4, 4)), 5)
    assert [row[mask].tolist() for row, mask in zip(places, used, strict=True)] == [[5, 6, 7], [12], []]


def test_of_many_patches_an_even_choice_is_taken():
    shares = torch.ones(1, 4, 4)
    shares[0, 0, :2] = 0
    _, used, places = sample_cells(torch.zeros(1, 6, 4, 4), shares, 5)
    inside = list(range(2, 16))
    assert used.all()
    assert places[0].tolist() == [inside[k * 14 // 5] for k in range(5)]


def test_a_region_of_the_same_image_is_a_stroke_without_its_places(head, embedded):
    shares = torch.zeros(1, 4, 4)
    shares[0, 1:3, 2] = 1
    region = head.refer(embedded.cells[:1], shares)
    tokens, used = head._own(embedded.cells[:1], shares, 5, 0)
    places = head.decoder.prompts.grid(4, 4)[[6, 10]]
    plain = head.seen(region[0, :2]) + head.kinds[0] + places
    torch.testing.assert_close(tokens[0, :2], plain)
    assert used.tolist() == (~region[:, :-1].isnan().any(dim=2)).tolist()


# Any weights.


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 3])
def test_with_a_promptable_heads_prompts_alone_it_is_one(prompt, memory):
    head = random_head(Unified(samples=5, memory=memory, embedding=8))
    embedded = head.embed(torch.randn(2, 12, 4, 4), torch.randn(2, 3, 32, 32))
    again = prompt if memory else replace(prompt, masks=torch.randn(3, 1, 16, 16))
    ours, plain = head(embedded, again), head.decoder(embedded, again)
    assert torch.equal(ours.logits, plain.logits)
    assert torch.equal(ours.quality, plain.quality)


@torch.no_grad()
def test_each_prompt_is_independent_of_the_others(head, embedded, asked):
    together = head(embedded, asked)
    for i in range(3):
        close(together, head(embedded, asked.rows(slice(i, i + 1))), slice(i, i + 1))


@torch.no_grad()
def test_what_no_prompt_has_is_as_nothing(head, embedded, prompt):
    empty = replace(
        prompt,
        masks=torch.full((3, 1, 16, 16), math.nan),
        strokes=torch.zeros(3, 4, 4),
        region=torch.full((3, 6, 64), math.nan),
        words=torch.zeros(3, 4),
    )
    close(head(embedded, empty), head(embedded, prompt))


@torch.no_grad()
def test_every_part_of_a_prompt_counts(head, embedded, asked):
    before = head(embedded, asked).logits
    changed: dict[str, tuple[Prompt, list[int]]] = {
        "strokes": (replace(asked, strokes=asked.strokes.flip(1)), [0]),
        "words": (replace(asked, words=asked.words.flip(1)), [0, 1]),
        "region": (replace(asked, region=asked.region + 1), [1, 2]),
        "masks": (replace(asked, masks=-asked.masks), [2]),
    }
    for name, (other, rows) in changed.items():
        difference = (head(embedded, other).logits - before).abs().amax(dim=(1, 2, 3))
        assert [i for i in range(3) if difference[i] > 1e-3] == rows, name


@torch.no_grad()
def test_the_memory_is_what_the_last_mask_covers(embedded):
    """Two earlier masks that cover the same patches are the same memory; without memory they are not read."""
    for memory in (0, 3):
        head = random_head(Unified(samples=5, memory=memory, embedding=8))
        torch.nn.init.zeros_(head.decoder.prompts.mask[-1].weight)  # the mask itself is not seen
        one, two = torch.full((2, 1, 16, 16), -3.0), torch.full((2, 1, 16, 16), -1.0)
        one[:, :, :8], two[:, :, :8] = 5.0, 2.0
        prompts = [with_masks(masks) for masks in (one, two, -one)]
        answers = [head(embedded, prompt).logits for prompt in prompts]
        torch.testing.assert_close(answers[0], answers[1])
        assert torch.allclose(answers[0], answers[2], atol=1e-4) == (memory == 0)


def with_masks(masks):
    return replace(empty_prompt(torch.tensor([0, 1])), masks=masks)


@torch.no_grad()
def test_neither_the_order_of_a_regions_patches_nor_their_place_matters(head, embedded, asked):
    before = head(embedded, asked)
    mixed = torch.cat([asked.region[:, :-1].flip(1), asked.region[:, -1:]], dim=1)
    close(before, head(embedded, replace(asked, region=mixed)))
    cells, shares = torch.randn(3, 64, 4, 4), torch.zeros(3, 4, 4)
    shares[:, 1:3, 1:3] = 1
    regions = [head.refer(cells.roll(n, 2), shares.roll(n, 1)) for n in (0, 1)]
    close(*(head(embedded, replace(asked, region=region)) for region in regions))


@torch.no_grad()
def test_a_text_is_the_directions_of_its_words(head, embedded, asked):
    before = head(embedded, asked)
    head.table *= 2
    close(before, head(embedded, asked))
    head.table[1] = head.table[0]  # blue is red now
    blue = replace(asked, words=asked.words[:, [1, 0, 2, 3]])
    assert not torch.equal(blue.words, asked.words)
    ours, theirs = head(embedded, asked), head(embedded, blue)
    torch.testing.assert_close(ours.logits, theirs.logits)


def test_words_of_a_given_table_are_not_trained():
    head = UnifiedHead(12, Head(hidden=32), Unified(embedding=3), WORDS, vectors=torch.eye(4, 3))
    assert torch.equal(head.table, torch.eye(4, 3))
    assert not head.table.requires_grad
    assert head.text.in_features == 3


# Phrases.


def test_words_come_from_the_names_of_classes():
    assert words_of("Red_disc") == ("red", "disc")
    assert vocabulary(["red disc", "blue disc"]) == ["blue", "disc", "red"]
    assert read_phrase("the red thing", WORDS) == ("red",)
    assert read_phrase("a Red disc", WORDS) == ("red", "disc")
    for text, message in (
        ("a pink disc", "does not know the word 'pink'.* It knows: red, blue, disc, cross"),
        ("a discs", "Did you mean 'disc'"),
        ("the thing", "it has no word that says what"),
    ):
        with pytest.raises(ValueError, match=message):
            read_phrase(text, WORDS)
    with pytest.raises(ValueError, match="knows no words"):
        read_phrase("red", ())


def test_phrases_are_drawn_evenly_and_absent_ones_fit_nothing():
    rng, classes = np.random.default_rng(0), ["red disc", "blue disc", "red cross", "blue cross"]
    drawn = [draw_phrase(("red", "disc"), rng) for _ in range(600)]
    shares = [drawn.count(phrase) / 600 for phrase in (("red",), ("disc",), ("red", "disc"))]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.06)
    for _ in range(50):
        phrase = draw_absent([("red", "disc")], classes, rng)
        assert phrase
        assert not set(phrase) <= {"red", "disc"}
    assert draw_absent([words_of(name) for name in classes], classes, rng) == ()


# What is asked in training.


@pytest.fixture
def source():
    pytest.importorskip("scipy")
    return registry.build("data.objects", CAPTIONED)


def config(**odds):
    kinds = dict.fromkeys(("point", "box", "stroke", "mask", "region", "text"), 0.0)
    return Config(
        kind="unified",
        size=64,
        prompts=Prompts(objects=3, rounds=2),
        unified=Unified(samples=5, memory=3, embedding=8, **({**kinds, **odds} if odds else {})),
        head=Head(hidden=32),
        optim=Optim(steps=2, batch=2, warmup=1),
        run=Run(out="unused", device="cpu"),
    )


def boards():
    return Boards(64, 0, {"train": 40}, (1, 4))


def test_words_ask_for_all_things_that_have_them(source, backbone):
    """The truth is that of the board, which the question never sees."""
    items, known = Items(source, Encoder(backbone, 64), 1.0), vocabulary(source.classes)
    cfg, empty = config(text=1.0, both=0.0, absent=0.3), 0
    for step in range(12):
        question = draw_question(items, cfg, known, step, 0)
        board, picture = boards()[question.sample.index]
        for words, truth, names in zip(question.words, question.sample.truth, question.names, strict=True):
            phrase = {known[i] for i in words.nonzero().flatten().tolist()}
            things = [{COLOURS[t.colour], SHAPES[t.shape]} for t in board.things]
            fits = [number for number, has in enumerate(things, 1) if phrase <= has]
            assert (truth.numpy() == np.isin(picture.instances, fits)).all()
            common = set.intersection(*(things[number - 1] for number in fits)) if fits else set()
            assert {known[i] for i in (names == 1).nonzero().flatten().tolist()} == common
            assert bool(names.isnan().all()) == (not fits)
            empty += not fits
        assert not question.strokes.any()
        assert not question.sample.clicked.any()
    assert 3 <= empty <= 20


def test_a_region_asks_for_its_class_and_a_stroke_for_its_object(source, backbone):
    items, known = Items(source, Encoder(backbone, 64), 1.0), vocabulary(source.classes)
    seen = 0
    for step in range(6):
        question = draw_question(items, config(region=1.0, both=0.0), known, step, 0)
        for region in question.regions:
            number = question.sample.numbers[region.row]
            assert (question.sample.truth[region.row] == items[question.sample.index].mask(number)).all()
            assert region.mask.any()
            seen += 1
        assert not question.words.any()
        stroke = draw_question(items, config(stroke=1.0, both=0.0), known, step, 0)
        assert (stroke.strokes & ~stroke.sample.truth).sum() == 0
        assert stroke.strokes.flatten(1).any(dim=1).all()
    assert seen > 6


def test_a_question_is_a_function_of_seed_step_and_place(source, backbone):
    items, known = Items(source, Encoder(backbone, 64), 1.0), vocabulary(source.classes)
    one, again, other = (draw_question(items, config(), known, step, 1) for step in (3, 3, 4))
    for key in ("strokes", "moved", "words", "rough"):
        assert torch.equal(getattr(one, key), getattr(again, key))
    assert torch.equal(one.sample.truth, again.sample.truth)
    assert not torch.equal(one.sample.truth, other.sample.truth)


def test_kinds_have_their_odds():
    rng, cfg = np.random.default_rng(0), Unified(point=3, box=1, stroke=0, mask=0, region=0, text=0, both=0.5)
    drawn = [draw_kinds(cfg, rng) for _ in range(800)]
    assert {frozenset(kinds) for kinds in drawn} == {
        frozenset({"point"}),
        frozenset({"box"}),
        frozenset({"point", "box"}),
    }
    assert sum(len(kinds) == 2 for kinds in drawn) / 800 == pytest.approx(0.5, abs=0.06)
    assert sum(kinds == {"point"} for kinds in drawn) / 800 == pytest.approx(0.375, abs=0.06)


def test_a_shifted_mask_does_not_come_back_on_the_other_side():
    masks = torch.rand(3, 9, 9) < 0.5
    masks[2], masks[2, 0, 4] = False, True
    for down in (-2, 0, 1):
        for right in (-1, 0, 2):
            moved = shifted(masks, down, right)
            for i in range(3):
                kept = [(y + down, x + right) for y, x in masks[i].nonzero().tolist()]
                kept = [[y, x] for y, x in kept if 0 <= y < 9 and 0 <= x < 9]
                assert sorted(moved[i].nonzero().tolist()) == sorted(kept or masks[i].nonzero().tolist())


def test_rough_masks_of_an_image_are_moved_each_on_its_own(source, backbone):
    items, known, steps = Items(source, Encoder(backbone, 64), 1.0), vocabulary(source.classes), []
    for step in range(10):
        question = draw_question(items, config(mask=1.0, both=0.0), known, step, 0)
        assert question.rough.all()
        ways = set()
        for truth, moved in zip(question.sample.truth.numpy(), question.moved.numpy(), strict=True):
            wide = np.pad(truth, 2)
            places = [(y, x) for y in range(5) for x in range(5)]
            ways |= {(y, x) for y, x in places if (wide[y : y + 64, x : x + 64] == moved).all()}
        steps.append(ways)
    assert {n for ways in steps for way in ways for n in way} == set(range(5))
    assert sum(len(ways) > 1 for ways in steps) >= 9  # three masks have one way once in 625 steps


def test_a_random_stroke_stays_in_its_mask():
    rng, mask = np.random.default_rng(0), np.zeros((20, 20), bool)
    mask[4:12, 3:15] = True
    sizes = []
    for _ in range(100):
        stroke = random_stroke(mask, rng)
        assert not (stroke & ~mask).any()
        sizes.append(int(stroke.sum()))
    assert min(sizes) >= 3
    assert len(set(sizes)) > 20
    mask[:] = False
    assert not random_stroke(mask, rng).any()
    mask[7, 7] = True
    assert random_stroke(mask, rng).sum() == 1


def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(source, backbone):
    torch.manual_seed(0)
    task = UnifiedTask(config(), Items(source, Encoder(backbone, 64), 1.0))
    whole, logs = task.loss(3, [0, 1])
    parts = [task.loss(3, [place])[0] for place in (0, 1)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    whole.backward()
    assert all(p.grad is not None for p in task.head.parameters())
    assert all(p.grad.isfinite().all() for p in task.head.parameters())
    assert {"loss", "iou_1", "iou_2", "words"} <= logs.keys()


def test_objects_without_classes_can_be_asked_for_by_place_alone(source, backbone):
    class Nameless:
        classes = ()

        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            image, objects = self.source[index]
            return image, replace(objects, labels=[-1] * len(objects))

        def name(self, index):
            return "nameless"

    items = Items(Nameless(source), Encoder(backbone, 64), 1.0)
    with pytest.raises(ValueError, match=r"have no classes.*set unified.text=0"):
        UnifiedTask(config(), items)
    loss, _ = UnifiedTask(config(point=1.0, stroke=1.0), items).loss(0, [0])
    assert loss.isfinite()


def test_logits_of_a_mask_are_those_of_a_sure_answer():
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, :, :6] = True
    assert mask_logits(masks, (4, 4))[0, 0, 0].tolist() == [8, 0, -8, -8]
