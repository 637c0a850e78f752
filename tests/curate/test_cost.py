"""What a curation is said to take, against what it left on disk and held in memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinokit.curate.cost import INTERPRETER, Machine, Work, cost, measured, total
from dinokit.curate.settings import Index


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("n", "width"), [(3000, 64), (12_000, 32)])
def test_disk_is_what_files_take(tmp_path, make, curate, n, width):
    make(tmp_path, n, width, seeds=200, tests=50)
    index = {"exact_below": 500, "recall": 20, "probe": 4, "shard": 5000}
    curate(f"pool.embeddings={tmp_path / 'pool.npy'}", f"seeds.s.embeddings={tmp_path / 'seeds.npy'}",
           f"out={tmp_path / 'out'}", "dedup.keep=first", "dedup.similarity=0.8", "clusters.count=20",
           *[f"index.{key}={value}" for key, value in index.items()])  # fmt: skip
    found = {path.name.partition(".")[0]: size(path) for path in (tmp_path / "out" / "stages").iterdir()}
    done = next((tmp_path / "out" / "stages").glob("neighbours.*")) / "done.json"
    edges = json.loads(done.read_text())["figures"]["edges"] / n
    fate = np.load(next((tmp_path / "out" / "stages").glob("overlap.*")) / "fate.npz")["fate"]
    said = cost(
        Work(
            n,
            width,
            left=(fate == 0).mean(),
            seeds=200,
            edges=edges,
            hashed=False,
            index=Index(**index),
        )
    )
    for name in ("hash", "embed", "index", "neighbours", "dedup", "survivors", "search"):
        assert said[name].disk == pytest.approx(found[name], rel=0.15, abs=4_000), name
    assert total(said).disk >= 0.8 * size(tmp_path / "out" / "stages")


@pytest.mark.slow
def test_memory_at_the_peak_is_no_more_than_said_nor_much_less(tmp_path, make):
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
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(re.findall(r"VmHWM:\s+(\d+)", done.stdout)[0]) * 1024
    said = total(
        cost(Work(60_000, 256, left=0.9, hashed=False, index=Index(exact_below=500, lists=100, train=8)))
    )
    mapped = (
        size(tmp_path / "out") + (tmp_path / "pool.npy").stat().st_size
    )  # pages of mapped files count as well
    assert said.memory / 2 < peak < said.memory + mapped


def test_time_grows_with_the_work_and_shrinks_with_machines():
    million, billion = (total(cost(Work(n))) for n in (10**6, 10**9))
    assert billion.seconds > 1000 * million.seconds
    assert billion.disk == pytest.approx(1000 * million.disk, rel=0.2)
    alone, many = (cost(Work(10**8), Machine(machines=m)) for m in (1, 10))
    for stage in ("hash", "embed", "neighbours"):
        assert many[stage].seconds == pytest.approx(alone[stage].seconds / 10)
    assert many["index"].seconds == alone["index"].seconds
    assert all(part.memory >= INTERPRETER for part in alone.values())


def test_a_curation_of_images_tells_what_the_machine_does_a_second(heap, weights, curate):
    words = (f"weights={weights}", f"pool.path={heap / 'heap'}", f"out={heap / 'out'}", "dedup.similarity=1")
    said = curate(*words, "stage=hash")
    on = measured_or_refused(heap / "out")
    assert "stage 'embed'" in on
    figures = curate(*words, f"against.test.path={heap / 'test'}", "stage=embed")
    stages = heap / "out" / "stages"
    taken = {name: json.loads(next(stages.glob(f"{name}.*/done.json")).read_text())["figures"]
             for name in ("hash", "embed")}  # fmt: skip
    files = len(list((heap / "heap").iterdir())) + len(list((heap / "test").iterdir()))
    on = measured(heap / "out", machines=3)
    assert said["computed"] == files - 8
    assert on.machines == 3
    assert on.decoded == pytest.approx(files / max(taken["hash"]["seconds"], 0.01))
    assert on.embedded == pytest.approx(figures["computed"] / max(taken["embed"]["seconds"], 0.01))
    assert figures["computed"] == sum(figures["rows"].values())


def measured_or_refused(out):
    with pytest.raises(ValueError, match="holds no curation") as told:
        measured(out)
    return str(told.value)


def test_the_page_on_scale_says_what_the_function_says():
    page = (Path(__file__).parents[2] / "docs" / "curation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (1e\d) \| .*?\| ([\d,]+) GiB \| ([\d,.]+) GiB \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == ["1e6", "1e8", "1e9"]
    for name, disk, memory in rows:
        said = total(cost(Work(int(float(name)))))
        assert float(disk.replace(",", "")) == pytest.approx(said.disk / 2**30, abs=1, rel=0.01)
        assert float(memory.replace(",", "")) == pytest.approx(said.memory / 2**30, abs=0.1, rel=0.01)
