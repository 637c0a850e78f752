"""One, two and four processes do the same; DDP and FSDP2 do the same. Real processes, over gloo."""

import pytest
import torch

from dinokit.config import registry
from dinokit.losses.contrastive import info_nce
from dinokit.train import trainer
from dinokit.train.parallel import choose, gradient_sync, unsharded_backbone
from dinokit.train.schedule import accumulation
from dinokit.train.step import Step

# Every statistic then counts over all processes: what is per process by nature is left out, or made to count.
SHARED = [
    "backbone.drop_path=0.0", "losses.koleo.distributed=true", "losses.sigreg={distributed: true}",
    "losses.coding_rate={distributed: true}",     "run.log_every=2",
]  # fmt: skip
# Signals look at the images of a process, and are then averaged.
OF_ONE_PROCESS = {
    "feature_rank", "brightness_agreement", "prototypes_used", "crop_agreement", "head_spread",
}  # fmt: skip
CENTRES = ["losses.dino.targets=centering", "losses.ibot.targets=centering"]


def train(recipe, evaluators=()):
    return trainer.train(recipe, registry.build("data.sources", recipe.data), evaluators)


@pytest.fixture
def overrides(photos, tmp_path):
    def make(out, *more):
        return [f"data.path={photos}", f"run.out={tmp_path / out}", *SHARED, *more]

    return make


@pytest.fixture
def nearly_same(records, weights, tmp_path):
    def compare(one, two):
        for a, b in zip(records(tmp_path / one), records(tmp_path / two), strict=True):
            a, b = ({key: row[key] for key in row if key not in OF_ONE_PROCESS} for row in (a, b))
            assert a == pytest.approx(b, rel=2e-4), two
        a, b = weights(tmp_path / one), weights(tmp_path / two)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=3e-5, msg=lambda m, k=key: f"{k}: {m}")

    return compare


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_either_way_of_spreading_gives_the_same_run(
    tiny, recipe_file, overrides, together, nearly_same, world
):
    train(tiny("one", *SHARED))
    runs = [overrides(kind, f"run.parallel={kind}") for kind in ("ddp", "fsdp")]
    together(world, "several_runs", str(recipe_file), runs)
    nearly_same("one", "ddp")
    nearly_same("one", "fsdp")


@pytest.mark.slow
def test_parts_hold_the_same_images_for_any_number_of_processes(
    tiny, recipe_file, overrides, together, nearly_same
):
    """Sinkhorn-Knopp and KoLeo look at one part: they would tell."""
    train(tiny("one", *SHARED, "run.accumulate=2"))
    runs = [overrides(k, f"run.parallel={k}", "run.accumulate=2") for k in ("ddp", "fsdp")]
    together(2, "several_runs", str(recipe_file), runs)
    nearly_same("one", "ddp")
    nearly_same("one", "fsdp")


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes_and_otherwise_cut(
    tiny, recipe_file, overrides, together, nearly_same
):
    each = "run.log_every=1"
    train(tiny("whole", *SHARED, *CENTRES, each))
    for world, steps, kind in ((1, 2, "auto"), (2, 2, "fsdp"), (4, 1, "ddp")):
        more = overrides("moved", *CENTRES, f"run.parallel={kind}", each)
        together(world, "stop_after", str(recipe_file), more, steps, status=(130,))
    train(tiny("moved", *SHARED, *CENTRES, each))
    nearly_same("whole", "moved")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_goes_on_with_ever_fewer_processes_keeps_its_path(
    tiny, recipe_file, overrides, together, nearly_same, accumulate
):
    """Sinkhorn-Knopp and KoLeo over all processes, at eight images a step: 4 cut, then 2 by DDP, then 1."""
    each = ("run.log_every=1", "optim.batch=8", f"run.accumulate={accumulate}")
    train(tiny("whole", *SHARED, *each))
    for world, kind in ((4, "fsdp"), (2, "ddp")):
        more = overrides("fewer", f"run.parallel={kind}", *each)
        together(world, "stop_after", str(recipe_file), more, 2, status=(130,))
    train(tiny("fewer", *SHARED, *each))
    nearly_same("whole", "fewer")


def test_an_evaluator_may_call_the_backbone_unequally_often(
    recipe_file, overrides, together, records, tmp_path
):
    output = together(
        2, "train", str(recipe_file), overrides("a", "run.parallel=fsdp", "optim.steps=3"), "unequal"
    )
    assert "Traceback" not in output
    assert [r["step"] for r in records(tmp_path / "a") if "probe/size" in r] == [0, 2, 3]


@pytest.mark.slow
def test_losses_that_leave_parameters_unread_are_no_trouble_for_ddp(recipe_file, overrides, together):
    runs = [
        overrides("a", "losses.dino=null", "heads.patch.prototypes=16", "optim.steps=3"),
        overrides("b", "losses.ibot=null", "masks=null", "optim.steps=3"),
    ]
    together(2, "several_runs", str(recipe_file), runs)


def test_alone_there_is_nothing_to_spread(tiny):
    for kind in ("auto", "none", "ddp", "fsdp"):
        recipe = tiny("a", f"run.parallel={kind}")
        step = Step(recipe, torch.device("cpu"))
        assert choose(recipe, step.model, torch.device("cpu"), 4) == "none"
    assert step.replica is step.model
    assert unsharded_backbone(recipe, step.model.teacher.backbone) is step.model.teacher.backbone
    with gradient_sync(step.replica, last=False):
        pass


def test_several_processes_that_would_train_apart_are_refused(recipe_file, overrides, together):
    output = together(2, "train", str(recipe_file), overrides("a", "run.parallel=none"), status=(1, 2))
    assert output.count("run.parallel=none: each would train alone") == 1


@pytest.mark.parametrize(
    ("world", "accumulate", "want"), [(1, 1, 1), (1, 3, 3), (2, 3, 3), (4, 2, 3), (4, 4, 3), (12, 1, 1)]
)
def test_parts_keep_the_batch_on_any_number_of_processes(tiny, world, accumulate, want):
    recipe = tiny("a", "optim.batch=12", f"run.accumulate={accumulate}", "losses.koleo=null")
    assert accumulation(recipe, world) == want


def test_with_fewer_processes_parts_get_more_if_the_images_would_not_fit(tiny):
    recipe = tiny("a", "optim.batch=64", "losses.koleo=null")
    assert accumulation(recipe, 4, {"images_at_once": 8, "memory_share": 0.8}) == 2
    assert accumulation(recipe, 4, {"images_at_once": 8, "memory_share": 0.4}) == 1
    assert accumulation(recipe, 1, {"images_at_once": 8, "memory_share": 0.8}) == 8
    assert accumulation(recipe, 1, {"images_at_once": 8, "memory_share": 0.0}) == 1


def test_a_batch_that_cannot_be_shared_out_is_said_with_the_numbers_that_can(tiny):
    with pytest.raises(ValueError, match=r"optim.batch=12 .* over 5 processes\. Start 4, .* optim.batch=15"):
        accumulation(tiny("a", "optim.batch=12"), 5)
    with pytest.raises(
        ValueError, match=r"losses.koleo compares 2 images .* gives each 1\..*distributed=true"
    ):
        accumulation(tiny("a", "optim.batch=4"), 4)
    assert accumulation(tiny("a", "optim.batch=4", "losses.koleo.distributed=true"), 4) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_does(tiny, recipe_file, overrides, together, nearly_same):
    train(tiny("one", *SHARED, "run.device=cuda"))
    runs = [overrides(kind, f"run.parallel={kind}", "run.device=cuda") for kind in ("ddp", "fsdp")]
    together(2, "several_runs", str(recipe_file), runs)
    nearly_same("one", "ddp")
    nearly_same("one", "fsdp")


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused(recipe_file, overrides, together):
    more = overrides("a", "run.device=cuda", "optim.batch=48")
    output = together(torch.cuda.device_count() + 1, "train", str(recipe_file), more, status=(1, 2))
    assert "start as many processes as GPUs" in output


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_named_is_refused_for_two_processes(recipe_file, overrides, together):
    output = together(2, "train", str(recipe_file), overrides("a", "run.device=cuda:0"), status=(1, 2))
    assert "run.device=cuda:0 is one GPU for 2 processes" in output


def test_a_contrast_over_all_processes_is_that_of_one_with_all_images(together, tmp_path):
    z = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.save(z, tmp_path / "z.pt")
    together(2, "contrast", str(tmp_path))
    z.requires_grad_()
    whole = info_nce(z, 2, 0.2)
    whole.backward()
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((got[0]["loss"] + got[1]["loss"]) / 2, whole.detach())
    torch.testing.assert_close(torch.cat([each["grad"] for each in got], dim=1) / 2, z.grad)


@pytest.mark.parametrize("loss", ["sigreg", "coding_rate"])
def test_a_spreading_term_of_all_processes_is_that_of_one_with_all_images(together, tmp_path, loss):
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    together(1, "spread", str(tmp_path), loss)
    whole = torch.load(tmp_path / "0.pt")
    together(2, "spread", str(tmp_path), loss)
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((got[0]["loss"] + got[1]["loss"]) / 2, whole["loss"])
    torch.testing.assert_close(torch.cat([each["grad"] for each in got], dim=1) / 2, whole["grad"])
