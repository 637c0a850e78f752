"""Captions in tar files against the members that were put into them, and as talks."""

import io
import json
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.talks import MARK, captions


def image_of(n: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (n, 0, 0)).save(out, "PNG")
    return out.getvalue()


def pack(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def build(path, **keys):
    return registry.build("data.captions", {"name": "tar", "path": str(path), **keys})


@pytest.fixture
def shards(tmp_path):
    """Three of two images each, with a text before or behind the image, and fields."""
    for shard in range(3):
        members = {}
        for n in (2 * shard, 2 * shard + 1):
            text = {f"{n}.txt": f"picture {n}\n\n  of {n} \n".encode()}
            fields = {"caption": f"field {n}", "all": [f"one {n}", f"two {n}"], "label": "x"}
            both = {f"{n}.png": image_of(n), f"{n}.json": json.dumps(fields).encode()}
            members |= both | text if n % 2 else text | both
        pack(tmp_path / f"part-{shard:03}.tar", members)
    return tmp_path


@pytest.mark.parametrize("form", ["{}", "{}/*.tar", "{}/part-{{000..002}}.tar"])
def test_each_image_has_the_text_of_its_key(shards, form):
    source = build(form.format(shards))
    assert len(source) == 6
    for n in range(6):
        image, label = source[n]
        assert (np.asarray(image)[0, 0, 0], label) == (n, -1)
        assert source.captions(n) == [[f"picture {n}", f"of {n}"]]
        assert source.name(n) == f"{shards}/part-{n // 2:03}.tar: {n}.png"
    again = pickle.loads(pickle.dumps(source))  # as loader processes have it
    assert again.captions(5) == source.captions(5)


def test_a_field_of_json_is_one_caption_or_several(shards):
    assert build(shards, field="caption").captions(4) == [["field 4"]]
    assert build(shards, field="all").captions(4) == [["one 4", "two 4"]]
    with pytest.raises(
        ValueError, match=r"4\.png, \.json: there is no field 'text'; there is: caption, all, la"
    ):
        build(shards, field="text").captions(4)


def test_a_name_with_dots_has_its_own_text_or_that_of_its_key(tmp_path):
    members = {"1.5.png": image_of(1), "1.5.txt": b"own", "2.left.png": image_of(2), "2.txt": b"of the key"}
    source = build(pack(tmp_path / "x.tar", members))
    assert [source.captions(n) for n in range(2)] == [[["own"]], [["of the key"]]]


def test_a_field_that_is_nearly_there_is_named(shards):
    with pytest.raises(ValueError, match=r"no field 'captoin'; .* Did you mean 'caption'\? Give field="):
        build(shards, field="captoin").captions(0)


def test_what_is_left_out_is_neither_image_nor_text(tmp_path, capsys):
    build(pack(tmp_path / "x.tar", {"1.png": image_of(1), "1.txt": b"a", "1.json": b"{}"}))
    assert "no images or .txt files that dinokit reads: 1 .json" in "".join(capsys.readouterr())


def test_splits_have_no_image_in_common(tmp_path):
    members = {}
    for n in range(100):
        members |= {f"{n}.png": image_of(n), f"{n}.txt": f"picture {n}".encode()}
    path = pack(tmp_path / "all.tar", members)
    train, test = (build(path, split=split) for split in ("train", "test"))
    texts = [{source.captions(n)[0][0] for n in range(len(source))} for source in (train, test)]
    assert len(texts[0]) + len(texts[1]) == len(texts[0] | texts[1]) == 100
    for n in range(len(test)):
        assert test.captions(n) == [[f"picture {np.asarray(test[n][0])[0, 0, 0]}"]]


@pytest.mark.parametrize(
    ("members", "keys", "message"),
    [
        ({"1.png": image_of(1)}, {}, r"1 of 1 images have no \.txt .*1\.png: set field=caption to"),
        ({"1.png": image_of(1), "1.txt": b""}, {}, r"1 of 1 images have no \.txt beside them with something"),
        (
            {"1.png": image_of(1), "1.txt": b"a"},
            {"field": "caption"},
            r"no \.json .* leave out field= to read KEY\.txt",
        ),
        ({"1.txt": b"a"}, {}, "without an image"),
    ],
)
def test_what_is_wrong_is_named_when_it_is_opened(tmp_path, members, keys, message):
    with pytest.raises(ValueError, match=message):
        build(pack(tmp_path / "x.tar", members), **keys)


@pytest.mark.parametrize(
    ("name", "data", "keys", "message"),
    [
        ("1.txt", b" \n", {}, r"1\.png, \.txt: there is no caption with a word"),
        ("1.txt", b"\xff\xfe", {}, r"1\.png, \.txt beside it cannot be read: 'utf-8'"),
        ("1.json", b"{", {"field": "caption"}, r"1\.png, \.json beside it cannot be read"),
        ("1.json", b"[1]", {"field": "caption"}, "there is no field 'caption'; there is: none"),
        ("1.json", b'{"caption": 3}', {"field": "caption"}, "3 is no caption"),
    ],
)
def test_what_is_wrong_with_a_text_is_named_with_its_image(tmp_path, name, data, keys, message):
    source = build(pack(tmp_path / "x.tar", {"1.png": image_of(1), name: data}), **keys)
    with pytest.raises(ValueError, match=message):
        source.captions(0)


def test_damaged_files_are_refused_as_by_the_source_of_images(tmp_path, shards):
    whole = (shards / "part-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:-2048][: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tar is damaged or cut short"):
        build(tmp_path / "cut.tar")
    with pytest.raises(ValueError, match="2 files; 1 are missing"):
        build(f"{shards}/part-{{002..003}}.tar")
    twice = pack(tmp_path / "a.tar", {"1.png": image_of(1), "1.txt": b"a"})
    subprocess.run(["tar", "-rf", str(twice), "-C", str(tmp_path), _text(tmp_path)], check=True)
    with pytest.raises(ValueError, match=r"its member 1\.txt is there twice"):
        build(twice)


def _text(folder) -> str:
    (folder / "1.txt").write_text("b")
    return "1.txt"


def test_captions_become_talks(shards):
    keys = {
        "source": {"name": "tar", "path": str(shards), "field": "all"},
        "requests": ("what is it", "say it"),
    }
    source = captions.build(captions.Config(each=2, **keys))
    assert len(source) == 12
    for index in range(12):
        talk, n = source[index], index % 6
        request = ("what is it", "say it")[index % 2]
        assert [turn.text for turn in talk.turns] == [
            f"{MARK}\n{request}",
            f"{('one', 'two')[index // 6]} {n}",
        ]
        assert np.asarray(talk.images[0])[0, 0, 0] == n
        assert talk.key.endswith(f"{n}.png")
    other = captions.build(captions.Config(each=2, source={**keys["source"], "field": "caption"}))
    assert (
        other.fingerprint()
        != source.fingerprint()
        == captions.build(captions.Config(each=2, **keys)).fingerprint()
    )
    assert other[7].turns[1].text == "field 1"
    with pytest.raises(
        ValueError, match=r"source\.name must be given, images with captions; there is: captioned"
    ):
        captions.build(captions.Config())
    with pytest.raises(ValueError, match="requests: 2 times <image> for 1 images"):
        captions.build(captions.Config(**{**keys, "requests": (f"{MARK} what",)}))
    with pytest.raises(ValueError, match="give one text or more"):
        captions.Config(requests=("",))
    # As a command checks it, before the file is imported.
    section = section_values("data.talks", "captions", {"source": {"name": "tar", "path": "x"}}, "data")
    assert section["source"]["field"] == ""
    with pytest.raises(ValueError, match=r"no key 'feild' in 'data\.source'"):
        section_values("data.talks", "captions", {"source": {"name": "tar", "feild": "x"}}, "data")
