"""Names against a list of strings."""

import pickle

import pytest

from dinokit.data.files import Names

WORDS = ["a/b.jpg", "", "naïve/鳥 🐦.png", "x" * 1000, "\udcff-is-no-text.jpg", "a/b.jpg"]


def test_the_strings_come_back_as_they_went_in() -> None:
    names = Names.of(iter(WORDS))
    assert [names[i] for i in range(len(names))] == list(names) == WORDS
    assert names[-1] == WORDS[-1]
    with pytest.raises(IndexError):
        names[len(WORDS)]


def test_no_string_at_all_is_a_list_of_none() -> None:
    names = Names.of([])
    assert len(names) == 0
    assert list(names) == []


def test_walking_gives_what_asking_one_by_one_gives_however_many_there_are() -> None:
    words = [f"{i:x}" * (i % 4) for i in range(10_000)]
    names = Names.of(words)
    assert list(names) == words
    assert all(names[i] == words[i] for i in (0, 4095, 4096, 4097, 9999))


def test_a_million_paths_take_little_more_than_their_bytes_and_survive_a_pickle() -> None:
    names = Names.of(f"{i:07}.jpg" for i in range(1_000_000))
    packed = pickle.dumps(names)
    assert len(packed) < 1_000_000 * (11 + 8) + 1000
    again = pickle.loads(packed)
    assert again[999_999] == "0999999.jpg"
    assert again.blob.dtype == "uint8"
    assert again.offsets.dtype == "int64"
