"""A folder of images against the list of files that was written into it."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinokit.config import registry
from dinokit.data.sources import folder

Paint = Callable[[int], bytes]
Numbers = Callable[[Any], Any]


def fill(root: Path, names: Iterable[str], paint: Paint) -> Path:
    """Write an image by each name; image i shows i."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(paint(number))
    return root


def opened(root: Path, **values: Any) -> Any:
    return folder.build(folder.Config(path=str(root), **values))


def test_images_come_in_the_order_of_their_names_whatever_their_depth_and_case(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    names = ["a/x.png", "a/y/z.PNG", "b.png", "b/c.png", "ü b.png"]
    root = fill(tmp_path, reversed(names), paint)
    (root / "a" / "notes.txt").write_text("no image")
    source = opened(root)
    assert [source.name(i) for i in range(len(source))] == [
        str(root / n) for n in ["a/x.png", "a/y/z.PNG", "b/c.png", "b.png", "ü b.png"]
    ]
    assert [number for number, _ in numbers(source)] == [4, 3, 1, 2, 0]
    assert list(source.classes) == []
    assert {label for _, label in numbers(source)} == {-1}


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path, paint: Paint) -> None:
    assert len(opened(fill(tmp_path, ["a.png", ".b.png", "._a.png", ".cache/c.png"], paint))) == 1


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    root = fill(tmp_path / "data", ["a/x.png", "b/y.png"], paint)
    fill(tmp_path / "other", ["z.png"], paint)
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b" / "self")
    source = opened(root)
    found = [source.name(i).removeprefix(str(root)) for i in range(len(source))]
    assert found == ["/a/x.png", "/b/y.png", "/linked/z.png"]
    assert [number for number, _ in numbers(source)] == [0, 1, 0]


def test_the_first_folder_is_the_class_and_numbers_are_sorted_as_numbers(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    source = opened(
        fill(tmp_path / "w", ["dog/1.png", "cat/deep/2.png", "Cat/3.png"], paint), labels="folders"
    )
    assert list(source.classes) == ["Cat", "cat", "dog"]
    assert sorted(numbers(source)) == [(0, 2), (1, 1), (2, 0)]
    digits = opened(fill(tmp_path / "d", [f"{n}/x.png" for n in range(11)], paint), labels="folders")
    assert list(digits.classes) == [str(n) for n in range(11)]
    assert sorted(numbers(digits)) == [(n, n) for n in range(11)]


def test_folders_named_for_train_and_val_are_the_split_with_the_same_classes_on_both_sides(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    names = ["train/cat/0.png", "train/dog/1.png", "train/emu/2.png", "val/dog/3.png", "val/ant/4.png"]
    root = fill(tmp_path, names, paint)
    train, test, both = (opened(root, labels="folders", split=split) for split in ("train", "test", "all"))
    assert list(train.classes) == list(test.classes) == list(both.classes) == ["ant", "cat", "dog", "emu"]
    assert sorted(numbers(train)) == [(0, 1), (1, 2), (2, 3)]
    assert sorted(numbers(test)) == [(3, 2), (4, 0)]
    assert sorted(numbers(both)) == sorted(numbers(train) + numbers(test))


def test_a_stored_file_is_the_file(tmp_path: Path, paint: Paint) -> None:
    source = opened(fill(tmp_path, ["0.png", "1.png", "2.png"], paint))
    assert [source.stored(n) for n in range(3)] == [paint(n) for n in range(3)]


def test_a_class_may_be_called_train(tmp_path: Path, paint: Paint) -> None:
    root = fill(tmp_path, ["train/0.png", "bus/1.png"], paint)
    assert list(opened(root, labels="folders").classes) == ["bus", "train"]


def test_the_train_folder_alone_still_has_its_classes_below(tmp_path: Path, paint: Paint) -> None:
    root = fill(tmp_path, ["train/cat/0.png", "train/dog/1.png"], paint)
    assert list(opened(root, labels="folders").classes) == ["cat", "dog"]


def test_without_such_folders_a_share_is_held_out_for_good(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    root = fill(tmp_path, [f"{n % 3}/{n:03}.png" for n in range(500)], paint)
    train, test = (
        numbers(opened(root, labels="folders", split=s, test_share=0.2)) for s in ("train", "test")
    )
    assert sorted(train + test) == [(n, n % 3) for n in range(500)]
    assert 60 < len(test) < 140
    fill(root, ["new/another.png"], lambda _: paint(600))
    later = numbers(opened(root, split="test", test_share=0.2))
    assert {n for n, _ in later} - {600} == {n for n, _ in test}


def test_a_split_without_an_image_is_refused(tmp_path: Path, paint: Paint) -> None:
    root = fill(tmp_path, ["0.png", "1.png"], paint)
    with pytest.raises(ValueError, match=r"split='test'.*no image.*test_share=0.0"):
        opened(root, split="test", test_share=0.0)


def test_an_image_outside_of_all_classes_is_named(tmp_path: Path, paint: Paint) -> None:
    root = fill(tmp_path, ["cat/0.png", "stray.png"], paint)
    with pytest.raises(ValueError, match=r"stray\.png is not in a folder of its class"):
        opened(root, labels="folders")


def test_a_folder_beside_train_and_test_is_refused_when_a_side_is_asked_for(
    tmp_path: Path, paint: Paint
) -> None:
    root = fill(tmp_path, ["train/0.png", "test/1.png", "extra/2.png"], paint)
    assert len(opened(root)) == 3
    with pytest.raises(ValueError, match=r"'extra'.*neither train"):
        opened(root, split="train")


def test_a_damaged_or_vanished_image_is_named_when_it_is_read(tmp_path: Path, paint: Paint) -> None:
    root = fill(tmp_path, ["0.png", "1.png"], paint)
    source = opened(root)
    (root / "0.png").write_bytes(paint(0)[:40])
    (root / "1.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png"):
        source[0]
    with pytest.raises(OSError, match=r"1\.png"):
        source[1]


def test_a_mistyped_path_is_answered_with_what_is_there(tmp_path: Path, paint: Paint) -> None:
    fill(tmp_path, ["images/0.png"], paint)
    with pytest.raises(ValueError, match=rf"looked for from {Path.cwd()}.*{tmp_path}.*Did you mean 'images'"):
        opened(tmp_path / "imagse" / "deeper")


@pytest.mark.parametrize(
    ("name", "reader"),
    [("x.parquet", "parquet"), ("x.tar", "tar"), ("x.csv", "manifest"), ("x.txt", "manifest")],
)
def test_a_file_in_place_of_a_folder_is_sent_to_its_reader(tmp_path: Path, name: str, reader: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"set name={reader}"):
        opened(tmp_path / name)
    hint = "give its own path" if reader == "manifest" else f"set name={reader}"  # a list is no folder
    with pytest.raises(ValueError, match=f"1 {Path(name).suffix}.*{hint}"):
        opened(tmp_path)


def test_a_folder_that_the_library_datasets_wrote_is_sent_to_its_reader(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "state.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"1 \.arrow.*set name=hf in the same section\."):
        opened(tmp_path)


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file at all"):
        opened(tmp_path)
    for name in ("a.mp4", "b.mp4", "c"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"\.jpg.*2 \.mp4, 1 without suffix"):
        opened(tmp_path)


def test_another_process_sees_the_same(tmp_path: Path, paint: Paint, numbers_elsewhere: Numbers) -> None:
    source = opened(fill(tmp_path, [f"{n % 2}/{n}.png" for n in range(20)], paint), labels="folders")
    first, *others = numbers_elsewhere(source)
    assert len(first) == 20
    assert all(other == first for other in others)


def test_channels_are_those_that_were_asked_for(tmp_path: Path, paint: Paint) -> None:
    assert opened(fill(tmp_path, ["0.png"], paint), channels=1)[0][0].mode == "L"


def test_files_that_are_no_images_are_counted_by_suffix_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.HEIC", "c.heic", "d.mp4", "e"):
        (tmp_path / name).touch()
    source = registry.build("data.sources", {"name": "folder", "path": str(tmp_path)})
    err = capsys.readouterr().err
    heic = find_spec("pillow_heif") is not None
    assert len(source) == (3 if heic else 1)
    assert "1 .mp4" in err
    assert "1 without suffix" in err
    assert ("2 .heic" in err and "pip install pillow-heif" in err) != heic
    registry.build("data.sources", {"name": "folder", "path": str(tmp_path)})
    assert not capsys.readouterr().err  # once
