"""Six whole optimiser steps against trajectories recorded from the reference implementations.

Schedules, parameter groups, clipping, freezing, centres and the moving average are all in there.
"""

import math

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from dinokit.config.load import (
    CropGroup,
    Crops,
    Head,
    Heads,
    Masks,
    Optim,
    Recipe,
    Run,
    Teacher,
    section_values,
)
from dinokit.data.augment import draw
from dinokit.data.batch import Batch
from dinokit.runtime.distributed import all_reduce_sum, full, rank, world_size
from dinokit.train.step import Step

SWITCHES = [
    {},
    {"logits": "whole", "attention": "sdpa"},
    {"tokens": "all"},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
]
COMPILED = pytest.param({"compile": "all", "checkpointing": "selective"}, marks=pytest.mark.slow)
# The compiler looks at .grad, and would hide the warning itself were it no error.
COMPILES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PLAIN = {"jitter": 0.0, "gray": 0.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def crops_of(globals_: torch.Tensor, locals_: torch.Tensor | None, images: int) -> Crops:
    def group(x: torch.Tensor | None) -> CropGroup:
        count, size = (0, 16) if x is None else (len(x) // images, x.shape[-1])
        return CropGroup(count=count, size=size, blur=(0.0,), solarize=(0.0,))

    return Crops(globals=group(globals_), locals=group(locals_), **PLAIN)


def backbone_section(**values) -> dict:
    return {"name": "vit", **section_values("models", "vit", values, "backbone")}


def losses_section(**losses) -> dict:
    return {name: section_values("losses", name, values, f"losses.{name}") for name, values in losses.items()}


def batch_of(recorded, i: int, crops: Crops) -> Batch:
    globals_ = recorded[f"batch/{i}/global"]
    locals_, masks = recorded.get(f"batch/{i}/local"), recorded.get(f"batch/{i}/masks")
    if locals_ is None:
        locals_ = globals_.new_zeros(0, *globals_.shape[1:])
    weight = torch.zeros(0)
    if masks is not None:
        weight = (1 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
    row = torch.as_tensor(np.asarray(draw(crops, crops.globals, 0, np.random.default_rng(0))))
    return Batch(
        global_crops=globals_,
        local_crops=locals_,
        global_colour=row.expand(len(globals_), -1),
        local_colour=row.expand(len(locals_), -1),
        masks=masks,
        masked=masks.flatten().nonzero().flatten() if masks is not None else torch.zeros(0, dtype=torch.long),
        mask_weight=weight,
        step=i,
        unreadable={},
        images=len(globals_) // 2,
    )


def close(got: float, want: float, what: str) -> None:
    assert got == pytest.approx(want, rel=1e-4, abs=1e-7), what


def check_end(step: Step, recorded) -> None:
    for who, network in {"student": step.model.student, "teacher": step.model.teacher}.items():
        end = recorded.under(f"end/{who}/")
        got = rename({name: full(x) for name, x in network.state_dict().items()}, end)
        assert got.keys() == end.keys()
        for name in end:
            if name.endswith("attn.qkv.bias"):
                # A bias of the keys moves all scores of a row alike, so its gradient is rounding, which Adam
                # then brings to the size of any other.
                got[name], end[name] = (x.unflatten(0, (3, -1))[[0, 2]] for x in (got[name], end[name]))
            torch.testing.assert_close(
                got[name], end[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=f"{who} {name}": f"{n}: {m}"
            )


def rename(state: dict, like: dict) -> dict:
    """DINO calls its one head `head`."""
    old, new = ("dino_head.", "head.") if any(k.startswith("head.") for k in like) else ("", "")
    return {new + k.removeprefix(old) if old and k.startswith(old) else k: v for k, v in state.items()}


def load_start(step: Step, recorded) -> None:
    for who, network in {"student": step.model.student, "teacher": step.model.teacher}.items():
        start = recorded.under(f"start/{who}/")
        names = rename({k: k for k in network.state_dict()}, start)
        whole = StateDictOptions(full_state_dict=True)  # it may be cut up
        set_model_state_dict(network, {names[k]: v for k, v in start.items()}, options=whole)


@pytest.mark.parametrize("run", SWITCHES, ids=str)
@pytest.mark.parametrize(
    "name", ["step_v2_sinkhorn_separate", "step_v2_centering_shared", "step_v2_no_local"]
)
def test_dinov2_steps_are_the_recorded_ones(golden, name, run):
    follow(golden(name), run)


@COMPILES
@pytest.mark.parametrize(
    ("name", "checkpointing", "backend"),
    [
        # Graphs that are computed by PyTorch's own operations show what is cut out and what is kept. To make
        # kernels of them takes ten times as long: once.
        pytest.param("step_v2_sinkhorn_separate", "none", "inductor", marks=pytest.mark.slow),
        ("step_v2_sinkhorn_separate", "none", "aot_eager"),
        ("step_v2_sinkhorn_separate", "selective", "aot_eager"),
        ("step_v2_centering_shared", "selective", "aot_eager"),
        ("step_v2_no_local", "full", "aot_eager"),
    ],
)
def test_dinov2_steps_in_graphs_are_the_recorded_ones(golden, name, checkpointing, backend):
    torch.compiler.reset()
    with torch.compiler.set_stance("default", force_backend=backend):
        follow(golden(name), {"compile": "blocks", "checkpointing": checkpointing})


@pytest.mark.parametrize(
    ("name", "parallel"), [("step_v2_centering_shared", "ddp"), ("step_v2_sinkhorn_separate", "fsdp")]
)
def test_two_processes_take_the_recorded_steps(together, name, parallel):
    together(2, "golden", name, parallel)


def in_several_processes(recorded, parallel: str) -> None:
    """The same with a share of the images in each process; KoLeo must look at those of all."""
    follow(recorded, {"parallel": parallel}, koleo={"distributed": True})


def follow(recorded, run: dict, koleo: dict | None = None) -> None:
    recipe, columns = dinov2_recipe(recorded), recorded.settings["columns"]
    recipe.run = Run(precision="fp32", **run)
    recipe.losses["koleo"] |= koleo or {}
    step = Step(recipe, torch.device("cpu"))
    load_start(step, recorded)
    for i, values in enumerate(recorded["rows"].tolist()):
        want = dict(zip(columns, values, strict=True))
        schedules = step.schedules
        close(schedules.lr(i), want["lr"], f"lr of step {i}")
        close(schedules.prototypes_lr(i), want["last_layer_lr"], f"last_layer_lr of step {i}")
        close(schedules.weight_decay(i), want["weight_decay"], f"weight decay of step {i}")
        close(schedules.momentum(i), want["momentum"], f"momentum of step {i}")
        close(schedules.teacher_temp(i), want["teacher_temp"], f"teacher temperature of step {i}")
        share = batch_of(recorded, i, recipe.crops).split(world_size())[rank()]
        got = {k: (all_reduce_sum(v) / world_size()).item() for k, v in step(share).items()}
        weighted = {k: recipe.losses[k]["weight"] * got[k] for k in recipe.losses}
        close(weighted["dino"], want["dino_local"] + want["dino_global"], f"DINO of step {i}")
        close(weighted["ibot"], want["ibot"], f"iBOT of step {i}")
        close(weighted["koleo"], want["koleo_weighted"], f"KoLeo of step {i}")
        close(sum(weighted.values()), want["total"], f"total of step {i}")
        for part in ("backbone", "dino_head", "ibot_head"):
            if f"grad_norm_{part}" in want:
                close(got[f"grad_{part}"], want[f"grad_norm_{part}"], f"gradient of the {part} in step {i}")
    check_end(step, recorded)


def dinov2_recipe(recorded) -> Recipe:
    c, vit, first = recorded.settings["config"], recorded.settings["vit"], recorded["batch/0/global"]
    images, epoch = len(first) // 2, c["train"]["OFFICIAL_EPOCH_LENGTH"]
    crops = crops_of(first, recorded.get("batch/0/local"), images)
    student, teacher, optim = c["student"], c["teacher"], c["optim"]
    targets = "sinkhorn" if c["train"]["centering"] == "sinkhorn_knopp" else "centering"
    # Without local crops the reference still counts one local pair in its denominator.
    locals_ = crops.locals.count
    missing_pair = (2 + 2 * locals_) / (2 + max(2 * locals_, 1))
    start = recorded.under("start/student/backbone.")

    def head(section: dict) -> Head:
        return Head(
            prototypes=section["head_n_prototypes"],
            hidden=section["head_hidden_dim"],
            bottleneck=section["head_bottleneck_dim"],
            layers=section["head_nlayers"],
        )

    return Recipe(
        name="golden",
        backbone=backbone_section(
            width=vit["embed_dim"], depth=vit["depth"], heads=vit["num_heads"], patch=student["patch_size"],
            size=round(math.sqrt(start["pos_embed"].shape[1] - 1)) * student["patch_size"],
            ffn=student["ffn_layer"].removesuffix("fused"), layer_scale=student["layerscale"],
            registers=student["num_register_tokens"], pos_offset=student["interpolate_offset"],
            pos_antialias=student["interpolate_antialias"],
        ),
        heads=Heads(cls=head(c["dino"]), patch=head(c["ibot"]) if c["ibot"]["separate_head"] else None),
        losses=losses_section(
            dino={"weight": c["dino"]["loss_weight"] * missing_pair, "targets": targets},
            ibot={"weight": c["ibot"]["loss_weight"], "targets": targets},
            koleo={"weight": c["dino"]["koleo_loss_weight"]},
        ),
        teacher=Teacher(
            momentum=(teacher["momentum_teacher"], teacher["final_momentum_teacher"]),
            temp=(teacher["warmup_teacher_temp"], teacher["teacher_temp"]),
            temp_warmup=teacher["warmup_teacher_temp_epochs"] * epoch,
        ),
        crops=crops,
        masks=Masks(),
        optim=Optim(
            steps=optim["epochs"] * epoch, batch=images, lr=optim["lr"], lr_rule="none",
            warmup=optim["warmup_epochs"] * epoch, min_lr=optim["min_lr"],
            weight_decay=(optim["weight_decay"], optim["weight_decay_end"]),
            betas=(optim["adamw_beta1"], optim["adamw_beta2"]), clip=optim["clip_grad"],
            layer_decay=optim["layerwise_decay"], patch_lr=optim["patch_embed_lr_mult"],
            head_frozen=optim["freeze_last_layer_epochs"] * epoch,
        ),
        run=Run(precision="fp32"),
    )  # fmt: skip


@COMPILES
@pytest.mark.parametrize("run", [*SWITCHES, COMPILED], ids=str)
def test_dino_steps_are_the_recorded_ones(golden, run):
    recorded = golden("step_v1")
    recipe, rows = dino_recipe(recorded), recorded["rows"].tolist()
    recipe.run = Run(precision="fp32", **run)
    step = Step(recipe, torch.device("cpu"))
    load_start(step, recorded)
    for i, values in enumerate(rows):
        want = dict(zip(recorded.settings["columns"], values, strict=True))
        close(step.schedules.lr(i), want["lr"], f"lr of step {i}")
        close(step.schedules.weight_decay(i), want["weight_decay"], f"weight decay of step {i}")
        close(step.schedules.momentum(i), want["momentum"], f"momentum of step {i}")
        close(step.schedules.teacher_temp(i), want["teacher_temp"], f"teacher temperature of step {i}")
        close(step(batch_of(recorded, i, recipe.crops))["dino"].item(), want["loss"], f"loss of step {i}")
    check_end(step, recorded)
    centre = step.model.losses[0].targets
    torch.testing.assert_close(centre.center, recorded["center"].flatten(), rtol=1e-4, atol=1e-5)


def dino_recipe(recorded) -> Recipe:
    """The settings beside the recording; the schedules' ends, not among them, from its first two rows."""
    s, vit, rows = recorded.settings, recorded.settings["vit"], recorded["rows"].double()
    epoch, epochs, images = s["iterations_per_epoch"], s["epochs"], s["batch"]
    steps, (lr, decay, momentum, temp) = epoch * epochs, rows[:, 1:].unbind(dim=1)
    warmup = int(lr.argmax()) + 1

    def end_of_cosine(values: torch.Tensor, at: int, over: int) -> float:
        share = (1 + math.cos(math.pi * at / over)) / 2
        return ((values[at] - share * values[0]) / (1 - share)).item()

    return Recipe(
        name="golden",
        backbone=backbone_section(
            width=vit["embed_dim"], depth=vit["depth"], heads=vit["num_heads"], patch=vit["patch"],
            size=vit["img_size"], layer_scale=0.0, mask_token=False,
        ),
        heads=Heads(cls=Head(prototypes=s["prototypes"], **s["head"])),
        losses=losses_section(dino={"targets": "centering"}),
        teacher=Teacher(
            momentum=(momentum[0].item(), end_of_cosine(momentum, 1, steps)),
            temp=(temp[0].item(), temp[-1].item()),
            temp_warmup=s["warmup_teacher_temp_epochs"] * epoch, temp_every=epoch,
        ),
        crops=crops_of(recorded["batch/0/global"], recorded["batch/0/local"], images),
        optim=Optim(
            steps=steps, batch=images, lr=lr.max().item(), lr_rule="none", warmup=warmup,
            min_lr=end_of_cosine(lr[warmup:], 1, steps - warmup),
            weight_decay=(decay[0].item(), end_of_cosine(decay, 1, steps)),
            clip=s["clip_per_tensor"], clip_per="tensor",
            head_frozen=s["freeze_last_layer_epochs"] * epoch, head_freeze="gradient",
        ),
        run=Run(precision="fp32"),
    )  # fmt: skip
