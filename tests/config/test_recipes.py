"""The shipped recipes: every one can be read, and the published ones say what was published.

The numbers are those of the papers and of the released configurations, in the form in which these give them:
epochs times steps an epoch, GPUs times images a GPU.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinokit.config import registry
from dinokit.config.load import Recipe, load_recipe, student_shares
from dinokit.config.registry import recipe_names
from dinokit.models.head import PrototypeHead

ROOT = Path(__file__).parents[2]
V1_EPOCH = 1_281_167 // (8 * 64)  # steps: the images of ImageNet-1k, on 8 GPUs of 64
EPOCH = 1_250  # steps of DINOv2's nominal epoch

DINOV2 = {
    "losses.dino.weight": 1.0, "losses.ibot.weight": 1.0, "losses.koleo.weight": 0.1,
    "losses.dino.student_temp": 0.1, "losses.ibot.student_temp": 0.1,
    "teacher.temp": (0.04, 0.07), "teacher.temp_warmup": 30 * EPOCH,
    "crops.globals.count": 2, "crops.globals.size": 224, "crops.globals.scale": (0.32, 1.0),
    "crops.globals.blur": (1 - 1.0, 1 - 0.1), "crops.globals.solarize": (0.0, 0.2),
    "crops.locals.count": 8, "crops.locals.scale": (0.05, 0.32), "crops.locals.blur": (0.5,),
    "crops.blur_sigma": (0.1, 2.0), "crops.blur_kernel": 9,
    "masks.images": 0.5, "masks.patches": (0.1, 0.5),
    "optim.lr_batch": 1024, "optim.lr_rule": "sqrt", "optim.min_lr": 1e-6, "optim.betas": (0.9, 0.999),
    "optim.clip": 3.0, "optim.clip_per": "part", "optim.patch_lr": 0.2,
    "optim.head_frozen": EPOCH, "optim.head_freeze": "lr",
    "heads.cls.hidden": 2048, "heads.cls.layers": 3, "heads.cls.norm_last_layer": False,
    "backbone.layer_scale": 1e-5, "backbone.drop_path_uniform": True,
}  # fmt: skip
LONG = DINOV2 | {
    "optim.steps": 500 * EPOCH, "optim.warmup": 80 * EPOCH, "optim.batch": 3072, "optim.lr": 2e-4,
    "optim.weight_decay": (0.04, 0.2), "optim.layer_decay": 1.0, "teacher.momentum": (0.994, 1.0),
    "losses.dino.targets": "sinkhorn", "losses.ibot.targets": "sinkhorn",
    "heads.cls.prototypes": 2**17, "heads.cls.bottleneck": 384,
    "heads.patch.prototypes": 2**17, "heads.patch.bottleneck": 256,
    "backbone.patch": 14, "backbone.ffn": "swiglu", "backbone.drop_path": 0.4, "crops.locals.size": 7 * 14,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "dinov1_vits16_in1k": {
        "optim.steps": 100 * V1_EPOCH, "optim.warmup": 10 * V1_EPOCH, "optim.batch": 8 * 64,
        "optim.lr": 5e-4, "optim.lr_batch": 256, "optim.lr_rule": "linear", "optim.min_lr": 1e-6,
        "optim.weight_decay": (0.04, 0.4), "optim.clip": 3.0, "optim.clip_per": "tensor",
        "optim.head_frozen": V1_EPOCH, "optim.head_freeze": "gradient",
        "optim.layer_decay": 1.0, "optim.patch_lr": 1.0,
        "teacher.momentum": (0.996, 1.0), "teacher.temp": (0.04, 0.04),
        "heads.cls.prototypes": 2**16, "heads.cls.bottleneck": 256, "heads.cls.norm_last_layer": True,
        "losses.dino.targets": "centering", "losses.dino.center_momentum": 0.9,
        "losses.dino.student_temp": 0.1,
        "backbone.drop_path": 0.1, "backbone.drop_path_uniform": False, "backbone.layer_scale": 0.0,
        "crops.globals.scale": (0.4, 1.0), "crops.globals.blur": (1.0, 0.1),
        "crops.globals.solarize": (0.0, 0.2),
        "crops.locals.count": 8, "crops.locals.size": 96, "crops.locals.scale": (0.05, 0.4),
        "crops.locals.blur": (0.5,),
    },
    "dinov2_vitl16_short": DINOV2 | {
        "optim.steps": 100 * EPOCH, "optim.warmup": 10 * EPOCH, "optim.batch": 32 * 64, "optim.lr": 4e-3,
        "optim.weight_decay": (0.04, 0.4), "optim.layer_decay": 0.9, "teacher.momentum": (0.992, 1.0),
        "losses.dino.targets": "centering", "losses.ibot.targets": "centering",
        "heads.cls.prototypes": 2**16, "heads.cls.bottleneck": 256, "heads.patch": None,
        "backbone.patch": 16, "backbone.ffn": "mlp", "backbone.drop_path": 0.3, "crops.locals.size": 6 * 16,
    },
    "dinov2_distill_vits14": {key: value for key, value in LONG.items() if not key.startswith("masks.")} | {
        "optim.batch": 2048, "optim.lr": 1e-3, "optim.lr_batch": 2048, "masks": None,
        "backbone.width": 384, "backbone.depth": 12, "backbone.heads": 6, "backbone.ffn": "mlp",
        "backbone.drop_path": 0.0,
    },
    "dinov2_vitl14": LONG,
    "dinov2_vitg14": LONG,
}  # fmt: skip
STAGE = DINOV2 | {  # of DINOv3: the 7B's schedules and weights of losses, for a ViT-L at half the batch
    "losses.dino.local_weight": 0.5, "teacher.momentum": (0.999, 0.999), "teacher.temp": (0.07, 0.07),
    "optim.batch": 2048, "optim.schedule": "constant", "optim.weight_decay": (0.04, 0.04),
    "optim.betas": (0.9, 0.99), "optim.clip": 30.0, "optim.layer_decay": 0.98, "optim.head_frozen": 0,
}  # fmt: skip
ABSENT = {"teacher.temp_warmup", "optim.min_lr", "optim.head_freeze", "crops.globals.size",
          "backbone.drop_path_uniform", "crops.blur_sigma", "crops.blur_kernel"}  # fmt: skip
V3_SHORT = {key: value for key, value in DINOV2.items() if key.split(".")[-1] not in
            ("drop_path_uniform", "blur_sigma", "blur_kernel")}  # fmt: skip
PUBLISHED |= {
    "dinov3_vitl16_pretrain": V3_SHORT | {
        "optim.steps": 100 * EPOCH, "optim.warmup": 10 * EPOCH, "optim.batch": 32 * 64, "optim.lr": 4 * 1e-3,
        "optim.weight_decay": (0.04, 0.4), "optim.layer_decay": 0.9, "teacher.momentum": (0.992, 1.0),
        "losses.dino.targets": "sinkhorn", "losses.ibot.targets": "sinkhorn", "optim.schedule": "cosine",
        "heads.cls.prototypes": 2**16, "heads.cls.bottleneck": 256, "heads.patch.prototypes": 2**16,
        "backbone.drop_path": 0.3, "backbone.patch": 16, "crops.locals.size": 6 * 16,
    },
    "dinov3_vitl16_gram": {key: value for key, value in STAGE.items() if key not in ABSENT} | {
        "losses.gram.weight": 2.0, "losses.gram.ramp": 1_000, "optim.lr": 4 * 3e-5,
        "teacher.gram.refresh_from": 10_000, "teacher.gram.refresh_every": 10_000,
        "teacher.gram.refreshes": 3,
    },
    "dinov3_vitl16_highres": {key: value for key, value in STAGE.items() if key not in ABSENT} | {
        "losses.gram.weight": 1.5, "losses.koleo.distributed": True, "losses.koleo.group": 16,
        "optim.lr": 4 * 1.25e-5, "optim.steps": 30_000, "optim.warmup": 10_000,
    },
}  # fmt: skip
GIANT = {"backbone.width": 4096, "backbone.depth": 40, "backbone.heads": 32, "backbone.hidden": 8192,
         "backbone.drop_path": 0.4, "heads.cls.hidden": 8192, "heads.patch.hidden": 4096,
         "heads.cls.prototypes": 2**18, "heads.patch.prototypes": 96 * 1024, "heads.cls.bottleneck": 512,
         "heads.patch.bottleneck": 384, "crops.flip": 0.0, "crops.locals.size": 7 * 16}  # fmt: skip
PUBLISHED |= {
    "dinov3_vit7b16_pretrain": {k: v for k, v in V3_SHORT.items() if k != "optim.min_lr"} | GIANT | {
        "optim.steps": 1000 * 1000, "optim.warmup": 100 * 1000, "optim.batch": 16 * 256, "optim.lr": 4 * 5e-5,
        "optim.weight_decay": (0.04, 0.04), "optim.layer_decay": 0.98, "optim.betas": (0.9, 0.99),
        "optim.clip": 30.0, "optim.schedule": "constant", "optim.head_frozen": 5 * 1000,
        "teacher.momentum": (0.994, 0.994), "teacher.temp_warmup": 100 * 1000, "crops.globals.size": 256,
        "losses.dino.targets": "sinkhorn", "losses.ibot.targets": "sinkhorn",
    },
    "dinov3_distill": {  # of the students; their starting weights are not released
        "students.vits16.share": 48 // 8, "students.vits16plus.share": 48 // 8,
        "students.vitb16.share": 80 // 8, "students.vitl16.share": 120 // 8,
        "optim.steps": 20 * EPOCH, "optim.warmup": 10 * EPOCH, "optim.batch": 1920,
        "optim.schedule": "constant", "optim.betas": (0.9, 0.999), "optim.weight_decay": (0.04, 0.04),
        "optim.layer_decay": 0.99, "optim.clip": 3.0, "teacher.momentum": (0.994, 1.0),
        "teacher.temp": (0.07, 0.07), "backbone.drop_path": 0.0, "masks": None, "losses.koleo.weight": 0.1,
        "heads.cls.prototypes": 2**18, "heads.patch.prototypes": 96 * 1024,
    },
    "dinov3_vit7b16_gram": PUBLISHED["dinov3_vitl16_gram"] | GIANT | {
        "optim.steps": 200 * 1000, "optim.batch": 16 * 256, "crops.gram_size": 512,
    },
    "dinov3_vit7b16_highres": PUBLISHED["dinov3_vitl16_highres"] | GIANT | {
        "optim.batch": 8 * 256, "crops.gram_size": 768,
    },
}  # fmt: skip
PEAK_LR = {
    "dinov3_distill": 4 * 5e-5 * (1776 / 1024) ** 0.5,
    "dinov3_vit7b16_pretrain": 4e-4,
    "dinov3_vit7b16_gram": 2.4e-4,
    "dinov3_vit7b16_highres": 7.071e-5,
    "dinov3_vitl16_pretrain": 5.657e-3,
    "dinov3_vitl16_highres": 7.071e-5,
    "dinov1_vits16_in1k": 1e-3,
    "dinov2_vitl16_short": 5.657e-3,
    "dinov2_distill_vits14": 1e-3,
    "dinov2_vitl14": 3.464e-4,
    "dinov2_vitg14": 3.464e-4,
}


def stated(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"{name}.yaml"))


def load(name: str, *overrides: str) -> Recipe:
    asked = {"data": "path", "teacher": "frozen", "backbone": "weights"}
    given = [f"{part}.{key}=somewhere" for part, key in asked.items() if stated(name)[part].get(key) == "???"]
    if "students" in stated(name):
        given += [f"student={next(iter(stated(name)['students']))}"]
    if stated(name)["teacher"].get("start") == "???":  # a later stage of DINOv3
        given += ["teacher.start=somewhere", "teacher.gram.weights=somewhere"]
    return load_recipe(
        name, [*given, *overrides], read_architecture=lambda _: {"name": "vit", "patch": 14, "size": 518}
    )


def value_of(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


@pytest.mark.parametrize("name", recipe_names())
def test_every_crop_is_a_whole_number_of_patches(name):
    recipe = load(name)
    sides = [group.size for group in (recipe.crops.globals, recipe.crops.locals) if group.count]
    assert all(side % recipe.backbone["patch"] == 0 for side in sides)
    assert recipe.backbone["size"] == recipe.crops.globals.size


@pytest.mark.parametrize("name", recipe_names())
def test_checkpoints_that_a_recipe_keeps_for_good_come_before_its_end(name):
    recipe = load(name)
    assert recipe.run.keep_every <= recipe.optim.steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_runs_with_the_published_numbers(name):
    recipe = load(name)
    published = {key: value for key, value in PUBLISHED[name].items() if not key.startswith("students.")}
    runs_with = {key: value_of(recipe, key) for key in published}
    assert runs_with == {
        key: pytest.approx(value, rel=1e-12, abs=1e-12) if isinstance(value, float | tuple) else value
        for key, value in published.items()
    }
    if "students" in stated(name):
        shares = student_shares(name)
        assert shares == {key: PUBLISHED[name][f"students.{key}.share"] for key in shares}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_number_stands_in_the_recipe_and_does_not_hang_on_a_default(name):
    text = stated(name)
    for key in PUBLISHED[name]:
        value_of(text, key)


@pytest.mark.parametrize("name", PEAK_LR)
def test_the_peak_learning_rate_is_the_published_one(name):
    assert load(name).optim.peak_lr == pytest.approx(PEAK_LR[name], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("dinov1_vits16_in1k", [], 21_665_664),
        ("dinov2_vits14_in1k", ["backbone.size=518"], 22_056_576),
        ("dinov2_vitl14", ["backbone.size=518", "backbone.ffn=mlp"], 304_368_640),
        ("dinov2_vitg14", ["backbone.size=518"], 1_136_480_768),
    ],
)
def test_the_backbone_has_as_many_parameters_as_the_released_one(name, overrides, count):
    """The released positional embeddings are for 518 pixels, and the released ViT-L has an MLP."""
    with torch.device("meta"):
        backbone = registry.build("models", load(name, *overrides).backbone)
    assert sum(p.numel() for p in backbone.parameters()) == count


@pytest.mark.parametrize(
    ("name", "part", "count"),
    [
        ("dinov1_vits16_in1k", "cls", 22_352_128),
        ("dinov2_vitl16_short", "cls", 23_662_848),
        ("dinov2_vitg14", "cls", 58_593_664),
        ("dinov2_vitg14", "patch", 41_554_176),
        # The original has no lengths of prototypes.
        ("dinov3_vit7b16_pretrain", "cls", 239_092_224 + 2**18),
        ("dinov3_vit7b16_pretrain", "patch", 72_884_608 + 96 * 1024),
    ],
)
def test_a_head_has_as_many_parameters_as_the_original(name, part, count):
    recipe = load(name)
    with torch.device("meta"):
        head = PrototypeHead(recipe.backbone["width"], **asdict(getattr(recipe.heads, part)))
    assert sum(p.numel() for p in head.parameters()) == count


@pytest.mark.parametrize("name", recipe_names())
def test_the_head_of_a_recipe_gives_its_origin_cost_result_and_command(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "arXiv" in head or "Ours" in head
    assert "cost" in head.lower()
    assert "result" in head.lower()
    assert f"dinokit train {name}" in head


def test_the_documented_recipes_are_those_that_there_are():
    rows = [
        line for line in (ROOT / "docs" / "recipes.md").read_text().splitlines() if line.startswith("| [`")
    ]
    assert sorted(row.split("`")[1] for row in rows) == recipe_names()
