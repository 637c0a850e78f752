"""A unified head from its recipe to masks: Predictor and the commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.language.aligned import load_aligned
from dinokit.segment.encoder import Encoder
from dinokit.segment.predictor import Predictor
from dinokit.segment.promptable import PromptableHead
from dinokit.segment.prompts import mask_logits, stroke_mask
from dinokit.segment.recipe import Head, Unified
from dinokit.segment.saved import NAME, load_head
from dinokit.segment.unified import UnifiedHead
from dinokit.weights import load_backbone
from dinokit.weights.checkpoint import read_safetensors, write_tensors
from dinokit.weights.formats.native import save_backbone

WORDS = ("disc", "red")
PIXELS = np.zeros((9, 9, 3), np.uint8)
KINDS = ("point", "box", "stroke", "mask", "region", "text")


@pytest.fixture
def predictor(backbone):
    torch.manual_seed(1)
    encoder = Encoder(backbone, 32)
    head = UnifiedHead(encoder.width, Head(hidden=32), Unified(samples=4, embedding=8), WORDS).eval()
    return Predictor(head, encoder)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8)


@pytest.fixture
def region():
    mask = np.zeros((30, 30), bool)
    mask[3:20, 5:25] = True
    return np.random.default_rng(1).integers(0, 255, (30, 30, 3), dtype=np.uint8), mask


def test_every_prompt_alone_has_an_answer_of_its_own(predictor, photo, region):
    predictor.set_image(photo)
    line = [(4, 4), (30, 9)]
    given = ({"text": "red"}, {"text": "disc"}, {"text": "a red disc"}, {"region": region}, {"strokes": line},
             {"points": [(4, 4)]}, {"text": "red", "region": region})  # fmt: skip
    answers = [predictor.predict(**prompt).logits for prompt in given]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert not torch.allclose(one, other, atol=1e-4)
    torch.testing.assert_close(predictor.predict(text="the disc, red").logits, answers[2])


def test_names_are_the_words_that_fit(predictor, photo):
    predictor.set_image(photo)
    head = predictor.head
    torch.nn.init.zeros_(head.name.weight)
    with torch.no_grad():
        head.name.bias.copy_(head.table[1])
        assert predictor.predict(points=[(4, 4)]).words == ("red",)
        head.bias.fill_(20.0)
        assert predictor.predict(points=[(4, 4)]).words == ("red", "disc")
        head.bias.fill_(-20.0)
    assert predictor.predict(points=[(4, 4)]).words == ()


def test_refining_keeps_words_strokes_and_region(predictor, photo, region):
    predictor.set_image(photo)
    given = {"text": "red", "region": region, "strokes": [(4, 4), (30, 9)]}
    first = predictor.predict(**given)
    refined = predictor.refine([(40, 6)], signs=[0])
    same = predictor.predict(points=[(40, 6)], signs=[0], mask=first.logits, **given)
    torch.testing.assert_close(refined.logits, same.logits)
    assert not torch.allclose(refined.logits, first.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text": "a green disc"}, "does not know the word 'green'.*It knows: disc, red"),
        ({"strokes": [(60, 4)]}, r"\(60, 4\) is outside the image"),
        ({"region": (PIXELS, np.ones((9, 8), bool))}, "of its image's size, 9 x 9, and marks something"),
        ({"region": (PIXELS, np.zeros((9, 9), bool))}, "this one has 9 x 9 pixels and type torch.bool"),
        ({}, "Give a prompt"),
    ],
)  # fmt: skip
def test_wrong_prompts_get_words(predictor, photo, prompt, message):
    predictor.set_image(photo)
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


@pytest.mark.parametrize("prompt", [{"text": "red"}, {"region": (None, None)}])
def test_a_head_that_takes_no_words_says_so(predictor, photo, prompt):
    torch.manual_seed(1)
    plain = Predictor(PromptableHead(predictor.encoder.width, Head(hidden=32)).eval(), predictor.encoder)
    plain.set_image(photo)
    with pytest.raises(ValueError, match=r"this head takes none\. Give a unified one"):
        plain.predict(**prompt)


def test_a_rough_mask_is_given_as_in_training(predictor, photo):
    predictor.set_image(photo)
    mask = np.zeros((20, 50), bool)
    mask[5:15, 10:30] = True
    predictor.predict(mask=mask)
    _, frame = predictor._embedded()
    expected = mask_logits(frame.mask_to_canvas(torch.from_numpy(mask))[None], (16, 16))
    assert torch.equal(predictor._prompt.masks, expected)


# The commands.

SIZES = ["size=32", "objects.maps.size=32", "objects.maps.count=6", "objects.min_area=8",
         "prompts.min_area=8",
         "prompts.objects=2", "optim.steps=2", "optim.batch=2", "head.hidden=32"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny backbone in a file, and a head that two steps trained."""
    folder = tmp_path_factory.mktemp("unified")
    torch.manual_seed(0)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    save_backbone(folder / "vit.safetensors", registry.build("models", section).eval(), section, "")
    words = ["train-head", "head_unified_scenes", f"weights={folder / 'vit.safetensors'}", *SIZES]
    assert main([*words, f"out={folder / 'head'}", "device=cpu"]) == 0
    source = registry.build("data.objects", {"name": "scenes", "size": 48, "split": "test"})
    for index in range(2):
        image, objects = source[index]
        image.save(folder / f"{index}.png")
        Image.fromarray(objects.mask(0).astype(np.uint8) * 255).save(folder / f"{index}_mask.png")
    return folder


def segment(folder, *settings):
    given = [f"weights={folder / 'vit.safetensors'}", f"head={folder / 'head'}", "device=cpu"]
    return main(["segment", str(folder / "0.png"), *given, *settings])


def test_words_and_regions_on_the_command_line(trained, tmp_path, capsys):
    other = f"region=[{trained / '1.png'},{trained / '1_mask.png'}]"
    for number, given in enumerate((["text=disc"], [other], ["text=disc", other, "points=[[20,20]]"])):
        assert segment(trained, *given, f"out={tmp_path / f'{number}.png'}") == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        with Image.open(tmp_path / f"{number}.png") as mask:
            assert result["area"] == [int((np.asarray(mask) > 0).sum())]
    assert segment(trained, "strokes=[[5,5],[20,9]]", "several=true", f"out={tmp_path / 'a.png'}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["masks"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["text=giraffe"], "the head does not know the word 'giraffe'"),
        (["region=[a.png]"], "it is an image and a mask in it"),
        (["text=disc", "everything=true"], "Leave one out"),
        (["align=x", "points=[[1,1]]"], "With align it goes with no other prompt"),
        (["strokes=[a.png,b.png]"], "give one file, or lines of points"),
    ],
)
def test_wrong_commands_get_words(trained, settings, message, capsys):
    assert segment(trained, *settings) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["region=[{0},{0}]", "strokes={0}", "mask={0}"])
def test_a_picture_of_a_prompt_is_not_written_over(trained, prompt, capsys):
    other = trained / "1.png"
    before = other.read_bytes()
    assert segment(trained, prompt.format(other), f"out={other}") != 0
    assert "is one of your images" in capsys.readouterr().err
    assert other.read_bytes() == before


def test_the_file_of_a_head_has_its_words_and_answers_clicks(trained):
    backbone = load_backbone(trained / "vit.safetensors")
    head, encoder, about = load_head(trained / "head", backbone, "promptable")
    assert about.kind == "unified"
    assert {"disc", "red"} <= set(head.words) == set(about.words)
    assert about.unified == {"samples": 8, "memory": 4, "embedding": 64}
    predictor = Predictor(head, encoder)
    predictor.set_image(trained / "0.png")
    drawn = stroke_mask([(5, 5), (20, 9)], (48, 48))
    assert predictor.predict(strokes=drawn).masks.shape == (1, 48, 48)
    with pytest.raises(ValueError, match="is a head of kind unified; this needs one of kind in_context"):
        load_head(trained / "head", backbone, "in_context")


@pytest.mark.parametrize(
    "change", [{"unified": {"samples": -1}}, {"unified": {"size": 3}}, {"words": [1]}, {"words": ["one"]}]
)
def test_a_damaged_file_is_refused(trained, tmp_path, change):
    backbone = load_backbone(trained / "vit.safetensors")
    tensors, metadata = read_safetensors(trained / "head" / NAME)
    about = json.loads(metadata["dinokit_head"]) | change
    write_tensors(tmp_path / NAME, tensors, {"dinokit_head": json.dumps(about)})
    with pytest.raises(ValueError, match=r"is no head that dinokit train-head saved|is damaged"):
        load_head(tmp_path, backbone, "unified")


ALIGN = ["data.size=32", "view.size=32", "data.count=16", "head.width=16", "head.depth=1",
         "head.heads=2", "head.embedding=8", "text.width=16", "text.depth=1", "text.heads=2", "steps=2",
         "batch=4"]  # fmt: skip


@pytest.mark.slow
def test_vectors_of_an_alignment_are_taken_and_stay(trained, tmp_path, capsys):
    pytest.importorskip("transformers")
    weights, out = trained / "vit.safetensors", ["device=cpu", "run.log_every=1"]
    assert (
        main(["align", "align_captioned_cpu", f"weights={weights}", *ALIGN, f"out={tmp_path / 'a'}", *out])
        == 0
    )
    words = [
        "train-head",
        "head_unified_scenes",
        f"weights={weights}",
        *SIZES,
        f"unified.align={tmp_path / 'a'}",
    ]
    assert main([*words, f"out={tmp_path / 'head'}", "device=cpu"]) == 0
    backbone = load_backbone(weights)
    head, _, about = load_head(tmp_path / "head", backbone, "unified")
    assert about.unified["embedding"] == 8
    torch.testing.assert_close(head.table, load_aligned(tmp_path / "a", backbone).text(about.words))
    again = [*words, f"start={tmp_path / 'head'}", "device=cpu"]
    assert main([*again, f"out={tmp_path / 'again'}"]) == 0
    file = tmp_path / "head" / NAME
    tensors, metadata = read_safetensors(file)
    write_tensors(file, tensors | {"table": tensors["table"] + 1}, metadata)
    capsys.readouterr()
    assert main([*again, f"out={tmp_path / 'other'}"]) != 0
    assert "has other vectors of words than unified.align" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kind=promptable", "prompts.objects=2"], "is a head of kind unified: set kind=unified."),
        (["objects.maps.labels=shape"], "knows the words black, blue"),
        (["unified.memory=4", "unified.samples=8", "head.hidden=16"], "'samples': 8"),
    ],
)
def test_a_head_to_begin_with_has_the_same_kind_words_and_sizes(trained, tmp_path, settings, message, capsys):
    weights = f"weights={trained / 'vit.safetensors'}"
    words = ["train-head", "head_unified_scenes", weights, *SIZES, f"start={trained / 'head'}", "device=cpu"]
    assert main([*words, *settings, f"out={tmp_path / 'new'}"]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["unified.both=2"], "unified.both=2.0: it is a share"),
        (["prompts.box=0.5"], "Set unified.box"),
        (["kind=promptable", "unified.text=0.5"], "unified: only with kind=unified"),
        (["unified.align=run", "unified.embedding=3"], "unified.embedding: the vectors are those of"),
        ([f"unified.{kind}=0" for kind in KINDS], "odds above 0"),
        (["unified.align=nowhere"], "There is no alignment nowhere"),
    ],
)  # fmt: skip
def test_wrong_settings_get_words(tmp_path, settings, message, capsys):
    given = ["backbone.name=raw_patches", "backbone.patch=8", "backbone.cell=4", "backbone.size=64"]
    settings = [*settings, "optim.steps=1", f"out={tmp_path}/run", "device=cpu"]
    words = ["train-head", "head_unified_scenes", *given, *settings]
    assert main(words) != 0
    assert message in capsys.readouterr().err
