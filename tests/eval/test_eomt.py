"""EoMT's matches and losses against brute force and transformers; then whole evaluations."""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import EomtConfig
from transformers.models.eomt.modeling_eomt import EomtLoss

from dinokit.config import registry
from dinokit.config.load import section_values
from dinokit.data.dense import IGNORE
from dinokit.eval import eomt, segmentation
from dinokit.heads.eomt import EoMT, Segments
from dinokit.segment.losses import dice_loss

WEIGHTS = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}


def segments(b=2, queries=5, classes=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(b, queries, side, side, generator=generator) * 3
    return Segments(masks, torch.randn(b, queries, classes + 1, generator=generator))


def truths(b=2, classes=3, side=32, seed=0):
    return torch.randint(-1, classes, (b, side, side), generator=torch.Generator().manual_seed(seed))


def as_targets(truth):
    labels = [ids[ids != IGNORE].unique() for ids in truth]
    return [(ids == k[:, None, None]).float() for ids, k in zip(truth, labels, strict=True)], labels


def test_costs_of_pairs_equal_sums_over_points():
    logits, true = torch.randn(4, 7), (torch.rand(3, 7) > 0.5).float()
    costs = eomt.pair_costs(logits, true)
    for q in range(4):
        for k in range(3):
            p = [1 / (1 + torch.exp(-x)) for x in logits[q]]
            pairs = list(zip(p, true[k], strict=True))
            entropy = sum(-torch.log(x) if t else -torch.log(1 - x) for x, t in pairs) / 7
            dice = 1 - (2 * sum(x * t for x, t in pairs) + 1) / (sum(p) + true[k].sum() + 1)
            assert costs[q, k].item() == pytest.approx(float(5 * entropy + 5 * dice), rel=1e-5)
            assert dice_loss(logits[q], true[k]).item() == pytest.approx(float(dice), rel=1e-5)


def test_matches_are_the_cheapest_of_all_assignments():
    found, truth = segments(queries=5), truths()
    targets, labels = as_targets(truth)
    torch.manual_seed(3)
    pairs = eomt.match(found, targets, labels, 50)
    torch.manual_seed(3)
    for i, (queries, places) in enumerate(pairs):
        points = torch.rand(1, 50, 2)
        logits, true = (
            eomt.at_points(x, points.expand(len(x), -1, -1)) for x in (found.masks[i], targets[i])
        )
        cost = eomt.pair_costs(logits, true) - 2 * found.classes[i].softmax(-1)[:, labels[i]]
        least = min(
            permutations(range(5), len(labels[i])),
            key=lambda each: sum(cost[q, k] for k, q in enumerate(each)),
        )
        assert dict(zip(places.tolist(), queries.tolist(), strict=True)) == dict(enumerate(least))


def test_fewer_queries_than_classes_match_each_once():
    found, truth = segments(queries=2), truths()
    targets, labels = as_targets(truth)
    for queries, places in eomt.match(found, targets, labels, 20):
        assert sorted(queries.tolist()) == [0, 1]
        assert len(set(places.tolist())) == 2
    assert eomt.segments_loss([found], truth, 20).isfinite()


@pytest.mark.parametrize("queries", [2, 5])
def test_the_loss_equals_that_of_transformers(queries):
    found, truth = segments(queries=queries), truths()
    theirs = EomtLoss(EomtConfig(num_labels=3, train_num_points=64), WEIGHTS)
    masks, classes = (x.clone().requires_grad_() for x in found)
    torch.manual_seed(5)
    want = theirs(masks, classes, *as_targets(truth))
    want = sum(WEIGHTS[name] * value for name, value in want.items())
    want.backward()
    ours = Segments(*(x.clone().requires_grad_() for x in found))
    torch.manual_seed(5)
    loss = eomt.segments_loss([ours], truth, 64)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(ours.masks.grad, masks.grad, atol=1e-6)
    assert torch.allclose(ours.classes.grad, classes.grad, atol=1e-6)
    assert eomt.segments_loss([ours, ours], truth, 64) > 1.5 * loss  # the answers after every block count


def test_queries_of_images_without_a_class_are_no_object():
    classes = torch.tensor([-40.0, -40, -40, 40]).repeat(2, 3, 1)
    nothing = torch.full((2, 8, 8), IGNORE)
    masks = torch.zeros(2, 3, 8, 8, requires_grad=True)
    loss = eomt.segments_loss([Segments(masks, classes)], nothing, 16)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert not masks.grad.any()  # not None: processes that average gradients have the same ones
    classes[:, 2] = torch.tensor([-40.0, 40, -40, -40])
    # Two of six queries name a class, by a margin of 80; all six weigh the same.
    loss = eomt.segments_loss([Segments(masks, classes)], nothing, 16)
    assert loss.item() == pytest.approx(2 * 2 * 80 / 6, rel=1e-5)


def test_right_masks_cost_less_than_those_of_the_other_half():
    truth = torch.arange(2).repeat_interleave(16).expand(1, 32, 32)
    masks = torch.full((1, 2, 32, 32), -10.0)
    masks[0, 0, :, :16], masks[0, 1, :, 16:] = 10.0, 10.0
    classes = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0]]])
    right = eomt.segments_loss([Segments(masks, classes)], truth, 400)
    moved = eomt.segments_loss([Segments(masks.flip(-1), classes)], truth, 400)
    assert right < 0.3 * moved
    assert eomt.segments_loss([Segments(masks.flip(1), classes.flip(1))], truth, 400) < 0.3 * moved


def test_most_points_lie_where_a_mask_is_uncertain():
    line = torch.linspace(-8, 8, 64).expand(2, 64, 64)  # 0 in the middle of x
    places = eomt.uncertain_points(line, 200)
    assert places.shape == (2, 200, 2)
    near = (places[..., 0] - 0.5).abs() < 0.2
    outside = ((places - 0.5).abs() > 0.5 - 0.5 / 64).any(-1)  # beyond the last centres a mask fades to 0
    assert (near | outside)[:, :150].all()
    assert outside[:, :150].float().mean() < 0.3
    assert 0.2 < near[:, 150:].float().mean() < 0.6


def test_shares_of_classes_are_at_the_pixels_of_an_unpadded_image():
    masks = torch.full((1, 2, 4, 4), -60.0)
    masks[0, 0, :, :2], masks[0, 1, :, 2:] = 60.0, 60.0
    classes = torch.full((1, 2, 4), -60.0)
    classes[0, 0, 2], classes[0, 1, 0] = 60.0, 60.0
    shares = eomt.class_shares(Segments(masks, classes), 14, 12, 16)
    assert shares.shape == (1, 3, 14, 12)
    predicted = shares[0].argmax(0)
    assert (predicted[:, :6] == 2).all()
    assert (predicted[:, 6:] == 0).all()


def test_rates_rise_first_for_what_is_new_and_fall_with_depth():
    vit = registry.build("models", {"name": "vit", "width": 24, "depth": 4, "heads": 2, "size": 32})
    head = EoMT(vit, 3, 4, 2)
    rates = eomt.learning_rates(head, 0.5)
    names = {p: name for name, p in head.named_parameters()}
    assert sorted(names[p] for part, _ in rates for p in part) == sorted(names.values())
    factors = {
        names[p]: [f(step, 100, 10) for step in (0, 5, 10, 20, 30, 65, 99)] for part, f in rates for p in part
    }
    assert factors["queries"] == pytest.approx(
        [0, 0.5, 1, (80 / 90) ** 0.9, (70 / 90) ** 0.9, (35 / 90) ** 0.9, (1 / 90) ** 0.9]
    )
    last = [0, 0, 0, 0.5, 1, 0.5**0.9, (1 / 70) ** 0.9]
    assert factors["backbone.norm.weight"] == factors["backbone.blocks.3.ls1.gamma"] == pytest.approx(last)
    assert factors["backbone.blocks.1.ls1.gamma"] == pytest.approx([0.25 * x for x in last])
    first = pytest.approx([0.125 * x for x in last])
    assert factors["backbone.pos_embed"] == factors["backbone.blocks.0.ls1.gamma"] == first
    assert all(0 <= f(step, 7, warmup) <= 1 for _, f in rates for step in range(7) for warmup in (0, 1, 3, 7))


def config(**values):
    data = {
        split: {"name": "scenes", "split": split, "size": 64, "count": 120, "test_count": 40}
        for split in ("train", "test")
    }
    small = {"resize": 64, "crop": 64, "stride": 64, "queries": 16, "blocks": 2, "workers": 0}
    points = {} if "head" in values else {"points": 256}
    given = {**data, **small, **points, "precision": "fp32", **values}
    return eomt.Config(**section_values("eval", "eomt", given, "eomt"))


TRAINED = ("steps", "batch", "save_every")
FEW = {"steps": 4, "batch": 2, "max_train": 8, "max_test": 3, "blocks": 1, "save_every": 2}


def small_vit(depth=4):
    torch.manual_seed(0)
    sizes = {"width": 96, "depth": depth, "heads": 3, "patch": 8, "size": 64}
    return registry.build("models", {"name": "vit", "layer_scale": 1.0, "init": "fan_in", **sizes})


def test_a_training_that_was_stopped_ends_in_the_same_scores(tmp_path, monkeypatch):
    whole = eomt.evaluate(config(**FEW), small_vit(2))
    assert json.loads(json.dumps(whole)) == whole
    assert whole["images_train"] == 8
    calls = []

    def stops(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return loss(*args)

    loss = eomt.segments_loss
    with monkeypatch.context() as patch:
        patch.setattr(eomt, "segments_loss", stops)
        with pytest.raises(KeyboardInterrupt):
            eomt.evaluate(config(**FEW, out=str(tmp_path)), small_vit(2))
    assert list(tmp_path.glob(".eomt_*.pt"))
    again = eomt.evaluate(config(**FEW, out=str(tmp_path)), small_vit(2))
    assert {name: again[name] for name in whole} == whole
    assert not list(tmp_path.glob(".eomt_*.pt"))
    # The file has all of the network: the backbone that is given need not be the tuned one.
    file = tmp_path / "eomt.pth"
    own = {key: value for key, value in FEW.items() if key not in TRAINED}
    read = eomt.evaluate(config(**own, head=str(file)), small_vit(2))
    assert {name: read[name] for name in whole} == whole
    kinds, plain = [], torch.autocast
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *a, **b: kinds.append(a[1]) or plain(*a, **b))
        half = eomt.evaluate(config(**own, head=str(file), precision="fp16"), small_vit(2))  # nothing learns
    assert set(kinds) == {torch.float16}
    assert half["pixel accuracy"] == pytest.approx(whole["pixel accuracy"], abs=0.02)
    with pytest.raises(ValueError, match=r"eomt.pth is not EoMT on such a backbone, with queries=3"):
        eomt.evaluate(config(**own, head=str(file), queries=3), small_vit(2))
    with pytest.raises(ValueError, match=r"in the last 1 blocks, not in 2: set blocks=1"):
        eomt.evaluate(config(**{**own, "blocks": 2}, head=str(file)), small_vit(2))


def gradient_of_classes(classes, truth):
    """Of the loss for masks of logit 0, whose match is decided by the classes alone."""
    classes = classes.clone().requires_grad_()
    eomt.segments_loss([Segments(torch.zeros(*classes.shape[:2], 8, 8), classes)], truth, 16).backward()
    return classes.grad


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from test_eomt import FEW, config, eomt, gradient_of_classes, small_vit
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
classes, truth = torch.load(f"{sys.argv[2]}/given.pt")
gradient = gradient_of_classes(classes[rank : rank + 1], truth[rank : rank + 1])
print(json.dumps([gradient.tolist(), eomt.evaluate(config(**FEW), small_vit(2))]))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_and_the_same_scores(tmp_path):
    truth = torch.full((2, 8, 8), 1)
    truth[1, :4], truth[1, 5:] = 0, IGNORE  # one class in the first image, two in the second
    classes = segments().classes
    torch.save((classes, truth), tmp_path / "given.pt")
    words = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path)]
    both = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    (one, scores), (two, others) = (json.loads(run.communicate(timeout=300)[0]) for run in both)
    whole = gradient_of_classes(classes, truth)
    assert torch.allclose(torch.tensor(one + two) / 2, whole, atol=1e-7)  # gradients are averaged
    assert scores == others


@pytest.mark.slow
def test_it_learns_scenes_far_above_the_most_frequent_class():
    cfg = config(steps=300, batch=8, lr=2e-3, warmup=0.05)
    scores = eomt.evaluate(cfg, small_vit())
    data = {"train": cfg.train, "test": cfg.test, "workers": 0, "resize": 64, "method": "majority"}
    base = segmentation.evaluate(
        segmentation.Config(**section_values("eval", "segmentation", data, "segmentation")), small_vit()
    )
    assert scores["mIoU"] > 1.5 * base["mIoU"]
    assert scores["pixel accuracy"] > base["pixel accuracy"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 700}, "leaves gaps"),
        ({"ratio": [2.0, 0.5]}, "smaller one first"),
        ({"layer_decay": 0.0}, "layer_decay is above 0"),
        ({"precision": "fp16"}, "Take bf16 or fp32"),
        ({"queries": 0}, "queries=0"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_the_published_numbers_are_the_defaults():
    cfg = eomt.Config()
    assert (cfg.resize, cfg.crop, cfg.queries, cfg.batch, cfg.points) == (512, 512, 100, 16, 12_544)
    assert (cfg.lr, cfg.layer_decay, cfg.weight_decay, cfg.clip) == (1e-4, 0.8, 0.05, 0.01)
    assert cfg.steps == 31 * (20_210 // 16)
    assert round(cfg.warmup * cfg.steps) == pytest.approx(500, abs=2)


def test_other_backbones_are_refused_before_any_image_is_read():
    with pytest.raises(ValueError, match=r"takes any backbone with patches"):
        eomt.evaluate(eomt.Config(), registry.build("models", {"name": "raw_patches"}))
