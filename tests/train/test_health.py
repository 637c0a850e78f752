"""Signals against their definitions, and every verdict provoked; a healthy run gets none."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinokit.commands.train import pretrain
from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.losses import Views, dino
from dinokit.models import Backbone, Input, Tokens
from dinokit.models.head import LazyLogits
from dinokit.runtime.log import read_records
from dinokit.train import trainer
from dinokit.train.health import (
    Probe,
    agreement,
    diagnose,
    effective_rank,
    mean_entropy,
    prototypes_used,
    shuffle_patches,
    spread,
    step_signals,
)


def test_agreement_is_the_share_of_variance_that_is_between_images(generator):
    shared = 3 * torch.randn(4000, 5, generator=generator)
    crops = shared + torch.randn(2, 4000, 5, generator=generator)
    assert agreement(crops).item() == pytest.approx(9 / 10, abs=0.01)
    assert agreement(torch.randn(2, 4000, 5, generator=generator)).item() == pytest.approx(0, abs=0.02)
    assert agreement(shared.expand(2, -1, -1)).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rows", [6, 200])  # fewer and more than columns
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(rows, generator):
    x = torch.randn(rows, 20, generator=generator) * torch.logspace(0, -2, 20)
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    values = np.linalg.eigvalsh(np.cov(unit.T))
    assert effective_rank(x).item() == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-3)


def test_rows_that_differ_by_rounding_alone_have_no_rank(generator):
    assert effective_rank(1 + 1e-3 * torch.randn(64, 32, generator=generator)).item() < 0.2


def test_spread_is_the_distance_of_rows_from_their_mean(generator):
    x = torch.randn(2, 30, 4, generator=generator)
    rows = x.view(60, 4).double().numpy()
    want = math.sqrt(
        sum(sum((a - b) ** 2 for a, b in zip(row, rows.mean(0), strict=True)) for row in rows) / 60
    )
    assert spread(x).item() == pytest.approx(want, rel=1e-5)


def test_entropy_and_prototypes_in_use_do_not_depend_on_the_slices(generator):
    p = (3 * torch.randn(10, 12, generator=generator)).softmax(dim=1)
    slices = list(p.split(5, dim=1))
    want = torch.distributions.Categorical(p).entropy().mean().item()
    assert mean_entropy(slices).item() == pytest.approx(want, rel=1e-5)
    used = math.exp(torch.distributions.Categorical(p.mean(dim=0)).entropy().item())
    assert prototypes_used(slices).item() == pytest.approx(used, rel=1e-5)
    one = torch.zeros(10, 12).index_fill(1, torch.tensor([3]), 1)
    assert prototypes_used([one]).item() == pytest.approx(1)
    assert mean_entropy([one]).item() == 0


def views(student, teacher, prototypes, features, **changes):
    """Views of rows (S, B, w), (G, B, w), prototypes (K, w) and features (G, B, D); no masked patches."""
    none = LazyLogits(torch.zeros(0, prototypes.shape[1]), prototypes)
    given = [LazyLogits(rows, prototypes) for rows in (student, teacher)]
    return Views(*given, features, none, none, torch.zeros(0), **{"teacher_temp": 0.04, **changes})


def seen(given, targets="sinkhorn"):
    """The signals after the DINO loss has seen the views."""
    loss = dino.DINOLoss(dino.Config(targets=targets), {"cls": len(given.student_cls.prototypes)})
    crops = torch.rand(given.student_feature.shape[:2].numel(), 3, 8, 8)
    value = loss(given)
    return value.item(), {k: v.item() for k, v in step_signals(given, {"dino": value}, crops, 0.1).items()}


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_cross_entropy_is_the_entropy_of_the_targets_and_what_is_left_to_learn(whole, targets, generator):
    rows = nn.functional.normalize(torch.randn(2, 8, 6, generator=generator), dim=-1)
    prototypes = nn.functional.normalize(torch.randn(33, 6, generator=generator), dim=-1)
    given = views(rows, rows, prototypes, torch.randn(2, 8, 7, generator=generator), whole_logits=whole)
    loss, signals = seen(given, targets)
    logits = rows @ prototypes.T
    if targets == "sinkhorn":
        log_p = logits.flatten(0, 1) / 0.04
        for _ in range(3):
            log_p = log_p - log_p.logsumexp(dim=0)
            log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
        p = log_p.exp().view(2, 8, 33)
    else:
        p = (logits / 0.04).softmax(dim=-1)
    q = (logits / 0.1).log_softmax(dim=-1)
    other = p.flip(0)  # the other crop is the target
    kl = (other * (other.log() - q)).sum(dim=-1).mean().item()
    assert signals["kl"] == pytest.approx(kl, rel=1e-4)
    assert loss == pytest.approx(signals["kl"] + signals["target_entropy"], rel=1e-5)
    assert signals["crop_agreement"] == pytest.approx(agreement(rows).item())
    assert signals["crop_agreement_needed"] == pytest.approx(0.4)


def test_what_a_run_does_not_have_is_absent(generator):
    features = torch.randn(2, 8, 7, generator=generator)
    given = views(features, features, torch.randn(9, 7, generator=generator), features)
    assert set(step_signals(given, {}, torch.rand(16, 3, 8, 8), None)) == {
        "feature_rank", "brightness_agreement",
    }  # fmt: skip
    one = views(features, features[:1], torch.randn(9, 7, generator=generator), features[:1])
    assert not {"crop_agreement", "brightness_agreement"} & set(seen(one)[1])


def test_shuffling_moves_whole_patches(generator):
    x = torch.rand(2, 3, 8, 8, generator=generator)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(2)])
    got = shuffle_patches(x, 4, order)
    for image, shuffled, places in zip(x, got, order.tolist(), strict=True):
        for place, origin in enumerate(places):
            row, column = 4 * (place // 2), 4 * (place % 2)
            from_row, from_column = 4 * (origin // 2), 4 * (origin % 2)
            patch = image[:, from_row : from_row + 4, from_column : from_column + 4]
            assert torch.equal(shuffled[:, row : row + 4, column : column + 4], patch)


class Reads(Backbone):
    """A backbone whose class token is a linear function of the pixels."""

    width, patch, channels = 3, 8, 3
    input = Input(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, crops, masks):
        cls = crops[0].flatten(1) @ self.weight
        return [Tokens(cls, cls[:, None][:, :0], cls[:, None])]


class Pictures:
    """Pictures with patches of random colours."""

    classes = ()

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index == 3:
            raise OSError("cannot be read")
        return Image.fromarray(self.pixels[index]), -1


def test_the_probe_tells_a_bag_of_patches_from_a_network_that_sees_places(generator):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))
    mean = torch.zeros(3, 1024, 3)
    mean[torch.arange(3), :, torch.arange(3)] = 1 / 1024
    bag = Probe(Pictures(pixels))(Reads(mean.flatten(0, 1)))
    assert bag["shuffled_patches"] == pytest.approx(0, abs=1e-5)
    assert 1.5 < bag["feature_rank"] < 3
    places = Probe(Pictures(pixels))(Reads(torch.randn(3072, 3, generator=generator)))
    assert places["shuffled_patches"] == pytest.approx(1, abs=0.35)
    grey = np.full((40, 32, 32, 3), 1, np.uint8) * np.arange(40, dtype=np.uint8)[:, None, None, None] * 3
    light = torch.cat([torch.ones(3072, 1), torch.zeros(3072, 2)], dim=1) / 3072
    backbone = Reads(light)
    backbone.input = Input(32, (0.0,) * 3, (1.0,) * 3)
    backbone.forward = lambda crops, masks: [
        Tokens(c := torch.stack([crops[0].flatten(1).mean(1), torch.ones(len(crops[0]))], 1), c[:, :0], c)
    ]
    probed = Probe(Pictures(grey))(backbone)
    assert probed["brightness_share"] > 0.95
    lights = [3 * n / 255 for n in range(40) if n != 3]  # the mean cosine of all pairs, by a loop
    units = [(x / math.hypot(x, 1), 1 / math.hypot(x, 1)) for x in lights]
    cosines = [sum(p * q for p, q in zip(u, v, strict=True)) for u in units for v in units]
    assert probed["common_share"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


RUN = """
backbone: {name: vit, size: 32, width: 32, depth: 2, heads: 2, patch: 8, layer_scale: 1.0}
heads: {cls: {prototypes: 32, hidden: 32, bottleneck: 16}}
losses: {dino: {}, koleo: {}}
teacher: {momentum: [0.9, 1.0], temp: [0.04, 0.04]}
crops: {globals: {count: 2, size: 32, scale: [0.5, 1.0], blur: [0.0]}, locals: {count: 0},
        brightness: 0, contrast: 0, saturation: 0, hue: 0, gray: 0}
optim: {steps: 60, batch: 16, lr: 1e-3, lr_rule: none, warmup: 5}
data: {name: folder, path: "???"}
run: {precision: fp32, workers: 0, log_every: 4, checkpoint_every: 60}
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe(*overrides): one of 64 prototypes."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return lambda *words: load_recipe(file, ["data.path=x", "heads.cls.prototypes=64", *words])


@pytest.fixture
def run(tmp_path):
    """run(pixels, *overrides): a run on these images (n, S, S, 3); its last verdict, records and log."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN)

    def do(pixels, *overrides, evaluators=True):
        folder = tmp_path / "images"
        folder.mkdir()
        for number, each in enumerate(pixels):
            Image.fromarray(each.astype(np.uint8)).save(folder / f"{number}.png")
        recipe = load_recipe(file, [f"data.path={folder}", f"run.out={tmp_path / 'out'}", *overrides])
        source = registry.build("data.sources", recipe.data)
        probes = [trainer.Evaluator("health", 60, Probe(source))] if evaluators else []
        out = trainer.train(recipe, source, probes)
        records, log = read_records(out), (out / "run.log").read_text()
        verdicts = [record["verdict"] for record in records if "verdict" in record]
        assert all(f"verdict after step 60: {verdict}: " in log for verdict in verdicts)
        return (verdicts[-1] if verdicts else None), records, log

    return do


def textures(images: int) -> np.ndarray:
    """Eight kinds of images: the colour and the direction of stripes, with some noise in both."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    made = []
    for number in range(images):
        kind = number % 8
        angle, wave = np.pi * (kind % 4) / 4, rng.uniform(0.6, 0.7)
        stripes = np.sin(wave * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
        colour = np.array([60, -40, 20]) if kind < 4 else np.array([-40, 30, 60])
        noise = rng.normal(0, 8, (48, 48, 3)) + rng.normal(0, 30)
        made.append(np.clip(128 + stripes[..., None] * 50 + colour * 0.7 + noise, 0, 255))
    return np.stack(made)


def test_a_healthy_run_has_no_verdict(run):
    verdict, records, log = run(textures(64))
    steps = [record for record in records if "lr" in record]
    assert verdict is None, (verdict, steps[-1])
    assert "verdict" not in log
    assert {"target_entropy", "kl", "crop_agreement", "feature_rank", "prototypes_used"} <= steps[-1].keys()
    assert steps[-1]["dino"] < 0.9 * math.log(32)
    assert records[0].keys() >= {"health/shuffled_patches", "health/feature_rank", "health/brightness_share"}
    assert "health/shuffled_patches" in log  # in the table of first and last scores


def test_crops_that_agree_too_little_are_noise(run):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3)).repeat(4, 1).repeat(4, 2)
    verdict, records, log = run(pixels, "crops.globals.scale=[0.03,0.05]", "optim.lr=3e-3")
    assert verdict == "noise", records[-3:]
    assert records[-3]["crop_agreement"] < 0.4
    assert "Raise losses.dino.student_temp" in log


def test_a_head_whose_input_is_nearly_the_same_for_every_image_has_one_output(run):
    # Far from the mean that is taken off, all images are alike to the network.
    verdict, records, log = run(textures(64), "crops.mean=[-9,-9,-9]", "optim.lr=1e-4")
    assert verdict == "one output", records[-3:]
    assert records[-3]["head_spread"] < 0.05
    assert "Set heads.cls.standardize=true" in log


def test_a_head_with_standardized_input_is_not_held_at_one_output(run):
    _, records, _ = run(textures(64), "crops.mean=[-9,-9,-9]", "optim.lr=1e-4", "heads.cls.standardize=true")
    steps = [record for record in records if "lr" in record]
    assert steps[-1]["head_spread"] > 0.5
    assert steps[-1]["dino"] < 0.95 * math.log(32)


def test_a_centre_that_never_moves_lets_every_image_have_the_same_prototype(run):
    verdict, records, log = run(
        textures(64), "losses={dino: {targets: centering, center_momentum: 1.0}}", "teacher.temp=[0.02,0.02]",
        "optim.lr=5e-3",
    )  # fmt: skip
    assert verdict == "one prototype", records[-3:]
    assert "losses.dino.targets=sinkhorn" in log


def test_images_that_are_all_alike_collapse_the_rank(run):
    verdict, records, log = run(
        np.repeat(textures(1), 32, axis=0), "crops.globals.scale=[0.99,1.0]", "crops.flip=0"
    )
    assert verdict == "rank collapse", records[-3:]
    assert "losses.koleo.weight" in log


def test_images_that_differ_in_brightness_alone_are_a_shortcut(run):
    light = np.linspace(20, 235, 64)[:, None, None, None]
    noise = np.random.default_rng(0).normal(0, 4, (64, 40, 40, 3))
    verdict, records, log = run(np.clip(light + noise, 0, 255))
    assert verdict == "shortcut", records[-3:]
    assert "Raise crops.brightness" in log, records[-3:]


def series(steps, **signals):
    """Records of a run, every 20 steps; a signal is a number or a function of the share that is done."""
    made = []
    for step in range(20, steps + 1, 20):
        values = {key: value(step / steps) if callable(value) else value for key, value in signals.items()}
        made.append({"step": step, "lr": 1e-3, **{k: v for k, v in values.items() if "/" not in k}})
        if step % 100 == 0:
            made.append({"step": step, **{k: v for k, v in values.items() if "/" in k}})
    return made


HEALTHY = {
    "dino": lambda t: 4.2 - 1.5 * t, "kl": lambda t: 1.2 - 0.7 * t, "target_entropy": lambda t: 3.0 - 0.8 * t,
    "crop_agreement": 0.8, "crop_agreement_needed": 0.4, "brightness_agreement": 0.9, "prototypes_used": 60.0,
    "feature_rank": 6.0, "health/feature_rank": 6.0, "health/brightness_share": 0.2,
    "health/shuffled_patches": 0.1, "knn/top1@20": lambda t: 0.3 + 0.4 * t,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, None),
        ({"health/shuffled_patches": 0.003}, "shortcut"),
        ({"kl": 0.2, "dino": 2.4, "target_entropy": 2.2, "knn/top1@20": 0.6}, "nothing left"),
        ({"kl": 0.2, "dino": 2.4, "target_entropy": 2.2}, None),  # the accuracy still rises
        ({"knn/top1@20": lambda t: 0.6 - 0.2 * abs(t - 0.4)}, "data-bound"),
        ({"knn/top1@20": lambda t: 0.6 - 0.2 * abs(t - 0.4), "dino": 2.4}, None),  # the loss does not fall
        ({"crop_agreement": 0.2, "dino": 4.15}, "noise"),
        ({"head_spread": 0.01, "crop_agreement": 0.2, "dino": 4.15}, "noise"),
        ({"head_spread": 0.01, "dino": 4.15}, "one output"),
        ({"head_spread": 0.01}, None),  # the loss falls
        ({"head_spread": 0.3, "dino": 4.15}, None),
        ({"crop_agreement": 0.2, "dino": 3.0}, None),
        ({"brightness_agreement": 0.9, "health/brightness_share": 0.8}, "shortcut"),
        ({"brightness_agreement": 0.2, "health/brightness_share": 0.8}, None),
    ],
)
def test_verdicts_by_their_records(changed, name, recipe):
    verdict = diagnose(series(1000, **{**HEALTHY, **changed}), recipe(), images=1000)
    assert (verdict.name if verdict else None) == name


def test_what_only_began_has_no_verdict(recipe):
    assert diagnose([], recipe(), 1000) is None
    worst = {"prototypes_used": 1.0, "feature_rank": 1.0}
    assert diagnose(series(60, **worst), recipe(), 1000) is None
    late = [r | ({"prototypes_used": 1.0} if r["step"] > 160 else {}) for r in series(200, koleo=1.0)]
    assert diagnose(late, recipe(), 1000) is None  # a loss that joined 40 steps ago
    assert diagnose(series(200, **worst), recipe(), 1000).name == "one prototype"


def test_few_passes_over_the_images_are_not_data_bound(recipe):
    falling = {**HEALTHY, "knn/top1@20": lambda t: 0.6 - 0.2 * abs(t - 0.4)}
    assert diagnose(series(1000, **falling), recipe(), images=100_000) is None


def test_a_run_without_a_dino_loss_is_diagnosed_by_its_features(recipe):
    contrast = recipe(
        "losses.dino=null", "losses.koleo=null", "losses.contrastive.weight=1.0", "heads.projector={}",
        "optim.steps=1000",
    )  # fmt: skip
    features = {k: v for k, v in HEALTHY.items() if "feature" in k or "brightness" in k or "/" in k}
    signals = {"contrastive": lambda t: 2 - t, **features}
    assert diagnose(series(1000, **signals), contrast, 1000) is None
    alike = series(1000, **{**signals, "health/common_share": 0.99})
    assert diagnose(alike, contrast, 1000).name == "alike"
    assert diagnose(alike, recipe("losses.koleo.weight=0.1"), 1000) is None  # it spreads them
    assert diagnose(alike[: len(alike) // 2], contrast, 1000) is None  # the features of a young network
    assert diagnose(series(1000, **{**signals, "health/common_share": 0.9}), contrast, 1000) is None
    collapsed = diagnose(series(1000, **{**signals, "health/feature_rank": 1.01}), contrast, 1000)
    assert collapsed.name == "rank collapse"
    bound = {**signals, "knn/top1@20": lambda t: 0.6 - 0.2 * abs(t - 0.4)}
    assert diagnose(series(1000, **bound), contrast, 1000).name == "data-bound"


def test_a_purely_contrastive_run_has_the_signals_of_its_features(run):
    projector = "heads.projector={hidden: 32, output: 16, layers: 2}"
    removed = "losses.dino=null", "losses.koleo=null"
    _, records, _ = run(textures(64), *removed, "losses.contrastive.weight=1.0", projector)
    step = next(record for record in records if "lr" in record)
    assert {"contrastive", "feature_rank", "brightness_agreement"} <= step.keys()
    assert not {"target_entropy", "kl", "crop_agreement", "prototypes_used"} & step.keys()
    assert any("health/shuffled_patches" in record for record in records[1:])


def test_an_evaluated_run_is_probed_beside_its_evaluators(tmp_path):
    for half, split in enumerate(("train", "test")):
        for kind, number in [(kind, number) for kind in range(2) for number in range(4)]:
            folder = tmp_path / "data" / split / str(kind)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(textures(16)[8 * half + 4 * kind + number].astype(np.uint8)).save(
                folder / f"{number}.png"
            )
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    source = pretrain(load_recipe(file, [
        f"data={{name: folder, path: {tmp_path / 'data'}, split: train, labels: folders}}",
        "optim.steps=2", "optim.batch=4", "optim.warmup=0", f"run.out={tmp_path / 'out'}",
        "evals.knn={every: 2, k: [1], resize: 32, workers: 0}",
    ]))  # fmt: skip
    keys = [sorted(record) for record in read_records(tmp_path / "out")]
    assert [
        "health/brightness_share",
        "health/common_share",
        "health/feature_rank",
        "health/shuffled_patches",
        "step",
    ] in keys
    assert len(source) == 8


def test_a_contrast_without_koleo_leaves_class_tokens_alike(run):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3)).repeat(12, 1).repeat(12, 2)
    verdict, records, log = run(
        pixels, "losses.dino=null", "losses.koleo=null", "losses.contrastive.weight=1.0",
        "heads.projector={hidden: 32, output: 16, layers: 2}", "crops.mean=[-1,-1,-1]",
        "crops.brightness=0.8", "optim.lr=1e-3",
    )  # fmt: skip
    assert verdict == "alike", records[-3:]
    assert "Add losses.koleo.weight=0.1" in log
