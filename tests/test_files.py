"""Files are whole or not there."""

import pytest

from dinokit.files import atomic, write_text


def fail_in_the_middle(path):
    with atomic(path) as part:
        part.write_text("new, but")
        raise RuntimeError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError):
        fail_in_the_middle(path)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
