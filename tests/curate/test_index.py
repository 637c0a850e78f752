"""Search against numpy on all pairs; approximate indexes by how much of it they find."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from dinokit.curate.index import (
    Searcher,
    Vectors,
    build_index,
    exact_search,
    measure_recall,
    nearest_centre,
    recall_of_pairs,
)  # fmt: skip
from dinokit.curate.settings import Index

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


def test_exact_search_equals_a_comparison_of_all_pairs(rows):
    similarity, found = exact_search(rows[:50], Vectors([rows[:1000], rows[1000:]]), 7, gpu=False)
    truth, order = all_pairs(rows[:50], rows, 7)
    assert np.allclose(similarity, truth, atol=1e-5)
    assert (found == order).mean() > 0.99  # equals may change places
    similarity, found = exact_search(rows[:2], Vectors([rows[:3]]), 5, gpu=False)
    assert found[:, 3:].tolist() == [[-1, -1], [-1, -1]]


def test_assignment_is_to_the_nearest_centre(rows):
    which, distance = nearest_centre(rows, rows[:30], gpu=False)
    table = ((rows[:, None].astype(np.float64) - rows[None, :30]) ** 2).sum(axis=2)
    assert np.allclose(distance, table.min(axis=1), atol=1e-5)
    assert (which == table.argmin(axis=1)).mean() > 0.999


def test_an_inverted_file_in_shards_finds_nearly_all_and_measures_its_recall(rows, tmp_path):
    searcher = build_index(Vectors([rows]), tmp_path, IVF, 0)
    assert sorted(path.name for path in tmp_path.glob("0*.faiss")) == [
        "00000.faiss",
        "00001.faiss",
        "00002.faiss",
    ]
    _, found = searcher.search(rows, 10)
    _, order = all_pairs(rows, rows, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, order, strict=True)])
    assert recall > 0.9
    assert measure_recall(searcher, 10, 0, tmp_path)["recall"] == pytest.approx(recall, abs=0.05)
    full = Searcher(Vectors([rows]), tmp_path, replace(IVF, probe=10_000))
    assert measure_recall(full, 10, 0, tmp_path)["recall"] > 0.98  # float16


def test_recall_of_pairs_counts_those_above_a_threshold(rows, tmp_path):
    poor = replace(IVF, probe=1, recall=3000)  # asks with every row
    searcher = build_index(Vectors([rows]), tmp_path, poor, 0)
    assert recall_of_pairs(tmp_path, 0.9) == {}  # not measured yet
    measure_recall(searcher, 10, 0, tmp_path)
    _, found = searcher.search(rows, 10)
    cosine, order = all_pairs(rows, rows, 10)
    shares = []
    for threshold in (0.7, 0.9):
        hits = [
            near in found[row]
            for row in range(len(rows))
            for near, value in zip(order[row], cosine[row], strict=True)
            if near != row and value > threshold
        ]
        measured = recall_of_pairs(tmp_path, threshold)
        assert measured["pairs_in_the_sample"] == pytest.approx(len(hits), abs=2)
        assert measured["recall_of_pairs"] == pytest.approx(np.mean(hits), abs=1e-3)
        shares.append(measured["recall_of_pairs"])
    assert shares[0] < shares[1] < 1
    assert recall_of_pairs(tmp_path, 1.1) == {"pairs_in_the_sample": 0}


def test_recall_can_be_measured_with_other_queries(rows, tmp_path):
    searcher = build_index(Vectors([rows[:2000]]), tmp_path, replace(IVF, probe=1), 0)
    others = Vectors([rows[2000:]])
    measured = measure_recall(searcher, 1, 0, tmp_path, others)
    _, found = searcher.search(rows[2000:], 1)
    assert measured["recall"] == pytest.approx(
        (found == all_pairs(rows[2000:], rows[:2000], 1)[1]).mean(), abs=0.1
    )
    assert 0.5 < measured["recall"] < 1


def test_the_same_seed_builds_the_same_index_and_a_killed_build_resumes(rows, tmp_path):
    for name in ("a", "b"):
        build_index(Vectors([rows]), tmp_path / name, IVF, 3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    read = lambda folder: [(tmp_path / folder / name).read_bytes() for name in files]  # noqa: E731
    assert read("a") == read("b")
    for name in ("00001.faiss", "00002.faiss", "index.json"):
        (tmp_path / "b" / name).unlink()
    before = (tmp_path / "b" / "00000.faiss").stat().st_mtime_ns
    build_index(Vectors([rows]), tmp_path / "b", IVF, 3)
    assert read("a") == read("b")
    assert (tmp_path / "b" / "00000.faiss").stat().st_mtime_ns == before


def test_lists_of_another_index_can_be_used_for_similar_rows(rows, tmp_path):
    build_index(Vectors([rows]), tmp_path / "all", IVF, 0)
    some = build_index(Vectors([rows], np.arange(0, 3000, 2)), tmp_path / "half", IVF, 0, tmp_path / "all")
    assert not (tmp_path / "half" / "trained.faiss").exists()
    assert measure_recall(some, 10, 0, tmp_path)["recall"] > 0.9


@pytest.mark.slow
def test_product_quantisation_gives_true_similarities(rows, tmp_path):
    searcher = build_index(Vectors([rows]), tmp_path, replace(IVF, pq=4, lists=16), 0)
    similarity, found = searcher.search(rows[:20], 10)
    assert np.allclose(similarity, np.einsum("qd,qkd->qk", rows[:20], rows[found]), atol=1e-5)
    assert (np.diff(similarity, axis=1) <= 0).all()
    assert measure_recall(searcher, 10, 0, tmp_path)["recall"] > 0.4


def test_a_quantisation_that_does_not_fit_the_width_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"index\.pq=5 does not divide .* 16"):
        build_index(Vectors([rows]), tmp_path, replace(IVF, pq=5), 0)


@pytest.mark.parametrize(
    ("module", "message"), [(None, r"pip install '.\[cpu\]' in the clone"), (sys, "but empty")]
)
def test_without_faiss_the_error_names_what_to_install(monkeypatch, rows, module, message):
    monkeypatch.setitem(sys.modules, "faiss", module)
    with pytest.raises(ValueError, match=message) as error:
        exact_search(rows[:1], Vectors([rows]), 1, gpu=False)
    assert "[cpu]" in str(error.value)
    assert "[gpu]" in str(error.value)
