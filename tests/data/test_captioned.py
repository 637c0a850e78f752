"""The world of captioned boards: pixels, sentences and answers against functions without its code."""

import colorsys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from dinokit.data.scenes import World
from dinokit.data.scenes.captioned import COLOURS, DIRECTIONS, SHAPES, SPLITS, Board, CaptionedWorld, Thing
from dinokit.data.scenes.sentences import (
    COLUMNS,
    FAMILIES,
    NUMBERS,
    ROWS,
    VOCABULARY,
    ask,
    describe,
    exchanged,
    name,
    quad,
)

HUES = {"red": 0, "green": 120, "blue": 232, "yellow": 57, "purple": 290, "cyan": 180}  # degrees
PALETTE = np.array(
    [
        [255 * v for v in colorsys.hsv_to_rgb(HUES[colour] / 360, 0.85, 0.85)]
        if colour in HUES
        else [{"white": 245, "black": 16}[colour]] * 3
        for colour in COLOURS
    ]
)


def boards(split: str = "train", count: int = 100, **settings) -> list[Board]:
    world = CaptionedWorld(split=split, **settings)
    return [world.board(index) for index in range(count)]


def equal(a, b) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.instances, b.instances)


@pytest.mark.parametrize("split", SPLITS)
def test_a_picture_is_a_function_of_seed_split_and_index(split) -> None:
    one, two = (CaptionedWorld(seed=3, split=split) for _ in range(2))
    two.board(0)  # the order of calls has no effect
    assert one.board(7) == two.board(7)
    assert equal(one.draw(one.board(7)), two.draw(two.board(7)))
    other = CaptionedWorld(seed=4, split=split)
    assert not equal(one.draw(one.board(7)), other.draw(other.board(7)))


def test_no_two_items_share_random_numbers() -> None:
    worlds = {split: CaptionedWorld(split=split) for split in SPLITS}
    keys = [worlds[s].rng(stream, 5) for s in SPLITS for stream in ("board", "clip", "quad")]
    first = [tuple(rng.integers(0, 2**62, 4).tolist()) for rng, _ in keys]
    assert len(set(first)) == len(first)
    assert len({key for _, key in keys}) == len(keys)
    scenes = {World(split=s)._rng(s, 5).integers(0, 2**62) for s in ("train", "test")}
    assert not scenes & {numbers[0] for numbers in first}
    grounds = [worlds[s].draw(Board((), (0, 64 + k, 5))).image for k, s in enumerate(SPLITS)]
    assert not np.array_equal(grounds[0], grounds[1])


def test_colours_can_be_read_from_the_pixels_and_the_ground_is_grey() -> None:
    world = CaptionedWorld()
    chroma = []
    for board in boards(count=300):
        picture = world.draw(board)
        for number, thing in enumerate(board.things, start=1):
            pixels = picture.image[picture.instances == number].astype(float)
            mean = np.median(pixels, axis=0)
            assert np.argmin(((PALETTE - mean) ** 2).sum(axis=1)) == thing.colour, COLOURS[thing.colour]
        # Soft edges spread beyond a mask, by two pixels at the tips of a triangle.
        padded = np.pad(picture.instances, 2)
        near = [padded[i : i + 64, j : j + 64] for i in range(5) for j in range(5)]
        pixels = picture.image[np.max(near, axis=0) == 0].astype(int)
        chroma.append((pixels.max(axis=1) - pixels.min(axis=1)).max())
    assert max(chroma) <= 8


def test_hues_differ_by_45_degrees_whatever_their_variation() -> None:
    world = CaptionedWorld(things=(1, 1))
    seen = defaultdict(list)
    for board in boards(count=300, things=(1, 1)):
        picture = world.draw(board)
        mean = np.median(picture.image[picture.instances > 0], axis=0) / 255
        seen[COLOURS[board.things[0].colour]].append(360 * colorsys.rgb_to_hsv(*mean)[0])
    spans = sorted(
        (HUES[c] + min(d), HUES[c] + max(d))
        for c, d in ((c, [(h - HUES[c] + 180) % 360 - 180 for h in seen[c]]) for c in HUES)
    )
    gaps = [b[0] - a[1] for a, b in zip(spans, [*spans[1:], (spans[0][0] + 360, 0)], strict=True)]
    assert min(gaps) >= 45


def test_masks_are_where_the_cells_are_and_wide_enough() -> None:
    world = CaptionedWorld(things=(1, 1))
    for board in boards(count=300, things=(1, 1)):
        thing, mask = board.things[0], world.draw(board).instances
        rows, columns = np.nonzero(mask)
        assert set(np.unique(mask)) == {0, 1}
        assert columns.max() - columns.min() + 1 >= 16
        middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        cell = 64 / 3
        assert abs(middle[0] + 0.5 - (thing.row + 0.5) * cell) <= 0.1 * cell + 1
        assert abs(middle[1] + 0.5 - (thing.column + 0.5) * cell) <= 0.1 * cell + 1


def test_shapes_have_the_area_of_their_outline() -> None:
    share = defaultdict(list)
    world = CaptionedWorld(size=256, things=(1, 1))
    for board in boards(count=60, size=256, things=(1, 1)):
        mask = world.draw(board).instances
        thing = board.things[0]
        radius = 0.3 * 128 if thing.large else 0.2 * 128
        share[thing.shape].append(mask.sum() / radius**2)
    triangle = 3 * np.sqrt(3) * 0.58**2  # by the radius of its inner circle
    expected = {"disc": np.pi, "square": 4, "triangle": triangle, "cross": 4 * 2 * 0.36 - 0.72**2}
    for shape, areas in share.items():
        assert np.mean(areas) == pytest.approx(expected[SHAPES[shape]], rel=0.06), SHAPES[shape]


def test_large_things_are_wider_where_they_fit() -> None:
    board = boards(count=1, size=96)[0]
    widths = []
    for large in (False, True):
        one = Board((Thing(0, 1, large, 4),), board.key)
        columns = np.nonzero(CaptionedWorld(size=96).draw(one).instances)[1]
        widths.append(columns.max() - columns.min() + 1)
    assert widths[1] / widths[0] >= 1.38  # pixels are whole


def test_a_thing_that_is_replaced_leaves_the_other_pixels_as_they_are() -> None:
    world = CaptionedWorld(things=(3, 3))
    for index in range(20):
        board = world.board(index)
        first, second = (
            world.draw(Board((replace(board.things[0], large=False, colour=c), *board.things[1:]), board.key))
            for c in (0, 7)
        )
        changed = (first.image != second.image).any(axis=2)
        rows, columns = np.nonzero(first.instances == 1)
        inside = np.zeros((64, 64), bool)
        inside[max(0, rows.min() - 2) : rows.max() + 3, max(0, columns.min() - 2) : columns.max() + 3] = True
        assert changed.any()
        assert not changed[~inside].any()


@pytest.mark.parametrize("split", SPLITS)
def test_boards_have_different_pairs_and_cells_and_keep_the_novel_pairs_apart(split) -> None:
    novel = {(c, s) for c in range(8) for s in range(4) if Thing(c, s, False, 0).novel}
    assert len(novel) == 8
    seen = set()
    for board in boards(split, 1500):
        pairs = [(thing.colour, thing.shape) for thing in board.things]
        assert len(set(pairs)) == len({thing.cell for thing in board.things}) == len(pairs)
        assert bool(novel & set(pairs)) == (split == "novel")
        seen |= set(pairs)
    everything = {(c, s) for c in range(8) for s in range(4)}
    assert seen == (everything if split == "novel" else everything - novel)


def naive(board: Board, text: str) -> str:
    """The answer to a question, from its words and a table of the things."""
    words = text.split()
    table = [
        {"colour": COLOURS[t.colour], "shape": SHAPES[t.shape], "x": t.cell % 3, "y": t.cell // 3}
        for t in board.things
    ]

    def look(colour, shape):
        return [row for row in table if row["colour"] == colour and row["shape"] == shape]

    if text.startswith("what colour"):
        (row,) = [row for row in table if row["shape"] == words[-1]]
        return row["colour"]
    if text.startswith("what shape"):
        (row,) = [row for row in table if row["colour"] == words[-2]]
        return row["shape"]
    if text.startswith("how many"):
        return NUMBERS[len([row for row in table if words[2] in (row["colour"], "things")])]
    if text.startswith("where"):
        (row,) = look(*words[-2:])
        return f"{ROWS[row['y']]} {COLUMNS[row['x']]}"
    if text.startswith("is there"):
        return "yes" if look(*words[-2:]) else "no"
    (first,), (second,) = look(*words[2:4]), look(*words[-2:])
    line = "x" if "left" in words else "y"
    assert first[line] != second[line]
    return "yes" if first[line] < second[line] else "no"


@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_priors(split) -> None:
    """Answers against the naive ones; their frequencies by chi-square, and yes and no for each question."""
    priors: dict[str, Counter] = defaultdict(Counter)
    for index, board in enumerate(boards(split, 3000)):
        for number, family in enumerate(FAMILIES):
            question = ask(board, family, np.random.default_rng([index, number]))
            if question is not None:
                assert question.answer == naive(board, question.text), question.text
                assert set(f"{question.text} {question.answer}".split()) <= set(VOCABULARY)
                general = question.text == "how many things are there"
                priors["count all" if general else family][question.answer] += 1
                priors[question.text][question.answer] += 1
    sizes = {"colour": 8, "shape": 4, "count": 4, "count all": 4, "where": 9, "exist": 2, "relation": 2}
    if split == "novel":  # a board needs a novel pair, so boards of one and of four things are not alike
        del sizes["count"], sizes["count all"]
    for family, size in sizes.items():
        counts = np.array(list(priors[family].values()))
        assert len(counts) == size, (family, priors[family])
        assert counts.sum() > 180
        # Six standard deviations: twelve tables are looked at, always at the same questions.
        chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi <= (size - 1) + 6 * np.sqrt(2 * (size - 1)), (family, priors[family])
    if split != "novel":
        for text in (
            text for text in priors if text.startswith("is there") and sum(priors[text].values()) > 40
        ):
            share = priors[text]["yes"] / sum(priors[text].values())
            assert abs(share - 0.5) <= 4 * 0.5 / np.sqrt(sum(priors[text].values())), text


def test_a_question_that_no_board_answers_is_none() -> None:
    lone = Board((Thing(0, 1, False, 4),), (1, 2))
    rng = np.random.default_rng(0)
    assert ask(lone, "exist", rng) is None
    assert ask(lone, "relation", rng) is None
    assert ask(lone, "where", rng).answer == "middle centre"
    pairs = [(0, 1), (0, 2), (1, 1), (1, 2)]
    twins = Board(tuple(Thing(*pair, False, cell) for cell, pair in enumerate(pairs)), (1,))
    assert ask(twins, "colour", rng) is None
    assert ask(twins, "shape", rng) is None
    with pytest.raises(ValueError, match="no family 'color'; there is: colour"):
        ask(lone, "color", rng)


def test_descriptions_name_every_thing_with_its_place() -> None:
    board = Board((Thing(6, 0, True, 8), Thing(0, 1, False, 1)), (1,))
    assert name(board.things[0]) == "a white disc"
    assert describe(board) == "a red square at the top centre and a white disc at the bottom right"
    for board in boards(count=200):
        assert set(describe(board).split()) <= set(VOCABULARY)
        assert describe(board).count(" at the ") == len(board.things)
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= 75


def bag(board: Board) -> tuple[Counter, ...]:
    return tuple(
        Counter(getattr(t, key) for t in board.things) for key in ("colour", "shape", "cell", "large")
    )


@pytest.mark.parametrize("split", SPLITS)
def test_an_exchange_changes_who_has_what_and_nothing_else(split) -> None:
    rng = np.random.default_rng(0)
    twins = [(board, exchanged(board, rng)) for board in boards(split, 500)]
    assert sum(twin is not None for _, twin in twins) > 150
    for board, twin in twins:
        if twin is None:
            continue
        assert bag(twin) == bag(board)
        assert twin.key == board.key
        assert Counter(describe(twin).split()) == Counter(describe(board).split())
        assert describe(twin) != describe(board)
        if split != "novel":
            assert not any(thing.novel for thing in twin.things)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quads(split, family) -> None:
    """Answers are those of the naive function; the same question and the same board have two answers each."""
    world = CaptionedWorld(split=split)
    for index in range(60):
        item = quad(world, family, index)
        assert item == quad(world, family, index)
        assert item.boards[0].key == item.boards[1].key
        if family != "count":
            assert bag(item.boards[0]) == bag(item.boards[1])
        for k, board in enumerate(item.boards):
            assert tuple(naive(board, text) for text in item.questions) == item.answers[k]
        assert item.answers[0][0] != item.answers[1][0]
        assert item.answers[0][1] != item.answers[1][1]
        assert item.answers[0][0] != item.answers[0][1]
        assert item.answers[1][0] != item.answers[1][1]


def test_answers_from_the_question_alone_or_the_board_alone_never_get_a_group() -> None:
    """Also for the answerer that has seen the answers and gives each question its most frequent one."""
    world = CaptionedWorld(split="test")
    items = [quad(world, family, index) for family in FAMILIES for index in range(50)]
    by_text, by_board = defaultdict(Counter), defaultdict(Counter)
    for item in items:
        for k, answers in enumerate(item.answers):
            for text, answer in zip(item.questions, answers, strict=True):
                by_text[text][answer] += 1
                by_board[item.boards[k]][answer] += 1

    def groups(reply) -> tuple[int, float]:
        right = [
            [
                reply(item.boards[k], text) == a
                for k in (0, 1)
                for text, a in zip(item.questions, item.answers[k], strict=True)
            ]
            for item in items
        ]
        return sum(all(four) for four in right), max(sum(four) for four in right)

    assert groups(lambda board, text: by_text[text].most_common(1)[0][0]) == (0, 2)
    assert groups(lambda board, text: by_board[board].most_common(1)[0][0]) == (0, 2)
    assert groups(naive) == (len(items), 4)


def test_quads_need_two_things() -> None:
    world = CaptionedWorld(things=(1, 1))
    assert {answer for answers in quad(world, "count", 0).answers for answer in answers} == {"zero", "one"}
    with pytest.raises(ValueError, match=r"of 1 to 1 things make a quad of 'where': .*things=\(2, 4\)"):
        quad(world, "where", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tset"}, "no split 'tset'; there is: train, test, novel"),
        ({"things": (0, 2)}, "from 1 to 4 things"),
        ({"things": (3, 2)}, "from 1 to 4 things"),
        ({"things": (1, 5)}, "from 1 to 4 things"),
        ({"size": 31}, "size=31, but it must be 32 or more"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionedWorld(**settings)


def moving(clip) -> np.ndarray:
    """Where the pixels are that change in the clip, by frame: the mean of row and column."""
    still = np.median(clip.frames, axis=0)
    changed = np.abs(clip.frames - still).sum(axis=3) > 60
    return np.array([np.argwhere(frame).mean(axis=0) for frame in changed if frame.any()])


def test_the_label_of_a_clip_is_where_its_thing_goes() -> None:
    world = CaptionedWorld(things=(1, 3))
    ways = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for index in range(24):
        clip = world.clip(index, 9)
        assert clip.frames.shape == (9, 64, 64, 3)
        assert np.array_equal(clip.frames, world.clip(index, 9).frames)
        path = moving(clip)
        way = np.array(ways[DIRECTIONS[clip.label]])
        step = (path[-1] - path[0]) @ way
        assert step > 8, (index, path)
        assert clip.label == index % 4


def test_the_middle_of_a_path_does_not_depend_on_its_direction() -> None:
    """Two clips with the same random numbers and opposite directions have the same frame in the middle."""
    world = CaptionedWorld(things=(1, 3))
    for index in range(8):
        clip = world.clip(index, 9)
        board = clip.board
        for motion in ((0.4, 0.0), (-0.4, 0.0), (0.0, 0.3), (0.0, -0.3)):
            turned = Board((*board.things[:-1], replace(board.things[-1], motion=motion)), board.key)
            assert np.array_equal(world.draw(turned).image, clip.frames[4])


def test_a_thing_stays_in_the_image_while_it_moves() -> None:
    world, checked = CaptionedWorld(things=(1, 1)), 0
    for index in range(60):
        clip = world.clip(index, 3)
        if COLOURS[clip.board.things[0].colour] in HUES:
            chroma = clip.frames.max(axis=3).astype(int) - clip.frames.min(axis=3)
            areas = (chroma > 60).sum(axis=(1, 2))
            assert areas.min() > 0.93 * areas.max(), (index, areas)
            checked += 1
    assert checked > 30
