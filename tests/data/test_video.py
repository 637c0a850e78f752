"""Frames of videos that FFmpeg's own encoders wrote; the pictures are known, so no recording is needed."""

import struct
import sys

import numpy as np
import pytest

from dinokit.data.video import frame_times, frames_at, read_video

av = pytest.importorskip("av")

WIDTH, HEIGHT, FRAMES = 64, 48, 20
CODECS = {".mp4": "mpeg4", ".webm": "libvpx-vp9", ".mkv": "libx264", ".mpg": "mpeg2video", ".wmv": "wmv2"}


def write_video(path, fps=25):
    """Frame i: the left half has the grey 12 i, the upper right quarter is white, the lower right black."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix.lower()], rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FRAMES):
            pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            pixels[:, : WIDTH // 2] = 12 * i
            pixels[: HEIGHT // 2, WIDTH // 2 :] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.mark.parametrize("kind", CODECS)
def test_frames_are_kept_at_even_steps_from_the_first_to_the_last(tmp_path, kind):
    frames, fps = read_video(write_video(tmp_path / f"clip{kind}"), 5)
    kept = [0, 5, 10, 14, 19]  # 0, 4.75, 9.5, 14.25, 19, rounded; halves to the even number
    assert fps == pytest.approx(25 * 5 / FRAMES)
    assert [frame.size for frame in frames] == [(WIDTH, HEIGHT)] * 5
    for number, frame in zip(kept, frames, strict=True):
        pixels = np.asarray(frame, int)
        # Codecs are lossy, and neighbouring frames differ by 12.
        assert abs(pixels[4:-4, 4:28].mean() - 12 * number) < 6
        assert pixels[4:20, 36:60].min() > 230
        assert pixels[28:44, 36:60].max() < 25


def test_all_frames_are_there_if_more_are_asked_for(mp4):
    frames, fps = read_video(mp4, 1000)
    assert (len(frames), fps) == (FRAMES, 25)


def test_a_video_of_a_phone_is_turned_upright(mp4, tmp_path):
    data = bytearray(mp4.read_bytes())
    stored = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    # Of the track (ISO 14496-12, 8.3.2): x' = -y, y' = x, which is a quarter turn to the right.
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    at = data.index(stored, data.index(b"tkhd"))
    data[at : at + len(turned)] = turned
    (tmp_path / "phone.mp4").write_bytes(data)
    (frame,), _ = read_video(tmp_path / "phone.mp4", 1)
    assert frame.size == (HEIGHT, WIDTH)
    pixels = np.asarray(frame, int)
    assert pixels[36:60, 28:44].min() > 230  # the upper right quarter is now the lower right one
    assert pixels[36:60, 4:20].max() < 25


def test_a_video_that_is_cut_short_or_none_is_named(mp4, tmp_path):
    data = mp4.read_bytes()
    damaged = tmp_path / "damaged.mp4"
    for content in (data[: len(data) // 2], data[: len(data) * 9 // 10], b"junk" * 100, b""):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.mp4 (cannot be read|is damaged)"):
            read_video(damaged, 5)
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "absent.mp4", 5)


def test_frames_that_cannot_be_decoded_are_an_error(mp4, tmp_path):
    data = bytearray(mp4.read_bytes())
    begin = data.index(b"mdat") + 4
    for place in range(begin + 200, begin + 1000):
        data[place] ^= 0x5A
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.mp4"):
        read_video(tmp_path / "damaged.mp4", 5)


def test_too_many_pixels_are_refused_before_a_frame_is_decoded(mp4):
    with pytest.raises(ValueError, match=r"clip\.mp4 .* 64 x 48 pixels, over 1,000"):
        read_video(mp4, 5, max_pixels=1000)


def test_the_start_of_a_trimmed_clip_is_no_frame(tmp_path):
    """An edit list (ISO 14496-12, 8.6.6) says from when on a clip is shown."""
    path = write_video(tmp_path / "clip.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 16  # past version, flags, count and duration: the time in units of the media
    ticks = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    data[at : at + 4] = struct.pack(">i", ticks * 8 // 25)  # eight frames
    (tmp_path / "trimmed.mp4").write_bytes(data)
    frames, fps = read_video(tmp_path / "trimmed.mp4", 100)
    assert (len(frames), fps) == (FRAMES - 8, 25)
    assert abs(np.asarray(frames[0], int)[4:-4, 4:28].mean() - 12 * 8) < 6


@pytest.mark.parametrize("name", ["2026-11-29T12:30:00.mp4", "http:clip.mp4"])
def test_a_name_with_a_colon_is_no_address(mp4, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(mp4.read_bytes())
    assert len(read_video(name, 100)[0]) == FRAMES


def test_a_list_of_files_under_the_name_of_a_video_opens_none_of_them(mp4):
    path = mp4.with_name("list.mp4")
    path.write_text(f"ffconcat version 1.0\nfile {mp4.name}\n")
    with av.open(str(path)) as container:  # so FFmpeg would follow it
        assert container.streams.video[0].width == WIDTH
    with pytest.raises(ValueError, match=r"list\.mp4 cannot be read"):
        read_video(path, 5)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"a b\.mp4 is a video, and PyAV.*pip install av.*-i 'a b\.mp4'"):
        read_video("a b.mp4", 5)


def test_frames_by_number_are_those_of_a_whole_reading(mp4):
    frames, _ = read_video(mp4, FRAMES)
    whole = np.stack([np.asarray(frame) for frame in frames])
    assert np.array_equal(frames_at(mp4, [19, 0, 7, 7]), whole[[19, 0, 7, 7]])
    assert np.diff(frame_times(mp4)) == pytest.approx(1 / 25)


@pytest.mark.parametrize("indices", [[FRAMES], [3, -1]])
def test_a_frame_that_a_video_does_not_have_is_refused(mp4, indices):
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be read: it has \d+ frames, and frames"):
        frames_at(mp4, indices)
