"""Files are whole or not there."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest

from dinokit.runtime import files
from dinokit.runtime.files import aside, atomic, check_target, fits, full_disk, write_text


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


def test_a_folder_a_fifo_and_a_stream_are_never_replaced_by_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    (tmp_path / "file").touch()
    for name, why in {
        "folder": "folder is a folder, and a file is to be written there",
        "fifo": "fifo is a FIFO",
        "stdout": "stdout is a stream",
        "file/below.csv": "file is a file, not a folder",
    }.items():
        with pytest.raises(OSError, match=why):
            write_text(tmp_path / name, "new")
    assert (tmp_path / "stdout").is_symlink()
    assert (tmp_path / "fifo").is_fifo()
    with pytest.raises(OSError, match="/dev/null is a device"):
        check_target("/dev/null")
    with pytest.raises(OSError, match="/dev/fd/1 is a stream"):
        check_target("/dev/fd/1")


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


def system_error(number):
    return OSError(number, os.strerror(number))


def test_the_error_of_a_full_disk_has_the_bytes_of_what_was_written_and_what_is_free(tmp_path):
    (tmp_path / "part" / "below").mkdir(parents=True)
    (tmp_path / "part" / "a").write_bytes(bytes(1000))
    (tmp_path / "part" / "below" / "b").write_bytes(bytes(500))
    full = full_disk(system_error(errno.ENOSPC), tmp_path / "x", tmp_path / "part")
    assert "It needs more than 1,500 bytes" in full.fact
    room = int(full.fact.rpartition("room for ")[2].replace(",", ""))
    assert room == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_a_quota_and_a_limit_of_a_file_say_nothing_of_the_room_on_the_disk(number, tmp_path):
    full = full_disk(system_error(number), tmp_path / "x", tmp_path / "part")
    assert full.fact == f"{tmp_path / 'x'} could not be written: {files.FULL[number]}. It needs space"


def test_what_a_file_had_before_is_no_need_of_what_is_appended(tmp_path):
    (tmp_path / "log").write_bytes(bytes(1000))
    with pytest.raises(files.DiskFullError, match="It needs space, and"), fits(tmp_path / "log"):
        raise system_error(errno.ENOSPC)


def test_a_full_disk_is_guessed_for_an_error_without_a_number_alone():
    place = Path("/proc/file")  # there is no free space, and no file can be made
    if not place.parent.is_dir() or shutil.disk_usage(place.parent).free:
        pytest.skip("no /proc")
    for forgotten in (OSError("encoder error -2"), RuntimeError("write failed")):
        assert full_disk(forgotten, place).errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="other"), fits(Path(__file__)):
        raise RuntimeError("other")
    for other in (system_error(errno.EACCES), system_error(errno.EIO), ValueError("x")):
        assert full_disk(other, place) is None
    rust = RuntimeError("Io error: Disk quota exceeded (os error 122)")
    assert full_disk(rust, place).errno == errno.EDQUOT


def test_the_error_of_a_full_disk_passes_between_processes(tmp_path):
    full = full_disk(system_error(errno.ENOSPC), tmp_path / "x")
    other = pickle.loads(pickle.dumps(full))
    assert (type(other), str(other), other.fact) == (files.DiskFullError, str(full), full.fact)
    assert (other.errno, other.written) == (full.errno, full.written)
