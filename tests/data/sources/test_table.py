"""Tables looked through at once against Python's own reader, row by row."""

import csv
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinokit.data import files as module
from dinokit.data.files import Names
from dinokit.data.sources import manifest
from dinokit.data.sources.manifest import Column, read_table

VALUES = st.sampled_from(["a.jpg", "b, c.jpg", 'd"e.jpg', "é", "#f", " g ", "h\ni", "j k", "", "-1"])


def by_us(path):
    names, labels, splits = read_table(path)
    words = [[w.words[code] for code in w.codes] for w in (labels, splits)]
    return list(names), [names[i] for i in range(len(names))], words


def by_python(path):
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = [[value.strip() for value in row] for row in list(csv.reader(file))[1:] if row]
    paths, labels, splits = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    return paths, paths, [labels, splits]


@given(
    rows=st.lists(st.tuples(VALUES.filter(str.strip), VALUES, VALUES), max_size=40),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    block=st.integers(60, 400),
)
def test_all_is_as_python_reads_it(tmp_path, monkeypatch, rows, quoting, end, block):
    monkeypatch.setattr(module, "EVERY", 5)
    monkeypatch.setattr(manifest, "BLOCK", block)
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, quoting=quoting, lineterminator=end).writerows([("path", "label", "split"), *rows])
    assert by_us(path) == by_python(path)


def test_only_positions_of_lines_are_stored_for_the_paths(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("label,path\n" + "".join(f"{i % 7},folder/{i}.jpg\n" for i in range(100_000)))
    names, labels, splits = read_table(path)
    assert isinstance(names, Column)
    assert len(pickle.dumps(names)) < 8 * 100_000 / 64 + 1000
    assert names[-1] == "folder/99999.jpg"
    assert labels.words[labels.codes[99_999]] == str(99_999 % 7)
    assert not splits.words
    with pytest.raises(IndexError):
        names[100_000]


def test_a_value_with_a_line_end_is_read_row_by_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('path,label\n"a\nb.jpg",x\nc.jpg,y\n')
    names, labels, _ = read_table(path)
    assert isinstance(names, Names)
    assert list(names) == ["a\nb.jpg", "c.jpg"]
    assert [labels.words[code] for code in labels.codes] == ["x", "y"]


def test_bytes_that_are_no_text_stay_what_they_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"path,label\n\xff\xfe.jpg,\xfd\n")
    names, labels, _ = read_table(path)
    assert isinstance(names, Column)
    assert names[0].encode("utf-8", "surrogateescape") == b"\xff\xfe.jpg"
    assert labels.words[0].encode("utf-8", "surrogateescape") == b"\xfd"
