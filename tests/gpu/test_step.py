"""A whole step on the emulated GPU: what it computes is what the CPU computes, and the host never waits."""

import copy

import pytest
import torch

from dinokit.config import registry
from dinokit.config.load import Crops, load_recipe
from dinokit.data.loader import training_loader
from dinokit.data.sources.scenes import Config, build
from dinokit.models import Input, attention
from dinokit.train.networks import block_masks
from dinokit.train.step import Step
from dinokit.train.student_teacher import StudentTeacher
from dinokit.weights import save_backbone

GPU = torch.device("cuda:0")
CENTERING = ("losses.dino.targets=centering", "losses.ibot.targets=centering")
PROJECTOR = ("losses.contrastive={}", "heads.projector={hidden: 32, output: 16}")
STEPS = 2

FORMS = {
    "fp32": (),
    "bf16": ("run.precision=bf16", "run.attention=sdpa", "crops.tint=0.2"),
    "fp16, in two parts": ("run.precision=fp16", "run.accumulate=2", *PROJECTOR),
    "plain": ("run.logits=whole", "run.tokens=all", "run.attention=sdpa", *CENTERING),
}
MORE = {
    "centering in slices": CENTERING,
    "Sinkhorn from whole logits": ("run.logits=whole",),
    "contrastive": (*PROJECTOR, "losses.dino=null", "losses.ibot=null", "masks=null"),
    "spreading": (
        "losses.sigreg={}",
        "losses.coding_rate={}",
        "losses.lejepa={}",
        "heads.projector={hidden: 32, output: 16}",
    ),
    "patches": ("losses.kernel_alignment={}", "teacher.gram.refreshes=3", "losses.ibot.patches=all"),
    "selective checkpointing": ("run.checkpointing=selective", "run.precision=bf16"),
    "full checkpointing": ("run.checkpointing=full",),
    "two heads": ("heads.patch={prototypes: 48, hidden: 32, bottleneck: 16}", "optim.clip_per=tensor"),
    "swiglu, registers, sincos": ("backbone.ffn=swiglu", "backbone.registers=2", "backbone.positions=sincos"),
    "convolutions": ("backbone.stem=conv", "backbone.width=32", "run.precision=bf16"),
    "no local crops": ("crops.locals.count=0", "optim.head_frozen=3", "optim.head_freeze=gradient"),
    "colour on every crop": ("run.compile=colour", "run.precision=bf16"),
}


CASES = [
    *(pytest.param(words, id=name) for name, words in FORMS.items()),
    *(pytest.param(words, id=name, marks=pytest.mark.slow) for name, words in MORE.items()),
]


def run(step, batches, gpu=None):
    """The values of each step, and what it waited for."""
    rows, waits = [], []
    for batch in batches:
        if gpu:
            gpu.waits.clear()
        rows.append(step(batch.pin_memory() if gpu else batch))
        waits.append(list(gpu.waits) if gpu else [])
    return rows, waits


@pytest.fixture
def teacher(tmp_path):
    """The file of a backbone wider than the student."""
    torch.manual_seed(5)
    section = {"name": "vit", "size": 32, "width": 36, "depth": 3, "heads": 3, "patch": 8}
    backbone = registry.build("models", section)
    backbone.input = Input(32, tuple(Crops().mean), tuple(Crops().std))
    save_backbone(tmp_path / "teacher.safetensors", backbone, section)
    return tmp_path / "teacher.safetensors"


def both(emulated, recipe, batches, first_may_wait=False):
    """The steps on the emulated GPU are those on the CPU; none waits for the device."""
    torch.manual_seed(0)
    model = StudentTeacher(recipe)
    on_cpu = copy.deepcopy(model)
    with torch.compiler.set_stance("force_eager"):
        want, _ = run(Step(recipe, torch.device("cpu"), model=on_cpu), batches(recipe, model, STEPS))
    with emulated() as gpu:
        step = Step(recipe, GPU, model=model)
        got, waits = run(step, batches(recipe, model, STEPS), gpu)
        assert all(p.device == GPU and p.dtype == torch.float32 for p in model.parameters())
        tol = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}[recipe.run.precision]
        for ours, theirs in zip(got, want, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert value.device == GPU, name
                torch.testing.assert_close(
                    value.cpu(), theirs[name], rtol=tol, atol=tol, equal_nan=True,
                    msg=lambda m, n=name: f"{n}: {m}",
                )  # fmt: skip
    assert waits[first_may_wait:] == [[]] * (STEPS - first_may_wait)


@pytest.mark.parametrize("words", CASES)
def test_a_step_computes_what_the_cpu_computes_and_never_waits(emulated, tiny, batches, words):
    both(emulated, tiny(*words), batches)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_under_a_frozen_teacher_never_waits(emulated, tiny, batches, teacher, precision):
    # The first step moves the teacher. Its fresh heads learn beside the student.
    words = f"teacher.frozen={teacher}", "masks=null", "backbone.drop_path=0", f"run.precision={precision}"
    both(emulated, tiny(*words), batches, first_may_wait=True)


def test_what_goes_to_the_device_in_a_step_is_the_batch_and_its_colours(emulated, tiny, batches):
    recipe = tiny("run.precision=bf16", *CENTERING)
    model = StudentTeacher(recipe)
    with emulated() as gpu:
        step = Step(recipe, GPU, model=model)
        (batch,) = batches(recipe, model, 1)
        inputs = step.augment(batch.pin_memory())
        gpu.uploads.clear()
        step.augment = lambda batch: batch
        step(inputs)
    assert gpu.uploads == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dinov2_vitl16_short", ["losses.dino.targets=sinkhorn"]),
        ("dinov2_vitl16_short", ["run.attention=varlen"]),
        pytest.param(
            "dinov1_vits16_in1k", ["run.accumulate=2", "run.compile=colour"], marks=pytest.mark.slow
        ),
        pytest.param(
            "dinov2_vitl14", ["run.checkpointing=selective", "run.tokens=all"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_published_step_has_its_shapes_without_any_number(emulated, name, words):
    """At full size, on tensors without numbers: whatever asked for one would raise."""
    words = ["optim.batch=4", "data={name: scenes}", "run.precision=bf16", "run.workers=0", *words]
    recipe = load_recipe(name, words)
    with torch.device("meta"):
        model = StudentTeacher(recipe)
    with emulated("meta") as gpu:
        step = Step(recipe, GPU, model=model.to_empty(device=GPU))
        masks = block_masks(recipe, model.student.backbone)
        source = build(Config(size=64))
        (batch,) = training_loader(
            source, recipe.crops, masks, seed=0, start_step=0, steps=1, batch=4, workers=0
        )
        gpu.waits.clear()
        values = step(batch.pin_memory())
    assert gpu.waits == []
    assert {"dino", "feature_rank", "grad_backbone"} <= values.keys()
    assert all(x.shape == () and x.device == GPU and x.dtype == torch.float32 for x in values.values())
    trained = {n: p for n, p in model.student.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for n, p in trained.items() if "last_layer" not in n)  # DINO freezes these


def test_a_kernel_that_does_not_work_on_the_card_is_refused_with_its_reason(emulated, monkeypatch):
    def fail(*_):
        raise NotImplementedError(
            "No operator found with inputs:\n  query\n  it was built for another PyTorch"
        )

    monkeypatch.setattr(attention, "_xformers", fail)
    with emulated():
        layer, expected = attention.Attention(8, 2), "No operator found with inputs: ... it was built for"
        with pytest.raises(ValueError, match=f"run.attention=xformers cannot be used here: {expected}"):
            attention.use_kernel(layer, "xformers", GPU, torch.bfloat16)
