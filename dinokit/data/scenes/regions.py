"""Questions about regions of boards: the box of a thing, and the thing in a box.

    ground   what is the box of the red disc       [0.06, 0.38, 0.31, 0.66]
    point    which thing is in [0.06, 0.38, 0.31, 0.66]       a red disc

A box is that of the pixels that a thing has in its picture, so it says more than the cell of the board. Its
edges are rounded to 1/32 of the side, so that few words say every box. The questions of the other families
(dinokit.data.scenes.sentences) are asked here too, unchanged.
"""

import numpy as np

from dinokit.data.boxes import Box, box_iou, box_text
from dinokit.data.scenes.captioned import Board, CaptionedWorld
from dinokit.data.scenes.sentences import (
    ATTEMPTS,
    FAMILIES,
    Quad,
    Question,
    ask,
    couples_of,
    name,
    quad,
    swapped,
)

REGIONS = ("ground", "point")
STEPS = 32  # of an edge, from one side of the image to the other
_EDGES = [f"{step / STEPS:.2f}" for step in range(STEPS + 1)]
# What a tokenizer of words has to know beside the vocabulary of the other families.
WORDS = (
    "box",
    *(f"[{edge}," for edge in _EDGES),
    *(f"{edge}," for edge in _EDGES),
    *(f"{edge}]" for edge in _EDGES),
)


def boxes_of(world: CaptionedWorld, board: Board) -> list[Box]:
    """The boxes of the things of a board, in parts of the picture's side, rounded."""
    instances, found = world.draw(board).instances, []
    for number in range(1, len(board.things) + 1):
        rows, columns = np.nonzero(instances == number)
        corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        left, top, right, bottom = (round(STEPS * float(edge) / world.size) / STEPS for edge in corners)
        found.append((left, top, right, bottom))
    return found


def question_of(
    world: CaptionedWorld, board: Board, family: str, rng: np.random.Generator
) -> Question | None:
    """A question of any family on a board of this world; None as ask().

    Raises:
        ValueError: if there is no such family.
    """
    if family not in REGIONS:
        return ask(board, family, rng)
    number = int(rng.integers(len(board.things)))
    thing, box = board.things[number], boxes_of(world, board)[number]
    if family == "ground":
        return Question(_which(board, number), box_text(box), (family, thing.colour, thing.shape))
    return Question(_inside(box), name(thing), (family, *box))


def group_of(world: CaptionedWorld, family: str, index: int) -> Quad:
    """Two boards and two questions of any family, as quad().

    For `ground` two things have exchanged their cells, and no box of one overlaps that of the other; for
    `point` they have exchanged their colours, so that the boxes are the same.

    Raises:
        ValueError: as quad().
    """
    if family not in REGIONS:
        return quad(world, family, index)
    rng, key = world.rng("quad", index, len(FAMILIES) + REGIONS.index(family))
    for _ in range(ATTEMPTS):
        board = Board(world.draw_things(rng), key)
        for i, j in couples_of(board, rng)[:1]:
            twin = swapped(board, i, j, "cell" if family == "ground" else "colour")
            if twin is None:
                continue
            first, second = boxes_of(world, board), boxes_of(world, twin)
            if family == "point":
                a, b, c, d = (name(each.things[k]) for each in (board, twin) for k in (i, j))
                return Quad((board, twin), (_inside(first[i]), _inside(first[j])), ((a, b), (c, d)))
            boxes = first[i], first[j], second[i], second[j]
            if not any(box_iou(boxes[m], boxes[n]) for m, n in ((0, 1), (2, 3), (0, 2), (1, 3))):
                a, b, c, d = map(box_text, boxes)
                return Quad((board, twin), (_which(board, i), _which(board, j)), ((a, b), (c, d)))
    raise ValueError(
        f"captioned: no two boards of {world.things[0]} to {world.things[1]} things make a group of "
        f"'{family}': give the world things=(2, 4)."
    )


def _which(board: Board, number: int) -> str:
    return f"what is the box of the {name(board.things[number]).removeprefix('a ')}"


def _inside(box: Box) -> str:
    return f"which thing is in {box_text(box)}"
