"""The estimated cost of a curation against the disk and memory of real ones."""

import json
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest

from dinokit.curate.settings import Index

DOCS = Path(__file__).parents[2] / "docs"
script = run_path(str(DOCS / "curation_cost.py"))
Machine, Workload, INTERPRETER = script["Machine"], script["Workload"], script["INTERPRETER"]
estimate, measured_machine, total = script["estimate"], script["measured_machine"], script["total"]


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("n", "width"), [(3000, 64), (12_000, 32)])
def test_estimated_disk_is_what_the_files_take(tmp_path, make, curate, n, width):
    make(tmp_path, n, width, seeds=200, tests=50)
    index = {"exact_below": 500, "recall": 20, "probe": 4, "shard": 5000}
    curate(f"pool.embeddings={tmp_path / 'pool.npy'}", f"seeds.s.embeddings={tmp_path / 'seeds.npy'}",
           f"out={tmp_path / 'out'}", "dedup.keep=first", "dedup.similarity=0.8", "clusters.count=20",
           *[f"index.{key}={value}" for key, value in index.items()])  # fmt: skip
    found = {path.name.partition(".")[0]: size(path) for path in (tmp_path / "out" / "stages").iterdir()}
    marker = next((tmp_path / "out" / "stages").glob("neighbours.*")) / "done.json"
    edges = json.loads(marker.read_text())["figures"]["edges"] / n
    status = np.load(next((tmp_path / "out" / "stages").glob("overlap.*")) / "status.npz")["status"]
    expected = estimate(
        Workload(
            n,
            width,
            left=(status == 0).mean(),
            seeds=200,
            edges=edges,
            hashed=False,
            index=Index(**index),
        )
    )
    for name in ("hash", "embed", "index", "neighbours", "dedup", "clean_index", "search"):
        assert expected[name].disk == pytest.approx(found[name], rel=0.15, abs=4_000), name
    assert total(expected).disk >= 0.8 * size(tmp_path / "out" / "stages")


@pytest.mark.slow
def test_estimated_memory_is_above_the_peak_and_not_far(tmp_path, make):
    make(tmp_path, 60_000, 256, seeds=200, tests=50)
    words = [f"pool.embeddings={tmp_path / 'pool.npy'}", f"out={tmp_path / 'out'}", "dedup.keep=first",
             "index.exact_below=500", "index.probe=4", "index.train=8", "index.lists=100", "index.recall=20",
             "clusters.count=20", "clusters.kmeans.iterations=2"]  # fmt: skip
    # Not getrusage's figure: a new process inherits that from the one that started it.
    code = (
        "import sys\nfrom dinokit.__main__ import main\nmain(sys.argv[1:])\n"
        "print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, "curate", "curate_small", *words]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(re.findall(r"VmHWM:\s+(\d+)", process.stdout)[0]) * 1024
    expected = total(
        estimate(
            Workload(60_000, 256, left=0.9, hashed=False, index=Index(exact_below=500, lists=100, train=8))
        )
    )
    mapped = (
        size(tmp_path / "out") + (tmp_path / "pool.npy").stat().st_size
    )  # pages of mapped files count as well
    assert expected.memory / 2 < peak < expected.memory + mapped


def test_time_grows_with_the_work_and_shrinks_with_machines():
    million, billion = (total(estimate(Workload(n))) for n in (10**6, 10**9))
    assert billion.seconds > 1000 * million.seconds
    assert billion.disk == pytest.approx(1000 * million.disk, rel=0.2)
    alone, many = (estimate(Workload(10**8), Machine(machines=m)) for m in (1, 10))
    for stage in ("hash", "embed", "neighbours"):
        assert many[stage].seconds == pytest.approx(alone[stage].seconds / 10)
    assert many["index"].seconds == alone["index"].seconds
    assert all(part.memory >= INTERPRETER for part in alone.values())


def test_a_curation_of_images_measures_the_rates_of_the_machine(photos, weights, curate):
    words = (
        f"weights={weights}",
        f"pool.path={photos / 'pool'}",
        f"out={photos / 'out'}",
        "dedup.similarity=1",
    )
    expected = curate(*words, "stage=hash")
    on = refusal(photos / "out")
    assert "stage 'embed'" in on
    figures = curate(*words, f"against.test.path={photos / 'test'}", "stage=embed")
    stages = photos / "out" / "stages"
    taken = {name: json.loads(next(stages.glob(f"{name}.*/done.json")).read_text())["figures"]
             for name in ("hash", "embed")}  # fmt: skip
    files = len(list((photos / "pool").iterdir())) + len(list((photos / "test").iterdir()))
    on = measured_machine(photos / "out", machines=3)
    assert expected["computed"] == files - 8
    assert on.machines == 3
    assert on.decoded == pytest.approx(files / max(taken["hash"]["seconds"], 0.01))
    assert on.embedded == pytest.approx(figures["computed"] / max(taken["embed"]["seconds"], 0.01))
    assert figures["computed"] == sum(figures["rows"].values())


def refusal(out):
    with pytest.raises(ValueError, match="has no curation") as error:
        measured_machine(out)
    return str(error.value)


def test_the_table_in_the_docs_is_what_the_function_estimates():
    page = (DOCS / "curation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (1e\d) \| .*?\| ([\d,]+) GiB \| ([\d,.]+) GiB \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == ["1e6", "1e8", "1e9"]
    for name, disk, memory in rows:
        expected = total(estimate(Workload(int(float(name)))))
        assert float(disk.replace(",", "")) == pytest.approx(expected.disk / 2**30, abs=1, rel=0.01)
        assert float(memory.replace(",", "")) == pytest.approx(expected.memory / 2**30, abs=0.1, rel=0.01)
