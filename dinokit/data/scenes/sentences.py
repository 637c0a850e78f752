"""Sentences about boards: descriptions, questions with their answers, and pairs of boards that test a reader.

A question is made from its meaning, a small tuple, and the answer is computed from the meaning and the board.
Within a family every answer is equally frequent, and yes and no are so for each single question, so that
nothing is gained from a question without its image. One thing is, because eight pairs of colour and outline
are kept for the split `novel`: the outline of a question excludes two of eight colours, a colour one of four
outlines.

The meanings:
    ("colour", shape), ("shape", colour): of the one thing with it
    ("count",), ("count", colour): of all things, or of those of a colour
    ("where", colour, shape), ("exist", colour, shape)
    ("left", colour, shape, colour, shape), ("above", ...): whether the first is left of, or above, the second
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dinokit.data.scenes.captioned import (
    COLOUR_COUNTS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Board,
    CaptionedWorld,
    Thing,
    valid,
)

FAMILIES = ("colour", "shape", "count", "where", "exist", "relation")
NUMBERS = ("zero", "one", "two", "three", "four")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_OTHERS = (
    "a the an there here is are it and at of in this that what which how many where does do thing things "
    "picture board colour shape way move moves moving above below yes no not describe show me say answer "
    "with word only"
)
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys([*COLOURS, *SHAPES, *NUMBERS, *ROWS, *COLUMNS, *DIRECTIONS, *_OTHERS.split()])
)
ATTEMPTS = 2_000  # to draw the boards of a quad

Meaning = tuple[Any, ...]


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    meaning: Meaning


@dataclass(frozen=True)
class Quad:
    """Two boards and two questions: the boards differ in the answer to each, the questions on each board.

    Whoever answers from the question alone, or from the board alone, is right twice at most.
    """

    boards: tuple[Board, Board]
    questions: tuple[str, str]
    answers: tuple[tuple[str, str], tuple[str, str]]  # [board][question]


def name(thing: Thing) -> str:
    """As in 'a red disc'."""
    return f"a {COLOURS[thing.colour]} {SHAPES[thing.shape]}"


def place(thing: Thing) -> str:
    """As in 'top left'."""
    return f"{ROWS[thing.row]} {COLUMNS[thing.column]}"


def describe(board: Board) -> str:
    """All things with their places, row by row: 'a red disc at the top left and a blue cross at the ...'."""
    things = sorted(board.things, key=lambda thing: thing.cell)
    return " and ".join(f"{name(thing)} at the {place(thing)}" for thing in things)


def answer(board: Board, meaning: Meaning) -> str | None:
    """The answer to a question; None where the board does not hold what it asks for exactly once."""
    kind, *rest = meaning
    match kind:
        case "colour":
            found = [thing for thing in board.things if thing.shape == rest[0]]
            return COLOURS[found[0].colour] if len(found) == 1 else None
        case "shape":
            found = [thing for thing in board.things if thing.colour == rest[0]]
            return SHAPES[found[0].shape] if len(found) == 1 else None
        case "count":
            return NUMBERS[sum(not rest or thing.colour == rest[0] for thing in board.things)]
        case "exist":
            return "yes" if _find(board, *rest) else "no"
        case "where":
            thing = _find(board, *rest)
            return place(thing) if thing else None
    first, second = _find(board, *rest[:2]), _find(board, *rest[2:])
    if first is None or second is None:
        return None
    lines = [(thing.column if kind == "left" else thing.row) for thing in (first, second)]
    return None if lines[0] == lines[1] else "yes" if lines[0] < lines[1] else "no"


def phrase(meaning: Meaning) -> str:
    """The question in words."""
    kind, *rest = meaning
    match kind:
        case "colour":
            return f"what colour is the {SHAPES[rest[0]]}"
        case "shape":
            return f"what shape is the {COLOURS[rest[0]]} thing"
        case "count":
            return f"how many {COLOURS[rest[0]] + ' ' if rest else ''}things are there"
        case "exist":
            return f"is there a {_words(*rest)}"
        case "where":
            return f"where is the {_words(*rest)}"
    side = "left of" if kind == "left" else "above"
    return f"is the {_words(*rest[:2])} {side} the {_words(*rest[2:])}"


def ask(board: Board, family: str, rng: np.random.Generator) -> Question | None:
    """A question of a family, or None where the board holds none with the answer that was drawn.

    Each answer is equally frequent over the boards of a world: yes and no are drawn only where both are
    possible; a count of a colour is drawn first, so that boards without it give no question. That one is
    exact for boards of one to four things.

    Raises:
        ValueError: if there is no such family.
    """
    things = [board.things[k] for k in rng.permutation(len(board.things)).tolist()]
    colours, shapes = Counter(t.colour for t in things), Counter(t.shape for t in things)
    meaning: Meaning | None = None
    match family:
        case "colour":
            meaning = next((("colour", t.shape) for t in things if shapes[t.shape] == 1), None)
        case "shape":
            meaning = next((("shape", t.colour) for t in things if colours[t.colour] == 1), None)
        case "count":
            meaning = _count(colours, rng)
        case "where":
            meaning = ("where", things[0].colour, things[0].shape)
        case "exist":
            absent = _absent(board, rng)
            present = (things[0].colour, things[0].shape)
            if absent is not None:
                meaning = ("exist", *(present if rng.random() < 0.5 else absent))
        case "relation":
            meaning = _relation(things, ("left", "above")[int(rng.integers(2))])
        case _:
            raise ValueError(f"There is no family '{family}'; there is: {', '.join(FAMILIES)}.")
    found = None if meaning is None else answer(board, meaning)
    return None if meaning is None or found is None else Question(phrase(meaning), found, meaning)


def exchanged(board: Board, rng: np.random.Generator) -> Board | None:
    """The board with the colours of two things exchanged: the same colours and outlines, bound otherwise.

    None where no two things can be, as with one thing or one colour. A board without a novel pair gets none.
    """
    for i, j in couples_of(board, rng):
        if twin := swapped(board, i, j, "colour"):
            return twin
    return None


def quad(world: CaptionedWorld, family: str, index: int) -> Quad:
    """Quad `index` of a family, a function of (seed, split, index); in the split novel, of a novel pair.

    Raises:
        ValueError: if there is no such family, or if the boards of the world have too few things for it.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no family '{family}'; there is: {', '.join(FAMILIES)}.")
    rng, key = world.rng("quad", index, FAMILIES.index(family))
    for _ in range(ATTEMPTS):
        board = Board(world.draw_things(rng), key)
        drawn = _twin(board, family, rng)
        if drawn is None:
            continue
        twin, meanings = drawn
        answers = [[answer(one, meaning) for meaning in meanings] for one in (board, twin)]
        (a, b), (c, d) = answers
        if a and b and c and d and a != c and b != d and a != b and c != d:
            return Quad((board, twin), (phrase(meanings[0]), phrase(meanings[1])), ((a, b), (c, d)))
    raise ValueError(
        f"captioned: no two boards of {world.things[0]} to {world.things[1]} things make a quad of "
        f"'{family}': give the world things=(2, 4)."
    )


def _twin(
    board: Board, family: str, rng: np.random.Generator
) -> tuple[Board, tuple[Meaning, Meaning]] | None:
    """Another board and two questions, which may still have equal answers."""
    if family == "count":
        one, two = rng.permutation(len(COLOURS))[:2].tolist()
        other = {one: two, two: one}
        things = tuple(replace(t, colour=other.get(t.colour, t.colour)) for t in board.things)
        novel = any(thing.novel for thing in board.things)
        return (Board(things, board.key), (("count", one), ("count", two))) if valid(things, novel) else None
    couples = couples_of(board, rng)
    if not couples:
        return None
    i, j = couples[0]
    first, second = board.things[i], board.things[j]
    twin = swapped(board, i, j, "cell" if family in ("where", "relation") else "colour")
    if twin is None:
        return None
    pairs = (first.colour, first.shape), (second.colour, second.shape)
    side = ("left", "above")[int(rng.integers(2))]
    meanings: dict[str, tuple[Meaning, Meaning]] = {
        "colour": (("colour", first.shape), ("colour", second.shape)),
        "shape": (("shape", first.colour), ("shape", second.colour)),
        "where": (("where", *pairs[0]), ("where", *pairs[1])),
        "exist": (("exist", *pairs[0]), ("exist", second.colour, first.shape)),
        "relation": ((side, *pairs[0], *pairs[1]), (side, *pairs[1], *pairs[0])),
    }
    return twin, meanings[family]


def couples_of(board: Board, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The pairs of things in random order; those with a novel thing come first, in which it is the first."""
    n = len(board.things)
    couples = [(i, j) for i in range(n) for j in range(n) if i != j]
    couples = [couples[k] for k in rng.permutation(len(couples)).tolist()]
    return sorted(couples, key=lambda couple: not board.things[couple[0]].novel)


def swapped(board: Board, i: int, j: int, attribute: str) -> Board | None:
    """The board with an attribute of two things exchanged; None if nothing changes or it is not allowed."""
    things = list(board.things)
    values = [getattr(things[k], attribute) for k in (j, i)]
    if values[0] == values[1]:
        return None
    for k, value in zip((i, j), values, strict=True):
        things[k] = replace(things[k], **{attribute: value})
    novel = any(thing.novel for thing in board.things)
    return Board(tuple(things), board.key) if valid(tuple(things), novel) else None


def _count(colours: Counter[int], rng: np.random.Generator) -> Meaning | None:
    """A count of all things, or of a colour, of which the rarest answer is taken wherever it is possible."""
    if rng.random() < 0.5:
        return ("count",)
    wanted = int(rng.integers(len(_CHANCES)))
    matching = [colour for colour in range(len(COLOURS)) if colours[colour] == wanted]
    if not matching or rng.random() >= min(_CHANCES) / _CHANCES[wanted]:
        return None
    return ("count", matching[int(rng.integers(len(matching)))])


def _chances() -> list[float]:
    """How often a board has a colour with 0, 1, 2 and 3 things, if 1 to 4 things are equally frequent."""
    boards = COLOUR_COUNTS.values()
    return [1.0] + [
        sum(sum(k in counts for counts in board) / len(board) for board in boards) / len(boards)
        for k in (1, 2, 3)
    ]


_CHANCES = _chances()


def _absent(board: Board, rng: np.random.Generator) -> tuple[int, int] | None:
    """A pair that is not there, though its colour and its outline are."""
    present = {(thing.colour, thing.shape) for thing in board.things}
    novel = any(thing.novel for thing in board.things)
    pairs = {(one.colour, other.shape) for one in board.things for other in board.things} - present
    listed = sorted(pair for pair in pairs if novel or not Thing(*pair, False, 0).novel)
    return listed[int(rng.integers(len(listed)))] if listed else None


def _relation(things: list[Thing], side: str) -> Meaning | None:
    for k, first in enumerate(things):
        for second in things[k + 1 :]:
            lines = [(thing.column if side == "left" else thing.row) for thing in (first, second)]
            if lines[0] != lines[1]:
                return (side, first.colour, first.shape, second.colour, second.shape)
    return None


def _find(board: Board, colour: int, shape: int) -> Thing | None:
    return next((t for t in board.things if (t.colour, t.shape) == (colour, shape)), None)


def _words(colour: int, shape: int) -> str:
    return f"{COLOURS[colour]} {SHAPES[shape]}"
