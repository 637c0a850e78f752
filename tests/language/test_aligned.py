"""language/aligned.py and align.py: the head by hand, what must not leak, resume, and the file."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import checked_values, read_mapping
from dinokit.language import align
from dinokit.language.align import Pairs, train
from dinokit.language.align_recipe import Config, Head, Optim, Run, Text, View
from dinokit.language.aligned import FrozenTokens, ImageHead, load_aligned, sine_places
from dinokit.language.text import build_tower, open_tower
from dinokit.models.vit import Config as Vit
from dinokit.models.vit import VisionTransformer
from dinokit.runtime.launch import Watchdog
from dinokit.runtime.signals import Stopped, StopSignal
from dinokit.weights.checkpoint import read_safetensors

WORLD = {"name": "captioned", "size": 32, "count": 24, "split": "train"}


@pytest.fixture
def backbone(drawn):
    return drawn(size=32, patch=8, width=64, registers=2)


@pytest.fixture
def source():
    return registry.build("data.captions", {**WORLD, "things": (1, 3)})


def config(out, **changes):
    given = {
        "name": "tiny",
        "data": dict(WORLD),
        "head": Head(width=16, depth=1, heads=2, embedding=8),
        "text": Text(width=16, depth=1, heads=2, length=40),
        "optim": Optim(steps=4, batch=6, warmup=1),
        "run": Run(out=str(out), device="cpu", log_every=1, checkpoint_every=2),
    }
    (Path(out) / "checkpoints").mkdir(parents=True, exist_ok=True)
    return Config(**{**given, **changes})


def run(cfg, backbone, source):
    return train(cfg, backbone, source, Watchdog(30.0))


def head_of(depth=0, grid=(2, 3), width=5, local=False):
    torch.manual_seed(0)
    return ImageHead(Head(width=8, depth=depth, heads=2, embedding=6, local=local), width, grid).eval()


def test_without_blocks_a_vector_is_the_class_token_beside_the_mean_of_patches():
    head, tokens = head_of(), torch.randn(2, 1 + 2 + 6, 5)  # two registers
    head.standardise(torch.randn(40, 9, 5) * 3 + 1)
    got = head(tokens)
    scaled = (tokens - head.mean) / head.deviation
    patches = F.layer_norm(head.inside(scaled[:, 3:]) + head.places, (8,))
    cls = F.layer_norm(head.inside(scaled[:, 0]), (8,))
    want = torch.cat([cls @ head.of_class.weight.T, (patches @ head.of_patches.weight.T).mean(dim=1)], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert head.mean.mean().item() == pytest.approx(1, abs=0.3)


def test_registers_are_read_by_blocks_and_are_in_neither_the_mean_nor_the_map():
    tokens, texts = torch.randn(1, 9, 5), torch.randn(4, 6)
    other = tokens.clone()
    other[:, 1:3] += 5
    plain, blocks = head_of(), head_of(depth=1)
    assert torch.equal(plain(tokens), plain(other))
    assert torch.equal(plain.dense(tokens, texts), plain.dense(other, texts))
    assert not torch.allclose(blocks(tokens), blocks(other))


def test_a_local_map_changes_where_a_patch_does_and_the_class_token_reads_all():
    tokens, texts = torch.randn(1, 7, 5), torch.randn(2, 6)
    other = tokens.clone()
    other[:, 4] += 1  # the patch at (1, 0)
    for local, count in ((True, 1), (False, 6)):
        head = head_of(depth=1, local=local)
        changed = (head.dense(tokens, texts) - head.dense(other, texts)).abs().amax(dim=(0, 1)) > 1e-6
        assert int(changed.sum()) == count
        assert changed[1, 0]
        assert not torch.allclose(head(tokens)[:, :3], head(other)[:, :3])


def test_the_map_is_the_cosine_of_each_patch_with_the_second_half_of_a_text():
    head, tokens, texts = head_of(depth=1), torch.randn(2, 7, 5), torch.randn(3, 6)
    got = head.dense(tokens, texts)
    assert got.shape == (2, 3, 2, 3)
    patches = head.seen(tokens)[1]
    for b, c, i, j in [(0, 0, 0, 0), (1, 2, 1, 2), (0, 1, 1, 0)]:
        want = F.cosine_similarity(patches[b, 3 * i + j], texts[c, 3:], dim=0)
        torch.testing.assert_close(got[b, c, i, j], want)


def test_places_differ_and_have_the_same_waves_on_another_grid():
    small, large = sine_places((2, 2), 16), sine_places((6, 6), 16)
    assert len({tuple(row) for row in large.tolist()}) == 36
    centre = large.unflatten(0, (6, 6))[1::3, 1::3].flatten(0, 1)  # the same places in [0, 1]
    torch.testing.assert_close(centre, small)


def test_tokens_are_those_of_a_block_of_the_backbone(backbone):
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    for block, norm in [(0, False), (-1, True)]:
        seen = FrozenTokens(backbone, View(block=block, norm=norm))
        assert (seen.tokens, seen.width, seen.grid) == (1 + 2 + 16, 64, (4, 4))
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (backbone.input.mean, backbone.input.std))
        want = backbone.layers((pixels / 255 - mean) / std, [block % 2], norm)[0]
        rows = torch.cat([want.cls[:, None], want.registers, want.patches], dim=1)
        torch.testing.assert_close(seen(pixels).float(), rows, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"view.size=36 is no multiple .* take view.size=32"):
        FrozenTokens(backbone, View(size=36))
    with pytest.raises(ValueError, match=r"view\.block=2: the backbone has blocks 0 to 1"):
        FrozenTokens(backbone, View(block=2))


def test_items_are_a_function_of_seed_and_number_and_know_all_captions(source):
    pairs, again = Pairs(source, 60, 3), Pairs(source, 60, 3)
    items = [pairs[k] for k in range(60)]
    assert [again[k] for k in reversed(range(60))] == items[::-1]
    assert [Pairs(source, 60, 4)[k]["texts"] for k in range(9)] != [item["texts"] for item in items[:9]]
    assert sorted(item["index"] for item in items[:24]) == list(range(24))
    kinds = [0, 0, 0]
    for item in items:
        known = source.captions(item["index"])
        texts = [pairs.texts[number] for number in item["captions"] if number >= 0]
        assert texts == [text for kind in known for text in kind]
        (text,), (number,) = item["texts"], item["numbers"]
        assert pairs.texts[number] == text
        kinds[next(k for k, kind in enumerate(known) if text in kind)] += 1
    assert min(kinds) > 6


def test_a_second_text_has_two_colours_exchanged_or_is_another_caption(source):
    false = 0
    pairs = Pairs(source, 24, 0, exchanged=True)
    for item in (pairs[k] for k in range(24)):
        twins = source.exchanged(item["index"])
        first, second = item["numbers"]
        assert first in item["captions"]
        if twins is None:
            assert second in item["captions"]
        else:
            assert item["texts"][1] == twins[1]
            assert second not in item["captions"]
            false += 1
    assert false > 5
    with pytest.raises(ValueError, match="needs loss=sigmoid"):
        Config(loss="clip", exchanged=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, with its backbone and images."""
    torch.manual_seed(0)
    backbone = VisionTransformer(Vit(size=32, patch=8, width=64, depth=1, heads=2, registers=2)).eval()
    source = registry.build("data.captions", {**WORLD, "things": (1, 3)})
    cfg = config(tmp_path_factory.mktemp("run") / "run")
    run(cfg, backbone, source)
    return cfg, backbone, source


def test_a_run_that_is_stopped_or_killed_goes_on_bit_for_bit(finished, tmp_path):
    cfg, backbone, source = finished
    whole = read_safetensors(Path(cfg.run.out) / "head.safetensors")[0]
    text = read_safetensors(Path(cfg.run.out) / "text/model.safetensors")[0]
    other = config(tmp_path / "other")
    folder = tmp_path / "other/checkpoints"
    shutil.copytree(Path(cfg.run.out) / "checkpoints/checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-3").mkdir()  # a kill while it was written: it has no state of the loop
    assert run(other, backbone, source) == tmp_path / "other/head.safetensors"
    resumed = read_safetensors(tmp_path / "other/head.safetensors")[0]
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())
    after = read_safetensors(tmp_path / "other/text/model.safetensors")[0]
    assert all(torch.equal(x, after[name]) for name, x in text.items())
    records = [json.loads(line) for line in (Path(cfg.run.out) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"loss", "top1", "repeated", "scale", "lr"} <= records[0].keys()


def test_steps_after_the_last_line_of_the_log_get_one_too(finished, tmp_path):
    _, backbone, source = finished
    cfg = config(tmp_path, optim=Optim(steps=6, batch=6, warmup=1))
    run(replace(cfg, run=replace(cfg.run, log_every=4)), backbone, source)
    assert rates(tmp_path) == {4: pytest.approx(cosine(3, 6)), 6: pytest.approx(cosine(5, 6))}
    assert (tmp_path / "head.safetensors").is_file()


def rates(folder):
    """The learning rate of each line of the log."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["lr"] for record in records}


def cosine(step, steps):
    """The rate of a step, from 0, after a warm-up of one step."""
    return Optim().lr * (1 + math.cos(math.pi * (step - 1) / (steps - 1))) / 2


def test_a_signal_saves_and_stops(finished, tmp_path, monkeypatch):
    _, backbone, source = finished
    asked = iter([False, False, True])
    monkeypatch.setattr(StopSignal, "on_any_process", lambda self: next(asked))
    cfg = config(tmp_path)
    with pytest.raises(Stopped):
        run(replace(cfg, run=replace(cfg.run, log_every=4)), backbone, source)
    assert (tmp_path / "checkpoints/checkpoint-3/trainer_state.json").is_file()
    assert not (tmp_path / "head.safetensors").exists()
    assert rates(tmp_path) == {3: pytest.approx(cosine(2, 4))}


def test_tokens_that_are_not_kept_are_computed_and_teach_the_same(finished, tmp_path, monkeypatch):
    _, backbone, source = finished
    monkeypatch.setattr(align, "CHUNK", 5)
    monkeypatch.setattr(align, "SAMPLE", 12)  # of 24
    found = []
    for gib in (2.0, 0.0):
        cfg = config(tmp_path / f"{gib}")
        run(replace(cfg, run=replace(cfg.run, memory_gib=gib)), backbone, source)
        found.append(read_safetensors(tmp_path / f"{gib}/head.safetensors")[0])
    a, b = found
    assert all(torch.equal(a[f"head.{name}"], b[f"head.{name}"]) for name in ("mean", "deviation"))
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=2e-2, atol=2e-3)  # 16 bits, and another batch


def test_a_folder_gives_back_what_was_trained(finished):
    cfg, backbone, source = finished
    aligned = load_aligned(cfg.run.out, backbone)
    images, texts = [source[i][0] for i in range(3)], ["a red disc", "a blue thing"]
    x, y = aligned.image(images), aligned.text(texts)
    assert x.shape == (3, 8)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(2))
    assert aligned.dense(images, texts).shape == (3, 2, 4, 4)
    torch.testing.assert_close(aligned.image(images[0])[0], x[0])
    stacked = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])
    torch.testing.assert_close(aligned.image(stacked), x)
    assert aligned.image(Image.new("RGB", (50, 40))).shape == (1, 8)  # any size, as a square
    assert not aligned.training
    assert aligned.about.steps == 4
    with pytest.raises(ValueError, match="A text is empty"):
        aligned.text([""])


def test_images_of_several_depths_in_one_call_have_the_vectors_that_each_has_alone(finished):
    cfg, backbone, _ = finished
    aligned = load_aligned(cfg.run.out, backbone)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), np.uint8), rng.integers(0, 65536, (32, 32, 3), np.uint16)]
    alone = torch.cat([aligned.image([image]) for image in images])
    torch.testing.assert_close(aligned.image(images), alone, rtol=0, atol=1e-3)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


class TwoDepths:
    """Captions of images, every second of which has 16 bits."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        array = np.asarray(self.source[index][0])
        return (array.astype(np.uint16) * 257 if index % 2 else array), 0

    def captions(self, index):
        return self.source.captions(index)


def test_images_of_several_depths_have_the_tokens_of_one_depth(finished):
    _, backbone, source = finished
    seen, mixed = FrozenTokens(backbone, View()), TwoDepths(source)
    want, got = (align.first_tokens(seen, images, Watchdog(30.0), 6) for images in (source, mixed))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)
    pairs = Pairs(mixed, 6, 0, pixels=seen.square)
    tower = build_tower(Text(width=16, depth=1, heads=2), ["a disc"])
    items = [pairs[k] for k in range(6)]
    pixels = align.Collate(tower, None)(items)["pixels"]
    for item, square in zip(items, pixels, strict=True):
        array = torch.from_numpy(np.array(source[item["index"]][0])).permute(2, 0, 1)
        torch.testing.assert_close(square, array / 255)


def test_other_weights_and_other_files_are_refused(finished, tmp_path, drawn):
    cfg, backbone, _ = finished
    with pytest.raises(ValueError, match=r"trained on the features of other weights.*dinokit align RECIPE"):
        load_aligned(cfg.run.out, drawn(size=32, patch=8, width=64, registers=2))
    with pytest.raises(LookupError, match=r"There is no alignment .*head\.safetensors"):
        load_aligned(tmp_path, backbone)
    shutil.copytree(cfg.run.out, tmp_path / "copy")
    (tmp_path / "copy/head.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no head that dinokit align saved"):
        load_aligned(tmp_path / "copy", backbone)


def test_a_folder_that_would_run_code_or_has_another_model_is_refused(finished, tmp_path):
    cfg, _, _ = finished
    text = tmp_path / "text"
    shutil.copytree(Path(cfg.run.out) / "text", text)
    assert open_tower(text, "mean", 99, "text.path").length == 40  # as many as it has positions
    settings = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ValueError, match=r"text.path=.* cannot be read"):
        open_tower(text, "mean", 40, "text.path")
    (text / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "a.B"}}))
    with pytest.raises(ValueError, match=r"text.path=.* cannot be read"):
        open_tower(text, "mean", 40, "text.path")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        open_tower(tmp_path, "mean", 40, "text.path")


def test_recipes_are_read_and_wrong_settings_are_named():
    for name in registry.recipe_names("align"):
        values = read_mapping(registry.find_recipe(name, "align"), holds=Config)
        if name == "align_coco":
            values["data"] |= {"path": "X", "annotations": "Y"}
            values["text"]["path"] = "Z"
        cfg = Config(**checked_values(Config, values, ""))
        assert asdict(cfg)["loss"] in ("sigmoid", "clip")
    with pytest.raises(ValueError, match=r"text\.path is the folder of text.name=folder"):
        Config(text=Text(name="folder"))
    with pytest.raises(ValueError, match=r"head\.width=10 is no multiple of head.heads=4"):
        Config(head=Head(width=10))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "clip"])
def test_it_learns_which_colour_is_where(loss, tmp_path):
    """Raw patches and one thing an image: after 150 steps most images find their colour among eight."""
    backbone = registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4})
    source = registry.build("data.captions", {**WORLD, "count": 400, "things": (1, 1)})
    cfg = config(
        tmp_path, loss=loss, optim=Optim(steps=150, batch=64, lr=3e-3, warmup=20),
        head=Head(width=32, depth=1, heads=2, embedding=32), text=Text(width=32, depth=1, heads=2, length=16),
    )  # fmt: skip
    run(replace(cfg, run=replace(cfg.run, checkpoint_every=150)), backbone, source)
    aligned = load_aligned(tmp_path, backbone)
    test = registry.build("data.captions", {**WORLD, "split": "test", "test_count": 100, "things": (1, 1)})
    boards = [test.board(i).things[0] for i in range(100)]
    colours = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
    texts = [f"a {colour} thing" for colour in colours]
    images = [test[i][0] for i in range(100)]
    found = (aligned.image(images) @ aligned.text(texts).T).argmax(dim=1).tolist()
    assert sum(a == thing.colour for a, thing in zip(found, boards, strict=True)) > 50  # chance: 12
