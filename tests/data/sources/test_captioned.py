"""The captioned boards as a source of images: labels, splits, and what wrong settings say."""

import pickle
from collections import Counter

import numpy as np
import pytest

from dinokit.config import registry
from dinokit.data.scenes.captioned import COLOURS, SHAPES
from dinokit.data.sources.captioned import CLASSES, Captioned, Config


@pytest.mark.parametrize("labels", ["pair", "colour", "shape", "cell"])
def test_a_label_is_what_the_image_shows(labels) -> None:
    source = registry.build("data.sources", {"name": "captioned", "labels": labels, "split": "train"})
    counts = Counter()
    for index in range(400):
        label = source[index][1]
        (thing,) = source.board(index).things
        shown = {
            "pair": f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}",
            "colour": COLOURS[thing.colour],
            "shape": SHAPES[thing.shape],
            "cell": f"{('top', 'middle', 'bottom')[thing.row]} {('left', 'centre', 'right')[thing.column]}",
        }
        assert source.classes[label] == shown[labels]
        counts[label] += 1
    assert set(counts) == set(range(len(source.classes)))
    assert max(counts.values()) < 2.5 * 400 / len(counts)


def test_the_splits_share_no_image_and_together_are_all() -> None:
    sizes = {"count": 30, "test_count": 20}
    every, train, test = (Captioned(Config(**sizes, split=split)) for split in ("all", "train", "test"))
    assert (len(every), len(train), len(test)) == (50, 30, 20)
    images = [np.asarray(every[i][0]) for i in range(50)]
    assert len({image.tobytes() for image in images}) == 50
    assert np.array_equal(images[31], np.asarray(test[1][0]))
    assert every[31][1] == test[1][1]
    assert (every.name(31), train.name(3)) == ("captioned test 1", "captioned train 3")
    with pytest.raises(IndexError, match="no image 50: split 'all' has 50"):
        every[50]


def test_it_pickles_and_its_stamp_follows_the_settings() -> None:
    source = Captioned(Config(things=4, labels="none"))
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(np.asarray(copy[9][0]), np.asarray(source[9][0]))
    assert copy.stamp() == source.stamp()
    assert source.stamp() != Captioned(Config(things=3, labels="none")).stamp()
    assert source.classes == CLASSES["none"] == ()
    assert {source[i][1] for i in range(5)} == {-1}
    assert Counter(len(source.board(i).things) for i in range(400)).keys() == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"things": 2}, "things=2, and labels=pair is the pair of one thing: give labels=none"),
        ({"things": 5, "labels": "none"}, "from 1 to 4 things"),
        ({"size": 16}, "size=16"),
    ],
)
def test_settings_that_do_not_fit(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build("data.sources", {"name": "captioned", **settings})
