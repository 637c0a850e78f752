"""What only a GPU does: docs/gpu.md lists the branches of the code, each with its test."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.api import export
from dinokit.bench import wait
from dinokit.bench.step import bench_attention, bench_steps, plain
from dinokit.commands.doctor import machine
from dinokit.config import registry
from dinokit.config.load import load_recipe, section_values
from dinokit.data.augment import Photometric
from dinokit.features import open_store
from dinokit.losses import chunked
from dinokit.models import Input
from dinokit.models.attention import unavailable_reason
from dinokit.runtime.device import memory_share, peak_memory, pick_device, pick_precision
from dinokit.train.choose import choose, measure
from dinokit.train.resources import memory_available
from dinokit.train.step import Step
from dinokit.train.student_teacher import StudentTeacher
from dinokit.weights import save_backbone

pytestmark = pytest.mark.gpu

GPU, CPU = torch.device("cuda"), torch.device("cpu")
STILL = ("backbone.drop_path=0",)  # stochastic depth draws other numbers on a GPU
CENTERING = ("losses.dino.targets=centering", "losses.ibot.targets=centering")
FORMS = {
    "fp32": (),
    "bf16": ("run.precision=bf16",),
    "fp16, in two parts": ("run.precision=fp16", "run.accumulate=2"),
    "plain": ("run.logits=whole", "run.tokens=all", "run.attention=sdpa", *CENTERING),
    "selective": ("run.checkpointing=selective", "run.precision=bf16"),
    "full": ("run.checkpointing=full",),
    "contrastive": (
        "losses.contrastive={}", "heads.projector={hidden: 32, output: 16}", "losses.dino=null",
        "losses.ibot=null", "masks=null",
    ),
    "two heads": ("heads.patch={prototypes: 48, hidden: 32, bottleneck: 16}", "optim.clip_per=tensor"),
    "convolutions": ("backbone.stem=conv", "backbone.width=32"),
}  # fmt: skip
FORMS_IDS = [pytest.param(words, id=name) for name, words in FORMS.items()]
KERNELS = "xformers", "varlen"
WIDE = ("backbone.width=64", "backbone.heads=2", "run.precision=bf16")  # 32 channels a head: for every kernel


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """What is compared in float32 is computed in float32, convolutions too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def steps(recipe, device, batches, count=2):
    """What so many steps of a new model return, on the CPU."""
    torch.manual_seed(0)
    model = StudentTeacher(recipe)
    step = Step(recipe, device, model=model)
    rows = [step(batch.pin_memory() if device == GPU else batch) for batch in batches(recipe, model, count)]
    return [{name: value.float().cpu() for name, value in row.items()} for row in rows]


def near(got, want, tol):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(
                value, theirs[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("words", FORMS_IDS)
def test_a_step_is_that_of_the_cpu(tiny, batches, words):
    recipe = tiny(*words, *STILL)
    tol = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 2e-2}[recipe.run.precision]
    got, want = steps(recipe, GPU, batches), steps(recipe, CPU, batches)
    if recipe.run.precision == "fp16":  # one of both may overflow where the other does not
        got, want = (
            [{k: v for k, v in row.items() if "grad" not in k} for row in run] for run in (got, want)
        )
    near(got, want, tol)


@pytest.fixture
def teacher(tmp_path):
    section = {"name": "vit", "size": 32, "width": 36, "depth": 3, "heads": 3, "patch": 8}
    backbone = registry.build("models", section)
    backbone.input = Input(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save_backbone(tmp_path / "teacher.safetensors", backbone, section)
    return f"teacher.frozen={tmp_path / 'teacher.safetensors'}", "masks=null", *STILL, "run.precision=bf16"


SPREADING = pytest.param(
    ("losses.sigreg={}", "losses.lejepa={}", "heads.projector={hidden: 32, output: 16}"), id="spreading"
)


@pytest.mark.parametrize("words", [*FORMS_IDS, SPREADING, "frozen teacher", *KERNELS])
def test_a_step_never_waits_for_the_gpu(tiny, batches, teacher, words):
    if words in KERNELS:
        skip_without(words)
        words = (*WIDE, *STILL, f"run.attention={words}")
    recipe = tiny(*(teacher if words == "frozen teacher" else words))
    step = Step(recipe, GPU)
    first, second = (batch.pin_memory() for batch in batches(recipe, step.model, 2))
    step(first)  # it makes the optimiser's state, and moves a frozen teacher
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def skip_without(kernel):
    reason = unavailable_reason(kernel, GPU, torch.bfloat16)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("kernel", ["sdpa", *KERNELS])
def test_every_kernel_of_attention_trains_alike(tiny, batches, kernel):
    skip_without(kernel)
    recipes = [tiny(*WIDE, *STILL, f"run.attention={name}") for name in (kernel, "auto")]
    near(*(steps(recipe, GPU, batches) for recipe in recipes), 5e-2)


def test_a_compiled_step_is_that_of_one_that_is_not(tiny, batches):
    torch.compiler.reset()
    words = (*WIDE, *STILL, "run.checkpointing=selective")
    recipes = [tiny(*words, f"run.compile={name}") for name in ("all", "none")]
    near(*(steps(recipe, GPU, batches) for recipe in recipes), 5e-2)


def test_checkpointing_keeps_less_on_the_card(tiny, batches):
    sizes, values = {}, {}
    for way in ("none", "selective", "full"):
        recipe = tiny(*WIDE, "backbone.depth=6", "optim.batch=16", f"run.checkpointing={way}", *STILL)
        torch.manual_seed(0)
        step = Step(recipe, GPU)
        (batch,) = batches(recipe, step.model, 1)
        inputs = step.augment(batch)
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            values[way] = step.model(inputs, 0.05)
        sizes[way] = torch.cuda.memory_allocated() - before
    assert sizes["full"] < sizes["selective"] < sizes["none"]
    for way in ("selective", "full"):
        near([values[way]], [values["none"]], 1e-3)


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_losses_in_slices_are_those_of_whole_logits(tiny, batches, monkeypatch, targets):
    monkeypatch.setattr(chunked, "GPU_CHUNK", 100)  # a few prototypes a slice
    words = (*STILL, *(f"losses.{name}.targets={targets}" for name in ("dino", "ibot")))
    recipes = [tiny(*words, f"run.logits={form}") for form in ("chunks", "whole")]
    near(*(steps(recipe, GPU, batches) for recipe in recipes), 1e-3)


def test_auto_takes_the_gpu_and_its_fastest_precision():
    device = pick_device("auto")
    assert device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert pick_precision("auto", device) == ("bf16" if native else "fp16")


def test_the_memory_that_is_reported_is_that_of_the_card():
    block = torch.ones(2**28, device=GPU)  # 1 GiB
    assert 1 <= peak_memory(GPU) <= torch.cuda.mem_get_info()[1] / 2**30
    assert 0 < memory_share(GPU) <= 1
    del block


def test_the_memory_that_is_free_is_that_of_the_card():
    free = memory_available(GPU)
    assert 0 < free <= torch.cuda.mem_get_info()[1] / 2**30
    block = torch.ones(2**30, device=GPU)  # 4 GiB
    assert memory_available(GPU) < free - 3
    del block


def test_doctor_names_the_card(tmp_path):
    facts = machine(str(tmp_path))
    assert torch.cuda.get_device_name(0) in facts["GPU 0"]
    assert facts["driver"] != "none"
    assert facts["CUDA"] == torch.version.cuda


def test_a_run_without_a_recipe_takes_the_one_for_gpus(tmp_path):
    for i in range(300):
        Image.fromarray(np.full((40, 40, 3), i % 256, np.uint8)).save(tmp_path / f"{i}.png")
    choice, _ = choose([f"data.path={tmp_path}"], "cuda")
    assert choice.recipe == "small_photos"


IMAGES = {
    "train": {"name": "scenes", "split": "train"}, "test": {"name": "scenes", "split": "test"},
    "max_train": 60, "max_test": 40, "workers": 1, "precision": "fp32",
}  # fmt: skip
EVALUATIONS = {
    "knn": {"k": [5, 20], "size": 32, "resize": 32},
    "linear": {"size": 32, "resize": 32, "blocks": [1], "lr": [1e-2], "steps": 5, "step_batch": 16},
    "logreg": {"size": 32, "resize": 32, "count": 2, "powers": [-2, 0]},
    "retrieval": {"size": 32, "resize": 32},
    "segmentation": {"method": "knn", "resize": 64, "bank": 500},
    "eomt": {"resize": 64, "crop": 32, "stride": 24, "queries": 6, "blocks": 1, "steps": 1, "batch": 4},
    "depth": {"augment": False, "steps": 3, "batch": 4, "crop": [32, 32], "layers": 1, "bins": 16},
    "video": {
        "test": {"name": "scenes", "size": 64, "videos": 1, "frames": 4},
        "size": 64,
        "precision": "fp32",
    },
}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 4, "heads": 2, "patch": 8}
    made = registry.build("models", section).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.input = Input(32, (0.5,) * 3, (0.2,) * 3)
    made.section = section
    return made


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluator_gives_the_scores_of_the_cpu(backbone, name):
    module = registry.find("eval", name)
    values = {**IMAGES, **EVALUATIONS[name]} if name != "video" else EVALUATIONS[name]
    values = {k: v for k, v in values.items() if not (name == "retrieval" and "train" in k)}
    cfgs = [module.Config(**section_values("eval", name, values, name)) for _ in range(2)]
    want = module.evaluate(cfgs[0], copy.deepcopy(backbone))
    got = module.evaluate(cfgs[1], backbone.to(GPU))
    assert got == pytest.approx(want, rel=3e-2, abs=3e-2)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_extraction_is_that_of_the_cpu(backbone, tmp_path, processes):
    """Two processes share one card, or have one each."""
    weights = tmp_path / "vit.safetensors"
    save_backbone(weights, backbone, backbone.section)
    stores = []
    for device, many in (("cpu", 1), ("cuda", processes)):
        words = [f"weights={weights}", "data.name=scenes", "data.count=20", "data.split=train"]
        words += [f"out={tmp_path / device}", "size=32", "resize=32", "batch=4", "shard=8", "workers=1"]
        words += ["precision=fp32", "dtype=float32", f"device={device}", f"processes={many}"]
        assert main(["extract", *words]) == 0
        stores.append(np.asarray(open_store(tmp_path / device)["cls"][:]))
    np.testing.assert_allclose(stores[1], stores[0], rtol=1e-3, atol=1e-3)


def test_a_backbone_on_the_card_is_exported_and_stays_there(backbone, tmp_path):
    want = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert export(backbone.to(GPU), "dinov2", tmp_path / "vit.pth")
    assert all(p.is_cuda for p in backbone.parameters())
    got = torch.load(tmp_path / "vit.pth", weights_only=True)
    for name in want.keys() & got.keys():
        assert torch.equal(got[name], want[name])
    assert len(want.keys() & got.keys()) > 20


def test_a_bench_measures_the_card():
    words = ["data={name: scenes}", "optim.batch=8", "run.precision=bf16", "run.device=cuda", "run.workers=0"]
    words += ["backbone.width=64", "backbone.depth=2", "backbone.heads=2", "heads.cls.prototypes=256"]
    recipe = load_recipe("small_photos", words)
    ours, theirs = bench_steps([recipe, plain(recipe)], 2, real=False)
    for report in (ours, theirs):
        assert report.images_per_second > 0
        assert 0 <= report.idle_gib < report.peak_gib < torch.cuda.mem_get_info()[1] / 2**30
        assert min(report.milliseconds.values()) > 0
    times = bench_attention(recipe, 2)["milliseconds"]
    assert times["auto"] > 0
    assert times["sdpa"] > 0


def test_a_clock_waits_for_the_card():
    x = torch.ones(8192, 8192, device=GPU)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(20):
        x @ x
    ended.record()
    wait(GPU)
    assert ended.query()
    assert begun.elapsed_time(ended) > 0


def test_the_time_of_a_step_is_that_of_the_card(tiny):
    recipe = tiny("run.device=cuda", "data.count=40")
    assert 0 < measure(recipe, registry.build("data.sources", recipe.data)) < 60


def test_compiled_colours_are_those_of_the_cpu_in_the_shapes_of_a_recipe(tiny, batches):
    recipe = tiny("crops.tint=0.2")
    model = StudentTeacher(recipe)
    (batch,) = batches(recipe, model, 1)
    want = Photometric(recipe.crops)(batch.global_crops, batch.global_colour)
    got = Photometric(recipe.crops, compiled=True)(batch.global_crops.cuda(), batch.global_colour)
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
