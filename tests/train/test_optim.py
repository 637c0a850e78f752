"""Parameter groups against the published rules, written per name; clipping against torch's own."""

import copy
import math
import re

import pytest
import torch

from dinokit.config.load import Crops, Head, Heads, Optim, Recipe, section_values
from dinokit.train.networks import Network
from dinokit.train.optim import (
    build_optimizer,
    clip_gradients,
    drop_prototype_gradients,
    parameter_groups,
    set_rates,
)

DEPTH = 3


def network(**backbone) -> Network:
    values = {"width": 16, "depth": DEPTH, "heads": 2, "patch": 8, "size": 32, "registers": 1, **backbone}
    recipe = Recipe(
        name="x",
        backbone={"name": "vit", **section_values("models", "vit", values, "backbone")},
        heads=Heads(
            cls=Head(prototypes=6, hidden=8, bottleneck=4), patch=Head(prototypes=5, hidden=8, bottleneck=4)
        ),
        crops=Crops(),
    )
    return Network(recipe)


def optim(**values) -> Optim:
    return Optim(**{"steps": 10, "batch": 2, "lr": 1e-3, **values})


def rule(name: str, decay: float, patch: float) -> tuple[float, bool, str]:
    """DINOv2's rules, from the name alone (section 5.3 of its description)."""
    scale = 1.0
    if name.startswith("backbone."):
        block = re.search(r"blocks\.(\d+)\.", name)
        first = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
        level = 0 if any(word in name for word in first) else int(block[1]) + 1 if block else DEPTH + 1
        scale = decay ** (DEPTH + 1 - level)
    if "patch_embed" in name:
        scale *= patch
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    head = "prototypes" if "last_layer" in name else "heads"
    return scale, decays, "backbone" if name.startswith("backbone.") else head


def test_every_parameter_is_in_one_group_and_follows_the_published_rules():
    student = network()
    groups = parameter_groups(student, optim(layer_decay=0.9, patch_lr=0.2))
    found = {id(p): (g["lr_scale"], g["decays"], g["role"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(list(student.parameters()))
    for name, p in student.named_parameters():
        scale, decays, role = rule(name, 0.9, 0.2)
        assert found[id(p)] == (pytest.approx(scale), decays, role), name


def test_a_patch_embedding_of_a_large_model_learns_slowly():
    groups = parameter_groups(network(depth=24), optim(layer_decay=0.9, patch_lr=0.2))
    assert min(g["lr_scale"] for g in groups) == pytest.approx(0.2 * 0.9**25)


def test_rates_reach_the_groups():
    opt = build_optimizer(network(), optim())
    rates = {"backbone": 0.5, "heads": 0.25, "prototypes": 0.0}
    set_rates(opt, rates, weight_decay=0.1)
    assert {g["role"] for g in opt.param_groups} == set(rates)
    for g in opt.param_groups:
        assert g["lr"] == rates[g["role"]]
        assert g["weight_decay"] == (0.1 if g["decays"] else 0.0)


def with_gradients(generator: torch.Generator) -> Network:
    student = network()
    for p in student.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return student


def test_parts_are_clipped_as_torch_clips(generator):
    student = with_gradients(generator)
    other = copy.deepcopy(student)
    for p, q in zip(other.parameters(), student.parameters(), strict=True):
        p.grad = q.grad.clone()
    norms = clip_gradients(student, optim(clip=0.5))
    for name, part in other.named_children():
        want = torch.nn.utils.clip_grad_norm_(part.parameters(), 0.5)
        torch.testing.assert_close(norms[name], want)
    for p, q in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_tensors_are_clipped_one_by_one(generator):
    student = with_gradients(generator)
    before = [p.grad.clone() for p in student.parameters()]
    clip_gradients(student, optim(clip=0.5, clip_per="tensor"))
    for p, old in zip(student.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, old * min(0.5 / (old.norm().item() + 1e-6), 1))


def test_no_clipping_leaves_gradients_alone(generator):
    student = with_gradients(generator)
    before = [p.grad.clone() for p in student.parameters()]
    clip_gradients(student, optim(clip=0.0))
    assert all(torch.equal(p.grad, old) for p, old in zip(student.parameters(), before, strict=True))


def test_dropped_prototypes_do_not_move_and_keep_no_moments(generator):
    student = with_gradients(generator)
    opt = build_optimizer(student, optim())
    set_rates(opt, dict.fromkeys(("backbone", "heads", "prototypes"), 0.1), 0.1)
    before = student.dino_head.last_layer.weight_v.detach().clone()
    drop_prototype_gradients(opt)
    opt.step()
    assert torch.equal(student.dino_head.last_layer.weight_v, before)
    assert student.dino_head.last_layer.weight_v not in opt.state
    assert student.dino_head.mlp[0].weight in opt.state


def test_a_number_moves_as_the_formula_says():
    """AdamW over Python floats (Loshchilov and Hutter, arXiv 1711.05101), with the rates of each step."""
    student = network()
    opt = build_optimizer(student, optim(betas=(0.9, 0.95)))
    weight, bias = student.backbone.blocks[0].attn.qkv.weight, student.backbone.blocks[0].attn.qkv.bias
    for p, decays in ((weight, True), (bias, False)):
        x, mean, square = p.flatten()[0].item(), 0.0, 0.0
        for t, grad in enumerate([0.3, -2.0, 0.05, 1.5], start=1):
            lr, decay = 0.1 / t, 0.04 * t
            opt.zero_grad()
            p.grad = torch.full_like(p, grad)
            set_rates(opt, dict.fromkeys(("backbone", "heads", "prototypes"), lr), decay)
            opt.step()
            x -= lr * (decay if decays else 0.0) * x
            mean = 0.9 * mean + 0.1 * grad
            square = 0.95 * square + 0.05 * grad**2
            x -= lr * mean / (1 - 0.9**t) / (math.sqrt(square / (1 - 0.95**t)) + 1e-8)
            assert p.flatten()[0].item() == pytest.approx(x, rel=1e-5)
    assert set(opt.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}  # the names in a checkpoint


def test_an_overflow_leaves_everything_as_it_was():
    student = network()
    opt, scaler = build_optimizer(student, optim()), torch.amp.GradScaler("cpu")
    params = list(student.parameters())
    set_rates(opt, dict.fromkeys(("backbone", "heads", "prototypes"), 0.1), 0.1)
    for overflows in (False, True, False):
        scaler.scale(sum((p**2).sum() for p in params)).backward()
        if overflows:
            params[0].grad.flatten()[0] = torch.inf
        before = [p.detach().clone() for p in params]
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        same = [torch.equal(p, old) or not old.any() for p, old in zip(params, before, strict=True)]
        assert all(same) == overflows
        opt.zero_grad()
    assert {opt.state[p]["step"].item() for p in params} == {2}
