"""What was submitted from a folder is found again by the number of a job, an array, or a job of one."""

import pytest

from dinokit.slurm import record


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, many = record.new_folder("train-a"), record.new_folder("train-a")  # within the same second
    record.write(one, ["7"], [["train", "a"]], ["profile=cpu"])
    record.write(many, ["9_0", "9_1"], [["eval", "x"], ["eval", "y"]], ["profile=cpu"])
    record.new_folder("refused")  # one without a record is none
    return one, many


def test_a_record_is_read_back_as_it_was_written(two):
    one, many = record.records()
    assert (one.number, one.commands, one.settings) == ("7", [["train", "a"]], ["profile=cpu"])
    assert (many.number, many.jobs) == ("9", ["9_0", "9_1"])
    assert [each.folder.endswith(path.name) for each, path in zip((one, many), two, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize(("word", "jobs"), [("7", ["7"]), ("9", ["9_0", "9_1"]), ("9_1", ["9_1"])])
def test_a_number_finds_its_jobs(two, word, jobs):
    [(_, found)] = record.find([word])
    assert found == jobs


def test_a_number_that_is_not_known_here_is_answered_with_those_that_are(two):
    with pytest.raises(LookupError, match=r"No job 8 was submitted from here \(/.*\). There is: 7, 9."):
        record.find(["7", "8"])
