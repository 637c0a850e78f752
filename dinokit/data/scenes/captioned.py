"""Renders boards: a few things of one colour and one outline each in the 3 x 3 cells of a grey ground.

Everything that a sentence can say of a board is in its numbers, so captions, questions and answers are
computed from them (dinokit.data.scenes.sentences) and the pixels show nothing else. Hues are 45 degrees apart
or more, a thing is 16 pixels wide or more from an image side of 64 pixels on, and the ground is grey with
grey blotches: a coloured ground hides the colour of things in mean features.

Eight of the 32 pairs of colour and outline are never in the splits `train` and `test`. A board of the split
`novel` has one of them at least.

Letters: S side of the image in pixels, T frames of a clip. The image spans [-1, 1] in both directions, as in
dinokit.data.scenes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.data.scenes import Floats, Labels, _bumps, _colours, _noise, locate

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
SHAPES = ("disc", "square", "triangle", "cross")
SPLITS = ("train", "test", "novel")
DIRECTIONS = ("left", "right", "up", "down")  # of clips; a clip that runs backwards has label ^ 1

# How many things have the same colour, by the number of things: without repeated colours nothing can be
# counted.
COLOUR_COUNTS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((1, 1), (2,)),
    3: ((1, 1, 1), (2, 1), (3,)),
    4: ((1, 1, 1, 1), (2, 1, 1), (2, 2), (3, 1)),
}
CELLS = 9
CODES = 6  # squares along a side of a cell, where the truth is shown in place of things
CELL = 2 / 3  # side of a cell
HUES = np.array([0, 120, 232, 57, 290, 180]) / 360  # of the colours that have one
HUE_RANGE = 3 / 360
SMALL, LARGE = 17, 0.3  # radius of a small thing times the side in pixels; radius of a large thing
SMALL_RADIUS = (0.2, 0.27)  # least and most radius of a small thing, whatever the side
TURN = math.radians(10)
SPEED = (18 / 64, 30 / 64)  # widths of the image over a clip
_STREAM = 64  # dinokit.data.scenes uses the numbers below


@dataclass(frozen=True)
class Thing:
    colour: int  # place in COLOURS
    shape: int  # place in SHAPES
    large: bool
    cell: int  # 0 to 8, row by row
    motion: tuple[float, float] = (0.0, 0.0)  # x and y, in widths of the image over a clip

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def novel(self) -> bool:
        """Whether its colour and outline are together in the split `novel` only."""
        return self.colour % len(SHAPES) == self.shape


@dataclass(frozen=True)
class Board:
    """The things of an image, no two of them with the same colour and outline or in the same cell."""

    things: tuple[Thing, ...]
    key: tuple[int, ...]  # seeds the ground and the exact place, pose and colour of what is in each cell


@dataclass(frozen=True)
class Picture:
    image: Labels  # (S, S, 3)
    instances: Labels  # (S, S): 1 + the place of the thing in board.things, 0 on the ground


@dataclass(frozen=True)
class Clip:
    """One thing moves, the others and the ground are still."""

    frames: Labels  # (T, S, S, 3)
    label: int  # place in DIRECTIONS
    board: Board  # the thing that moves is its last


def valid(things: tuple[Thing, ...], novel: bool) -> bool:
    """Whether a board may have these things: cells and pairs differ, and novel pairs only where allowed."""
    pairs = {(thing.colour, thing.shape) for thing in things}
    cells = {thing.cell for thing in things}
    return len(pairs) == len(cells) == len(things) and (novel or not any(thing.novel for thing in things))


class CaptionedWorld:
    """Draws boards, pictures and clips; each is a function of its index and of the arguments here."""

    def __init__(
        self, size: int = 64, seed: int = 0, split: str = "train", things: tuple[int, int] = (1, 4),
        truth: bool = False,
    ) -> None:  # fmt: skip
        """Prepare to draw.

        Args:
            size: S, the side of the images in pixels, 32 or more.
            seed: 0 or more.
            split: train, test or novel.
            things: fewest and most on a board, from 1 to 4.
            truth: show what is known of each cell as black and white squares, in place of the picture.

        Raises:
            ValueError: if a number is out of its range, or there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"captioned: there is no split '{split}'; there is: {', '.join(SPLITS)}.")
        if not 1 <= things[0] <= things[1] <= max(COLOUR_COUNTS):
            raise ValueError(
                f"captioned: a board has from 1 to {max(COLOUR_COUNTS)} things, fewest first; got {things}."
            )
        for name, value, least in (("size", size, 32), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"captioned: {name}={value}, but it must be {least} or more.")
        if truth and size % (3 * CODES):
            raise ValueError(
                f"captioned: with truth=true, size={size} must be a multiple of {3 * CODES}, such as 72."
            )
        self.size, self.seed, self.split, self.things, self.truth = size, seed, split, things, truth
        self.novel = split == "novel"
        self._axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
        self._blotches = _bumps(size, 7)
        # 17 pixels wide where that leaves room for large ones, which are 1.4 as wide from a side of 88 on.
        self._small = min(max(SMALL / size, SMALL_RADIUS[0]), SMALL_RADIUS[1])

    def rng(self, stream: str, *index: int) -> tuple[np.random.Generator, tuple[int, ...]]:
        """Random numbers of one item of a stream (board, clip, quad), and its key for Board."""
        number = _STREAM + SPLITS.index(self.split) + len(SPLITS) * ("board", "clip", "quad").index(stream)
        key = (self.seed, number, *index)
        return np.random.Generator(np.random.PCG64(key)), key

    def board(self, index: int) -> Board:
        """Board `index`."""
        rng, key = self.rng("board", index)
        return Board(self.draw_things(rng), key)

    def draw_things(self, rng: np.random.Generator) -> tuple[Thing, ...]:
        """Things for a board, from a number of colours that is independent of which colours these are."""
        things: tuple[Thing, ...] = ()
        while not things or any(thing.novel for thing in things) != self.novel:
            n = int(rng.integers(self.things[0], self.things[1] + 1))
            counts = COLOUR_COUNTS[n][int(rng.integers(len(COLOUR_COUNTS[n])))]
            pairs: list[tuple[int, int]] = []
            for colour, count in zip(rng.permutation(len(COLOURS)).tolist(), counts, strict=False):
                shapes = [k for k in rng.permutation(len(SHAPES)).tolist() if self.novel or k != colour % 4]
                pairs += [(colour, shape) for shape in shapes[:count]]
            order: list[int] = rng.permutation(n).tolist()
            cells: list[int] = rng.permutation(CELLS).tolist()
            large: list[bool] = (rng.random(n) < 0.5).tolist()
            things = tuple(Thing(*pairs[k], large[j], cells[j]) for j, k in enumerate(order))
        return things

    def draw(self, board: Board) -> Picture:
        """The picture of a board. In two boards with one key, cells with equal things have equal pixels."""
        canvas = _Canvas(self, board)
        for number, thing in enumerate(board.things, start=1):
            canvas.paint(thing, number)
        return Picture(self._codes(board) if self.truth else canvas.pixels(), canvas.instances)

    def _codes(self, board: Board) -> Labels:
        """(S, S, 3): in each cell a white square for its colour, outline and size, and one for the cell."""
        numbers = [[len(COLOURS) + len(SHAPES) + 2 + cell] for cell in range(CELLS)]
        for thing in board.things:
            size = len(COLOURS) + len(SHAPES) + thing.large
            numbers[thing.cell] += [thing.colour, len(COLOURS) + thing.shape, size]
        squares = np.zeros((3 * CODES, 3 * CODES), np.uint8)
        for cell, held in enumerate(numbers):
            for number in held:
                row, column = divmod(number, CODES)
                squares[cell // 3 * CODES + row, cell % 3 * CODES + column] = 255
        side = self.size // (3 * CODES)
        return np.repeat(np.kron(squares, np.ones((side, side), np.uint8))[:, :, None], 3, axis=2)

    def clip(self, index: int, frames: int) -> Clip:
        """Clip `index`, whose label is `index` modulo the number of directions.

        The middle of the path is independent of its direction, so the frame in the middle does not tell it;
        the frames without their order tell the axis only.
        """
        rng, key = self.rng("clip", index)
        things = self.draw_things(rng)
        label = index % len(DIRECTIONS)
        step = rng.uniform(*SPEED) * (-1, 1)[label % 2]
        moving = replace(things[-1], motion=(step, 0.0) if label < 2 else (0.0, step))
        board = Board((*things[:-1], moving), key)
        canvas = _Canvas(self, board)
        for number, thing in enumerate(board.things[:-1], start=1):
            canvas.paint(thing, number)
        still = canvas.image
        drawn = []
        for k in range(frames):
            canvas.image = still.copy()
            canvas.paint(moving, len(things), k / max(frames - 1, 1) - 0.5)
            drawn.append(canvas.pixels())
        return Clip(np.stack(drawn), label, board)


class _Canvas:
    """A picture while it is drawn. What is random about a cell does not depend on what the cells hold."""

    def __init__(self, world: CaptionedWorld, board: Board) -> None:
        self.axis, self.size, self.small = world._axis, world.size, world._small
        rng = np.random.Generator(np.random.PCG64([*board.key, 1]))
        self.jitter = rng.uniform(-1, 1, (CELLS, 2)).tolist()
        self.turn = rng.uniform(-TURN, TURN, CELLS).tolist()
        self.zoom = rng.uniform(0, 1, CELLS).tolist()
        hues = np.zeros(CELLS)
        for thing in board.things:
            hues[thing.cell] = HUES[thing.colour] if thing.colour < len(HUES) else 0
        hues = (hues + rng.uniform(-HUE_RANGE, HUE_RANGE, CELLS)) % 1
        self.paints = (
            _colours(rng, hues, (0.75, 0.95), (0.75, 0.95)),
            _colours(rng, hues, (0.0, 0.04), (0.93, 1.0)),
            _colours(rng, hues, (0.0, 0.3), (0.03, 0.1)),
        )
        grey = rng.uniform(0.38, 0.62) + 0.05 * _noise(rng, world._blotches, 1)
        tint = rng.uniform(-0.01, 0.01, (3, 1, 1))
        self.image: Floats = (np.clip(grey, 0.25, 0.75) + tint).astype(np.float32)
        self.grain: Floats = 0.02 * rng.standard_normal((1, self.size, self.size), np.float32)
        self.instances: Labels = np.zeros((self.size, self.size), np.uint8)

    def paint(self, thing: Thing, number: int, time: float = 0.0) -> None:
        """Draw a thing at a time of a clip, -0.5 to 0.5, in the box of pixels that contains it."""
        cell = thing.cell
        zoom = self.zoom[cell]
        radius = LARGE * (0.98 + 0.04 * zoom) if thing.large else self.small * (1 + 0.03 * zoom)
        x, y = self._middle(thing, radius, time)
        reach = 1.3 * radius
        columns, rows = (self._pixels(middle - reach, middle + reach) for middle in (x, y))
        dx, dy = (self.axis[None, columns] - x) / radius, (self.axis[rows, None] - y) / radius
        cos, sin = math.cos(self.turn[cell]), math.sin(self.turn[cell])
        inside = _inside(thing.shape, cos * dx + sin * dy, cos * dy - sin * dx)
        cover = np.clip(0.5 + inside * radius * self.size / 2, 0, 1)
        kind = max(0, thing.colour - len(HUES) + 1)
        image = self.image[:, rows, columns]
        image += cover * (self.paints[kind][cell][:, None, None] - image)
        self.instances[rows, columns][cover >= 0.5] = number

    def pixels(self) -> Labels:
        """(S, S, 3)."""
        pixels = (np.clip(self.image + self.grain, 0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))

    def _middle(self, thing: Thing, radius: float, time: float) -> tuple[float, float]:
        """Where its middle is. A path stays in the image, and its middle says nothing of its direction."""
        room = min(0.1 * CELL, max(0.0, CELL / 2 - radius))
        middle = [
            (place - 1) * CELL + room * k
            for place, k in zip((thing.column, thing.row), self.jitter[thing.cell], strict=True)
        ]
        if any(thing.motion):
            most = 1 - LARGE - SPEED[1]
            middle = [min(max(place, -most), most) for place in middle]
        x, y = (place + 2 * time * step for place, step in zip(middle, thing.motion, strict=True))
        return x, y

    def _pixels(self, low: float, high: float) -> slice:
        low, high = ((side + 1) / 2 * self.size for side in (low, high))
        return slice(max(0, math.floor(low)), max(0, math.ceil(high)))


def _inside(shape: int, u: Floats, v: Floats) -> NDArray[np.floating[Any]]:
    """How far points are from the edge of an outline of unit radius, negative outside."""
    u = np.abs(u)
    match SHAPES[shape]:
        case "disc":
            return 1 - np.hypot(u, v)
        case "square":
            return 1 - np.maximum(u, np.abs(v))
        case "triangle":  # equilateral, upright, as wide as the disc
            v = v - 0.29
            return 0.58 - np.maximum(v, math.sqrt(0.75) * u - 0.5 * v)
        case _:  # a cross
            v = np.abs(v)
            return np.maximum(np.minimum(1 - u, 0.36 - v), np.minimum(0.36 - u, 1 - v))


class Boards:
    """Boards of splits that follow each other, by number."""

    def __init__(self, size: int, seed: int, counts: Mapping[str, int], things: tuple[int, int]) -> None:
        """Prepare to draw `counts` boards of each split; the others as in CaptionedWorld, which raises."""
        self._counts = dict(counts)
        self._worlds = {split: CaptionedWorld(size, seed, split, things) for split in counts}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __getitem__(self, index: int) -> tuple[Board, Picture]:
        """A board, and it drawn.

        Raises:
            IndexError: if there is none.
        """
        split, number = locate(index, self._counts)
        world = self._worlds[split]
        board = world.board(number)
        return board, world.draw(board)

    def board(self, index: int) -> Board:
        """A board, not drawn. Raises as []."""
        split, number = locate(index, self._counts)
        return self._worlds[split].board(number)

    def name(self, index: int) -> str:
        """As in 'captioned test 17'. Raises as []."""
        split, number = locate(index, self._counts)
        return f"captioned {split} {number}"
