"""The report of a run: complete, self-contained, and safe with names of files from anywhere."""

import json
import os
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

from dinokit import report
from dinokit.__main__ import main
from dinokit.config.registry import build
from dinokit.features import extract
from dinokit.report import read_run, summary, write_report
from dinokit.report.pictures import coherence
from dinokit.runtime.signals import STOP_SIGNALS
from dinokit.weights import load_backbone

TINY = [
    "backbone.width=32", "backbone.depth=2", "backbone.size=32", "crops.globals.size=32", "optim.batch=8",
    "optim.steps=6", "optim.warmup=2", "heads.cls.hidden=32", "heads.patch.hidden=32",
    "heads.projector.hidden=32",
    "run.workers=0", "run.log_every=1", "run.device=cpu", "run.precision=fp32",
]  # fmt: skip
SCENES = ["data.size=32", "data.count=60", "data.test_count=40", "evals.knn.workers=0", "evals.knn.every=3"]
HOSTILE = [
    "<script>alert(1)<script>.png", "<img src=x onerror=alert(1)>.png", "a' onload='x.png",
    'b" onload="x.png', "line\nend.png", os.fsdecode(b"\xff\xfe.png"), "{{ 7 * 7 }}.png", "&lt;b&gt;.png",
]  # fmt: skip
HEADINGS = [
    "Curves", "Results", "What training sees", "Patch features as colours", "Attention of the class token",
    "Nearest neighbours", "Data", "System", "Recipe",
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
    assert main(["train", "scenes_cpu", *TINY, *SCENES, f"run.out={out}", "run.report=false"]) == 0
    return out


def test_a_report_has_every_section_and_loads_nothing(scenes_run, tmp_path):
    path = write_report([scenes_run], tmp_path / "page.html", "cpu")
    page = Page(path)
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
    assert "6 of 6 steps, 48 images seen" in text
    assert "knn on scenes, while training" in text
    assert len([image for image in page.all("img") if "principal components" in image["alt"]]) >= 12
    assert len([image for image in page.all("img") if "attention of head" in image["alt"]]) == 8
    assert "40, of which 40 were read" in text  # the test split
    recipe = next(data for tag, data in page.texts if tag == "pre")
    assert "name: scenes_cpu" in recipe


def test_the_neighbours_of_a_report_are_those_of_the_class_tokens(scenes_run, tmp_path):
    page = Page(write_report([scenes_run], tmp_path / "page.html", "cpu"))
    tiles = [f["title"] for f in page.all("figure") if f.get("class") in ("query", "same", "other")]
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


def test_runs_stand_side_by_side(scenes_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(scenes_run, other)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "only_here": 1.5} if "lr" in line else line for line in lines]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(scenes_run), str(other), f"out={tmp_path / 'both.html'}", "device=cpu"]) == 0
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


def test_a_run_whose_images_are_gone_still_has_curves_and_says_why_pictures_are_missing(scenes_run, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(scenes_run, run)
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


def test_images_that_cannot_be_read_any_more_leave_a_page_that_says_so(scenes_run, tmp_path):
    run, photos = tmp_path / "unread", tmp_path / "photos"
    shutil.copytree(scenes_run, run)
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


def test_a_report_that_fails_does_not_fail_the_training(tmp_path, capsys):
    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)  # in the way
    (out / "report.html").rmdir()
    words = ["train", "scenes_cpu", *TINY, *SCENES, "evals=null", f"run.out={out}"]
    assert main(words) == 0
    assert (out / "report.html").is_file()
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    assert main(words) == 0  # resumes at the last step
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
    records(run, [*rising, {"step": 6, "verdict": "rank collapse", "advice": "Lower it."}])
    found = summary(read_run(run))
    assert (found.kind, found.headline) == ("bad", "Something is wrong: rank collapse")
    assert found.sentences[-1] == "Verdict after step 6: rank collapse: Lower it."
    records(run, [{"step": 3, "images_per_second": 100.0}])
    assert any("Not finished" in sentence for sentence in summary(read_run(run)).sentences)
    records(run, [])
    assert summary(read_run(run)).sentences[0].startswith("0 of 6 steps")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 3
    assert "is not a run: it has no recipe.yaml" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "Which run?" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "outt=x"]) == 2
    assert "outt" in capsys.readouterr().err


def test_coherence_of_noise_is_zero_and_of_areas_high():
    noise = list(torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5)
    halves = [torch.arange(32).expand(32, 32) < 16] * 4
    assert abs(coherence(noise)) < 0.05
    assert coherence(halves) == pytest.approx(1 - 2 * 32 / (2 * 31 * 32))
    assert coherence([torch.ones(4, 4, dtype=torch.bool)]) == 0


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
