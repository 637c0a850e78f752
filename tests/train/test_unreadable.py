"""Unreadable images are named once, and too many end the run."""

import pytest

from dinokit.train.trainer import TooManyUnreadableError, UnreadableImages


def test_each_is_named_once():
    counter = UnreadableImages(share=0.01, images=10_000)
    assert counter.add({"a": "cut short", "b": "no image"}, seen=100) == [
        "cannot be read, left out: a: cut short",
        "cannot be read, left out: b: no image",
    ]
    assert counter.add({"a": "cut short"}, seen=200) == []


def test_more_than_the_share_end_the_run_with_the_way_out():
    counter = UnreadableImages(share=0.01, images=300)
    counter.add({"1": "cut short.", "2": "four bands: set channels=4.", "3": "cut short."}, seen=10)
    with pytest.raises(
        TooManyUnreadableError,
        match=r"4 of 300 .* run\.max_unreadable=0\.01: 1, 2, 3, 4\. "
        r"Why: cut short; four bands: set channels=4\. Repair .*=0\.027",
    ):
        counter.add({"4": "cut short."}, seen=20)


def test_a_source_of_a_hundred_million_is_given_up_early():
    counter = UnreadableImages(share=0.01, images=10**8)
    with pytest.raises(TooManyUnreadableError, match="11 of 1000"):
        counter.add({str(i): "gone" for i in range(11)}, seen=64)


def test_the_count_survives_a_checkpoint():
    counter = UnreadableImages(share=0.5, images=10)
    counter.add({"a": "cut short"}, seen=5)
    again = UnreadableImages(share=0.5, images=10)
    again.reasons = dict.fromkeys(counter.reasons, "")
    assert again.add({"a": "cut short"}, seen=6) == []
