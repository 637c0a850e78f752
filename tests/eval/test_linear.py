"""Whole linear evaluations, from images to scores, files and the way back after a kill."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config.load import section_values
from dinokit.eval._images import split_images
from dinokit.eval._linear_grid import ImageOrder, cached_batches
from dinokit.eval.linear import Config, evaluate

SMALL = {"steps": 30, "step_batch": 16, "lr": [0.01, 0.1, 1.0], "workers": 0, "held_out": 0.2}


def config(**values):
    return Config(**section_values("eval", "linear", {**SMALL, **values}, "linear"))


def test_colours_are_distinguished_and_the_choice_is_reported(colours, mean):
    scores = evaluate(config(**colours), mean)
    assert scores["top1"] == scores["mean_per_class"] == scores["held_out"] == 1.0
    assert scores["lr"] in (0.01, 0.1, 1.0)
    assert (scores["images_train"], scores["images_test"]) == (30, 12)
    assert json.loads(json.dumps(scores)) == scores


def test_choosing_on_the_test_images_is_called_optimistic(colours, mean):
    scores = evaluate(config(**colours, select="test", held_out=0.1), mean)
    assert scores["top1_optimistic"] == 1.0
    assert not {"top1", "held_out"} & set(scores)


@pytest.mark.parametrize(("values", "calls"), [({}, 2), ({"views": 3}, 5), ({"mode": "online"}, 32)])
def test_features_are_made_once_a_view_or_online_in_every_step(colours, mean, values, calls):
    assert evaluate(config(**colours, **values), mean)["top1"] == 1.0
    assert mean.calls == calls


def test_the_best_heads_of_the_released_shapes_are_written_as_those_are(colours, mean, tmp_path):
    evaluate(config(**colours, out=str(tmp_path / "heads")), mean)
    assert sorted(p.name for p in (tmp_path / "heads").iterdir()) == [
        "classifier.safetensors",  # for dinokit predict
        "linear4_head.pth",
        "linear_head.pth",
    ]
    for name, blocks in {"linear_head.pth": 1, "linear4_head.pth": 4}.items():
        head = torch.load(tmp_path / "heads" / name, weights_only=True)
        assert {key: tuple(value.shape) for key, value in head.items()} == {
            "weight": (3, 3 * (blocks + 1)),
            "bias": (3,),
        }
    red = torch.full((1, 3, 16, 16), 0.0)
    red[:, 0] = 0.8
    tokens = mean.layers(red, range(4))
    row = torch.cat([*(t.cls for t in tokens), tokens[-1].patches.mean(dim=1)], dim=1)
    with torch.no_grad():
        assert (row @ head["weight"].T + head["bias"]).argmax().item() == 2  # blue, green, red


def test_a_head_is_not_trained_on_what_it_is_chosen_by():
    fit, held = split_images(50, 0.1, seed=3)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(50))
    assert len(held) == 5
    assert not torch.equal(held, split_images(50, 0.1, seed=4)[1])


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (10, 10), (3, 10)])
def test_every_image_comes_once_a_pass_in_another_order_each_time(count, batch):
    order = ImageOrder(count, batch, seed=0)
    seen = [(number, i) for step in range(60) for number, places in order(step) for i in places.tolist()]
    assert len(seen) == 60 * batch
    for number in range(60 * batch // count):
        assert sorted(i for n, i in seen if n == number) == list(range(count))
    first = [[i for n, i in seen if n == number] for number in (0, 1, 2)]
    assert count < 4 or first[0] != first[1] != first[2]


def test_cached_views_take_turns_pass_by_pass():
    views, y = [torch.full((6, 1), float(v)) for v in range(2)], torch.arange(6)
    rows = torch.tensor([0, 2, 4, 5])
    shown = [x.flatten().tolist() for x, _ in cached_batches(views, y, rows, ImageOrder(4, 4, 0), 0, 4)]
    assert shown == [[0.0] * 4, [1.0] * 4, [0.0] * 4, [1.0] * 4]
    _, labels = next(cached_batches(views, y, rows, ImageOrder(4, 4, 0), 0, 1))
    assert sorted(labels.tolist()) == rows.tolist()


def test_unreadable_images_are_left_out_named_and_counted(colours, mean, tmp_path, capsys):
    (tmp_path / "a" / "red" / "red0.png").write_bytes(b"")
    (tmp_path / "b" / "red" / "red0.png").write_bytes(b"")
    for mode in ("cached", "online"):
        with pytest.raises(ValueError, match=r"1 of the 12 test .* max_unreadable=0\.01: '.*red0\.png'"):
            evaluate(config(**colours, mode=mode), mean)
        capsys.readouterr()
        scores = evaluate(config(**colours, mode=mode, max_unreadable=0.1), mean)
        assert scores["top1"] == 1.0
        assert scores["images_test"] == 11
        assert scores["images_unreadable"] == 2
        output = capsys.readouterr().err
        assert "1 of the 12 test images cannot be read, left out: " in output
        assert " train images cannot be read" in output
        assert output.count("red0.png") == 2


def test_images_of_several_classes_get_mean_average_precision(colours, mean, tmp_path):
    table = {}
    for root in ("a", "b"):
        for path in (tmp_path / root).rglob("*.png"):
            colour = path.parent.name
            table[path.relative_to(tmp_path).as_posix()] = [colour, "cold" if colour != "red" else "warm"]
    (tmp_path / "many.json").write_text(json.dumps(table))
    for mode in ("cached", "online"):
        scores = evaluate(config(**colours, labels=str(tmp_path / "many.json"), mode=mode), mean)
        assert scores["mAP"] == pytest.approx(1.0)
        assert "top1" not in scores
    del table["a/red/red3.png"]
    (tmp_path / "many.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"has no entry for .*red3.png"):
        evaluate(config(**colours, labels=str(tmp_path / "many.json")), mean)


def test_accepted_classes_are_read_by_name_or_by_the_number_in_the_name(colours, mean, tmp_path):
    names = {"blue": 0, "green": 1, "red": 2}
    table = {p.name: [names[p.parent.name], 1] for p in (tmp_path / "b").rglob("*.png")}
    table["red0.png"] = [0]
    (tmp_path / "real.json").write_text(json.dumps(table))
    assert evaluate(config(**colours, real=str(tmp_path / "real.json")), mean)["real"] == pytest.approx(
        11 / 12
    )
    for i, path in enumerate(sorted((tmp_path / "b").rglob("*.png")), 1):
        path.rename(path.with_name(f"ILSVRC2012_val_{i:08d}.png"))
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 5 + [[1]] * 4 + [[]] * 3))
    assert evaluate(config(**colours, real=str(tmp_path / "real.json")), mean)["real"] == 1.0


def test_another_test_set_is_evaluated_on_its_own_classes(colours, mean, tmp_path):
    far = tmp_path / "far"
    for name in ("red", "blau"):
        (far / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (90, 100, 0) if name == "red" else (0, 0, 200)).save(far / name / "1.png")
    also = {"far": {"path": str(far)}}
    with pytest.raises(ValueError, match=r"'blau' is not a class .* Did you mean 'blue'\? Give maps.far"):
        evaluate(config(**colours, also=also), mean)
    (tmp_path / "map.json").write_text(json.dumps({"blau": "blue", "red": "red"}))
    scores = evaluate(config(**colours, also=also, maps={"far": str(tmp_path / "map.json")}), mean)
    assert scores["far top1"] == 1.0  # an olive that is greener than red, but green is not in question
    np.save(tmp_path / "map.npy", np.array([0, 2]))
    assert (
        evaluate(config(**colours, also=also, maps={"far": str(tmp_path / "map.npy")}), mean)["far top1"]
        == 1.0
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"lr": []}, "The grid is empty"),
        ({"steps": 0}, "steps=0"),
        ({"blocks": [5]}, "5 blocks were asked for, but Mean has 4"),
        ({"lr": [1e39]}, "Every head of the grid diverged"),
    ],
)
def test_settings_that_lead_nowhere_are_named(colours, mean, values, words):
    with pytest.raises(ValueError, match=words):
        evaluate(config(**colours, **values), mean)


def test_one_class_is_nothing_to_tell_apart(colours, mean, tmp_path):
    sections = {key: {**section, "path": f"{section['path']}1"} for key, section in colours.items()}
    for section in sections.values():
        folder = Path(section["path"]) / "red"
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(folder / "1.png")
    with pytest.raises(ValueError, match="one class only, 'red'"):
        evaluate(config(**sections), mean)


def test_broken_weights_are_refused(colours, mean):
    with torch.no_grad():
        mean.gain.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate(config(**colours), mean)


def test_where_the_largest_rate_is_the_best_larger_ones_are_named(colours, mean, capsys):
    evaluate(config(**colours, steps=2, lr=[1e-7, 1e-6]), mean)
    log = capsys.readouterr().err
    assert "lr=1e-06. Short features, and few steps, need larger ones: try lr=[5e-07,1e-06,2e-06," in log


KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import Mean
from dinokit.config.load import section_values
from dinokit.eval import linear
torch.set_num_threads(1)
values, stop = json.loads(sys.argv[2]), int(sys.argv[3])
net = Mean()
if stop:
    whole = net.layers
    def until(*args):
        if net.calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)
    net.layers = until
cfg = linear.Config(**section_values("eval", "linear", values, ""))
print(json.dumps(linear.evaluate(cfg, net)), net.calls)
"""


@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_ends_as_an_uninterrupted_one(colours, tmp_path):
    def go(out, stop):
        values = {
            **SMALL,
            **colours,
            "mode": "online",
            "out": str(tmp_path / out),
            "save_every": 10,
            "lr": [0.1],
        }
        words = [sys.executable, "-c", KILLED, str(Path(__file__).parent), json.dumps(values), str(stop)]
        return subprocess.run(words, capture_output=True, text=True)

    assert go("broken", stop=25).returncode == -9
    assert list((tmp_path / "broken").glob(".linear_*.pt"))
    again, whole = go("broken", stop=0), go("whole", stop=0)
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    assert int(whole.stdout.split()[-1]) - int(again.stdout.split()[-1]) == 20  # steps not repeated
    for name in ("linear_head.pth", "linear4_head.pth"):
        a, b = ((tmp_path / out / name).read_bytes() for out in ("broken", "whole"))
        assert a == b
    assert not list((tmp_path / "broken").glob(".linear_*.pt"))


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from conftest import Mean
from dinokit.config.load import section_values
from dinokit.eval import attentive_probe, linear, logreg, retrieval
values, rank = json.loads(sys.argv[2]), int(sys.argv[4])
if rank >= 0:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
scores = {}
for name, own in values:
    module = sys.modules[f"dinokit.eval.{name}"]
    cfg = module.Config(**section_values("eval", name, own, ""))
    scores[f"{name} {own.get('mode', '')}"] = module.evaluate(cfg, Mean())
print(json.dumps(scores))
if rank >= 0:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(colours, tmp_path):
    common = {**colours, "workers": 0}
    grid = {**SMALL, **common, "steps": 7, "lr": [0.001, 0.1]}
    plan = [("linear", {**grid, "mode": mode}) for mode in ("cached", "online")]
    plan.append(("logreg", {**common, "powers": [-2, 1], "count": 3, "held_out": 0.2}))
    plan.append(("attentive_probe", {**common, "steps": 30, "step_batch": 9, "lr": [1e-2], "size": 16}))
    plan.append(("retrieval", {"test": colours["test"], "workers": 0}))
    words = [
        sys.executable,
        "-c",
        WORKER,
        str(Path(__file__).parent),
        json.dumps(plan),
        str(tmp_path / "meet"),
    ]
    runs = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (-1, 0, 1)]
    alone, *both = (json.loads(run.communicate(timeout=300)[0]) for run in runs)
    for one in both:
        assert one.keys() == alone.keys()
        for name, scores in alone.items():
            assert one[name] == pytest.approx(scores, abs=1e-6), name
