"""The model against its parts by hand, and its saved folder in a process without dinokit."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dinokit.commands import ask
from dinokit.commands import read_command as command_of
from dinokit.data.talks import MARK
from dinokit.language.answer import Asker, question
from dinokit.language.labels import Collate, Counter, Labels
from dinokit.language.model import open_model, save_model
from dinokit.language.recipe import Language
from dinokit.language.towers import tower_of
from dinokit.models import build

transformers = pytest.importorskip("transformers")


def batch_of(model, talks):
    stops = model.model.generation_config.eos_token_id
    labels = Labels(model.tokenizer, stops, Counter(model.processor, model.tiled), 500)
    return Collate(model.processor, labels)(talks)


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("registers", [0, 3])
def test_a_tower_gives_the_tokens_of_the_backbone_before_the_norm(answering, registers, layer) -> None:
    net = answering.backbone(registers=registers)
    tower = tower_of(net, 32, layer)
    images = torch.randn(2, 3, 32, 32)
    block = layer - 1 if layer > 0 else 2 + layer
    with torch.no_grad():
        want = net.layers(images, [block], norm=False)[0]
        found = tower.model(images, output_hidden_states=True).hidden_states[tower.layer]
        normed = net.layers(images, [block])[0]
    torch.testing.assert_close(found[:, 1 + registers :], want.patches, rtol=0, atol=1e-5)
    assert not torch.allclose(found[:, 1 + registers :], normed.patches, atol=0.1)


def test_positions_of_a_tower_at_another_size_are_those_of_the_backbone(answering) -> None:
    net = answering.backbone(pos_antialias=True, pos_offset=0.0)
    images = torch.randn(1, 3, 48, 48)
    tower = tower_of(net, 48, -1)
    with torch.no_grad():
        found = tower.model(images, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(found, net.layers(images, [1], norm=False)[0].patches, rtol=0, atol=1e-4)


def test_a_tower_of_raw_patches_gives_their_pixels() -> None:
    net = build({"name": "raw_patches", "size": 32, "patch": 8, "cell": 4})
    tower = tower_of(net, 0, -1)
    images = torch.randn(2, 3, 32, 32)
    found = tower.model(images, output_hidden_states=True).hidden_states[tower.layer][:, 1:]
    torch.testing.assert_close(found, net([images], [None])[0].patches)


def test_other_backbones_are_refused_with_what_to_give(answering) -> None:
    with pytest.raises(ValueError, match=r"a Pixels, for which .* no tower. Give a vit or a dinov3"):
        tower_of(build({"name": "pixels"}), 0, -1)
    with pytest.raises(ValueError, match=r"view.size=30 is no multiple of the backbone's patch, 8"):
        tower_of(answering.backbone(), 30, -1)
    with pytest.raises(ValueError, match="has 2 blocks, so it is -3 to 2"):
        tower_of(answering.backbone(), 32, 5)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("registers", [0, 4])
def test_logits_are_those_of_the_parts_put_together_by_hand(answering, registers, layer) -> None:
    net = answering.backbone(registers=registers)
    model = answering.answerer(net, layer=layer)
    talks = [answering.talk("what colour is the disc", "red"), answering.talk("how many", "two", images=2)]
    batch = batch_of(model, talks)
    with torch.no_grad():
        got = model.model(**batch).logits
        seen = net.layers(batch["pixel_values"], [2 + layer], norm=False)[0]
        tokens = torch.cat([seen.registers, seen.patches], dim=1)
        projector = model.model.model.multi_modal_projector
        shown = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(tokens))).flatten(0, 1)
        rows = model.model.get_input_embeddings()(batch["input_ids"])
        image = model.tokenizer.convert_tokens_to_ids(MARK)
        places = (batch["input_ids"] == image).nonzero().tolist()
        assert len(places) == len(shown) == 3 * (16 + registers)
        for (row, place), token in zip(places, shown, strict=True):
            rows[row, place] = token
        decoder = model.model.model.language_model
        want = decoder(inputs_embeds=rows, attention_mask=batch["attention_mask"]).last_hidden_state
        want = want @ model.model.get_input_embeddings().weight.T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_batch_of_questions_is_answered_as_each_alone(answering) -> None:
    model = answering.answerer(answering.backbone())
    with torch.no_grad():  # answers that depend on what is seen, and long ones
        for parameter in model.parameters("language").values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    asker = Asker(model, 6)
    asked = [
        question([answering.picture(n)], text)
        for n, text in enumerate(["what colour", "how many things are there"])
    ]
    together = list(asker.answers(asked, 2))
    assert together == [next(asker.answers([each])) for each in asked]
    both, one = asker.inputs(asked), asker.inputs(asked[:1])
    assert both["attention_mask"][0, 0] == 0  # the shorter one is padded on the left
    with torch.no_grad():
        a, b = model.model(**both).logits[0, -1], model.model(**one).logits[0, -1]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


FRESH = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, photo, prompt = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
inputs = processor(images=[Image.open(photo)], text=[prompt], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1].tolist()
    new = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1]:]
answer = processor.decode(new, skip_special_tokens=True)
print(json.dumps([logits, answer, "dinokit" in sys.modules]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("view", ["square", "tiles"])
def test_a_saved_folder_answers_the_same_where_dinokit_is_not_imported(answering, view, tmp_path) -> None:
    model = answering.answerer(answering.backbone(registers=2 if view == "square" else 0), name=view)
    asker = Asker(model, 5)
    photo = tmp_path / "photo.png"
    Image.fromarray(answering.picture(0, 40, 70)).save(photo)
    asked = question([answering.picture(0, 40, 70)], f"{MARK} what colour is the disc")
    save_model(model, tmp_path / "model", {})
    with torch.no_grad():
        want = model.model(**asker.inputs([asked])).logits[0, -1]
    prompt = f"<bos> <user> {MARK} what colour is the disc <assistant>"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "model", photo, prompt],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    logits, answer, imported = json.loads(done.stdout.splitlines()[-1])
    assert not imported
    torch.testing.assert_close(torch.tensor(logits), want, rtol=0, atol=1e-4)
    assert answer.strip() == next(asker.answers([asked]))
    again = Asker(open_model(tmp_path / "model"), 5)
    assert next(again.answers([asked])) == next(asker.answers([asked]))


@pytest.mark.parametrize("lost", ["layers.1.mlp", "multi_modal_projector", "embed_tokens"])
def test_a_saved_folder_that_lacks_a_tensor_is_refused(answering, tmp_path, lost) -> None:
    save_model(answering.answerer(answering.backbone()), tmp_path, {})
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in name for name in tensors)  # it is tied, which is no damage
    open_model(tmp_path)
    name = next(name for name in sorted(tensors) if lost in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"model=.* cannot be read.* missing .*{lost}"):
        open_model(tmp_path)


def test_a_folder_of_a_language_model_keeps_its_logits_and_gets_the_image_symbol(answering, tmp_path) -> None:
    folder = answering.language_folder(tmp_path / "lm")
    model = answering.answerer(answering.backbone(), Language(name="folder", path=str(folder)))
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 70, 200, 31]])
    with torch.no_grad():
        want, got = alone(ids).logits, model.model(input_ids=ids).logits
    torch.testing.assert_close(got[..., : want.shape[-1]], want, rtol=0, atol=1e-5)
    assert model.model.get_input_embeddings().num_embeddings % 64 == 0
    with pytest.raises(LookupError, match=r"it has no config.json"):
        answering.answerer(answering.backbone(), Language(name="folder", path=str(tmp_path)))


def test_the_command_ask_answers_a_file_in_its_order(answering, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(answering.answerer(answering.backbone()), tmp_path / "model", {})
    records = []
    for number in range(3):
        Image.fromarray(answering.picture(number)).save(f"{number}.png")
        records.append({"question_id": 10 + number, "image": f"{number}.png", "text": "what colour is it"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    ask.run(
        command_of("ask", ["model", "questions=q.jsonl", "out=a.jsonl", "batch=2", "most=3", "device=cpu"])
    )
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [10, 11, 12]
    one = ask.run(command_of("ask", ["model", "1.png", "what colour is it", "most=3", "device=cpu"]))
    assert one["answer"] == lines[1]["text"]
    records.append({"question_id": 13, "image": "1.png", "text": "what is zzz"})  # a word it does not know
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    with pytest.raises(ValueError, match=r"question 13: .* does not know 'zzz'"):
        ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=c.jsonl", "batch=3", "most=3"]))
    assert (tmp_path / "c.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()  # those before are kept
    (tmp_path / "q.jsonl").write_text(json.dumps(records[0]) + '\n{"image": "no.png", "text": "x"}\n')
    with pytest.raises(ValueError, match="line 2: there is no image"):
        ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=b.jsonl"]))


def test_a_folder_of_frames_is_asked_about_as_the_images_that_it_shows(
    answering, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(answering.answerer(answering.backbone()), tmp_path / "model", {})
    (tmp_path / "clip").mkdir()
    for number in range(5):
        Image.fromarray(answering.picture(number)).save(f"clip/{number}.png")
    keys = ["what colour is it", "most=3", "device=cpu"]
    clip = ask.run(command_of("ask", ["model", "clip", *keys, "frames=3"]))
    images = ask.run(command_of("ask", ["model", *(f"clip/{n}.png" for n in (0, 2, 4)), *keys]))
    assert clip["answer"] == images["answer"]
    record = {"question_id": 1, "video": "clip", "text": "<video> what colour is it"}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=a.jsonl", "most=3", "frames=3"]))
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"]
    first = json.loads((tmp_path / "a.jsonl").read_text())["text"]
    (tmp_path / "q.jsonl").write_text(json.dumps({**record, "text": "<image> what colour is it"}))
    ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=a.jsonl", "most=3", "frames=3"]))
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"] == first
    for changed, message in (
        ({**record, "image": "a.png"}, "an image and a video"),
        ({**record, "video": "none"}, "there is no video or folder of frames none"),
    ):
        (tmp_path / "q.jsonl").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=b.jsonl"]))
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"q.jsonl has no question"):
        ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=b.jsonl"]))
    (tmp_path / "q.jsonl").write_text(json.dumps({**record, "text": "<video> or <video>"}))
    with pytest.raises(ValueError, match=r"line 1: 6 times <image> for 3 images"):
        ask.run(command_of("ask", ["model", "questions=q.jsonl", "out=b.jsonl", "frames=3"]))


def test_a_tiny_language_model_needs_heads_that_divide_its_width(answering) -> None:
    with pytest.raises(ValueError, match=r"language.width=30 is no multiple of language.heads=4"):
        answering.answerer(answering.backbone(), Language(width=30, heads=4))
    assert answering.TINY.width % answering.TINY.heads == 0


@pytest.mark.parametrize(("keys", "what"), [({"registers": 2}, "2 registers"), ({}, "view.cls=true")])
def test_tiles_of_anything_but_patches_are_refused(answering, keys, what) -> None:
    with pytest.raises(ValueError, match=rf"view\.name=tiles and .*{what}.* Take view.name=square"):
        answering.answerer(answering.backbone(**keys), name="tiles", cls=not keys)


def test_a_word_that_the_language_model_does_not_know_is_named(answering) -> None:
    asker = Asker(answering.answerer(answering.backbone()))
    with pytest.raises(ValueError, match="the language model does not know 'zebra'"):
        asker.inputs([question([answering.picture()], "what colour is the zebra")])
