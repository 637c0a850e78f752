"""Rows on disk, read in pieces, are the rows that were written."""

import numpy as np
import pytest

from dinokit.curate.vectors import Vectors


@pytest.fixture
def parts(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float16)
    files = []
    for number, (start, stop) in enumerate([(0, 20), (20, 21), (21, 50)]):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], x[start:stop])
    return files, x.astype(np.float32)


def test_rows_are_those_of_the_files_end_to_end_on_the_unit_sphere(parts):
    files, x = parts
    whole = x / np.linalg.norm(x, axis=1, keepdims=True)
    vectors = Vectors(files)
    assert (len(vectors), vectors.width) == (50, 6)
    assert np.allclose(np.concatenate([part for _, part in vectors.chunks(7)]), whole)
    assert [start for start, _ in vectors.chunks(20)] == [0, 20, 40]
    places = np.array([49, 0, 20, 20, 3])
    assert np.allclose(vectors.take(places), whole[places])
    assert np.array_equal(Vectors(files, unit=False).take(places), x[places])


def test_a_part_of_a_part_is_numbered_by_its_own_places(parts):
    files, x = parts
    some = Vectors(files, unit=False).at(np.arange(10, 40)).at(np.array([0, 11, 29]))
    assert np.array_equal(some.chunk(0), x[[10, 21, 39]])
    assert np.array_equal(some.take(np.array([2, 0])), x[[39, 10]])
    assert np.array_equal(some.chunk(1, 1), x[[21]])


def test_rows_without_a_direction_are_told(tmp_path):
    x = np.ones((5, 3), np.float16)
    x[1], x[3, 0], x[4, 2] = 0, np.nan, np.inf
    assert Vectors([x]).broken().tolist() == [False, True, False, True, True]


def test_arrays_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="one width"):
        Vectors([np.ones((2, 3)), np.ones((2, 4))])
