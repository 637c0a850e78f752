"""A list of images against the rows that were written into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinokit.data.sources import manifest

Paint = Callable[[int], bytes]
Numbers = Callable[[Any], Any]


@pytest.fixture
def folder(tmp_path: Path, paint: Paint) -> Path:
    """Images 0.png to 9.png."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(paint(number))
    return tmp_path


def opened(path: Path, text: str, **values: Any) -> Any:
    path.write_text(text, encoding="utf-8")
    return manifest.build(manifest.Config(path=str(path), **values))


def test_a_text_file_names_one_image_a_line_from_its_own_folder_on(folder: Path, numbers: Numbers) -> None:
    (folder / "lists").mkdir()
    text = f"\ufeff# mine\n\n../3.png\n  ../1.png  \r\n{folder}/2.png\n"
    source = opened(folder / "lists" / "mine.txt", text)
    assert numbers(source) == [(3, -1), (1, -1), (2, -1)]
    assert list(source.classes) == []
    assert Path(source.name(0)).samefile(folder / "3.png")


@pytest.mark.parametrize("column", ["path", "file", "image", "filename", "Path"])
def test_a_table_gives_paths_labels_and_splits(folder: Path, numbers: Numbers, column: str) -> None:
    rows = ["3.png,emu,train", '1.png,"cat, wild",val', "2.png,,train", "\n4.png,emu,test"]
    table = "\n".join([f"{column},label,split", *rows])
    sides = {side: opened(folder / "t.csv", table, split=side) for side in ("all", "train", "test")}
    assert all(list(source.classes) == ["cat, wild", "emu"] for source in sides.values())
    assert numbers(sides["all"]) == [(3, 1), (1, 0), (2, -1), (4, 1)]
    assert numbers(sides["train"]) == [(3, 1), (2, -1)]
    assert numbers(sides["test"]) == [(1, 0), (4, 1)]


def test_labels_that_are_numbers_are_sorted_as_numbers(folder: Path, numbers: Numbers) -> None:
    source = opened(folder / "t.csv", "path,label\n0.png,10\n1.png,2\n2.png,-1\n")
    assert list(source.classes) == ["2", "10"]
    assert numbers(source) == [(0, 1), (1, 0), (2, -1)]


def test_without_a_split_column_the_sides_are_disjoint_and_whole(folder: Path, numbers: Numbers) -> None:
    text = "\n".join(f"{n}.png" for n in range(10))
    train, test = (
        numbers(opened(folder / "t.txt", text, split=s, test_share=0.4)) for s in ("train", "test")
    )
    assert sorted(train + test) == [(n, -1) for n in range(10)]
    assert train
    assert test


def test_a_word_for_no_known_side_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="'pool', which is neither train"):
        opened(folder / "t.csv", "path,split\n0.png,train\n1.png,pool\n", split="train")


def test_a_side_that_the_table_leaves_empty_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"split='test'.*no image.*all its images are marked 'train'\."):
        opened(folder / "t.csv", "path,split\n0.png,train\n", split="test")
    with pytest.raises(ValueError, match=r"split='train'.*no image.*marked 'val' or 'dev'\."):
        opened(folder / "t.csv", "path,split\n0.png,val\n1.png,dev\n", split="train")


def test_a_list_whose_files_are_all_missing_shows_where_it_looked(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"first 2 files.*'img/0.png'.*{folder}/img/0\.png"):
        opened(folder / "t.txt", "img/0.png\nimg/1.png\n")


def test_one_missing_file_is_named_when_it_is_read(folder: Path) -> None:
    source = opened(folder / "t.txt", "gone.png\n1.png\n")
    with pytest.raises(OSError, match=r"gone\.png cannot be read: there is no such file\."):
        source[0]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "name,label\n0.png,1\n", "no column path.*it has: name, label"),
        ("t.csv", "", "it has: nothing"),
        ("t.csv", "path,label\n0.png\n", "line 2"),
        ("t.csv", "path,label\n,cat\n", "line 2"),
        ("t.txt", "# nothing\n\n", "names no image file"),
        ("t.json", "[]", r"\.txt or \.csv"),
    ],
)
def test_a_list_of_another_form_is_explained(folder: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        opened(folder / name, text)


def test_a_folder_is_sent_to_its_reader(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\(\.txt or \.csv\)\. To read it, set name=folder"):
        manifest.build(manifest.Config(path=str(folder)))


def test_another_process_sees_the_same(folder: Path, numbers_elsewhere: Numbers) -> None:
    source = opened(folder / "t.csv", "path,label\n" + "\n".join(f"{n}.png,{n % 3}" for n in range(10)))
    assert numbers_elsewhere(source) == [[(n, n % 3) for n in range(10)]] * 3


def test_a_nul_in_a_list_is_named_as_damage(folder: Path) -> None:
    source = opened(folder / "mine.txt", "3.png\n1\0.png\n")
    with pytest.raises(OSError, match=r"1\\x00.png' has a NUL"):
        source[1]
