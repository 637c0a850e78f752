"""Plans for many GPUs against 96 and 256 fake processes that cut the model, and against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinokit.config.load import load_recipe
from dinokit.runtime.distributed import local
from dinokit.train.parallel import choose, shard
from dinokit.train.plan import (
    STATE_BYTES,
    Cluster,
    bytes_sent,
    gathered_bytes,
    parallel_mode,
    plan,
    sharded_numel,
)
from dinokit.train.student_teacher import StudentTeacher

NODES, GPUS = 12, 8


@pytest.fixture
def giant():
    return load_recipe("dinov2_vitg14", ["data.path=nowhere", "run.parallel=fsdp"])


@pytest.fixture
def student(giant):
    with torch.device("meta"):
        return StudentTeacher(giant).student


@pytest.fixture
def fake_world():
    """start(rank): be one of 96 processes, or of `size`, that nobody answers."""

    def start(rank, size=NODES * GPUS):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize(("rank", "hybrid"), [(0, True), (0, False), (95, False)])
def test_the_giant_cut_over_96_processes_weighs_what_the_plan_says(giant, fake_world, rank, hybrid):
    fake_world(rank)
    with torch.device("meta"):
        model = StudentTeacher(giant)
    whole = [tuple(p.shape) for p in model.student.parameters()]
    total = sum(math.prod(shape) for shape in whole)
    if hybrid:
        mesh = init_device_mesh("cpu", (NODES, GPUS), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (NODES * GPUS,), mesh_dim_names=("shard",))
    planned = sharded_numel(model.student.parameters(), GPUS if hybrid else NODES * GPUS)
    shard(model, mesh, MixedPrecisionPolicy())
    parts = {
        who: sum(local(p).numel() for p in net.parameters())
        for who, net in {"student": model.student, "teacher": model.teacher}.items()
    }
    assert parts["student"] == parts["teacher"]
    if rank == 0:
        assert parts["student"] == planned
        assert planned == pytest.approx(
            total / (GPUS if hybrid else NODES * GPUS), rel=0.04
        )  # positions are one row
    else:
        assert parts["student"] <= planned
    # Student, its gradient, two moments like it, and the teacher: five times the part, in float32.
    held_bytes = 4 * (parts["student"] * 4 + parts["teacher"])
    assert held_bytes <= planned * STATE_BYTES
    assert total == 1_134_771_200 + 58_593_664 + 41_554_176


@pytest.mark.slow
def test_the_7b_cut_over_256_processes_weighs_what_the_plan_says(fake_world):
    recipe = load_recipe("dinov3_vit7b16_pretrain", ["data.path=nowhere"])
    fake_world(255, size=256)
    with torch.device("meta"):
        model = StudentTeacher(recipe)
    assert sum(p.numel() for p in model.student.backbone.parameters()) == 6_716_043_264  # as released
    planned = sharded_numel(model.student.parameters(), GPUS)
    mesh = init_device_mesh("cpu", (256 // GPUS, GPUS), mesh_dim_names=("replicate", "shard"))
    shard(model, mesh, MixedPrecisionPolicy())
    for net in (model.student, model.teacher):
        part = sum(local(p).numel() for p in net.parameters())
        assert 0.97 * planned < part <= planned  # the last process has the shortest rows
    lines = plan(recipe, Cluster(256 // GPUS, GPUS))
    assert lines["memory of a GPU"].startswith(f"{planned * 20 / 2**30:.2f} GiB for weights")
    assert "sharded over 8 GPUs; 16 images a GPU" in lines["parallel"]


@pytest.mark.slow
def test_the_plan_says_the_memory_of_a_gpu_and_what_it_assumes(giant):
    lines = plan(giant, Cluster(NODES, GPUS, images_per_second=35.0))
    assert "12 nodes of 8 GPUs, fsdp: every tensor sharded over 8 GPUs; 32 images a GPU" in lines["parallel"]
    assert lines["memory of a GPU"].startswith(f"{1_234_919_040 * 20 / 8 / 2**30:.2f} GiB for weights")
    assert "images_per_second=35" in lines["assumed"]
    low, high = (float(x.replace(",", "")) for x in lines["speed"].split(" images/s")[0].split(" to "))
    assert low < high == NODES * GPUS * 35
    assert "images_per_second=N" in plan(giant, Cluster(NODES, GPUS))["assumed"]


def test_bytes_sent_are_those_of_rings(giant, student):
    total = sum(p.numel() for p in student.parameters())
    giant.run.parallel = "ddp"
    inside, across = bytes_sent(giant, student, Cluster(1, 2), 1)
    assert across == 0
    assert inside == pytest.approx(total * 4, rel=0.01)  # two processes send each other all gradients, once
    giant.run.parallel = "fsdp"
    inside, across = bytes_sent(giant, student, Cluster(2, 4), 1)
    assert inside == pytest.approx(0.75 * (3 * gathered_bytes(student, half=True) + 4 * total), rel=0.01)
    assert across == pytest.approx(total * 4, rel=0.01)  # two nodes, each gradient once
    blocks = sum(p.numel() for p in student.backbone.blocks.parameters())
    assert gathered_bytes(student, half=True) == 4 * total - 2 * blocks


def test_auto_cuts_what_would_not_fit_a_gpu_with_its_backward_pass(giant):
    giant.run.parallel = "auto"
    state = 10**9 * STATE_BYTES / 2**30  # 18.6 GiB
    assert parallel_mode(giant, 10**9, 0.89 * 80 - state, Cluster(1, 8)) == ("ddp", 1)
    assert parallel_mode(giant, 10**9, 0.91 * 80 - state, Cluster(1, 8)) == ("fsdp", 8)
    assert parallel_mode(giant, 10**9, 1.0, Cluster(8, 1, gpu_gib=20)) == ("fsdp", 8)
    assert parallel_mode(giant, 10**9, 100.0, Cluster()) == ("none", 1)


@pytest.mark.slow
def test_a_run_and_its_plan_spread_the_giant_alike(giant, fake_world, monkeypatch):
    """Its weights would fit 80 GB, but not with 32 images; they do if the blocks are computed again."""
    fake_world(0)
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    giant.run.parallel = "auto"
    with torch.device("meta"):
        model = StudentTeacher(giant)
    for checkpointing, kind in (("none", "fsdp"), ("full", "ddp")):
        giant.run.checkpointing = checkpointing
        assert choose(giant, model, torch.device("cuda"), 32) == kind
        assert f"of 8 GPUs, {kind}:" in plan(giant, Cluster(NODES, GPUS))["parallel"]


def test_a_cluster_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nodes=0, but it must be 1 or more"):
        Cluster(nodes=0)
    with pytest.raises(ValueError, match="gpu_gib=0"):
        Cluster(gpu_gib=0)


def test_a_number_of_gpus_that_does_not_divide_the_batch_is_said(giant):
    with pytest.raises(ValueError, match=r"optim.batch=3072 .* over 56 processes\. Start 48"):
        plan(giant, Cluster(7, 8))
