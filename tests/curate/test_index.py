"""Search against numpy on all pairs; approximate indexes by how much of it they find."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from dinokit.curate.index import Searcher, assign, build, exact
from dinokit.curate.settings import Index
from dinokit.curate.vectors import Vectors

IVF = Index(exact_below=100, probe=8, shard=1300, recall=100, train=40)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 16))
    x = centres[rng.integers(0, 40, 3000)] + 0.4 * rng.standard_normal((3000, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def all_pairs(queries, x, k):
    order = np.argsort(-(queries.astype(np.float64) @ x.T), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(queries @ x.T, order, 1), order


def test_exact_search_is_that_of_all_pairs_whatever_the_pieces(rows):
    similarity, found = exact(rows[:50], Vectors([rows[:1000], rows[1000:]]), 7)
    truth, order = all_pairs(rows[:50], rows, 7)
    assert np.allclose(similarity, truth, atol=1e-5)
    assert (found == order).mean() > 0.99  # equals may change places
    similarity, found = exact(rows[:2], Vectors([rows[:3]]), 5)
    assert found[:, 3:].tolist() == [[-1, -1], [-1, -1]]


def test_assignment_is_to_the_nearest_centre(rows):
    which, distance = assign(rows, rows[:30])
    table = ((rows[:, None].astype(np.float64) - rows[None, :30]) ** 2).sum(axis=2)
    assert np.allclose(distance, table.min(axis=1), atol=1e-5)
    assert (which == table.argmin(axis=1)).mean() > 0.999


def test_an_inverted_file_in_shards_finds_nearly_all_and_says_how_much(rows, tmp_path):
    searcher = build(Vectors([rows]), tmp_path, IVF, 0)
    assert sorted(path.name for path in tmp_path.glob("0*.faiss")) == [
        "00000.faiss",
        "00001.faiss",
        "00002.faiss",
    ]
    _, found = searcher.search(rows, 10)
    _, order = all_pairs(rows, rows, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, order, strict=True)])
    assert recall > 0.9
    said = searcher.recall(10, 0.6, 0)
    assert said["recall"] == pytest.approx(recall, abs=0.05)
    assert said["recall_above"] >= said["recall"] - 0.05
    full = Searcher(Vectors([rows]), tmp_path, replace(IVF, probe=10_000))
    assert full.recall(10, 0.6, 0)["recall"] > 0.98  # float16


def test_the_same_seed_builds_the_same_index_and_a_killed_build_goes_on(rows, tmp_path):
    for name in ("a", "b"):
        build(Vectors([rows]), tmp_path / name, IVF, 3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    read = lambda folder: [(tmp_path / folder / name).read_bytes() for name in files]  # noqa: E731
    assert read("a") == read("b")
    for name in ("00001.faiss", "00002.faiss", "index.json"):
        (tmp_path / "b" / name).unlink()
    before = (tmp_path / "b" / "00000.faiss").stat().st_mtime_ns
    build(Vectors([rows]), tmp_path / "b", IVF, 3)
    assert read("a") == read("b")
    assert (tmp_path / "b" / "00000.faiss").stat().st_mtime_ns == before


def test_lists_of_another_index_serve_rows_that_are_like_its_own(rows, tmp_path):
    build(Vectors([rows]), tmp_path / "all", IVF, 0)
    some = build(Vectors([rows], np.arange(0, 3000, 2)), tmp_path / "half", IVF, 0, tmp_path / "all")
    assert not (tmp_path / "half" / "trained.faiss").exists()
    assert some.recall(10, 0.6, 0)["recall"] > 0.9


@pytest.mark.slow
def test_product_quantisation_gives_true_similarities(rows, tmp_path):
    searcher = build(Vectors([rows]), tmp_path, replace(IVF, pq=4, lists=16), 0)
    similarity, found = searcher.search(rows[:20], 10)
    assert np.allclose(similarity, np.einsum("qd,qkd->qk", rows[:20], rows[found]), atol=1e-5)
    assert (np.diff(similarity, axis=1) <= 0).all()
    assert searcher.recall(10, 0.6, 0)["recall"] > 0.4


def test_a_quantisation_that_does_not_fit_the_width_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"index\.pq=5 does not divide .* 16"):
        build(Vectors([rows]), tmp_path, replace(IVF, pq=5), 0)


@pytest.mark.parametrize(("module", "said"), [(None, "not installed: pip install -e"), (sys, "but empty")])
def test_without_faiss_it_says_what_to_install(monkeypatch, rows, module, said):
    monkeypatch.setitem(sys.modules, "faiss", module)
    with pytest.raises(ValueError, match=said) as told:
        exact(rows[:1], Vectors([rows]), 1)
    assert "[cpu]" in str(told.value)
    assert "[gpu]" in str(told.value)
