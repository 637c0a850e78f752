"""language/text.py and folders.py: pooling, encoders in folders, and what of them is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dinokit.config import registry
from dinokit.language import align
from dinokit.language.align_recipe import Config, Head, Optim, Run, Text
from dinokit.language.text import build_tower, open_tower, pooled
from dinokit.runtime.launch import Watchdog

WORLD = {"name": "captioned", "size": 32, "count": 24, "split": "train"}


@pytest.fixture
def source():
    return registry.build("data.captions", {**WORLD, "things": (1, 3)})


def test_pooling_reads_no_padding():
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(pooled(tokens, mask, "mean")[0], tokens[0, :2].mean(dim=0))
    assert torch.equal(pooled(tokens, mask, "last"), torch.stack([tokens[0, 1], tokens[1, 3]]))


def test_a_text_has_one_vector_alone_and_beside_a_longer_one():
    tower = build_tower(
        Text(width=16, depth=2, heads=2, length=12), ["a red disc", "A red disc above a cross"]
    )
    tower.eval()
    alone, beside = (
        tower(**tower.tokenize(texts))[0] for texts in (["a red disc"], ["a red disc", "a " * 11])
    )
    torch.testing.assert_close(alone, beside)
    assert tower.cut(["a red disc", "a " * 30]) == 1
    assert not torch.allclose(tower(**tower.tokenize(["a cross"])), alone)


def test_a_causal_encoder_in_a_folder_is_frozen_or_trained(source, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    texts = [text for i in range(24) for kind in source.captions(i) for text in kind]
    words = build_tower(Text(width=16, heads=2), texts).tokenizer
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=len(words), max_position_embeddings=30, **sizes)
    )
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    section = Text(name="folder", path=str(tmp_path), pool="last", train=False)
    tower = build_tower(section, texts)
    assert (tower.width, tower.length, tower.pool) == (16, 30, "last")
    assert not any(p.requires_grad for p in tower.parameters())
    a, b = (tower(**tower.tokenize([text]))[0] for text in ("a red disc", "a red cross"))
    assert not torch.allclose(a, b)
    assert any(p.requires_grad for p in build_tower(replace(section, train=True), texts).parameters())


@pytest.fixture
def bert(source, tmp_path):
    """The section of a Bert in a folder, with a pooler and dropout."""
    texts = [text for i in range(24) for kind in source.captions(i) for text in kind]
    words = build_tower(Text(width=16, heads=2), texts).tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shown = transformers.BertConfig(vocab_size=len(words), hidden_dropout_prob=0.5, **sizes)
    transformers.BertModel(shown).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    return Text(name="folder", path=str(tmp_path / "bert"))


def test_a_frozen_encoder_has_no_dropout_while_the_head_is_trained(source, bert, tmp_path, monkeypatch):
    backbone, build = (
        registry.build("models", {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}),
        build_tower,
    )
    found = []

    def watched(*given):
        tower = build(*given)
        tower.encoder.register_forward_pre_hook(
            lambda encoder, _: found.append({part.training for part in encoder.modules()})
        )
        return tower

    monkeypatch.setattr(align, "build_tower", watched)
    for trained in (False, True):
        (tmp_path / f"{trained}/checkpoints").mkdir(parents=True)
        cfg = Config(
            data=dict(WORLD), head=Head(width=16, depth=1, heads=2, embedding=8),
            text=replace(bert, train=trained), optim=Optim(steps=1, batch=6),
            run=Run(out=str(tmp_path / f"{trained}"), device="cpu"),
        )  # fmt: skip
        align.train(cfg, backbone, source, Watchdog(30.0))
    assert found == [{False}, {True}]


def test_every_parameter_that_is_trained_gets_a_gradient(bert):
    tower = build_tower(bert, [])
    tower(**tower.tokenize(["a red disc"])).square().sum().backward()
    without = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert tower.encoder.encoder.layer[0].attention.self.value.weight.grad.abs().sum() > 0


def test_a_folder_that_lacks_a_tensor_is_refused_but_for_a_pooler(bert):
    file = Path(bert.path) / "model.safetensors"
    tensors = load_file(file)
    rest = {name: x for name, x in tensors.items() if not name.startswith("pooler.")}
    assert len(rest) < len(tensors)
    save_file(rest, file, {"format": "pt"})
    open_tower(Path(bert.path), "mean", 40, "text.path")
    lost = "encoder.layer.0.output.dense.weight"
    save_file({name: x for name, x in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"text.path=.*1 tensors are missing .* such as {lost}"):
        open_tower(Path(bert.path), "mean", 40, "text.path")
    name = "embeddings.word_embeddings.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text.path=.* cannot be read"):
        open_tower(Path(bert.path), "mean", 40, "text.path")
