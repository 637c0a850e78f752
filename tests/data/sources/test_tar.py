"""Tar files against the members that were put into them."""

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dinokit.data.sources import tar

Paint = Callable[[int], bytes]
Numbers = Callable[[Any], Any]


def pack(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        folder = tarfile.TarInfo("some-folder.png")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def opened(path: Path | str, **values: Any) -> Any:
    return tar.build(tar.Config(path=str(path), **values))


def descriptors() -> int:
    """How many files this process holds open."""
    return len(list(Path("/dev/fd").iterdir()))


@pytest.fixture
def three(tmp_path: Path, paint: Paint) -> Path:
    """Three shards of four images each, labelled by a .cls: image n shows n and is of class n % 5."""
    for shard in range(3):
        members = {}
        for n in range(4 * shard, 4 * shard + 4):
            members |= {f"{n:04}.png": paint(n), f"{n:04}.cls": str(n % 5).encode()}
        pack(tmp_path / f"shard-{shard:03}.tar", members)
    return tmp_path


BRACES = [
    "{}/shard-{{000..002}}.tar",
    "{}/shard-{{000,001,002}}.tar",
    "{}/{{shard-00{{0..1}},shard-002}}.tar",
    "{0}/shard-{{000..001}}.tar::{0}/shard-002.tar",
]


@pytest.mark.parametrize("form", ["{}", "{}/*.tar", "{}/shard-00?.tar", *BRACES])
def test_a_folder_a_glob_and_a_range_mean_the_same_shards(three: Path, numbers: Numbers, form: str) -> None:
    source = opened(form.format(three))
    assert numbers(source) == [(n, n % 5) for n in range(12)]
    assert list(source.classes) == ["0", "1", "2", "3", "4"]
    assert source.name(5) == f"{three}/shard-001.tar: 0005.png"


def test_a_stored_file_is_the_member_as_it_was_packed(three: Path, paint: Paint) -> None:
    source = opened(three)
    assert [source.stored(n) for n in range(12)] == [paint(n) for n in range(12)]


def test_labels_come_from_cls_or_json_beside_the_image_in_any_order(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    members = {
        "a/1.cls": b"dog\n",
        "a/1.png": paint(1),
        "b/1.png": paint(2),
        "b/1.json": json.dumps({"label": "cat", "caption": "x"}).encode(),
        "3.left.png": paint(3),
        "3.right.png": paint(4),
        "3.json": b'{"cls": "emu"}',
        "5.png": paint(5),
        "6.json": b"[1, 2]",
        "6.png": paint(6),
        "7.1.png": paint(7),
        "7.1.cls": b"dog",
        "7.2.png": paint(8),
        "7.2.cls": b"cat",
        "._6.png": b"what a Mac leaves",
        "read.me": b"",
    }
    source = opened(pack(tmp_path / "x.tar", members))
    assert list(source.classes) == ["cat", "dog", "emu"]
    assert numbers(source) == [(1, 1), (2, 0), (3, 2), (4, 2), (5, -1), (6, -1), (7, 1), (8, 0)]


def test_class_numbers_are_sorted_as_numbers(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    members = {}
    for n, label in enumerate((10, 9, 100, 9)):
        members |= {f"{n}.png": paint(n), f"{n}.json": json.dumps({"label": label}).encode()}
    source = opened(pack(tmp_path / "x.tar", members))
    assert list(source.classes) == ["9", "10", "100"]
    assert [label for _, label in numbers(source)] == [1, 0, 2, 0]


def test_long_names_and_large_members_are_found(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    members = {"x" * 150 + ".png": paint(1), "big.bin": bytes(100_000), "ü" * 200 + ".png": paint(2)}
    source = opened(pack(tmp_path / "x.tar", members))
    assert [n for n, _ in numbers(source)] == [1, 2]


def test_shards_named_for_their_side_are_the_split(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    for n, name in enumerate(("in1k-train-0.tar", "in1k-train-1.tar", "in1k-val-0.tar")):
        pack(tmp_path / name, {f"{n}.png": paint(n), f"{n}.cls": b"%d" % n})
    train, test = opened(tmp_path, split="train"), opened(tmp_path, split="test")
    assert numbers(train) == [(0, 0), (1, 1)]
    assert numbers(test) == [(2, 2)]
    assert list(train.classes) == list(test.classes) == ["0", "1", "2"]
    pack(tmp_path / "extra.tar", {"x.png": paint(9)})
    assert len(opened(tmp_path)) == 4
    with pytest.raises(ValueError, match=r"extra\.tar has neither"):
        opened(tmp_path, split="train")


def test_a_lone_train_shard_and_a_word_that_holds_a_side_are_no_split(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    images = {f"{n}.png": paint(n) for n in range(200)}
    for name in ("train.tar", "interval-latest.tar"):
        path = pack(tmp_path / name, images)
        train, test = (numbers(opened(path, split=s)) for s in ("train", "test"))
        assert sorted(train + test) == [(n, -1) for n in range(200)]
        assert 5 < len(test) < 40


def test_another_process_sees_the_same(three: Path, numbers_elsewhere: Numbers) -> None:
    assert numbers_elsewhere(opened(three)) == [[(n, n % 5) for n in range(12)]] * 3


def test_more_shards_than_a_process_may_hold_open_can_be_read(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    for n in range(150):
        pack(tmp_path / f"{n:03}.tar", {"x.png": paint(n)})
    before = descriptors()
    source = opened(tmp_path)
    assert [n for n, _ in numbers(source)] == list(range(150))
    assert descriptors() < before + 150
    del source
    assert descriptors() == before


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_says_how_to_undo_it(tmp_path: Path, paint: Paint, kind: str) -> None:
    path = pack(tmp_path / f"x.tar.{kind}", {"x.png": paint(1)}, f"w:{kind}")
    with pytest.raises(ValueError, match=r"is compressed.* -d"):
        opened(path)


def test_a_tar_that_is_cut_short_is_named(three: Path, paint: Paint) -> None:
    whole = (three / "shard-001.tar").read_bytes()
    (three / "shard-001.tar").write_bytes(whole[:1500])
    with pytest.raises(ValueError, match=r"shard-001\.tar is damaged or cut short"):
        opened(three)


def test_a_tar_that_shrinks_under_way_is_an_error_of_that_image(three: Path) -> None:
    source = opened(three)
    os.truncate(three / "shard-002.tar", 600)
    with pytest.raises(OSError, match=r"shard-002\.tar: 0008\.png is cut short"):
        source[8]


def test_a_missing_shard_of_a_range_is_named(three: Path) -> None:
    with pytest.raises(ValueError, match=r"5 files; 2 are missing: .*shard-003\.tar, .*shard-004\.tar"):
        opened(three / "shard-{000..004}.tar")


def test_what_holds_no_image_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without an image"):
        opened(pack(tmp_path / "x.tar", {"a.txt": b"hello"}))
    with pytest.raises(ValueError, match="matches no file"):
        opened(tmp_path / "*.jpg")
    (tmp_path / "x.tar").rename(tmp_path / "x.zip")
    with pytest.raises(ValueError, match=r"no \.tar; it has: 1 \.zip"):
        opened(tmp_path)


def test_a_label_that_is_not_json_is_named(tmp_path: Path, paint: Paint) -> None:
    with pytest.raises(ValueError, match=r"x\.tar.*1\.json is not JSON"):
        opened(pack(tmp_path / "x.tar", {"1.png": paint(1), "1.json": b"{"}))


def test_anything_behind_the_last_member_is_damage_that_names_shard_and_member(three: Path) -> None:
    whole = (three / "shard-001.tar").read_bytes()
    starts = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    begin = starts[5]  # of a member; the one before it is 0005.png
    flipped = bytearray(whole)
    flipped[begin + 3] ^= 1
    harms = {
        "no members: it is damaged there": bytes(flipped),
        "archives were joined": whole + whole,
        "or it is damaged there": whole[:begin] + bytes(512) + whole[begin + 512 :],  # a hole
        "bytes of zeros: later members are lost": whole[:begin] + bytes(len(whole) * 4 - begin),
        "no end mark: later members are lost": whole[:begin],
        "unexpected end of data": whole[: begin + 512],
    }
    for message, content in harms.items():
        (three / "shard-001.tar").write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"shard-001\.tar is damaged or cut short: .*{message}"
        ) as caught:
            opened(three)
        assert "unexpected" in message or re.search(r"behind its member 000\d\.", str(caught.value))
    (three / "shard-001.tar").write_bytes(whole + bytes(512))
    assert len(opened(three)) == 12


def test_archives_with_large_records_are_read(three: Path) -> None:
    for shard in sorted(three.glob("*.tar")):
        subprocess.run(["tar", "-xf", shard.name], cwd=three, check=True)
    images = sorted(path.name for path in three.glob("*.png") if path.is_file())
    subprocess.run(["tar", "-b", "2048", "-cf", "big.tar", *images], cwd=three, check=True)
    assert len(opened(three / "big.tar")) == 12


@pytest.mark.parametrize("path", ["https://host/a-{000..009}.tar", "pipe:aws s3 cp s3://b/a.tar -"])
def test_shards_on_another_machine_are_to_be_copied_first(path: str) -> None:
    with pytest.raises(ValueError, match=r"on another machine.*copy the files to a disk"):
        opened(path)
