"""Frames that are taken, against lists written by hand."""

from collections import Counter

import numpy as np
import pytest

from dinokit.video.sampling import Sampling

HAND = {  # eight frames of a clip of so many; what is repeated is written apart
    ("even", 1): ([0], 7), ("even", 2): ([0, 1], 6), ("even", 7): ([0, 1, 2, 3, 4, 5, 6], 1),
    ("even", 8): ([0, 1, 2, 3, 4, 5, 6, 7], 0), ("even", 9): ([0, 1, 2, 3, 5, 6, 7, 8], 0),
    ("even", 15): ([0, 2, 4, 6, 8, 10, 12, 14], 0), ("even", 100): ([6, 18, 31, 43, 56, 68, 81, 93], 0),
    ("ends", 1): ([0], 7), ("ends", 2): ([0, 1], 6), ("ends", 7): ([0, 1, 2, 3, 4, 5, 6], 1),
    ("ends", 8): ([0, 1, 2, 3, 4, 5, 6, 7], 0), ("ends", 9): ([0, 1, 2, 3, 5, 6, 7, 8], 0),
    ("ends", 100): ([0, 14, 28, 42, 57, 71, 85, 99], 0),
    ("dense", 1): ([0], 7), ("dense", 2): ([0, 1], 6), ("dense", 7): ([0, 1, 2, 3, 4, 5, 6], 1),
    ("dense", 8): ([0, 1, 2, 3, 4, 5, 6, 7], 0), ("dense", 9): ([0, 1, 2, 3, 4, 5, 6, 7], 0),
    ("dense", 100): ([46, 47, 48, 49, 50, 51, 52, 53], 0),
    # Two a second of a clip with ten: slots of five frames, and their middles.
    ("fps", 1): ([0], 7), ("fps", 2): ([1], 7), ("fps", 7): ([2], 7), ("fps", 8): ([2], 7),
    ("fps", 9): ([2], 7), ("fps", 10): ([2, 7], 6), ("fps", 40): ([2, 7, 12, 17, 22, 27, 32, 37], 0),
    ("fps", 100): ([7, 17, 32, 42, 57, 67, 82, 92], 0),
}  # fmt: skip


def times(length: int) -> list[float]:
    return [i / 10 for i in range(length)]


@pytest.mark.parametrize(("way", "length"), HAND)
def test_frames_of_evaluation(way, length) -> None:
    frames, repeated = HAND[way, length]
    found, real = Sampling(way, 8, rate=2.0)(times(length))
    assert found == frames + [frames[-1]] * repeated
    assert real == [True] * (8 - repeated) + [False] * repeated


@pytest.mark.parametrize(
    ("length", "frames"), [(7, [0, 3, 6]), (8, [0, 3, 6]), (9, [1, 4, 7]), (100, [46, 49, 52])]
)
def test_dense_frames_with_a_stride(length, frames) -> None:
    assert Sampling("dense", 3, stride=3)(times(length)) == (frames, [True] * 3)


def test_a_window_that_does_not_fit_repeats_the_last_frame_it_has() -> None:
    assert Sampling("dense", 4, stride=3)(times(8)) == ([0, 3, 6, 6], [True, True, True, False])


def test_one_frame_is_the_middle_one() -> None:
    for way in ("even", "ends"):
        assert Sampling(way, 1)(times(15))[0] == [7]


def test_even_frames_of_a_reversed_clip_are_the_same_frames() -> None:
    for length in (8, 9, 15, 17, 100):
        found = Sampling("even", 8)(times(length))[0]
        assert [length - 1 - i for i in reversed(found)] == found


def test_frames_by_time_stamps_that_are_not_equally_far_apart() -> None:
    """A slow second half: frames 0 to 9 are shown a tenth of a second each, then 10 to 14 for 0.4 s each."""
    seconds = [i / 10 for i in range(10)] + [1 + 0.4 * i for i in range(5)]
    # 2.8 s, and 0.2 s for the last: three slots of a second, in the middle of which are 0.5, 1.5 and 2.5 s.
    assert Sampling("fps", 8, rate=1.0)(seconds)[0][:2] == [5, 11]


def test_training_takes_every_frame_of_a_slot_and_the_last_one() -> None:
    rng = np.random.default_rng(0)
    seen = Counter(i for _ in range(600) for i in Sampling("even", 4)(times(10), rng)[0])
    assert set(seen) == set(range(10))
    for slot in ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9)):
        assert sum(seen[i] for i in slot) == 600
        assert max(seen[i] for i in slot) < 1.3 * 600 / len(slot)
    starts = Counter(Sampling("dense", 4, stride=2)(times(10), rng)[0][0] for _ in range(400))
    assert set(starts) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": "evn"}, "no way 'evn' to take frames; there is: even, ends, dense, fps"),
        ({"count": 0}, "count=0"),
        ({"stride": 0}, "stride=0"),
        ({"rate": 0.0}, "rate=0.0, but it must be above 0"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_clip_without_frames() -> None:
    with pytest.raises(ValueError, match="no frames"):
        Sampling()([])
