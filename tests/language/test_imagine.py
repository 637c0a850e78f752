"""Next-embedding prediction: a list of places made by hand, own outputs as fixed point, pixels read."""

import itertools
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinokit.commands import Command, imagine
from dinokit.data.scenes.captioned import Board, CaptionedWorld, Thing, valid
from dinokit.data.scenes.sentences import describe
from dinokit.features import fingerprint
from dinokit.language.imagine import Decoder, Imagine, Shape, check_words, load, save
from dinokit.language.imagine_train import caption_count, drawn_right, encode, read_cells, recall
from dinokit.models import build, raw_patches

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
CAPTION, LONGER = "a red disc", "a red disc at the top left"


@pytest.fixture(scope="module")
def model() -> Imagine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Imagine(Shape(channels=5, width=32, layers=2, pixels=16)).eval()
        made.mean.normal_()
        made.std.uniform_(0.5, 2)
    return made.requires_grad_(False)


def test_which_place_predicts_which_embedding_by_a_list_made_by_hand(model, generator):
    v = torch.randn(2, 16, 5, generator=generator)
    batch = model.tokens([CAPTION, CAPTION], [True, False])
    # <bos> a red disc [IMG] v1 .. v16 [/IMG] <eos>   and   <bos> [IMG] v1 .. v16 [/IMG] a red disc <eos>
    embeddings = [[(4 + k, k) for k in range(16)], [(1 + k, k) for k in range(16)]]
    words = [[(0, 1), (1, 2), (2, 3), (21, 22)], [(18, 19), (19, 20), (20, 21), (21, 22)]]
    states = model.hidden(**batch, embeddings=v)
    image, text = [], []
    for i in range(2):
        for place, k in embeddings[i]:
            image.append(F.smooth_l1_loss(model.down(states[i, place]), v[i, k]))
        for place, label in words[i]:
            text.append(-model.lm.lm_head(states[i, place]).log_softmax(0)[batch["input_ids"][i, label]])
    found = model(**batch, embeddings=v)
    torch.testing.assert_close(found["image"], torch.stack(image).mean())
    torch.testing.assert_close(found["words"], torch.stack(text).mean())
    torch.testing.assert_close(found["loss"], found["words"] + 4 * found["image"])


def test_padding_changes_nothing(model, generator):
    v = torch.randn(2, 16, 5, generator=generator)
    both = model(**model.tokens([CAPTION, LONGER], [True, False]), embeddings=v)
    alone = [model(**model.tokens([c], [w]), embeddings=v[i : i + 1])
             for i, (c, w) in enumerate([(CAPTION, True), (LONGER, False)])]  # fmt: skip
    torch.testing.assert_close(both["image"], (alone[0]["image"] + alone[1]["image"]) / 2)
    words = [(a["words"], n) for a, n in zip(alone, (4, 8), strict=True)]  # with <eos>
    torch.testing.assert_close(both["words"], sum(x * n for x, n in words) / 12)


def test_with_and_without_the_cache_are_equal_and_own_outputs_are_a_fixed_point(model):
    made = model.imagine([CAPTION, LONGER])
    torch.testing.assert_close(made, model.imagine([CAPTION, LONGER], cache=False), rtol=0, atol=1e-5)
    torch.testing.assert_close(made, model.teacher_forced([CAPTION, LONGER], made), rtol=0, atol=1e-5)
    assert not torch.allclose(made[0], made[1])


def test_reading_is_the_likeliest_word_each_time(model, generator):
    v = torch.randn(1, 16, 5, generator=generator)
    (got,) = model.read(v, longest=3)
    ids = model.tokens([""], [False])["input_ids"][:, :-1]
    for _ in range(3):
        states = model.hidden(ids, torch.ones_like(ids), v)
        ids = torch.cat([ids, model.lm.lm_head(states[:, -1:]).argmax(dim=2)], dim=1)
    assert got == model.tokenizer.decode(ids[0, 19:], skip_special_tokens=True)


@torch.no_grad()
def test_each_embedding_is_a_square_of_the_drawing():
    decoder = Decoder(channels=5, pixels=16, width=8).eval()
    decoder.blocks = torch.nn.Identity()
    x = torch.zeros(1, 16, 5)
    before = decoder(x)
    x[0, 6] = 1
    changed = (decoder(x) != before).any(dim=1)[0].nonzero()
    assert changed.min(dim=0).values.tolist() == [4, 8]  # the second row, the third column, of 4 x 4 pixels
    assert changed.max(dim=0).values.tolist() == [7, 11]


def test_the_template_matcher_reads_boards_and_tells_others_apart():
    world = CaptionedWorld(split="test", things=(1, 2))
    boards = [world.board(i) for i in range(60)]
    pixels = torch.stack([torch.from_numpy(world.draw(b).image) for b in boards]).permute(0, 3, 1, 2) / 255
    assert drawn_right(pixels, boards) == {"colour": 1.0, "place": 1.0}
    wrong = drawn_right(pixels, boards[1:] + boards[:1])
    assert wrong["colour"] < 0.3
    assert wrong["place"] < 0.5
    assert read_cells(torch.full((1, 3, 64, 64), 0.5))[1].max() < 1e-6


def test_recall_of_the_truth_a_constant_and_a_shift(generator):
    x = torch.randn(20, 16, 5, generator=generator)
    assert recall(x, x) == 1
    assert recall(torch.ones_like(x), x) == pytest.approx(1 / 20)
    assert recall(x.roll(1, 0), x) == 0


def test_a_folder_gives_the_same_drawings_and_mistakes_are_answered(model, tmp_path):
    save(model, tmp_path / "run", {"seed": 3})
    back, about = load(tmp_path / "run")
    assert about == {"seed": 3}
    torch.testing.assert_close(back.imagine([CAPTION]), model.imagine([CAPTION]))
    with pytest.raises(ValueError, match="not: teapot"):
        check_words(model, "a red teapot")
    with pytest.raises(LookupError, match=r"has no imagine\.json"):
        load(tmp_path)
    (tmp_path / "run" / "imagine.json").write_text(json.dumps({"shape": {"channels": 6}}))
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"one of train, draw, decode, eval\. Did you mean 'draw'"):
        imagine.run(Command(["drew"], []))


def test_code_that_the_user_names_is_built_and_the_same_out_of_a_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "drawing_room").mkdir()
    (tmp_path / "drawing_room" / "net.py").write_text(Path(raw_patches.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    section = {"name": "drawing_room.net", "size": 32, "patch": 8}
    same = build({**section, "name": "raw_patches"}).eval()
    about = {"backbone": section, "fingerprint": fingerprint(same, settings=True)}
    with pytest.raises(ValueError, match=r"run names the module 'drawing_room\.net'"):
        imagine._encoder(imagine.Config(), "run", about)
    assert imagine._encoder(imagine.Config(backbone=section), "run", about).patch == 8
    about["backbone"] = {"name": "timm_any", "model": "vit_tiny_patch16_224", "pretrained": True}
    with pytest.raises(ValueError, match=r"would be downloaded: give weights= or backbone\.name= yours"):
        imagine._encoder(imagine.Config(), "run", about)


@pytest.mark.parametrize(
    ("words", "setting", "answer"),
    [
        (["draw", "run", "a"], "steps=3", "steps=: dinokit imagine draw does not read it; train does."),
        (["draw", "run", "a"], "weights=x", "draw does not read it; train, decode, eval do."),
        (["decode", "run", "a.png"], "size=32", "decode does not read it; train does."),
        (["eval", "run"], "out=a.png", "eval does not read it; train, draw, decode do."),
        (["eval", "run"], "seed=1", "eval does not read it; train does."),
        (["train"], "test=5", "train does not read it; eval does."),
        (["train"], "width=12", "width=12: it must be a multiple of 8"),
        (["train"], "width=4", "width=4"),
        (["train"], "size=34", "size=34: it must be a multiple of 4"),
    ],
)
def test_a_key_that_would_do_nothing_or_cannot_be_is_refused_first(words, setting, answer):
    with pytest.raises(ValueError, match=re.escape(answer)):
        imagine.run(Command(words, [setting]))


def test_every_key_is_read_by_an_action_and_every_width_that_is_taken_can_be_built():
    assert set().union(*imagine.READ.values()) == {item.name for item in fields(imagine.Config)}
    assert list(imagine.READ) == list(imagine.ACTIONS)
    model = Imagine(Shape(channels=5, width=imagine.Config(width=8).width, layers=1, pixels=16))
    assert model.imagine([CAPTION]).shape == (1, 16, 5)


def test_more_captions_than_there_are_is_an_error_that_counts_them():
    things = [Thing(*pair, False, cell)
              for pair in itertools.product(range(8), range(4)) for cell in range(9)]  # fmt: skip
    twos = [pair for pair in itertools.combinations(things, 2) if valid(pair, novel=True)]
    boards = [Board(each, ()) for each in [*((thing,) for thing in things), *twos]]
    novel = {describe(board) for board in boards if any(thing.novel for thing in board.things)}
    others = {describe(board) for board in boards} - novel
    assert (caption_count("test"), caption_count("novel")) == (len(others), len(novel)) == (20_088, 15_912)
    with pytest.raises(ValueError, match=r"20,089 .* test has 20,088"):
        encode(build({"name": "raw_patches"}), "test", 20_089, 64, 0, distinct=True)


@pytest.mark.slow
def test_the_command_learns_draws_and_measures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = "backbone={name: raw_patches, size: 64, patch: 8}"
    small = ["images=100", "decoder_steps=40", "steps=20", "batch=8", "width=32", "layers=2"]
    trained = imagine.run(Command(["train"], [encoder, "out=run", *small]))
    assert trained["loss_decoder"] < 0.25
    drawn = imagine.run(Command(["draw", "run", LONGER], ["out=a.png"]))
    assert (tmp_path / "a.png").stat().st_size > 100
    assert drawn["caption"] == LONGER
    kept = imagine.run(Command(["decode", "run", "a.png", "a.png"], ["out=b.png"]))
    assert kept["images"] == 2
    with Image.open(tmp_path / "b.png", formats=["PNG"]) as picture:
        assert picture.size == (128, 128)
    scores = imagine.run(Command(["eval", "run"], ["test=20"]))
    assert scores["psnr"] > scores["psnr mean image"]
    assert scores["colour photograph"] == scores["place photograph"] == 1
    baselines = {"recall copy left", "recall shuffled captions"}  # a constant is at chance by its definition
    drawn = {"recall", "recall teacher forced", "recall new captions"}
    assert {name for name in scores if name.startswith("recall")} == drawn | baselines
