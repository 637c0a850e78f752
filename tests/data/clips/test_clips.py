"""Clips: frames in their order, splits, the classes of changed clips, and what is said of wrong files."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dinokit.config import registry
from dinokit.data.clips import natural
from dinokit.data.scenes.captioned import DIRECTIONS

SIDE = 32


def build(name, **settings):
    return registry.build("data.clips", {"name": name, **settings})


def picture(number: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 8 * number + 4, np.uint8)


def number_of(frames: np.ndarray) -> list[int]:
    return ((frames.mean(axis=(1, 2, 3)) - 4) / 8).round().astype(int).tolist()


def write_folder(path, count: int = 12):
    """Frame i is frame<i>.png with the grey 8 i + 4, so 10 comes after 9 and not after 1."""
    path.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(i)).save(path / f"frame{i}.png")


def write_video(path, gaps=(1,) * 20, rate: int = 10):
    """Lossless, frame i with the grey 8 i + 4; frame i is shown for gaps[i] tenths of a second."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "rgb24"
        shown = 0
        for i, gap in enumerate(gaps):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            frame.pts = shown
            shown += gap
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_names_are_sorted_by_the_numbers_in_them() -> None:
    names = ["f10.png", "f2.png", "f1.png", "g1.png", "f02b.png", "F3.png", "10.png", "9.png"]
    expected = ["9.png", "10.png", "F3.png", "f1.png", "f2.png", "f02b.png", "f10.png", "g1.png"]
    assert sorted(names, key=natural) == expected


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / split / "still" / "clip10")
        write_folder(tmp_path / split / "still" / "clip9", 3)
        write_folder(tmp_path / split / "moving" / "a")
    clips = build("folders", path=str(tmp_path), split="train")
    assert clips.classes == ("moving", "still")
    assert [(clip.name.split("/")[-1], clip.label) for clip in clips.clips] == [
        ("a", 0),
        ("clip9", 1),
        ("clip10", 1),
    ]
    clip = clips.clips[2]
    assert len(clip) == 12
    assert number_of(clip.frames(range(12))) == list(range(12))
    assert number_of(clip.frames([11, 2, 2])) == [11, 2, 2]
    assert np.diff(clip.seconds(range(12))) == pytest.approx(0.04)
    assert clips.changed == {}


def test_without_folders_of_splits_some_clips_of_each_class_are_for_the_test(tmp_path) -> None:
    for name in ("a", "b"):
        for i in range(7):
            write_folder(tmp_path / name / f"clip{i}", 1)
    found = {s: build("folders", path=str(tmp_path), split=s, held_out=3).clips for s in ("train", "test")}
    assert [clip.name[-5:] for clip in found["test"]] == ["clip2", "clip5"] * 2
    assert Counter(clip.label for clip in found["train"]) == {0: 5, 1: 5}
    names = [clip.name for clips in found.values() for clip in clips]
    assert len(set(names)) == len(names) == 14


def test_what_is_no_clip_in_the_folders_is_counted_in_the_log(tmp_path, capsys) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / split / "a" / "clip", 1)
        (tmp_path / split / "a" / "empty").mkdir()
        for name in ("x.gifv", "y.GIFV", "notes.txt", ".hidden"):
            (tmp_path / split / "a" / name).write_bytes(b"")
        (tmp_path / split / "loose.mp4").write_bytes(b"")
    (tmp_path / "labels.csv").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (clip,) = build("folders", path=str(tmp_path), split="test").clips
    assert clip.name.endswith("clip")
    said = capsys.readouterr().err
    assert f"path='{tmp_path / 'test'}': left out, because they are no clips that dinokit reads: " in said
    for part in ("2 .gifv", "1 .txt", "1 folder without images", "1 .mp4", "1 .csv"):
        assert part in said
    assert "hidden" not in said
    assert "cache" not in said


@pytest.mark.parametrize("gaps", [(1,) * 20, (1,) * 7, (1, 1, 3, 1, 2, 2, 1, 5, 1)])
def test_a_frame_of_a_video_is_the_one_that_was_asked_for(tmp_path, gaps) -> None:
    """Also at the end, behind a key frame, with an odd number of frames and with unequal times."""
    write_video(tmp_path / "one" / "clip.mkv", gaps)
    (clip,) = build("folders", path=str(tmp_path), split="train").clips
    n = len(gaps)
    assert len(clip) == n
    assert number_of(clip.frames(range(n))) == list(range(n))
    assert number_of(clip.frames([n - 1])) == [n - 1]
    assert number_of(clip.frames([n - 2, 0, n - 1, 0])) == [n - 2, 0, n - 1, 0]
    assert np.diff(clip.seconds(range(n))) == pytest.approx(np.array(gaps[:-1]) / 10, abs=2e-3)


def test_a_list_takes_a_part_of_a_video(tmp_path) -> None:
    write_video(tmp_path / "videos" / "a.mkv")
    write_folder(tmp_path / "frames")
    (tmp_path / "clips.csv").write_text(
        "path,label,start,end,split\n"
        "videos/a.mkv,late,1.0,1.4,train\nvideos/a.mkv,early,,0.25,train\nframes,early,,,test\n"
    )
    clips = build("listed", path=str(tmp_path / "clips.csv"), split="train")
    assert clips.classes == ("early", "late")
    late, early = clips.clips
    assert (late.label, early.label) == (1, 0)
    assert number_of(late.frames(range(len(late)))) == [10, 11, 12, 13, 14]
    assert number_of(early.frames(range(len(early)))) == [0, 1, 2]
    (test,) = build("listed", path=str(tmp_path / "clips.csv"), split="test").clips
    assert len(build("listed", path=str(tmp_path / "clips.csv"), split="all").clips) == len(clips.clips) + 1
    assert number_of(test.frames([10])) == [10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path': its first line is empty"),
        ("path,class\nframes,a\n", "no column 'label': its first line is path,class"),
        ("path,label,begin\nframes,a,1\n", "a column 'begin'"),
        ("path,label\nframes,\n", "line 2: it has no label"),
        ("path,label,split\nframes,a,test\nframes\n", "line 3: it has no label"),
        ("path,label\nframes,a,1,2\n", "line 2: it has more values than the first line"),
        ("path,label\nframes,a\nnothing,b\n", "line 3: .*nothing does not exist"),
        ("path,label\nclips.csv,a\n", "line 2: .* is neither a video file nor a folder with images"),
        ("path,label,start\nframes,a,1\n", "line 2: .* is a folder of images, which has no start"),
        ("path,label,start\nframes,a,soon\n", "line 2: start='soon' is no number of seconds"),
        ("path,label,start,end\na.mp4,a,3,1\n", "line 2: end=1 is before start=3"),
        ("path,label,split\nframes,a,train\n", "1 clips, none of the split 'test'; its splits are: train"),
        ("path,label,split\nframes,a,test\nframes,b,Train\n", "line 3: split='Train' .* mean 'train'"),
        ("path,label,split\nframes,a,test\nframes,b,\n", "line 3: split='' is not one of train, test"),
        ("path,label,split\nframes,a,test\nframes,b\n", "line 3: split='' is not one of train, test"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(tmp_path, text, message) -> None:
    write_folder(tmp_path / "frames", 2)
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "clips.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        build("listed", path=str(tmp_path / "clips.csv"))


def test_a_part_that_a_video_does_not_have(tmp_path) -> None:
    write_video(tmp_path / "a.mkv", (1,) * 4)
    (tmp_path / "clips.csv").write_text("path,label,start\na.mkv,x,9\n")
    (clip,) = build("listed", path=str(tmp_path / "clips.csv")).clips
    with pytest.raises(ValueError, match=r"no frame from 9 to inf seconds: .* from 0 to 0\.3"):
        len(clip)


def test_folders_without_clips_say_what_is_missing(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        build("folders", path=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"has no folders: clips are expected as .*CLASS/clip\.mp4"):
        build("folders", path=str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a has no clips: .* it has 1 other entries"):
        build("folders", path=str(tmp_path))
    write_folder(tmp_path / "a" / "clip", 2)
    with pytest.raises(ValueError, match="fewer than held_out=5 clips in every class"):
        build("folders", path=str(tmp_path), split="test")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="a folder for train, and none for test"):
        build("folders", path=str(tmp_path))


def test_frames_of_different_sizes_and_damaged_ones_are_refused(tmp_path) -> None:
    write_folder(tmp_path / "a" / "clip", 3)
    Image.fromarray(picture(1)[:20]).save(tmp_path / "a" / "clip" / "frame1.png")
    (clip,) = build("folders", path=str(tmp_path), split="train").clips
    with pytest.raises(
        ValueError, match=r"not equally large: frame0\.png has 32 x 32, frame1\.png has 20 x 32"
    ):
        clip.frames([0, 1])
    (tmp_path / "a" / "clip" / "frame1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"frame1\.png"):
        clip.frames([1])


def moved(frames: np.ndarray) -> np.ndarray:
    """Rows and columns from the first to the last frame of what moves."""
    still = np.median(frames, axis=0)
    ends = [np.argwhere(np.abs(frame - still).sum(axis=2) > 60).mean(axis=0) for frame in frames[[0, -1]]]
    return ends[1] - ends[0]


def test_changed_clips_have_the_classes_that_are_given_for_them() -> None:
    """By where pixels move: the class of a clip, and of it backwards, mirrored and upside down."""
    clips = build("captioned", split="test")
    ways = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    changes = {"backwards": np.s_[::-1], "mirrored": np.s_[:, :, ::-1], "flipped": np.s_[:, ::-1]}
    assert clips.classes == DIRECTIONS
    assert set(clips.changed) == set(changes)
    for clip in clips.clips[:12]:
        frames = clip.frames(range(len(clip)))
        assert moved(frames) @ ways[DIRECTIONS[clip.label]] > 8
        for name, view in changes.items():
            assert moved(frames[view]) @ ways[DIRECTIONS[clips.changed[name][clip.label]]] > 8, name


def test_the_splits_of_drawn_clips_are_apart_and_their_classes_equally_frequent() -> None:
    train, test = (build("captioned", split=split, count=40, test_count=20) for split in ("train", "test"))
    assert (len(train.clips), len(test.clips)) == (40, 20)
    assert Counter(clip.label for clip in train.clips) == dict.fromkeys(range(4), 10)
    first = [clips.clips[0].frames([0]) for clips in (train, test)]
    assert not np.array_equal(*first)
    assert np.array_equal(train.clips[3].frames([2, 14])[1], train.clips[3].frames(range(15))[14])
    assert replace(train.clips[0], number=1).name == "captioned train 1"
    with pytest.raises(ValueError, match="frames=0"):
        build("captioned", frames=0)
