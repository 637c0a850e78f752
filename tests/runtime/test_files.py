"""Files are whole or not there."""

import pytest

from dinokit.runtime import files
from dinokit.runtime.files import aside, atomic, write_text


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


def fail_with_a_folder_half_written(path):
    with aside(path) as folder:
        (folder / path.name).mkdir()
        (folder / path.name / "a").write_text("new")
        raise RuntimeError


def test_a_folder_that_failed_leaves_the_old_one_and_nothing_else(tmp_path):
    write_text(tmp_path / "out" / "a", "old")
    with pytest.raises(RuntimeError):
        fail_with_a_folder_half_written(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_folder_takes_its_place_beside_what_others_put_there(tmp_path):
    write_text(tmp_path / "out" / "a", "old")
    write_text(tmp_path / "out" / "notes", "mine")
    dead = tmp_path / ".out.aside.part" / "left"  # by a process that was killed
    write_text(dead, "half")
    with aside(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
        write_text(folder / "out" / "a", "new")
        write_text(folder / "out.data", "beside it")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.data"]
    content = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    assert content.keys() == {"a", "notes", files.CHECKSUMS}
    assert (content["a"], content["notes"]) == ("new", "mine")
    files.check_folder(tmp_path / "out")


def test_processes_of_one_number_on_two_machines_write_apart(tmp_path, monkeypatch):
    """As jobs in containers do, into one shared folder."""
    monkeypatch.setattr(files.socket, "gethostname", lambda: "n1")
    with atomic(tmp_path / "file") as one:
        one.write_text("one")
        monkeypatch.setattr(files.socket, "gethostname", lambda: "n2")
        write_text(tmp_path / "file", "two")
        assert one.read_text() == "one"
