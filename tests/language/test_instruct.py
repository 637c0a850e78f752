"""Training a model that answers: what changes, the loss of a step, LoRA, resuming and processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinokit.commands import instruct
from dinokit.commands import read_command as command_of
from dinokit.data.scenes.regions import WORDS
from dinokit.data.scenes.sentences import VOCABULARY
from dinokit.data.talks.captioned import Config as Talks
from dinokit.data.talks.captioned import build as captioned
from dinokit.language import instruct as instruct_module
from dinokit.language import model as model_module
from dinokit.language.instruct import trained_parameters
from dinokit.language.labels import Collate, Counter, Labels
from dinokit.language.lora import merge_lora
from dinokit.language.model import open_model
from dinokit.language.recipe import Config, Lora, Stage, stages_of
from dinokit.language.stages import Order
from dinokit.language.words import SPECIAL

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

RECIPE = """
backbone: {name: raw_patches, size: 32, patch: 8, cell: 4}
language: {width: 32, depth: 2, heads: 2, hidden: 48}
data: {name: captioned, size: 32}
stages:
  first: {trains: [connector], steps: 4, batch: 8, lr: 3.0e-3}
  second: {trains: [connector, language], steps: 8, batch: 8, lr: 3.0e-3, data: {captions: 0.5}}
run: {log_every: 1, checkpoint_every: 2, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def trained(recipe, out, *keys):
    """The losses of a run, and its folder."""
    instruct.run(command_of("instruct", [str(recipe), f"out={out}", *keys]))
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def tensors(folder):
    return {name: value.clone() for name, value in open_model(folder).model.state_dict().items()}


def test_a_stage_changes_what_it_trains_and_nothing_else(recipe, tmp_path) -> None:
    curve = trained(recipe, tmp_path / "run")
    assert len(curve) == 12
    assert curve[-1] < curve[0]
    first, second = (tensors(tmp_path / "run" / name) for name in ("stages/first", "model"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert {name.split(".")[1] for name in changed} >= {"language_model", "multi_modal_projector"}
    start = tmp_path / "start"
    trained(recipe, start, "stages.second=null", "stages.first.lr=0")
    before = tensors(start / "model")
    assert {name.split(".")[1] for name in before if not torch.equal(before[name], first[name])} == {
        "multi_modal_projector"
    }
    facts = json.loads((tmp_path / "run" / "model" / "dinokit.json").read_text())
    assert facts["stages"] == ["first", "second"]


@pytest.mark.slow
def test_a_batch_in_parts_has_the_loss_of_the_whole(recipe, tmp_path) -> None:
    keys = "stages.first=null", "stages.second.steps=3", "stages.second.clip=0"
    whole = trained(recipe, tmp_path / "whole", *keys)
    parts = trained(recipe, tmp_path / "parts", *keys, "stages.second.micro=2")
    assert whole == pytest.approx(parts, rel=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(recipe, tmp_path, answering) -> None:
    keys = "stages.first=null", "stages.second.steps=1", "stages.second.micro=4"
    (got,) = trained(recipe, tmp_path / "run", *keys, "stages.second.lr=0")
    model = open_model(tmp_path / "run")
    order = Order(captioned(Talks(size=32, captions=0.5)), 8, 0)
    stops = model.model.generation_config.eos_token_id
    labels = Labels(model.tokenizer, stops, Counter(model.processor, False), 500)
    total, count = 0.0, 0
    for number in range(8):
        batch = Collate(model.processor, labels)([order[number]])
        with torch.no_grad():
            logits = model.model(**batch).logits[0].log_softmax(-1)
        for place, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                total, count = total - float(logits[place - 1, label]), count + 1
    assert got == pytest.approx(total / count, rel=1e-4)


def test_words_of_boxes_are_known_only_where_a_stage_asks_for_boxes(recipe, tmp_path) -> None:
    """A model without them begins as it always did: more words would be other random numbers."""
    keys = "stages.second=null", "stages.first.steps=1", "stages.first.lr=0"
    trained(recipe, tmp_path / "plain", *keys)
    trained(recipe, tmp_path / "boxes", *keys, "stages.first.data.families=[ground,colour]")
    plain, boxes = (open_model(tmp_path / name) for name in ("plain", "boxes"))
    sizes = [len(each.tokenizer) for each in (plain, boxes)]
    assert sizes == [len(VOCABULARY) + len(SPECIAL), len(VOCABULARY) + len(SPECIAL) + len(WORDS)]
    for word in ("box", "[0.12,", "0.97,", "1.00]"):
        assert (plain.tokenizer.convert_tokens_to_ids(word) == plain.tokenizer.unk_token_id) is True
        assert boxes.tokenizer.convert_tokens_to_ids(word) != boxes.tokenizer.unk_token_id
    ids = boxes.tokenizer("[0.12, 0.50, 0.97, 1.00]", add_special_tokens=False)["input_ids"]
    assert boxes.tokenizer.decode(ids) == "[0.12, 0.50, 0.97, 1.00]"
    start = f"start={tmp_path / 'plain'}", "stages.first.data.families=[ground]"
    with pytest.raises(
        ValueError, match=r"does not know '\[\d\.\d\d,', a word of .*start=.* language\.name="
    ):
        trained(recipe, tmp_path / "on", *keys, *start)


def test_lora_changes_nothing_at_first_and_merges_into_equal_logits(answering) -> None:
    pytest.importorskip("peft")
    model = answering.answerer(answering.backbone())
    ids = torch.tensor([[1, 9, 8, 20, 12]])
    with torch.no_grad():
        before = model.model(input_ids=ids).logits
        names = set(model.model.state_dict())
        cfg = Config(lora=Lora(rank=2, alpha=4, dropout=0.0))
        chosen = trained_parameters(model, Stage(trains=("connector", "lora")), cfg)
        model.model.eval()
        assert torch.equal(model.model(input_ids=ids).logits, before)
        assert len(chosen) == 4 + 2 * 2 * 7  # of the connector; A and B of seven layers in two blocks
        trains = {name for name, each in model.model.named_parameters() if each.requires_grad}
        assert trains == set(chosen)
        for parameter in chosen.values():
            torch.nn.init.normal_(parameter, std=0.3)
        with_adapter = model.model(input_ids=ids).logits
        merge_lora(model)
        merged = model.model(input_ids=ids).logits
    assert not torch.allclose(with_adapter, before, atol=1e-2)
    torch.testing.assert_close(merged, with_adapter, rtol=0, atol=1e-4)
    assert set(model.model.state_dict()) == names


def test_a_run_with_lora_leaves_a_plain_folder(recipe, tmp_path) -> None:
    pytest.importorskip("peft")
    keys = "stages.first=null", "stages.second.steps=2", "lora.rank=2"
    trained(recipe, tmp_path / "run", *keys, "stages.second.trains=[connector,lora]")
    assert not [name for name in tensors(tmp_path / "run") if "lora" in name]


def test_an_epoch_shows_every_talk_once_in_another_order() -> None:
    order = Order([f"talk {n}" for n in range(10)], 30, seed=4)
    epochs = [[order[10 * epoch + n] for n in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order[n] for n in range(10)] == epochs[0]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("stages.second.trains=[tower]", "it is a list of some of connector, language, lora"),
        ("stages.second.trains=[language,lora]", "name one of the two"),
        ("stages.second.rate=1", "there is no key 'rate' in 'stages.second'"),
        ("stages.second.batch=0", "it must be 1 or more"),
        ("stages.second.batch=2.5", "stages.second.batch: 2.5 is not a whole number"),
        ("stages.second.warmup=100", "it is a share of the steps, from 0 to 1"),
        ("stages.second.blank=anything", "stages.second.blank"),
        ("stages.second.micro=3", "is not divided by 1 processes"),
        ("language.path=LM", "give both, or neither"),
        ("data.families=[size]", "there is: colour, shape"),
        ("stages.second.data.captoins=1", r"stages\.second\.data\.captoins: .* Did you mean 'captions'"),
        (
            "data.name=captions",
            r"stages\.second\.data\.captions: talks 'captions' .* stages\.second\.data=\{\} removes",
        ),
        ("weights=runs/demo", "Give either weights=FILE_OR_RUN or backbone.name"),
    ],
)
def test_a_wrong_setting_is_named_before_the_first_step(recipe, tmp_path, key, text) -> None:
    with pytest.raises(ValueError, match=text):
        trained(recipe, tmp_path / "run", key)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_stage_with_talks_of_another_name_has_nothing_of_the_recipes(recipe, tmp_path) -> None:
    """As a first stage on captions before a second on conversations; here the images are built in."""
    source = "{name: captioned, size: 32, count: 6, split: train}"
    own = "stages.first.data.name=captions", f"stages.first.data.source={source}"
    cfg = instruct.check(command_of("instruct", [str(recipe), f"out={tmp_path / 'run'}", *own]))
    first, second = (instruct.talks_of(cfg, stage) for stage in stages_of(cfg).values())
    assert (len(first), first[0].family) == (6, "caption")
    assert isinstance(second, type(captioned(Talks(size=32))))
    assert second.cfg.captions == 0.5


def test_stages_are_read_in_their_order() -> None:
    cfg = Config(stages={"b": {"trains": ["connector"]}, "a": {"steps": 3}, "c": None})
    assert list(stages_of(cfg)) == ["b", "a"]
    assert stages_of(cfg)["b"].trains == ("connector",)


def test_the_shown_baseline_sees_no_picture(answering) -> None:
    model = answering.answerer(answering.backbone())
    labels = Labels(model.tokenizer, [2], Counter(model.processor, False), 500)
    made = [answering.talk("what colour is the disc", "red")]
    assert not Collate(model.processor, labels, blank=True)(made)["pixel_values"].any()
    assert Collate(model.processor, labels)(made)["pixel_values"].any()


def start(recipe, out, *keys, processes=1):
    command = [sys.executable, "-m", "dinokit", "instruct", str(recipe), f"out={out}", *keys]
    if processes > 1:
        run = ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m", "dinokit"]
        command = [sys.executable, "-m", *run, *command[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_run_goes_on_only_where_it_may(recipe, tmp_path) -> None:
    keys = "stages.first=null", "stages.second.steps=2"
    with pytest.raises(ValueError, match="has no checkpoint"):
        trained(recipe, tmp_path / "run", *keys, "run.resume=must")
    curve = trained(recipe, tmp_path / "run", *keys)
    assert trained(recipe, tmp_path / "run", *keys, "run.resume=must") == curve
    assert trained(recipe, tmp_path / "run", *keys, "run.resume=never") == curve
    facts = tmp_path / "run" / "facts.json"
    facts.write_text(facts.read_text().replace('"data of stage second": "', '"data of stage second": "0'))
    with pytest.raises(ValueError, match=r"data of stage second was 0\w+ when .* began, and now is"):
        trained(recipe, tmp_path / "run", *keys)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_curve_and_the_same_model(recipe, tmp_path) -> None:
    want = trained(recipe, tmp_path / "whole", "stages.second.steps=40")
    process = start(recipe, tmp_path / "killed", "stages.second.steps=40")
    checkpoint = tmp_path / "killed" / "checkpoints" / "second" / "checkpoint-6" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(losses(tmp_path / "killed")) < len(want)
    got = trained(recipe, tmp_path / "killed", "stages.second.steps=40")
    assert got == want
    one, other = (tensors(tmp_path / name / "model") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(recipe, tmp_path) -> None:
    want = trained(recipe, tmp_path / "one")
    process = start(recipe, tmp_path / "two", processes=2)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert losses(tmp_path / "two") == pytest.approx(want, rel=1e-4)
    one, other = (tensors(tmp_path / name / "model") for name in ("one", "two"))
    gaps = [float((one[name].float() - other[name].float()).abs().max()) for name in one]
    assert max(gaps) < 1e-3


def test_a_file_of_llava_is_learnt_from(recipe, tmp_path, answering) -> None:
    for number in range(4):
        Image.fromarray(answering.picture(number)).save(tmp_path / f"{number}.png")
    records = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "what colour is the disc\n<image>"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for number in range(4)
    ]
    said = [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "two"}]
    records.append({"id": "text alone", "conversations": said})
    (tmp_path / "talks.json").write_text(json.dumps(records))
    text = RECIPE.replace("{name: captioned, size: 32}", f"{{name: llava, path: {tmp_path}/talks.json}}")
    recipe.write_text(text.replace(", data: {captions: 0.5}", ""))
    keys = "stages.first=null", "stages.second.epochs=2", "stages.second.steps=0"
    assert len(trained(recipe, tmp_path / "run", *keys)) == 2  # of 8 talks, the last one of the next epoch
    # A step of one talk without an image leaves the connector as it is.
    assert len(trained(recipe, tmp_path / "one", *keys, "stages.second.batch=1")) == 10


@pytest.mark.parametrize("kind", ["llava", "captions"])
def test_an_unknown_word_of_the_last_answer_is_found_before_the_first_step(
    recipe, tmp_path, answering, kind
) -> None:
    """In the random order of 120 talks the last one is not among the first, which are read as a whole."""
    said = ["red"] * 119 + ["a zebra"]
    for number, text in enumerate(said):
        Image.fromarray(answering.picture(number)).save(tmp_path / f"{number:03}.png")
        (tmp_path / f"{number:03}.txt").write_text(text)
    asked = {"from": "human", "value": "what colour is the disc\n<image>"}
    records = [
        {"image": f"{n:03}.png", "conversations": [asked, {"from": "gpt", "value": text}]}
        for n, text in enumerate(said)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    data = {
        "llava": f"{{name: llava, path: {tmp_path}/talks.json}}",
        "captions": f"{{name: captions, source: {{name: folder, path: {tmp_path}}}}}",
    }[kind]
    text = RECIPE.replace("{name: captioned, size: 32}", data)
    recipe.write_text(text.replace(", data: {captions: 0.5}", ""))
    last = {"llava": "record 120", "captions": "119.png"}[kind]
    with pytest.raises(ValueError, match=rf"{last}: the language model does not know 'zebra'.* leave such"):
        trained(recipe, tmp_path / "run", "stages.first=null")


def test_the_tower_of_the_backbone_is_in_eval_mode_in_every_step(recipe, tmp_path, monkeypatch) -> None:
    modes = []
    built = model_module.build_model

    def watched(cfg, backbone):
        answerer = built(cfg, backbone)
        tower, decoder = answerer.model.model.vision_tower, answerer.model.model.language_model
        tower.register_forward_hook(lambda *_: modes.append((tower.training, decoder.training)))
        return answerer

    monkeypatch.setattr(instruct_module, "build_model", watched)
    trained(recipe, tmp_path / "run", "stages.first=null", "stages.second.steps=2")
    assert (False, True) in modes
    assert not any(tower for tower, _ in modes)


@pytest.mark.slow
def test_a_start_with_another_connector_is_refused(recipe, tmp_path) -> None:
    only = "stages.first=null", "stages.second.steps=1"
    trained(recipe, tmp_path / "query", *only, "connector.name=query")
    with pytest.raises(ValueError, match=r"start=.* has the connector .*query.* give the recipe"):
        trained(recipe, tmp_path / "run", *only, f"start={tmp_path / 'query'}")


@pytest.mark.slow
def test_processes_of_slurm_learn_what_those_of_torchrun_do(recipe, tmp_path, free_port) -> None:
    """srun sets other variables than torchrun, and transformers' Trainer reads torchrun's alone."""
    want = trained(recipe, tmp_path / "one")
    words = [sys.executable, "-m", "dinokit", "instruct", str(recipe), f"out={tmp_path / 'two'}"]
    common = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    both = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert losses(tmp_path / "two") == pytest.approx(want, rel=1e-4)
