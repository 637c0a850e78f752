"""The report of a run: complete, self-contained, and safe with names of files from anywhere."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit import report, viz
from dinokit.__main__ import main
from dinokit.config.registry import build
from dinokit.data.predictions import NAME, Predictions, Sample
from dinokit.features import extract
from dinokit.report import read_run, summary, write_report
from dinokit.report.outcome import plan_and_outcome
from dinokit.report.pictures import SHOWN, Pictures
from dinokit.report.tiles import dense_section
from dinokit.runtime.signals import STOP_SIGNALS
from dinokit.viz import BASIS, run_basis
from dinokit.weights import load_backbone

TINY = [
    "backbone.width=32", "backbone.depth=2", "backbone.size=32", "crops.globals.size=32", "optim.batch=8",
    "optim.steps=6", "optim.warmup=2", "heads.cls.hidden=32", "heads.patch.hidden=32",
    "heads.projector.hidden=32",
    "run.workers=0", "run.log_every=1", "run.device=cpu", "run.precision=fp32",
]  # fmt: skip
SCENES = ["data.size=32", "data.count=60", "data.test_count=40", "evals.knn.workers=0", "evals.knn.every=3"]
DENSE = [f"evals.segmentation.{text}" for text in ("method=majority", "every=6", "workers=0")]
HOSTILE = [
    "<script>alert(1)<script>.png", "<img src=x onerror=alert(1)>.png", "a' onload='x.png",
    'b" onload="x.png', "line\nend.png", os.fsdecode(b"\xff\xfe.png"), "{{ 7 * 7 }}.png", "&lt;b&gt;.png",
]  # fmt: skip
HEADINGS = [
    "Curves", "Results", "What training sees", "Patch features as colours", "Attention of the class token",
    "Nearest neighbours", "Map of the images", "Predictions beside the truth", "Data", "Plan and outcome",
    "System", "Recipe",
]  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, and text by element, as a browser sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("style", "pre")).split())

    def check(self) -> None:
        """Nothing runs, nothing is loaded, every picture has a text."""
        assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in self.elements}
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            for name in ("src", "href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
        assert all(image["alt"] for image in self.all("img"))
        style = "".join(data for tag, data in self.texts if tag == "style")
        assert "url(" not in style
        assert "@import" not in style
        assert "prefers-color-scheme: dark" in style


@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "scenes"
    words = ["train", "scenes_cpu", *TINY, *SCENES, *DENSE, f"run.out={out}", "run.report=false"]
    assert main(words) == 0
    return out


@pytest.fixture
def short_run(scenes_run, tmp_path):
    """A copy with two curves: most of the time for a page goes into its charts."""
    run = tmp_path / "short"
    shutil.copytree(scenes_run, run)
    records(run, [{"step": step, "lr": 0.1, "knn/top1@20": 0.1 * step} for step in (3, 6)])
    return run


@pytest.fixture(scope="module")
def scenes_page(scenes_run):
    return Page(write_report([scenes_run], scenes_run.parent / "page.html", "cpu"))


def test_a_report_has_every_section_and_loads_nothing(scenes_run, scenes_page):
    page = scenes_page
    page.check()
    text = page.text()
    positions = [text.index(f" {heading} ") for heading in HEADINGS]
    assert positions == sorted(positions)
    assert "Cannot be shown" not in text
    names = {
        key for line in (scenes_run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)
    }
    charts = {
        name for name in names - {"step"} if "/images_" not in name and name not in ("verdict", "advice")
    }
    assert {div["aria-label"].split(" over steps")[0] for div in page.all("div") if "role" in div} == charts
    assert len(page.all("svg")) == len(charts)
    assert text.count("directions in which class tokens vary") == 2
    assert "6 of 6 steps, 48 images seen" in text
    assert "knn on scenes, while training" in text
    assert len([image for image in page.all("img") if "principal components" in image["alt"]]) >= 12
    assert len([image for image in page.all("img") if "attention of head" in image["alt"]]) == 8
    assert "40, of which 40 were read" in text  # the test split
    places = [each for each in page.all("img") + page.all("i") if "left:" in (each.get("style") or "")]
    assert len(places) == 40
    assert len([image for image in page.all("img") if image["alt"].endswith((": truth", ": predicted"))]) == 8
    recipe = next(data for tag, data in page.texts if tag == "pre")
    assert "name: scenes_cpu" in recipe


def test_the_neighbours_of_a_report_are_those_of_the_class_tokens(scenes_run, scenes_page):
    tiles = [f["title"] for f in scenes_page.all("figure") if f.get("class") in ("query", "same", "other")]
    source = build(
        "data.sources", {"name": "scenes", "size": 32, "count": 60, "test_count": 40, "split": "test"}
    )
    names = [source.name(i) for i in range(len(source))]
    x = extract(load_backbone(scenes_run), source, 32, 32).x
    unit = torch.nn.functional.normalize(x, dim=1)
    for row in (tiles[i : i + 8] for i in range(0, len(tiles), 8)):
        query = names.index(row[0])
        ranked = [names[i] for i in (unit @ unit[query]).argsort(descending=True).tolist() if i != query]
        assert row[1:] == ranked[:7]


def test_runs_stand_side_by_side(short_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(short_run, other)
    records(other, [{"step": step, "lr": 0.2, "only_here": 1.5} for step in (3, 6)])
    assert main(["report", str(short_run), str(other), f"out={tmp_path / 'both.html'}", "device=cpu"]) == 0
    page = Page(tmp_path / "both.html")
    page.check()
    labels = [div["aria-label"] for div in page.all("div") if "role" in div]
    assert next(label for label in labels if label.startswith("lr ")).count(" to ") == 2
    assert next(label for label in labels if label.startswith("only_here ")).count(" to ") == 1
    assert page.text().count("Nearest neighbours") == 2


def test_names_of_files_do_nothing(tmp_path):
    photos = tmp_path / "photos<i>"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name in HOSTILE:
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(photos / name)
    (photos / "<b>broken.png").write_bytes(b"nothing")
    out = tmp_path / "run<script>alert(2)<script>"
    data = ["data.name=folder", f"data.path={photos}", "run.max_unreadable=0.9"]
    assert main(["train", "scenes_cpu", *TINY, *data, f"run.out={out}"]) == 0
    page = Page(out / "report.html")
    page.check()
    text, titles = page.text(), {figure.get("title") for figure in page.all("figure")}
    assert "alert(2)" in text
    for name in HOSTILE:
        shown = name.encode("utf-8", "replace").decode()
        assert any(title and title.endswith(shown) for title in titles), name
    assert "<b>broken.png" in text
    assert not {"i", "b"} & {tag for tag, attributes in page.elements if tag == "i" and not attributes}
    places = [each for each in page.all("img") + page.all("i") if "left:" in (each.get("style") or "")]
    assert len(places) == len(HOSTILE)
    allowed = re.compile(r"(left|top|width): [0-9.]+%|(border-color|background): #[0-9a-f]{6}")
    for place in places:
        assert all(allowed.fullmatch(part.strip()) for part in place["style"].split(";"))


def test_a_run_whose_images_are_gone_still_has_curves_and_says_why_pictures_are_missing(short_run, tmp_path):
    run = short_run
    recipe = (run / "recipe.yaml").read_text()
    data = recipe[recipe.index("\ndata:") : recipe.index("\noptim:")]
    gone = f"\ndata:\n  name: folder\n  path: {tmp_path / 'gone'}"
    (run / "recipe.yaml").write_text(recipe.replace(data, gone))
    (run / "teacher.safetensors").unlink()
    (run / "env.json").write_text("{broken")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "dino": 1')  # cut short
    page = Page(write_report([run], device="cpu"))
    page.check()
    assert page.text().count("Cannot be shown: path=") >= 4
    assert "There is no env.json" in page.text()
    assert page.all("svg")


def test_a_network_that_fails_on_crops_leaves_a_page_that_says_so(short_run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(viz, "class_tokens", fail)
    page = Page(write_report([short_run], tmp_path / "page.html", "cpu"))
    assert page.text().count("Cannot be shown: CUDA out of memory") == 2  # neighbours and map
    assert len([image for image in page.all("img") if "principal components" in image["alt"]]) >= 12


def test_images_that_cannot_be_read_any_more_leave_a_page_that_says_so(short_run, tmp_path):
    run, photos = short_run, tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        (photos / f"{i}.png").write_bytes(b"nothing")
    recipe = (run / "recipe.yaml").read_text()
    data = recipe[recipe.index("\ndata:") : recipe.index("\noptim:")]
    (run / "recipe.yaml").write_text(recipe.replace(data, f"\ndata:\n  name: folder\n  path: {photos}"))
    page = Page(write_report([run], device="cpu"))
    page.check()
    assert page.text().count("Cannot be shown: ") >= 4
    assert page.all("svg")


def test_a_report_that_fails_does_not_fail_the_training(short_run, capsys):
    page, words = (
        short_run / "report.html",
        ["train", f"{short_run}/recipe.yaml", "run.report=true", "evals=null"],
    )
    assert main(words) == 0  # resumes at the last step
    assert page.is_file()
    page.unlink()
    page.mkdir()  # in the way
    assert main(words) == 0
    assert "the report was not written" in capsys.readouterr().err


def test_a_stop_signal_while_the_report_is_written_leaves_a_finished_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    words = ["train", "scenes_cpu", *TINY, *SCENES, "evals=null", f"run.out={out}"]
    before = signal.getsignal(signal.SIGUSR2)
    with monkeypatch.context() as patch:  # the signal arrives while pictures are drawn
        patch.setattr(report, "write_report", lambda *_, **__: signal.raise_signal(signal.SIGUSR2))
        try:
            assert main(words) == 0
        finally:
            for number in STOP_SIGNALS:
                signal.signal(number, before)
    assert "the report was not written: stopped" in capsys.readouterr().err
    assert (out / "teacher.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_after_a_training_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "a run"
    assert (
        main(["train", "scenes_cpu", *TINY, *SCENES, "evals=null", f"run.out={out}", "run.report=false"]) == 0
    )
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.split("What next:\n")[1].splitlines()]
    assert [shlex.split(line)[1] for line in lines[1:]] == ["eval", "extract", "export", "report"]
    assert not (out / "report.html").exists()
    exec(lines[0])
    for line in lines[1:]:
        words = shlex.split(line)[1:]
        small = {"eval": ["workers=0", "max_train=50", "max_test=20"], "extract": ["workers=0"]}
        assert main([*words, *small.get(words[0], [])]) == 0, line
    assert (out / "report.html").is_file()


def records(out: Path, rows: list[dict[str, object]]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_summary_says_whether_a_run_learns(scenes_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scenes_run, run)
    rising = [{"step": 0, "knn/top1@20": 0.1}, {"step": 6, "knn/top1@20": 0.4}]
    records(run, rising)
    assert summary(read_run(run)).kind == "good"
    records(run, [rising[0], {"step": 6, "knn/top1@20": 0.11}])
    assert summary(read_run(run)).kind == "bad"
    records(run, [rising[0], {"step": 3, "knn/top1@20": 0.4}])
    assert summary(read_run(run)).headline == "Not finished. So far: It learns: the k-NN accuracy rose."
    records(run, [*rising, {"step": 6, "verdict": "rank collapse", "advice": "Lower it."}])
    found = summary(read_run(run))
    assert (found.kind, found.headline) == ("bad", "Something is wrong: rank collapse")
    assert found.sentences[-1] == "Verdict after step 6: rank collapse: Lower it."
    records(run, [{"step": 3, "images_per_second": 100.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 2, "skipped": {"not_finite": ["dino"], "seed": 0, "images": []}}) + "\n"
        )
    sentences = " ".join(summary(read_run(run)).sentences)
    assert "Not finished" in sentences
    assert "were not finite: 1;" in sentences
    assert "recipe.yaml replay=2" in sentences
    records(run, [])
    found = summary(read_run(run))
    assert found.headline == "Not finished: 0 of 6 steps."
    assert found.sentences[0].startswith("0 of 6 steps")
    assert not any("No accuracy is known" in sentence for sentence in found.sentences)  # there may be one yet
    records(run, [{"step": 6, "lr": 0.1}])
    found = summary(read_run(run))
    assert found.headline == "Trained without an evaluation."
    assert f"dinokit eval knn weights={run} train.path=LABELLED/train" in found.sentences[-1]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tmp_path)]) == 3
    assert "is not a run: it has no recipe.yaml" in capsys.readouterr().err
    assert main(["report"]) == 2
    error = capsys.readouterr().err
    assert "Which run?" in error
    assert "Here is" not in error
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/recipe.yaml").touch()
    assert main(["report"]) == 2
    assert "Here is: runs/a." in capsys.readouterr().err
    assert main(["report", str(tmp_path), "outt=x"]) == 2
    assert "outt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", ["backbone:\n  weights: old.pth\n", "teacher:\n  start: old.pth\n"], ids=["weights", "start"]
)
def test_a_run_from_trained_weights_is_not_asked_to_rise(scenes_run, tmp_path, given):
    run = tmp_path / "run"
    run.mkdir()
    recipe = (scenes_run / "recipe.yaml").read_text().replace("\n  start: ''\n", "\n")
    section = given.partition("\n")[0]
    (run / "recipe.yaml").write_text(recipe.replace(f"\n{section}\n", f"\n{given}"))
    for last, kind, words in (
        (0.71, "", "stayed that of the weights that it began with: 0.700 and 0.710"),
        (0.6, "bad", "fell from 0.700 to 0.600: the weights that it began with, old.pth, are better"),
        (0.8, "good", "improved the weights that it began with"),
    ):
        records(run, [{"step": 0, "knn/top1@20": 0.7}, {"step": 6, "knn/top1@20": last}])
        found = summary(read_run(run))
        assert found.kind == kind
        assert words in found.headline
        assert "did not rise" not in found.headline


def test_losses_of_the_heads_of_a_frozen_teacher_stand_with_the_losses(scenes_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scenes_run, run)
    records(run, [{"step": 1, "dino": 1.0, "guide_dino": 2.0, "guided": 3.0, "lr": 0.1}])
    groups = {title: [chart["name"] for chart in charts] for title, charts in report._curves([read_run(run)])}
    assert groups == {"Losses": ["dino", "guide_dino"], "Signals": ["guided"], "Rates": ["lr"]}


def test_the_plan_stands_beside_what_was_measured(scenes_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scenes_run, run)
    plan = json.loads((run / "plan.json").read_text())
    assert plan.keys() == {"device", "memory_gib"}  # a recipe that was named is not timed
    (run / "plan.json").write_text(json.dumps({**plan, "seconds_per_step": 600.0}))
    speeds = [{"step": step, "images_per_second": speed} for step, speed in ((1, 2.0), (3, 4.0), (6, 8.0))]
    records(run, [{**row, "memory_gib": row["step"] / 4} for row in speeds])
    rows = {what: (planned, measured) for what, planned, measured in plan_and_outcome(read_run(run))}
    seconds = 8 / 2 + 2 * 8 / 4 + 3 * 8 / 8  # of 1, 2 and 3 steps of 8 images
    assert rows["images seen"] == ("48", "48")
    assert rows["images per second"] == ("0.01333", f"{48 / seconds:.4g}")
    assert rows["time of the steps"] == ("1:00:00, by a few steps that were timed before", "0:00:11")
    assert rows["peak memory of a process"][0].startswith(f"about {plan['memory_gib']:.2f} GiB")
    assert rows["peak memory of a process"][1].startswith("1.50 GiB")
    for text in ("{broken", "[1]", '{"seconds_per_step": "x", "memory_gib": -1}'):
        (run / "plan.json").write_text(text)
        rows = {what: planned for what, planned, _ in plan_and_outcome(read_run(run))}
        assert rows["images per second"] == "2"  # of the first record: 48 images take 24 s
        assert rows["time of the steps"] == "0:00:24, by its first 1 step"
        assert rows["peak memory of a process"] == "not recorded"
    records(run, [{"step": 6, "lr": 0.1}])
    rows = {what: planned for what, planned, _ in plan_and_outcome(read_run(run))}
    assert rows["time of the steps"] == "not timed before the run"


def test_the_colours_of_a_run_stay_while_they_show_something(tmp_path):
    path = tmp_path / BASIS
    features = list(
        torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17)
    )
    first, text = run_basis(features, path)
    assert text.startswith("The same feature has the same colour")
    later = [x + 0.1 * torch.randn(x.shape) for x in features]
    same, text = run_basis(later, path)
    assert text.startswith("The same feature has the same colour")
    for colours, expected in zip(same.colours(later), first.colours(later), strict=True):
        assert (colours == expected).all()
    others = viz.Basis.fit(later).colours(later)
    assert any((a != b).any() for a, b in zip(others, same.colours(later), strict=True))
    moved = [x + 1000 for x in features]
    new, text = run_basis(moved, path)
    assert text.startswith("The colours are new: the features have changed so much")
    assert new.contrast(moved) > 0.1
    assert run_basis(moved, path)[1].startswith("The same feature")
    path.write_bytes(b"{broken")
    text = run_basis(features, path)[1]
    assert text.startswith(f"The colours are new: {path}, which has those of earlier pictures, is damaged")
    assert run_basis(features, path)[1].startswith("The same feature")  # it was replaced
    basis, text = run_basis(features, path / BASIS)  # cannot be written: path is a file
    assert basis.contrast(features) > 0.1
    assert text.startswith("Later pictures of this run may have other colours, because those of this one")


def test_two_reports_of_a_run_have_one_basis(scenes_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scenes_run, run)
    (run / BASIS).unlink(missing_ok=True)
    recipe = read_run(run).recipe
    first = Pictures.of(run, recipe, "cpu")
    basis = viz.Basis.load(run / BASIS, load_backbone(run).width)
    for part in (basis.every, basis.front):  # the same components in another order: other colours
        part.axes, part.low, part.high = part.axes.flip(1), part.low.flip(0), part.high.flip(0)
    basis.save(run / BASIS)
    second = Pictures.of(run, recipe, "cpu")
    assert first.basis == second.basis == "The same feature has the same colour in every picture of this run."
    assert len(first.pca) == SHOWN
    for (_, before, *_), (_, after, *_) in zip(first.pca, second.pca, strict=True):
        assert (pixels_of(after.src) == pixels_of(before.src)[..., ::-1]).all()


def pixels_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_predictions_are_drawn_in_the_colours_of_their_classes(tmp_path):
    truth = np.array([[0, 1, -1], [1, 0, 1]], np.float32)
    predicted = np.array([[0, 0, 1], [1, 1, 1]], np.float32)
    image = np.zeros((2, 3, 3), np.uint8)
    name = os.fsdecode(b"a/<i>\xff'\".png")
    Predictions(["<b>cat", "dog", "never"], [Sample(name, image, truth, predicted)]).save(tmp_path / NAME)
    section = dense_section(tmp_path / NAME)
    assert [each for each, _ in section.legend] == ["<b>cat", "dog"]
    colours = dict(zip((0, 1, -1), [*viz.class_colours(3)[:2], (128, 128, 128)], strict=True))
    (tiles,) = section.rows
    assert [tile.caption for tile in tiles] == ["image", "truth", "predicted"]
    assert {tile.name for tile in tiles} == {name}
    for tile, ids in zip(tiles[1:], (truth, predicted), strict=True):
        for (row, column), label in np.ndenumerate(ids):
            assert tuple(pixels_of(tile.src)[row, column]) == colours[int(label)]


def test_depths_are_drawn_in_the_range_of_the_true_ones(tmp_path):
    truth, predicted = np.array([[2, 4, 0]], np.float32), np.array([[1, 3, 9]], np.float32)
    Predictions([], [Sample("a", np.zeros((1, 3, 3), np.uint8), truth, predicted)]).save(tmp_path / NAME)
    (tiles,) = dense_section(tmp_path / NAME).rows
    dark, middle, bright = (tuple(viz.heat(torch.full((1, 1), x))[0, 0]) for x in (0.0, 0.5, 1.0))
    assert [tuple(p) for p in pixels_of(tiles[1].src)[0]] == [dark, bright, (128, 128, 128)]
    assert [tuple(p) for p in pixels_of(tiles[2].src)[0]] == [dark, middle, bright]


class Evil:
    """What must not be unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_a_file_that_holds_no_predictions_is_named_and_runs_nothing(short_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = short_run
    path = run / "segmentation" / NAME
    whole = path.read_bytes()
    found = Predictions.read(path)
    found.samples[0].truth = found.samples[0].truth[:3]
    found.save(tmp_path / "uneven.npz")
    np.savez(tmp_path / "evil.npz", about=np.array(Evil(), dtype=object))
    cases = [whole[: len(whole) // 2], b"nothing", b"", (tmp_path / "uneven.npz").read_bytes()]
    for content in [*cases, (tmp_path / "evil.npz").read_bytes()]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"segmentation/predictions.npz has no predictions"):
            dense_section(path)
    assert not (tmp_path / "evil").exists()
    page = Page(write_report([run], device="cpu"))
    page.check()
    assert "Cannot be shown: " in page.text()
    assert "Predictions beside the truth" in page.text()


def test_coherence_of_noise_is_zero_and_of_areas_high():
    noise = list(torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5)
    halves = [torch.arange(32).expand(32, 32) < 16] * 4
    assert abs(viz.coherence(noise)) < 0.05
    assert viz.coherence(halves) == pytest.approx(1 - 2 * 32 / (2 * 31 * 32))
    assert viz.coherence([torch.ones(4, 4, dtype=torch.bool)]) == 0


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<body><iframe id=f src="report.html" style="width:400px;height:800px;border:0"></iframe>
<script>f.onload = () => {const d = f.contentDocument;
document.title = JSON.stringify({wide: d.documentElement.scrollWidth, pictures: d.images.length,
broken: [...d.images].filter(i => !i.naturalWidth).length, charts: [...d.querySelectorAll(".charts svg")]
.filter(s => s.getBoundingClientRect().width < 100).length})}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_every_picture_and_400_pixels_are_wide_enough(scenes_run, tmp_path):
    write_report([scenes_run], tmp_path / "report.html", "cpu")
    (tmp_path / "measure.html").write_text(MEASURE)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    command = [
        BROWSER,
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    result = subprocess.run([*command, f"file://{tmp_path}/measure.html"], capture_output=True, text=True)
    assert "CONSOLE" not in result.stderr
    found = json.loads(result.stdout.split("<title>")[1].split("</title>")[0])
    assert found["wide"] <= 400
    assert found["pictures"] > 50
    assert (found["broken"], found["charts"]) == (0, 0)
