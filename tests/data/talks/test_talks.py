"""Talks: what the built-in ones ask, and files of LLaVA's layout with what can be wrong in them."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dinokit.data.boxes import box_in
from dinokit.data.scenes.captioned import CaptionedWorld
from dinokit.data.scenes.sentences import FAMILIES, quad
from dinokit.data.talks import MARK, Turn, captioned, llava
from dinokit.runtime.launch import digest

HUMAN, GPT = {"from": "human", "value": f"{MARK}\nwhat is it?"}, {"from": "gpt", "value": "A cat."}
RECORDED = "8d08f34fffdc"  # of the sixty talks


def test_families_come_by_turns_and_a_talk_is_a_function_of_its_number():
    source = captioned.build(captioned.Config(size=32))
    talks = [source[number] for number in range(12)]
    assert [talk.family for talk in talks] == list(FAMILIES) * 2
    again = captioned.build(captioned.Config(size=32))
    assert talks[7].turns == again[7].turns
    assert np.array_equal(talks[7].images[0], again[7].images[0])
    assert all(talk.turns[0].text.startswith(f"{MARK} ") and len(talk.images) == 1 for talk in talks)
    other = captioned.build(captioned.Config(size=32, split="test"))
    assert [other[number].turns for number in range(12)] != [talk.turns for talk in talks]


def test_a_share_of_the_talks_are_descriptions():
    source = captioned.build(captioned.Config(size=32, captions=0.3, things=(1, 2)))
    counts = Counter(source[number].family == "caption" for number in range(600))
    assert 130 < counts[True] < 230  # within five deviations of 180
    with pytest.raises(ValueError, match="captions=2"):
        captioned.Config(captions=2)
    with pytest.raises(ValueError, match="families has 'size'; there is: colour"):
        captioned.build(captioned.Config(families=("size",)))


def test_a_share_of_the_questions_come_from_groups():
    """Each of the two pictures and two questions of a group comes equally often."""
    keys = {"size": 32, "families": ("shape",), "things": (2, 3)}
    world = CaptionedWorld(32, 0, "train", (2, 3))
    source = captioned.build(captioned.Config(groups=0.5, **keys))
    drawn = Counter()
    for number in range(200):
        talk, group = source[number], quad(world, "shape", number)
        said = talk.turns[0].text.removeprefix(f"{MARK} "), talk.turns[1].text
        for one, board in enumerate(group.boards):
            if np.array_equal(talk.images[0], world.draw(board).image):
                assert group.answers[one][group.questions.index(said[0])] == said[1]
                drawn[one, said[0] == group.questions[0]] += 1
    assert 65 < drawn.total() < 135  # within five deviations of 100
    assert len(drawn) == 4
    assert min(drawn.values()) > 5
    with pytest.raises(ValueError, match="groups=2: it is a share"):
        captioned.Config(groups=2)
    with pytest.raises(ValueError, match="groups=1 needs pictures of two things"):
        captioned.Config(groups=1, things=(1, 1))


def test_other_families_do_not_change_the_talks_that_were_there():
    """Texts and answers as they were before families about boxes came, recorded then."""
    source = captioned.build(captioned.Config(size=32, captions=0.2, groups=0.3))
    said = [" / ".join(turn.text for turn in source[number].turns) for number in range(60)]
    assert digest(said) == RECORDED
    again = captioned.build(captioned.Config(size=32, captions=0.2, groups=0.3, families=FAMILIES))
    assert [" / ".join(turn.text for turn in again[number].turns) for number in range(60)] == said


def test_families_about_boxes_are_asked_where_they_are_named():
    source = captioned.build(captioned.Config(size=32, families=("ground", "point"), groups=0.3))
    for number in range(20):
        asked, said = (turn.text for turn in source[number].turns)
        boxes = [box_in(text) is not None for text in (asked, said)]
        assert boxes == [number % 2 == 1, number % 2 == 0]
        assert source[number].family == ("ground", "point")[number % 2]


def test_codes_in_place_of_pictures_have_the_same_talks():
    plain, codes = (captioned.build(captioned.Config(size=72, truth=truth)) for truth in (False, True))
    for number in range(6):
        assert plain[number].turns == codes[number].turns
        assert set(np.unique(codes[number].images[0])) == {0, 255}
    assert plain.fingerprint() != codes.fingerprint()


def test_half_of_the_counts_are_of_a_colour():
    source = captioned.build(captioned.Config(size=32, families=("count",)))
    counts = Counter("many things" in source[number].turns[0].text for number in range(300))
    assert 107 < counts[True] < 193  # within five deviations of 150


@pytest.fixture
def written(tmp_path):
    """Writes records, and opens the file."""
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "a.png")

    def write(*records, lines=False, **keys):
        path = tmp_path / ("t.jsonl" if lines else "t.json")
        text = "\n".join(map(json.dumps, records)) if lines else json.dumps(list(records))
        path.write_text(text)
        return llava.build(llava.Config(path=str(path), **keys))

    return write


@pytest.mark.parametrize("lines", [False, True])
def test_records_are_read_with_their_images(written, lines):
    source = written(
        {"id": 7, "image": "a.png", "conversations": [HUMAN, GPT], "model": ""},
        {"conversations": [{"from": "user", "value": "why?"}, {"from": "assistant", "value": "So."}]},
        lines=lines,
    )
    assert len(source) == 2
    assert source[0].turns == (Turn("user", f"{MARK}\nwhat is it?"), Turn("assistant", "A cat."))
    assert np.asarray(source[0].images[0]).shape == (6, 8, 3)
    assert source[1].images == ()


def test_a_video_is_shown_as_frames_at_even_steps(written, tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(7):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"clip/{number}.png")
    for mark in ("<video>", MARK):
        asked = {"from": "human", "value": f"{mark}\nwhat moves?"}
        source = written({"video": "clip", "conversations": [asked, GPT]}, frames=3)
        talk = source[0]
        assert [int(frame[0, 0, 0]) for frame in talk.images] == [0, 3, 6]
        assert talk.turns[0].text == f"{MARK * 3}\nwhat moves?"
    with pytest.raises(ValueError, match=r"there is no video or folder of frames .*none"):
        written({"video": "none", "conversations": [asked, GPT]})
    with pytest.raises(ValueError, match="an image and a video"):
        written({"video": "clip", "image": "a.png", "conversations": [asked, GPT]})


def test_a_fingerprint_changes_with_a_text_and_with_an_image(written, tmp_path):
    record = {"id": 7, "image": "a.png", "conversations": [HUMAN, GPT]}
    first, again = written(record).fingerprint(), written(record).fingerprint()
    assert first == again
    assert written({**record, "conversations": [HUMAN, {**GPT, "value": "A dog."}]}).fingerprint() != first
    image = next(tmp_path.rglob("a.png"))
    image.write_bytes(image.read_bytes() + b"0")
    assert written(record).fingerprint() != first


def test_boxes_of_a_padded_square_and_in_pixels_become_parts_of_the_image(written):
    """The image has 8 x 6 pixels, so a square of it has a border of one pixel above and below."""

    def asked(box, **keys):
        record = {"image": "a.png", "conversations": [{**HUMAN, "value": f"{MARK} what is in {box}?"}, GPT]}
        text = {"conversations": [{"from": "human", "value": "sort [4, 3, 2, 1]"}, GPT]}
        source = written(record, text, **keys)
        assert source[1].turns[0].text == "sort [4, 3, 2, 1]"
        return source[0].turns[0].text.removeprefix(f"{MARK} what is in ").removesuffix("?"), source

    assert asked("[0.1, 0.2, 0.3, 0.44]")[0] == "[0.1, 0.2, 0.3, 0.44]"
    assert asked("[0.25, 0.125, 0.5, 0.5]", boxes="padded")[0] == "[0.25, 0.00, 0.50, 0.50]"
    assert asked("[0, 0, 1, 1]", boxes="padded")[0] == "[0.00, 0.00, 1.00, 1.00]"
    assert asked("[2, 3, 4, 6]", boxes="pixels")[0] == "[0.25, 0.50, 0.50, 1.00]"
    texts = {asked("[0.25, 0.125, 0.5, 0.5]", **keys)[1].fingerprint() for keys in ({}, {"boxes": "padded"})}
    assert len(texts) == 2
    with pytest.raises(
        ValueError, match=r"boxes=padded, and no text about an image has a box .* from 0 to 1"
    ):
        asked("[2, 3, 4, 6]", boxes="padded")
    with pytest.raises(ValueError, match=r"boxes=pixels, and no text .* in pixels. .*boxes=padded"):
        asked("[0.1, 0.2, 0.3, 0.4]", boxes="pixels")
    # Numbers as Python writes small ones; an edge that is a little outside, as some of photos are.
    assert asked("[1e-05, 0.125, 0.5, 0.5]", boxes="padded")[0] == "[0.00, 0.00, 0.50, 0.50]"
    assert asked("[-0.01, 0.125, 0.5, 1.01]", boxes="padded")[0] == "[0.00, 0.00, 0.50, 1.00]"
    assert asked("[6, 3, 9, 7]", boxes="pixels")[0] == "[0.75, 0.50, 1.00, 1.00]"
    for box, unit in (("[0.1, 0.01, 0.5, 0.1]", "padded"), ("[9, 2, 12, 3]", "pixels")):
        record = {"image": "a.png", "conversations": [{**HUMAN, "value": f"{MARK} {box}"}, GPT]}
        with pytest.raises(
            ValueError, match=rf"record 1 .*lies outside of its image of 8 x 6 .*boxes={unit}\. Set boxes="
        ):
            written(record, boxes=unit)[0]
    for box, unit in (("[0.6, 0.3, 0.2, 0.4]", "padded"), ("[4, 3, 5, 2]", "pixels")):
        with pytest.raises(ValueError, match=r"record 1 has the box .*ends before it begins: .*width"):
            asked(box, boxes=unit)
    two = {
        "image": ["a.png", "a.png"],
        "conversations": [{**HUMAN, "value": f"{MARK}{MARK} [1, 2, 3, 4]"}, GPT],
    }
    with pytest.raises(
        ValueError, match=r"record 1 has a box, and boxes=pixels needs the one image .* 2 images"
    ):
        written(two, boxes="pixels")


def test_marks_are_moved_and_added_where_it_is_asked_for(written):
    behind = {"from": "human", "value": f"what is it? {MARK}"}
    record = {"image": "a.png", "conversations": [behind, GPT]}
    assert written(record, front=True)[0].turns[0].text == f"{MARK}\nwhat is it?"
    bare = {"image": "a.png", "conversations": [{"from": "human", "value": "what?"}, GPT]}
    assert written(bare, marks="prepend")[0].turns[0].text == f"{MARK}\nwhat?"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"image": "a.png", "conversations": [GPT, HUMAN]}, "its turns are assistant, user"),
        ({"image": "a.png", "conversations": [HUMAN]}, "end with assistant"),
        ({"image": ["a.png", "a.png"], "conversations": [HUMAN, GPT]}, "1 times <image> for 2 images"),
        ({"conversations": [HUMAN, GPT]}, "1 times <image> for 0 images"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "?"}, GPT]}, "set marks=prepend"),
        ({"image": "no.png", "conversations": [HUMAN, GPT]}, "record 2 .id 9.: there is no image"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "has no text"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": MARK}]}, "belongs in a user's"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "cat", "value": "b"}]}, "a turn is no"),
        ({"video": "a.mp4", "conversations": [HUMAN, GPT]}, "there is no video"),
        ({"image": "a.png"}, "has no list `conversations`"),
    ],
)
def test_what_is_wrong_with_a_record_is_named_when_it_is_opened(written, record, text):
    good = {"image": "a.png", "conversations": [HUMAN, GPT]}
    with pytest.raises(ValueError, match=text) as error:
        written(good, {"id": 9, **record})
    assert "record 2" in str(error.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("3")
    with pytest.raises(ValueError, match="is no JSON list of conversations"):
        llava.build(llava.Config(path=str(tmp_path / "t.json")))
