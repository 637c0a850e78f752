"""Lines by number against Python's own reading of the file."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinokit.data import files as module
from dinokit.data.files import Lines

PIECES = st.sampled_from(["a.jpg", "b/c d.png", "é.jpg", "#", "# no", " ", "\t", "", "\r", "  x.png ", "#x"])


def by_python(data: bytes) -> list[str]:
    text = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [line.strip() for line in text]
    return [line.decode("utf-8", "surrogateescape") for line in lines if line and not line.startswith(b"#")]


@given(pieces=st.lists(PIECES, max_size=60), mark=st.booleans(), end=st.booleans(), block=st.integers(1, 40))
def test_they_are_those_that_python_reads(tmp_path, monkeypatch, pieces, mark, end, block):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "EVERY", 5)
    data = (b"\xef\xbb\xbf" if mark else b"") + "\n".join(pieces).encode() + (b"\n" if end else b"")
    path = tmp_path / "list.txt"
    path.write_bytes(data)
    found, want = Lines.of(path), by_python(data)
    assert len(found) == len(want)
    assert [found[i] for i in range(len(found))] == want
    assert list(found) == want


def test_bytes_that_are_no_text_stay_what_they_are(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xff\xfe.jpg\n")
    assert Lines.of(path)[0].encode("utf-8", "surrogateescape") == b"\xff\xfe.jpg"


def test_only_the_position_of_every_64th_line_is_stored(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("".join(f"folder/{i}.jpg\n" for i in range(100_000)))
    found = Lines.of(path)
    assert len(pickle.dumps(found)) < 8 * 100_000 / 64 + 1000
    assert found[-1] == "folder/99999.jpg"
    with pytest.raises(IndexError):
        found[100_000]
