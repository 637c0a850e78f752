"""Prediction: frames, wrong prompts, everything, and the commands."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.commands import Command
from dinokit.commands.train_head import check
from dinokit.config import registry
from dinokit.config.registry import find_recipe
from dinokit.segment.encoder import Encoder
from dinokit.segment.predictor import Predictor
from dinokit.segment.promptable import Answer, Embedded, PromptableHead
from dinokit.segment.prompts import check_box, stroke_mask, stroke_points
from dinokit.segment.recipe import Head
from dinokit.weights.formats.native import save_backbone


@pytest.fixture
def predictor(backbone):
    torch.manual_seed(1)
    encoder = Encoder(backbone, 32)
    head = PromptableHead(encoder.width, Head(hidden=32)).eval()
    return Predictor(head, encoder)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8)


def test_masks_have_the_size_of_the_image(predictor, photo):
    predictor.set_image(photo)
    assert predictor.size == (20, 50)
    one = predictor.predict(points=[(49, 19)])
    assert (one.masks.shape, one.quality.shape, one.logits.shape) == ((1, 20, 50), (1,), (1, 16, 16))
    three = predictor.predict(box=(0, 0, 50, 20), several=True)
    assert three.masks.shape == (3, 20, 50)
    assert (np.diff(three.quality) <= 0).all()


def test_refining_is_predicting_with_all_points_and_the_last_logits(predictor, photo):
    predictor.set_image(photo)
    first = predictor.predict(points=[(10, 5)])
    refined = predictor.refine([(30, 6)], signs=[0])
    same = predictor.predict(points=[(10, 5), (30, 6)], signs=[1, 0], mask=first.logits)
    torch.testing.assert_close(refined.logits, same.logits)
    assert not torch.equal(refined.logits, first.logits)
    predictor.predict(points=[(10, 5)])
    torch.testing.assert_close(predictor.refine([(30, 6)], signs=[0]).logits, refined.logits)


def test_of_several_masks_the_first_is_refined(predictor, photo):
    predictor.set_image(photo)
    three = predictor.predict(points=[(10, 5)], several=True)
    refined = predictor.refine([(30, 6)], signs=[0])
    same = predictor.predict(points=[(10, 5), (30, 6)], signs=[1, 0], mask=three.logits[:1])
    torch.testing.assert_close(refined.logits, same.logits)


def test_numbers_may_be_arrays(predictor, photo):
    predictor.set_image(photo)
    points, signs, box = [(10, 5), (30, 6)], [1, 0], (3, 2, 40, 19)
    lists = predictor.predict(points, signs, box), predictor.refine(points, signs)
    arrays = (
        predictor.predict(np.array(points), np.array(signs), np.array(box)),
        predictor.refine(np.array(points), np.array(signs)),
    )
    for one, other in zip(lists, arrays, strict=True):
        assert torch.equal(one.logits, other.logits)


def test_strokes_are_points_for_a_head_without_strokes(predictor, photo):
    predictor.set_image(photo)
    line = [(5, 3), (30, 12)]
    points = stroke_points(stroke_mask(line, (20, 50)))
    drawn = predictor.predict(points=[(40, 2)], signs=[0], strokes=line)
    same = predictor.predict(points=[(40, 2), *points], signs=[0] + [1] * len(points))
    assert torch.equal(drawn.logits, same.logits)


def test_a_new_image_replaces_the_old_one(predictor, photo):
    predictor.set_image(photo)
    first = predictor.predict(points=[(10, 5)]).logits
    predictor.set_image(255 - photo)
    with pytest.raises(ValueError, match="no mask to refine yet"):
        predictor.refine([(3, 3)])
    assert not torch.equal(predictor.predict(points=[(10, 5)]).logits, first)
    predictor.set_image(photo)
    assert torch.equal(predictor.predict(points=[(10, 5)]).logits, first)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "Give a prompt: points, a box, a mask, strokes, a text or a region"),
        ({"points": [(50, 3)]}, r"\(50, 3\) is outside the image, which is 50 pixels wide and 20 high"),
        ({"points": [(3, 3)], "signs": [1, 0]}, "give one for each of the 1 points"),
        ({"points": [(3, 3)], "signs": [2]}, "1 on the object or 0"),
        ({"points": [(3, 3)], "signs": [0]}, "All points have sign 0"),
        ({"points": [(3, 3, 1)]}, r"points: \[3.0, 3.0, 1.0\] is none"),
        ({"points": [(3, float("nan"))]}, r"\(3, nan\) is outside the image"),
        ({"box": (0, 0, 51, 3)}, "leaves the image, which is 50 pixels wide and 20 high"),
        ({"box": (9, 0, 3, 3)}, "the left and upper edge before the others"),
        ({"box": (1, 2, 3)}, "four numbers"),
        ({"mask": np.ones((50, 20), bool)}, "The mask has 20 x 50 pixels, the image 50 x 20"),
        ({"strokes": [(3, 3), (9, 3)], "signs": [1]}, r"signs=\[1\]: give one for each of the 0 points"),
        ({"strokes": [(3, 3), (50, 3)]}, r"\(50, 3\) is outside the image"),
        ({"mask": torch.zeros(1, 3, 3)}, r"this has the shape \(1, 3, 3\)"),
    ],
)
def test_wrong_prompts_get_words(predictor, photo, prompt, message):
    with pytest.raises(ValueError, match="call set_image"):
        predictor.predict(points=[(1, 1)])
    predictor.set_image(photo)
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


def test_a_mask_of_the_image_is_a_prompt(predictor, photo):
    predictor.set_image(photo)
    mask = np.zeros((20, 50), bool)
    mask[5:15, 10:30] = True
    assert not torch.equal(predictor.predict(mask=mask).logits, predictor.predict(mask=~mask).logits)


def test_a_box_may_touch_the_edges():
    check_box((0, 0, 50, 20), (20, 50))


class DiscHead(torch.nn.Module):
    """A disc around each point, the better the more it lies to the right."""

    def embed(self, features, pixels):
        return Embedded(features, None, pixels.shape[-1])

    def forward(self, embedded, prompt):
        centres = 2 * torch.arange(16) + 0.5  # of the cells, on a canvas of 32 pixels
        x, y = prompt.points[:, 0, :, None, None].unbind(dim=1)
        distance = torch.hypot(centres - x, centres[:, None] - y)
        return Answer((6 - distance)[:, None], prompt.points[:, 0, :1] / 32)


def test_everything_keeps_the_best_of_masks_that_overlap(predictor, photo):
    predictor = Predictor(DiscHead(), predictor.encoder)
    predictor.set_image(photo)
    assert len(predictor.everything(side=8, quality=0, stability=0, overlap=1)) == 8 * 3
    found = predictor.everything(side=8, quality=0, stability=0, overlap=0.4)
    assert 1 < len(found) < 8 * 3
    assert found[0].point[0] > 40
    assert [f.quality for f in found] == sorted((f.quality for f in found), reverse=True)
    for each in found:
        ys, xs = np.nonzero(each.mask)
        assert each.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert each.rle.area == each.mask.sum()
        assert 0 <= each.stability <= 1
    boxes = [f.box for f in found]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            w, h = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
            area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
            assert w * h / (sum(area) - w * h) <= 0.4
    assert predictor.everything(side=4, quality=1.1) == []


# The commands.

BACKBONE = ["backbone.name=raw_patches", "backbone.size=32", "backbone.patch=8", "backbone.cell=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny backbone in a file, and a head that two steps trained."""
    folder = tmp_path_factory.mktemp("segment")
    torch.manual_seed(0)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    save_backbone(folder / "vit.safetensors", registry.build("models", section).eval(), section, "")
    settings = ["size=32", "objects.size=32", "objects.count=4", "prompts.min_area=8", "prompts.objects=2",
                "optim.steps=2", "optim.batch=2", "head.hidden=32"]  # fmt: skip
    words = ["train-head", "head_promptable_scenes", f"weights={folder / 'vit.safetensors'}", *settings]
    assert main([*words, f"out={folder / 'head'}", "device=cpu"]) == 0
    source = registry.build("data.objects", {"name": "scenes", "size": 48, "split": "test"})
    (folder / "photos").mkdir()
    for index in range(2):
        source[index][0].save(folder / "photos" / f"{index}.png")
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def arguments(folder):
    return [f"weights={folder / 'vit.safetensors'}", f"head={folder / 'head'}", "device=cpu"]


def test_a_prompt_on_the_command_line_writes_a_mask(trained, tmp_path, capsys):
    photo, out = str(trained / "photos" / "0.png"), tmp_path / "mask.png"
    words = ["segment", photo, *arguments(trained), "points=[[20,20,1],[3,3,0]]", f"out={out}"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    mask = pixels(out)
    assert mask.shape == (48, 48)
    assert set(np.unique(mask)) <= {0, 255}
    assert result["area"] == [int((mask > 0).sum())]
    assert pixels(result["overlay"]).shape == (48, 48, 3)
    words = [
        "segment",
        photo,
        *arguments(trained),
        "box=[2,2,40,40]",
        f"mask={out}",
        "several=true",
        f"out={tmp_path / 'corrected.png'}",
    ]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["masks"] == 3
    assert (tmp_path / "corrected_3.png").is_file()


def test_strokes_are_lines_or_a_picture(trained, tmp_path, capsys):
    words = ["segment", str(trained / "photos" / "0.png"), *arguments(trained)]
    mask = stroke_mask([[(5, 5), (20, 9)], [(30, 30)]], (48, 48))
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "drawn.png")
    for number, strokes in enumerate(("[[[5,5],[20,9]],[[30,30]]]", tmp_path / "drawn.png")):
        assert main([*words, f"strokes={strokes}", f"out={tmp_path / f'{number}.png'}"]) == 0
    assert (pixels(tmp_path / "0.png") == pixels(tmp_path / "1.png")).all()
    assert main([*words, "strokes=[[5,5],[48,9]]"]) != 0
    assert "(48, 9) is outside the image" in capsys.readouterr().err


def test_torch_hub_gives_a_predictor(trained):
    files = {"weights": trained / "vit.safetensors", "head": trained / "head", "device": "cpu"}
    predictor = torch.hub.load(Path(__file__).parents[2], "dinokit_predictor", source="local", **files)
    predictor.set_image(trained / "photos" / "0.png")
    assert predictor.predict([(20, 20)]).masks.shape == (1, 48, 48)


def test_everything_writes_what_train_head_reads(trained, tmp_path, capsys):
    words = ["segment", str(trained / "photos"), *arguments(trained), "everything=true", "side=3"]
    assert main([*words, "quality=0", "stability=0", f"out={tmp_path / 'masks'}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 2
    assert result["masks"] > 0
    source = registry.build("data.objects", {"name": "sa1b", "path": str(tmp_path / "masks")})
    assert len(source) == 2
    assert sum(len(source[index][1]) for index in range(2)) == result["masks"]
    ids = pixels(tmp_path / "masks" / "pictures" / "0.ids.png")
    assert ids.max() <= len(source[0][1])
    assert (tmp_path / "masks" / "0.png").read_bytes() == (trained / "photos" / "0.png").read_bytes()


def test_a_copy_lies_as_its_masks_do(trained, tmp_path):
    """A photograph that EXIF turns is written upright, and no other is changed."""
    with Image.open(trained / "photos" / "0.png") as image:
        exif = image.getexif()
        exif[274] = 6  # a quarter turn
        image.crop((0, 0, 48, 20)).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    words = ["segment", str(tmp_path / "turned.jpg"), *arguments(trained), "everything=true", "side=2"]
    assert main([*words, "quality=0", "stability=0", f"out={tmp_path / 'masks'}"]) == 0
    source = registry.build("data.objects", {"name": "sa1b", "path": str(tmp_path / "masks")})
    image, objects = source[0]
    assert (image.size, objects.size) == ((20, 48), (48, 20))


def test_no_image_is_written_over_and_no_two_files_have_one_name(trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "a.jpg"):
        with Image.open(trained / "photos" / "0.png") as image:
            image.convert("RGB").save(photos / name)
    before = (photos / "a.png").read_bytes()
    everything = [f"weights={tmp_path}/none", f"head={tmp_path}/none", "everything=true"]
    assert main(["segment", str(photos), *everything, f"out={tmp_path}/out"]) != 0
    assert re.search(r"a.json would be written for .*a.jpg and .*a.png: rename one", capsys.readouterr().err)
    one = [f"weights={tmp_path}/none", f"head={tmp_path}/none", "points=[[1,1]]"]
    for photo, settings, out in (
        (photos / "a.png", one, photos / "a.png"),
        (photos / "a.png", everything, photos),
        (photos / "a.png", [*one[:2], "like=[a.png,b.png]"], photos),
        (photos / "a.jpg", [*one[:2], f"like=[{photos}/a.jpg,{photos}/a.png]"], photos),
    ):
        assert main(["segment", str(photo), *settings, f"out={out}"]) != 0
        assert "is one of your images, and would be written over" in capsys.readouterr().err
    assert (photos / "a.png").read_bytes() == before
    assert main(["segment", str(photos / "a.png"), *everything, f"out={photos / 'a.jpg'}"]) != 0
    assert "is a file, and several are written" in capsys.readouterr().err


def test_a_large_suffix_is_a_png_too(trained, tmp_path):
    words = ["segment", str(trained / "photos" / "0.png"), *arguments(trained), "points=[[20,20]]"]
    assert main([*words, f"out={tmp_path / 'mask.PNG'}"]) == 0
    assert (tmp_path / "mask.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "Give a prompt"),
        (["points=[[60,1,1]]"], "(60, 1) is outside the image, which is 48 pixels wide"),
        (["points=[[6,1,3]]"], "is no point"),
        (["points=[[6,1,1]]", "everything=true"], "Leave one out"),
        (["points=[[6,1,1]]", "out=mask.jpg"], "written as PNG"),
        (["points=[[6,1,1]]", "side=3"], "side: only with everything"),
        (["everything=true", "several=true"], "several: only without everything"),
    ],
)
def test_wrong_commands_get_words(trained, settings, message, capsys):
    assert main(["segment", str(trained / "photos" / "0.png"), *arguments(trained), *settings]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", registry.recipe_names("head"))
def test_every_recipe_of_a_head_can_be_read(name):
    path = [] if "scenes" in name else ["objects.path=FOLDER"]
    cfg = check(Command([name], [*BACKBONE, *path]))
    assert cfg.run.out == f"runs/{name}"
    text = find_recipe(name, "head").read_text()
    assert f"dinokit train-head {name}" in text
    assert "esult" in text
    if cfg.kind == "promptable":
        PromptableHead(48, cfg.head)


def test_nothing_found_is_said(trained, tmp_path, capsys):
    words = ["segment", str(trained / "photos" / "0.png"), *arguments(trained), "everything=true", "side=2"]
    assert main([*words, "quality=1", f"out={tmp_path / 'masks'}"]) == 0
    assert "No mask passed quality=1" in capsys.readouterr().err


def test_one_prompt_is_for_one_image(trained, capsys):
    assert main(["segment", str(trained / "photos"), *arguments(trained), "points=[[6,1,1]]"]) != 0
    assert "has 2 images, and a prompt is for one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "Give either weights="),
        ([*BACKBONE, "weights=x"], "Give either weights="),
        ([*BACKBONE, "objects=null"], "objects.name must be given"),
        ([*BACKBONE, "prompts.box=2"], "it is a share"),
        ([*BACKBONE, "prompts.boxes=2"], "Did you mean 'box'?"),
        ([*BACKBONE, "context.shots=2"], "context: only with kind=in_context"),
        ([*BACKBONE, "kind=in_context"], "prompts: only with kind=promptable"),
        ([*BACKBONE, "size=30"], "size=30 is no multiple"),
    ],
)
def test_wrong_settings_of_a_head_get_words(tmp_path, settings, message, capsys):
    words = ["train-head", "head_promptable_scenes", *settings, f"out={tmp_path}/run", "device=cpu"]
    assert main(words) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "recipe.yaml").exists()
