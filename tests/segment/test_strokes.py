"""Strokes: the pixels of lines, and the points that they become."""

import numpy as np
import pytest

from dinokit.segment.prompts import stroke_mask, stroke_points


def distance_to_line(x, y, a, b):
    """Of a pixel to the segment from a to b, as loops over floats have it."""
    length = (b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2
    t = min(1, max(0, ((x - a[0]) * (b[0] - a[0]) + (y - a[1]) * (b[1] - a[1])) / length))
    return ((x - a[0] - t * (b[0] - a[0])) ** 2 + (y - a[1] - t * (b[1] - a[1])) ** 2) ** 0.5


@pytest.mark.parametrize("end", [(30, 4), (9, 19), (2, 17), (0, 0)])
def test_a_line_has_the_pixels_beside_it(end):
    start = (4, 3)
    mask = stroke_mask([start, end], (20, 40))
    distance = np.array([[distance_to_line(x, y, start, end) for x in range(40)] for y in range(20)])
    assert (distance[mask] < 0.75).all()
    assert mask[distance < 1e-9].all()
    across = abs(end[0] - start[0]) > abs(end[1] - start[1])
    counts = mask.sum(axis=0 if across else 1)
    assert set(counts.tolist()) == {0, 1}  # one pixel wide, without a gap
    assert counts.sum() == 1 + max(abs(end[0] - start[0]), abs(end[1] - start[1]))


def test_lines_alone_several_arrays_and_masks_are_the_same():
    one, two = [(3, 4), (10, 4)], [(12, 9)]
    both = stroke_mask([one, two], (12, 16))
    assert both.sum() == 9
    assert (stroke_mask(one, (12, 16)) | stroke_mask(two, (12, 16)) == both).all()
    assert (stroke_mask(np.array(one), (12, 16)) == stroke_mask(one, (12, 16))).all()
    assert stroke_mask(both, (12, 16)) is both
    assert np.argwhere(stroke_mask([(15.4, 11.4), (15.9, 11.9)], (12, 16))).tolist() == [[11, 15]]


def test_points_are_the_farthest_from_those_before():
    mask = np.random.default_rng(0).random((11, 14)) < 0.3
    pixels = [(x, y) for y in range(11) for x in range(14) if mask[y, x]]
    middle = np.mean(pixels, axis=0)
    chosen = [min(pixels, key=lambda p: np.hypot(*(p - middle)))]
    while len(chosen) < 5:
        chosen.append(max(pixels, key=lambda p: min(np.hypot(p[0] - q[0], p[1] - q[1]) for q in chosen)))
    assert stroke_points(mask).tolist() == [list(p) for p in chosen]


def test_a_small_stroke_has_each_pixel_once():
    mask = np.zeros((5, 5), bool)
    mask[2, 1:4] = True
    assert sorted(stroke_points(mask).tolist()) == [[1, 2], [2, 2], [3, 2]]
    assert stroke_points(mask, most=1).tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("strokes", "message"),
    [
        ([], "give a mask of booleans of the image's size, a line"),
        ([[]], "give a mask of booleans"),
        ([5], "give a mask of booleans"),
        ("scribble", "give a mask of booleans"),
        ([[(1, 2)], []], "give a mask of booleans"),
        ([(1, 2), (16, 2)], r"\(16, 2\) is outside the image, which is 16 pixels wide and 12 high"),
        ([(1, 2, 3)], r"points: \[1.0, 2.0, 3.0\] is none"),
        (np.ones((16, 12), bool), "The mask of strokes has 12 x 16 pixels, the image 16 x 12"),
        (np.zeros((12, 16), bool), "the mask marks no pixel"),
        (np.full((12, 16), 255, np.uint8), r"the shape \(12, 16\) and type uint8\. A mask is of booleans"),
    ],
)
def test_wrong_strokes_get_words(strokes, message):
    with pytest.raises(ValueError, match=message):
        stroke_mask(strokes, (12, 16))
