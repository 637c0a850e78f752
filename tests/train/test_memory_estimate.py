"""What a step keeps, against what lives in a real step, and against the formula that was published."""

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.data.loader import training_loader
from dinokit.losses import chunked
from dinokit.models import fused
from dinokit.train import plan
from dinokit.train.networks import block_masks
from dinokit.train.plan import activation_memory, tokens_per_crop
from dinokit.train.student_teacher import StudentTeacher

SMALL = [
    "optim.batch=8", "data.size=32", "crops.globals.size=32", "crops.locals.size=16", "backbone.width=32",
    "backbone.depth=1", "heads.cls.hidden=32", "masks.images=1.0", "masks.patches=[0.5, 0.5]",
]  # fmt: skip


def seen(recipe):
    """A model and its batch, the crops as floats."""
    model = StudentTeacher(recipe).train()
    fused.install(model)
    source, masks = registry.build("data.sources", recipe.data), block_masks(recipe, model.student.backbone)
    batch = next(
        iter(training_loader(source, recipe.crops, masks, seed=0, start_step=0, steps=1, batch=8, workers=0))
    )
    batch.global_crops, batch.local_crops = batch.global_crops / 255, batch.local_crops / 255
    return model, batch


def most_bytes(recipe, counting):
    """The most bytes that live in a step's forward and backward pass."""
    torch.manual_seed(0)
    model, batch = seen(recipe)
    with counting() as living:
        with torch.autocast("cpu", torch.bfloat16):
            total = sum(model(batch, 0.07).values())
        total.backward()
    return living.most


@pytest.mark.parametrize(("two_heads", "patches"), [(False, "masked"), (True, "masked"), (True, "all")])
@pytest.mark.parametrize(("logits", "chunk"), [("whole", 2**26), ("chunks", 2**26), ("chunks", 2**14)])
def test_logits_are_counted_as_a_step_holds_them(monkeypatch, living, logits, chunk, two_heads, patches):
    """By what 1,024 more prototypes of each head cost: all else stays."""
    for place, name in ((chunked, "CPU_CHUNK"), (plan, "GPU_CHUNK")):
        monkeypatch.setattr(place, name, chunk)
    lived, counted = [], []
    for prototypes in (4096, 5120):
        patch = f"{{prototypes: {prototypes}, hidden: 32, bottleneck: 32}}" if two_heads else "null"
        more = [f"heads.cls.prototypes={prototypes}", f"heads.patch={patch}", f"run.logits={logits}"]
        more.append(f"losses.ibot.patches={patches}")
        recipe = load_recipe("scenes_cpu", [*SMALL, *more])
        lived.append(most_bytes(recipe, living))
        counted.append(activation_memory(recipe, 8)[1] * 2**30)
    # The prototypes themselves are counted elsewhere: 32 numbers each, at most three times at a time.
    own = (1 + two_heads) * 1024 * 32 * 4 * 3
    grown = lived[1] - lived[0]
    assert grown > own  # else the lower bound below would say nothing
    assert grown - own <= counted[1] - counted[0] <= grown


@pytest.mark.parametrize(
    "backbone",
    [
        {"patch": 14},
        {"patch": 14, "registers": 4},
        {"name": "timm_vit", "model": "vit_small_patch14_reg4_dinov2"},
    ],
)
def test_tokens_are_counted_as_the_blocks_see_them(backbone):
    model = registry.build("models", {"name": "vit", **backbone, "size": 28})
    rows = []
    model.blocks[0].norm1.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    with torch.no_grad():
        model([torch.rand(2, 3, 56, 56), torch.rand(5, 3, 28, 28)], [None, None])
    seen = sum(rows)
    assert 2 * tokens_per_crop(model.to("meta"), 56) + 5 * tokens_per_crop(model, 28) == seen


def test_the_backward_pass_is_counted_as_published():
    """Korthikanti et al. 2022: 34 bytes a token, block and unit of width; and logits, by hand."""
    giant = load_recipe("dinov2_vitg14", ["data.path=nowhere", "run.checkpointing=none", "run.logits=whole"])
    tokens, gib = activation_memory(giant, 32)
    assert tokens == 32 * (2 * 257 + 8 * 50)
    asked, taught = 32 * (2 + 8) * 131_072, 32 * 2 * 131_072
    patches = round(32 * 2 * 256 * 0.5 * 0.3) * 131_072  # half the images, 10 to 50 % of their patches
    logits = 4 * (asked + taught + 2 * patches + 1.5 * patches)
    assert gib * 2**30 == pytest.approx(tokens * 1536 * 40 * 34 + logits)
    giant.run.checkpointing = "full"
    gib = activation_memory(giant, 32)[1]
    assert gib * 2**30 == pytest.approx(tokens * 1536 * (40 * 4 + 34) + logits)
    giant.run.logits = "chunks"
    gib -= activation_memory(giant, 32)[1]
    assert gib * 2**30 == pytest.approx(4 * (asked + patches + 1.5 * patches - 1.5 * 2**26))
