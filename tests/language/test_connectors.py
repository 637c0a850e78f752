"""Connectors against what they compute by hand, and what makes each of them one of its kind."""

import json

import pytest
import torch

from dinokit.commands import instruct, read_command
from dinokit.language.answer import Asker, question
from dinokit.language.labels import Collate, Counter, Labels
from dinokit.language.model import build_model, open_model, save_model
from dinokit.language.recipe import Config, Connector, Run, View

transformers = pytest.importorskip("transformers")


def connected(answering, name, **keys):
    """A model at its start with a connector."""
    cfg = Config(connector=Connector(name=name, **keys), language=answering.TINY, run=Run(seed=3))
    return build_model(cfg, answering.backbone())


def batch_of(model, talks):
    stops = model.model.generation_config.eos_token_id
    labels = Labels(model.tokenizer, stops, Counter(model.processor, False), 999)
    return Collate(model.processor, labels)(talks)


def open_gates(model, value=1.0):
    for layer in model.model.model.multi_modal_projector.layers:
        torch.nn.init.constant_(layer.alpha_cross_attn, value)
        torch.nn.init.constant_(layer.alpha_dense, value)


def test_a_linear_connector_is_one_layer_and_opens_in_transformers(answering, tmp_path) -> None:
    model = connected(answering, "linear")
    projector, tokens = model.model.model.multi_modal_projector, torch.randn(2, 5, 32)
    by_hand = tokens @ projector.linear_1.weight.T + projector.linear_1.bias
    torch.testing.assert_close(projector(tokens), by_hand, rtol=0, atol=1e-5)
    assert {name.rpartition("projector.")[2] for name in model.parameters("connector")} == {
        "linear_1.weight", "linear_1.bias",
    }  # fmt: skip
    save_model(model, tmp_path / "model", {"connector": {"name": "linear"}})
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    batch = batch_of(model, [answering.talk("what colour is the disc", "red")])
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model.model(**batch).logits, rtol=0, atol=1e-4)


def test_queries_make_a_fixed_number_of_tokens_in_any_order_of_the_patches(answering) -> None:
    model = connected(answering, "query", queries=3, depth=1)
    projector, tokens = model.model.model.multi_modal_projector, torch.randn(2, 16, 32)
    with torch.no_grad():
        shown, turned = projector(tokens), projector(tokens[:, torch.randperm(16)])
    assert shown.shape == (2, 3, 32)
    torch.testing.assert_close(shown, turned, rtol=0, atol=1e-5)
    assert Counter(model.processor, False)(answering.picture()) == 3
    model.model(**batch_of(model, [answering.talk("what colour is the disc", "red")])).loss.backward()
    assert projector.resampler.latents.grad.abs().sum() > 0


def test_shut_gates_leave_the_language_model_as_it_is_bit_for_bit(answering) -> None:
    model = connected(answering, "gated")
    assert Counter(model.processor, False)(answering.picture()) == 0
    names = set(model.model.model.language_model.state_dict())
    alone = build_model(Config(language=answering.TINY, run=Run(seed=3)), answering.backbone())
    assert names == set(alone.model.model.language_model.state_dict())
    batch = batch_of(model, [answering.talk("what colour is the disc", "red")])
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model.model(**batch).logits, model.model(**ids).logits)
        open_gates(model)
        seen, unseen = model.model(**batch).logits, model.model(**ids).logits
    assert not torch.allclose(seen, unseen, atol=1e-3)


def test_a_gate_adds_the_attention_and_the_perceptron_that_one_computes_by_hand(answering) -> None:
    model = connected(answering, "gated", every=2)
    gates = model.model.model.multi_modal_projector
    assert len(gates.layers) == 1
    open_gates(model, 0.5)
    (layer,) = gates.layers
    before = []
    model.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: before.append((args or [kwargs["hidden_states"]])[0]), with_kwargs=True
    )  # runs after the hook of the gate
    batch = batch_of(model, [answering.talk("what colour is the disc", "red")])
    with torch.no_grad():
        model.model(**batch)
        x, images = model.model.get_input_embeddings()(batch["input_ids"])[0], gates.images[0]
        attend = layer.cross_attn
        y = layer.input_layernorm(x)
        q, k, v = y @ attend.q_proj.weight.T, images @ attend.k_proj.weight.T, images @ attend.v_proj.weight.T
        heads = []
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            weights = (q[:, part] @ k[:, part].T / 4).softmax(dim=1)
            heads.append(weights @ v[:, part])
        tanh = torch.tanh(torch.tensor(0.5))
        x = x + tanh * (torch.cat(heads, dim=1) @ attend.o_proj.weight.T)
        y = layer.post_attention_layernorm(x)
        mlp = layer.mlp
        inside = torch.nn.functional.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)
        want = x + tanh * (inside @ mlp.down_proj.weight.T)
    torch.testing.assert_close(before[0][0], want, rtol=0, atol=1e-4)


def test_a_talk_without_the_one_image_of_gates_is_named(answering) -> None:
    model = connected(answering, "gated")
    talks = [
        answering.talk("how many", images=2, key="two"),
        answering.talk("how many", images=0, key="none"),
    ]
    for talk in talks:
        with pytest.raises(ValueError, match=rf"{talk.key}: \d images, and connector.name=gated"):
            Asker(model).inputs([talk])


def test_gates_need_one_image_a_text(answering) -> None:
    model = connected(answering, "gated")
    with pytest.raises(ValueError, match=r"2 images for 1 texts: connector\.name=gated"):
        model.model(**batch_of(model, [answering.talk("how many", "two", images=2)]))


@pytest.mark.parametrize("name", ["query", "gated"])
def test_a_saved_model_answers_the_same_and_transformers_refuses_it(answering, name, tmp_path) -> None:
    model = connected(answering, name)
    with torch.no_grad():
        for part in ("connector", "language"):
            for parameter in model.parameters(part).values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    asked = [question([answering.picture(n)], "what colour is the disc") for n in range(3)]
    answers = list(Asker(model, 6).answers(asked))
    save_model(model, tmp_path / "model", {"connector": {"name": name}})
    opened = open_model(tmp_path / "model")
    assert list(Asker(opened, 6).answers(asked)) == answers
    inputs = Asker(opened, 6).inputs(asked)
    with torch.no_grad():
        cached, slow = (
            opened.model.generate(**inputs, max_new_tokens=5, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, slow)
    with pytest.raises((ValueError, KeyError), match="dinokit_llava"):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_a_damaged_folder_of_such_a_model_is_named(answering, tmp_path) -> None:
    model = connected(answering, "query")
    save_model(model, tmp_path / "model", {"connector": {"name": "query"}})
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "connector": {**values["connector"], "queries": 5}}))
    with pytest.raises(ValueError, match=r"model=.*model cannot be read"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["query", "gated"])
def test_tiles_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"connector.name={name} needs view.name=square"):
        Config(connector=Connector(name=name), view=View(name="tiles"))


@pytest.mark.parametrize("name", ["linear", "query", "gated"])
def test_a_connector_learns_alone_while_all_else_is_frozen(name, tmp_path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "backbone: {name: raw_patches, size: 32, patch: 8, cell: 4}\nview: {size: 32}\n"
        f"connector: {{name: {name}}}\nlanguage: {{width: 32, depth: 2, heads: 2, hidden: 48}}\n"
        "data: {name: captioned, size: 32, things: [1, 1], families: [colour]}\n"
        "stages: {only: {trains: [connector], steps: 6, batch: 8, lr: 1e-2}}\nrun: {log_every: 1}\n"
    )
    out = tmp_path / "run"
    instruct.run(read_command("instruct", [str(recipe), f"out={out}"]))
    curve = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(curve) == 6
    assert curve[-1] < curve[0]
    assert json.loads((out / "model" / "dinokit.json").read_text())["connector"]["name"] == name
    assert (open_model(out).model.config.projector_hidden_act == "linear") == (name == "linear")
