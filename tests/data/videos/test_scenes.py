import numpy as np
import pytest

from dinokit.config import registry
from dinokit.data.sources.scenes import Config as Images
from dinokit.data.sources.scenes import build as images

BUILD = {"name": "scenes", "videos": 3, "frames": 5, "size": 64}


def videos(**values):
    return registry.build("data.videos", {**BUILD, **values})


def pixels(video, index):
    return np.asarray(video.frame(index, 3)).astype(int)


def test_a_video_is_the_same_every_time_and_another_one_is_another():
    first, again = videos()[1], videos()[1]
    assert (pixels(first, 3) == pixels(again, 3)).all()
    assert (first.mask(3) == again.mask(3)).all()
    others = [videos()[2], videos(seed=1)[1], videos(split="train")[1]]
    assert all((pixels(first, 0) != pixels(other, 0)).any() for other in others)
    scene = images(Images(split="test"))
    assert all((pixels(videos()[1], 0) != np.asarray(scene[i][0])).any() for i in range(3))
    assert [video.name for video in videos()] == ["test0", "test1", "test2"]


def test_objects_move_a_little_from_frame_to_frame():
    moved = []
    for video in videos():
        first, last = video.mask(0), video.mask(len(video) - 1)
        assert sorted(np.unique(first)) == [0, 1, 2, 3]
        for number in (1, 2, 3):
            middles = []
            for index in range(len(video)):
                mask = video.mask(index) == number
                if mask.sum() < 20:  # hidden behind a nearer one, or gone
                    break
                middles.append(np.argwhere(mask).mean(axis=0))
            steps = np.linalg.norm(np.diff(middles, axis=0), axis=1)
            assert (steps < 12).all()  # pixels; an edge that is hidden moves the middle as well
            moved.append(steps.sum())
        assert (first != last).mean() > 0.02
    assert np.median(moved) > 3


def test_the_light_changes_and_the_objects_share_their_colours():
    changes, differences = [], []
    for video in videos(videos=8):
        means = [pixels(video, index).mean(axis=(0, 1)) for index in range(len(video))]
        changes.append(np.abs(np.diff(means, axis=0)).mean())
        mask, image = video.mask(0), pixels(video, 0)
        colours = [image[mask == number].mean(axis=0) for number in np.unique(mask[mask > 0])]
        differences.append(np.std(colours, axis=0).mean())
    assert np.mean(changes) > np.mean(differences)


def test_at_most_four_objects_are_tracked():
    assert videos(objects=1)[0].mask(0).max() == 1
    assert videos(objects=9)[0].mask(0).max() <= 4


def test_a_video_of_two_frames_is_refused():
    with pytest.raises(ValueError, match="frames=2, but it must be 3 or more"):
        videos(frames=2)
