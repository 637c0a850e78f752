"""The attentive head against loops over floats, and on images whose class one patch of many decides."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.eval import attentive_probe
from dinokit.eval.attentive_probe import AttentiveHead, evaluate

SMALL = {
    "size": 16,
    "resize": 16,
    "steps": 150,
    "step_batch": 32,
    "lr": [3e-3],
    "workers": 0,
    "precision": "fp32",
}


def config(**values):
    return attentive_probe.Config(**section_values("eval", "attentive_probe", {**SMALL, **values}, ""))


def normed(row):
    """Layer norm without gain and bias."""
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + 1e-5)
    return [(v - mean) / deviation for v in row]


def product(weight, bias, x):
    rows = zip(weight.tolist(), bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def by_hand(head, patches, heads):
    """The head on one image, one number at a time."""
    p = dict(head.double().state_dict())
    width = patches.shape[1]
    x, query = [normed(row) for row in patches.tolist()], p["query"][0, 0].tolist()
    weights, biases = p["attention.in_proj_weight"].split(width), p["attention.in_proj_bias"].split(width)
    q = product(weights[0], biases[0], query)
    keys, values = ([product(weights[i], biases[i], row) for row in x] for i in (1, 2))
    found, size = [], width // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        dots = [sum(a * b for a, b in zip(q[part], k[part], strict=True)) / math.sqrt(size) for k in keys]
        share = [math.exp(d) / sum(math.exp(e) for e in dots) for d in dots]
        found += [
            sum(s * v[i] for s, v in zip(share, values, strict=True)) for i in range(*part.indices(width))
        ]
    out = product(p["attention.out_proj.weight"], p["attention.out_proj.bias"], found)
    x = [a + b for a, b in zip(query, out, strict=True)]
    hidden = product(p["mlp.0.weight"], p["mlp.0.bias"], normed(x))
    hidden = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in hidden]
    x = [a + b for a, b in zip(x, product(p["mlp.2.weight"], p["mlp.2.bias"], hidden), strict=True)]
    return product(p["linear.weight"], p["linear.bias"], x)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_head_is_attention_an_mlp_and_a_classifier(heads, generator):
    torch.manual_seed(0)
    head = AttentiveHead(4, 3, heads)
    torch.nn.init.normal_(head.query)
    torch.nn.init.normal_(head.attention.in_proj_bias)
    patches = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    want = [by_hand(head, each, heads) for each in patches]
    torch.testing.assert_close(head(patches), torch.tensor(want).double(), rtol=1e-6, atol=1e-6)


def test_heads_follow_the_width():
    assert [AttentiveHead(width, 2).attention.num_heads for width in (24, 192, 200, 768)] == [1, 3, 1, 12]
    with pytest.raises(ValueError, match=r"heads=5 does not divide the 24 numbers"):
        AttentiveHead(24, 2, 5)


def spots(root, count, seed):
    """Two classes with the same colours, and so the same mean: a red and a blue patch, or two purple ones."""
    rng = np.random.default_rng(seed)
    for name in ("two", "purple"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 100, np.uint8)
            pixels += rng.integers(0, 30, dtype=np.uint8)
            for place, colour in zip(rng.permutation(16)[:2], ((200, 0, 0), (0, 0, 200)), strict=True):
                y, x = 4 * (place // 4), 4 * (place % 4)
                pixels[y : y + 4, x : x + 4] = colour if name == "two" else (100, 0, 100)
            Image.fromarray(pixels).save(root / name / f"{name}{i}.png")
    return {"name": "folder", "path": str(root), "labels": "folders"}


@pytest.fixture
def images(tmp_path):
    return {"train": spots(tmp_path / "a", 60, 0), "test": spots(tmp_path / "b", 20, 1)}


def test_one_patch_of_many_decides_where_the_class_token_knows_nothing(images, mean):
    scores = evaluate(config(**images), mean)
    assert scores["top1"] > 0.9
    assert (scores["images_train"], scores["images_test"]) == (120, 40)
    linear = registry.find("eval", "linear")
    plain = {key: SMALL[key] for key in ("size", "resize", "steps", "workers", "precision")}
    values = section_values(
        "eval", "linear", {**images, **plain, "lr": [0.1, 1.0, 10.0], "step_batch": 32}, ""
    )
    assert linear.evaluate(linear.Config(**values), mean)["top1"] < 0.75


def test_the_rate_is_chosen_on_held_out_images_and_nothing_stays_of_the_training(images, mean, tmp_path):
    scores = evaluate(config(**images, lr=[1e-9, 1e-2], out=str(tmp_path / "out")), mean)
    assert scores["lr"] == 1e-2
    assert scores["held_out"] > 0.9
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_training_resumes_and_ends_as_an_uninterrupted_one(images, mean, tmp_path, monkeypatch):
    forward, calls = AttentiveHead.forward, []

    def counted(self, patches):
        calls.append(0)
        if stop == len(calls):
            raise KeyboardInterrupt
        return forward(self, patches)

    monkeypatch.setattr(AttentiveHead, "forward", counted)
    few = {"steps": 12, "lr": [1e-4, 1e-3], "save_every": 4}
    broken, stop = config(**images, **few, out=str(tmp_path / "out")), 20
    with pytest.raises(KeyboardInterrupt):  # in the second head
        evaluate(broken, type(mean)())  # anew: it counts its calls, and other settings do not resume
    stop = 0
    calls.clear()
    again, resumed = evaluate(broken, type(mean)()), len(calls)
    calls.clear()
    assert evaluate(config(**images, **few), mean) == again
    assert len(calls) - resumed == 12 + 4  # the first head and four steps of the second


def test_the_mean_loss_of_two_processes_is_that_of_one(generator, monkeypatch):
    head = AttentiveHead(4, 3)
    x, y = torch.randn(5, 3 * 4, generator=generator), torch.tensor([0, 2, 1, 1, 0])
    whole = attentive_probe._loss(head, 3, 5, x, y, 0)
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(head(x.view(5, 3, 4)), y))
    monkeypatch.setattr(attentive_probe, "world_size", lambda: 2)
    parts = [attentive_probe._loss(head, 3, 5, x[i::2], y[i::2], 0) for i in (0, 1)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_what_cannot_be_done_is_refused_with_what_to_give(images, mean, monkeypatch):
    monkeypatch.setattr(attentive_probe, "memory", lambda: 4 * 16 * 3 * 100)
    with pytest.raises(ValueError, match=r"patches of 160 images .* enough for 80 images\. Give max_train=N"):
        evaluate(config(**images), mean)
    with pytest.raises(ValueError, match=r"lr=\[0.0\]: give one rate above 0"):
        config(lr=[0.0])
    with pytest.raises(ValueError, match=r"held_out=1\.0: it must lie between 0 and 1"):
        config(held_out=1.0)
    with pytest.raises(ValueError, match=r"warmup=2\.0: it is a share"):
        config(warmup=2.0)


def test_a_backbone_is_left_as_it_was(images, mean):
    before = {name: x.clone() for name, x in mean.state_dict().items()}
    evaluate(config(**images, steps=2), mean)
    assert all(torch.equal(before[name], x) for name, x in mean.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in mean.parameters())
