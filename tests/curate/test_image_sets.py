"""Rows read from disk in pieces are the rows that were written."""

import numpy as np
import pytest

from dinokit.curate.index import Vectors


@pytest.fixture
def files_and_rows(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float16)
    files = []
    for number, (start, stop) in enumerate([(0, 20), (20, 21), (21, 50)]):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], x[start:stop])
    return files, x.astype(np.float32)


def test_rows_are_those_of_all_files_on_the_unit_sphere(files_and_rows):
    files, x = files_and_rows
    whole = x / np.linalg.norm(x, axis=1, keepdims=True)
    vectors = Vectors(files)
    assert (len(vectors), vectors.width) == (50, 6)
    assert np.allclose(np.concatenate([x for _, x in vectors.chunks(7)]), whole)
    assert [start for start, _ in vectors.chunks(20)] == [0, 20, 40]
    places = np.array([49, 0, 20, 20, 3])
    assert np.allclose(vectors.take(places), whole[places])
    assert np.array_equal(Vectors(files, unit=False).take(places), x[places])


def test_a_selection_of_a_selection_counts_its_own_rows(files_and_rows):
    files, x = files_and_rows
    some = Vectors(files, unit=False).select(np.arange(10, 40)).select(np.array([0, 11, 29]))
    assert np.array_equal(some.chunk(0), x[[10, 21, 39]])
    assert np.array_equal(some.take(np.array([2, 0])), x[[39, 10]])
    assert np.array_equal(some.chunk(1, 1), x[[21]])


def test_rows_without_a_direction_are_found(tmp_path):
    x = np.ones((5, 3), np.float16)
    x[1], x[3, 0], x[4, 2] = 0, np.nan, np.inf
    assert Vectors([x]).without_direction().tolist() == [False, True, False, True, True]


def test_arrays_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="one width"):
        Vectors([np.ones((2, 3)), np.ones((2, 4))])
