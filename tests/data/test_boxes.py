"""Boxes as text, and questions about regions of boards, against loops over pixels."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from dinokit.data.boxes import box_in, box_iou, box_text, boxes_in, with_boxes
from dinokit.data.scenes.captioned import COLOURS, SHAPES, SPLITS, CaptionedWorld
from dinokit.data.scenes.regions import REGIONS, STEPS, WORDS, group_of, question_of
from dinokit.data.scenes.sentences import FAMILIES, VOCABULARY, ask, quad


def test_overlap_of_boxes_is_that_of_their_pixels():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = (
            [int(v) for v in (*low, *(low + rng.integers(1, 9, 2)))] for low in rng.integers(0, 9, (2, 2))
        )
        pixels = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
        assert box_iou(a, b) == pytest.approx(len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))


def test_a_box_is_written_and_read():
    assert box_text((0.125, 0.5, 0.75, 1.0)) == "[0.12, 0.50, 0.75, 1.00]"
    text = "from [0.1,0.2,0.3,0.4] to [ 10, 20 , 30, 40.5 ], not [1, 2, 3] and [1, 2, 3, 4, 5]"
    assert boxes_in(text) == [(0.1, 0.2, 0.3, 0.4), (10, 20, 30, 40.5)]
    assert with_boxes(text, lambda box: (0, 0, 1, 1) if box[0] > 1 else None) == text.replace(
        "[ 10, 20 , 30, 40.5 ]", "[0.00, 0.00, 1.00, 1.00]"
    )
    assert boxes_in("[1e-05, .25, 5.E-1, +1]") == [(0.00001, 0.25, 0.5, 1)]
    for nothing in ("", "0.1 0.2 0.3 0.4", "[0.3, 0.2, 0.3, 0.4]", "[0.1, 0.4, 0.3, 0.2]"):
        assert box_in(nothing) is None


def pixels_of(world, board) -> dict[str, tuple[float, ...]]:
    """The box of each thing by its name, from the lines and columns in which it has a pixel."""
    instances, found = world.draw(board).instances, {}
    for number, thing in enumerate(board.things, start=1):
        xs, ys = ([k for k, line in enumerate(lines) if number in line] for lines in (instances.T, instances))
        edges = min(xs), min(ys), max(xs) + 1, max(ys) + 1
        found[f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}"] = tuple(e / world.size for e in edges)
    return found


@pytest.mark.parametrize("size", [64, 96])
def test_boxes_are_those_of_the_pixels(size):
    """Questions in words, read by a function that knows the pixels alone; edges are rounded to 1/32."""
    world, answered = CaptionedWorld(size, split="test"), Counter()
    for index in range(15):
        board = world.board(index)
        truth = pixels_of(world, board)
        ground = question_of(world, board, "ground", np.random.default_rng(index))
        thing = ground.text.removeprefix("what is the box of the ")
        assert np.abs(np.subtract(box_in(ground.answer), truth[thing])).max() <= 0.5 / STEPS + 0.0051
        point = question_of(world, board, "point", np.random.default_rng(index))
        asked = box_in(point.text)
        nearest = max(truth, key=lambda name: box_iou(truth[name], asked))
        assert point.text.startswith("which thing is in [")
        assert point.answer == f"a {nearest}"
        assert box_iou(truth[nearest], asked) > 0.7
        answered[list(truth).index(thing), len(truth)] += 1
        words = {word for each in (ground, point) for word in f"{each.text} {each.answer}".split()}
        assert words <= {*VOCABULARY, *WORDS}
    assert len(answered) > 4
    assert not {*VOCABULARY} & {*WORDS}
    assert len({*WORDS}) == len(WORDS)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", REGIONS)
def test_a_group_has_four_answers_of_which_a_question_or_a_picture_alone_has_two(split, family):
    world = CaptionedWorld(split=split)
    for index in range(8):
        item = group_of(world, family, index)
        assert item == group_of(world, family, index)
        for board, answers in zip(item.boards, item.answers, strict=True):
            truth = pixels_of(world, board)
            for text, answer in zip(item.questions, answers, strict=True):
                if family == "ground":
                    thing = text.removeprefix("what is the box of the ")
                    assert box_iou(truth[thing], box_in(answer)) > 0.7
                else:
                    assert box_iou(truth[answer.removeprefix("a ")], box_in(text)) > 0.7
        (a, b), (c, d) = item.answers
        for one, other in ((a, b), (c, d), (a, c), (b, d)):
            assert one != other
            if family == "ground":  # no box overlaps two that are apart by more than half of each
                assert box_iou(box_in(one), box_in(other)) == 0


def test_the_other_families_are_asked_as_before():
    world = CaptionedWorld(split="test")
    for family in FAMILIES:
        for index in range(2):
            board, rngs = world.board(index), [np.random.default_rng([index, 3]) for _ in range(2)]
            assert question_of(world, board, family, rngs[0]) == ask(board, family, rngs[1])
            assert rngs[0].random() == rngs[1].random()
            assert group_of(world, family, index) == quad(world, family, index)
    with pytest.raises(ValueError, match="no family 'size'"):
        question_of(world, world.board(0), "size", np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"a group of 'ground': .*things=\(2, 4\)"):
        group_of(CaptionedWorld(things=(1, 1)), "ground", 0)


def test_codes_show_colour_outline_size_and_cell_and_nothing_else():
    """Read back from the squares; two boards with equal things have equal codes, whatever their key."""
    world, seen = CaptionedWorld(72, truth=True), defaultdict(set)
    for index in range(40):
        board = world.board(index)
        image = world.draw(board).image
        assert image.shape == (72, 72, 3)
        squares = image.reshape(18, 4, 18, 4, 3).transpose(0, 2, 1, 3, 4).reshape(18, 18, -1)
        assert (squares.min(axis=2) == squares.max(axis=2)).all()
        white = squares[:, :, 0].reshape(3, 6, 3, 6).transpose(0, 2, 1, 3).reshape(9, 36) == 255
        for cell in range(9):
            codes = np.flatnonzero(white[cell]).tolist()
            assert codes.pop() == 14 + cell
            things = [thing for thing in board.things if thing.cell == cell]
            assert codes == [n for t in things for n in (t.colour, 8 + t.shape, 12 + t.large)]
            seen[cell].add(tuple(codes))
    assert all(len(found) > 3 for found in seen.values())
    with pytest.raises(ValueError, match="size=64 must be a multiple of 18, such as 72"):
        CaptionedWorld(64, truth=True)
