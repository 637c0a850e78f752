"""Whole curations, as commands: of photos with planted copies, and of vectors with a planted truth."""

import csv
import io
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.curate import dedup, pipeline
from dinokit.curate.dedup import Status


def manifest(out):
    with (Path(out) / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows):
    """Of the photos in a manifest."""
    return sorted(int(Path(row["path"]).name[:2]) for row in rows)


def test_one_image_of_each_photo_stays_and_none_of_the_test_set(photos, weights, curate, capsys):
    out = photos / "out"
    strict = ("dedup.similarity=0.9999", "dedup.against=0.9999")  # the backbone is untrained
    curate(f"weights={weights}", f"pool.path={photos / 'pool'}", f"against.test.path={photos / 'test'}",
           f"out={out}", *strict)  # fmt: skip
    rows = manifest(out)
    assert numbers(rows) == list(range(32))
    assert not any("half" in row["path"] for row in rows)  # the largest stays
    assert {row["rule"] for row in rows} == {"all"}
    source = registry.build("data.sources", {"name": "manifest", "path": str(out / "manifest.csv")})
    assert len(source) == 32
    assert source[5][0].size == (128, 128)
    page = (out / "report.html").read_text()
    assert "same pixels as another image" in page
    assert page.count("data:image/jpeg") > 20
    assert "<script" not in page
    assert "://" not in page
    unreadable = next((out / "stages").glob("hash.*")) / "pool" / "00000.unreadable.txt"
    assert "broken.jpg" in unreadable.read_text()
    assert (
        f"unreadable images are in {unreadable.parent}" in (unreadable.parents[1] / "done.json").read_text()
    )


def test_seeds_retrieve_images_and_the_manifest_gives_the_reason(photos, weights, curate):
    out = photos / "out"
    words = (f"weights={weights}", f"pool.path={photos / 'pool'}", f"out={out}", "dedup.similarity=1")
    curate(*words, f"seeds.mine.path={photos / 'seeds'}", "seeds.mine.k=2", "seeds.mine.keep=true")
    rows = manifest(out)
    seed_rows = [row for row in rows if row["rule"] == "seed"]
    retrieved = [row for row in rows if row["rule"] == "sample"]
    assert (len(seed_rows), len(retrieved)) == (10, 20)
    assert {row["from"] for row in rows} == {"seeds.mine"}
    assert all(Path(row["query"]).parent == photos / "seeds" for row in retrieved)
    assert all(1 <= int(row["rank"]) <= 8 and -1 <= float(row["similarity"]) <= 1 for row in retrieved)
    page = (out / "report.html").read_text()
    assert "<td>of these retrieved by seeds.mine</td><td class=n>20" in page
    assert page.count('<figure class="query"') == page.count("<span>seed of mine") == 10
    curate(*words, f"seeds.mine.path={photos / 'seeds'}", "seeds.mine.k=2", "seeds.mine.strict=0.5")
    floor = min(float(row["similarity"]) for row in manifest(out))
    assert 0 < len(manifest(out)) < 20
    assert floor > min(float(row["similarity"]) for row in retrieved)
    capped = (
        f"seeds.mine.path={photos / 'seeds'}",
        "seeds.mine.rule=cluster",
        "clusters.count=2",
        "seeds.mine.cap=7",
    )
    curate(*words, *capped)
    rows = manifest(out)
    assert len(rows) == 7
    assert {row["rule"] for row in rows} == {"cluster"}


def test_images_of_a_parquet_or_tar_pool_become_files(tmp_path, scenes, weights, curate):
    with tarfile.open(tmp_path / "pool.tar", "w") as tar:
        for number, photo in enumerate(scenes[:12]):
            file = io.BytesIO()
            photo.save(file, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    pool = ("pool.name=tar", f"pool.path={tmp_path / 'pool.tar'}", "dedup.similarity=1")
    balanced = ("balance.images=6", "balance.levels=[4,2]", "balance.resample=[0,1]")
    out = tmp_path / "out"
    curate(f"weights={weights}", *pool, *balanced, f"out={out}")
    rows = manifest(out)
    assert len(rows) == 6
    assert {row["rule"] for row in rows} == {"balance"}
    source = registry.build(
        "data.sources", {"name": "manifest", "path": str(tmp_path / "out" / "manifest.csv")}
    )
    first = np.asarray(source[0][0])
    assert any(np.array_equal(first, np.asarray(photo.convert("RGB"))) for photo in scenes[:12])
    before = {row["path"] for row in rows}
    with tarfile.open(tmp_path / "pool.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("ignored.txt"))
    curate(f"weights={weights}", *pool, *balanced, f"out={out}")
    assert not before & {row["path"] for row in manifest(out)}  # of another pool, other files


@pytest.fixture(scope="module")
def planted(tmp_path_factory, make):
    folder = tmp_path_factory.mktemp("planted")
    make(folder, 4000, 64, seeds=100, tests=200)
    return folder


def test_names_of_earlier_versions_are_read(tmp_path, planted, capsys):
    given = f"pool.embeddings={planted / 'pool.npy'}"
    assert main(["curate", "curate_small", given, f"out={tmp_path / 'out'}", "stage=survivors"]) == 0
    output = capsys.readouterr().out
    assert "stage=survivors is now called stage=clean_index." in output
    assert '"stage": "clean_index"' in output
    folder = next((tmp_path / "out" / "stages").glob("hash.*"))
    arrays = dedup.load_status(folder)
    (folder / "status.npz").unlink()
    np.savez(folder / "fate.npz", fate=arrays.pop("status"), **arrays)
    assert dedup.load_status(folder)["status"].tolist() == [Status.CLEAN] * 4000
    assert dedup.load_status(folder).keys() == {"status", *arrays}


def settings_of(planted, out):
    sets = {"pool": "pool", "seeds.s": "seeds", "against.t": "test"}
    given = [f"{label}.embeddings={planted / name}.npy" for label, name in sets.items()]
    return [*given, f"out={out}", "dedup.keep=first", "dedup.similarity=0.8", "dedup.against=0.8",
            "index.exact_below=500", "index.recall=50", "index.probe=16", "index.shard=2500"]  # fmt: skip


def read_status(out):
    return np.load(next((out / "stages").glob("overlap.*")) / "status.npz")["status"]


def test_planted_copies_and_leaks_are_found_in_vectors(planted, tmp_path, curate):
    curate(*settings_of(planted, tmp_path / "out"))
    with np.load(planted / "truth.npz") as truth:
        copy, shows, label, seeds = (truth[key] for key in ("copy_of", "shows", "label", "seed_class"))
    root = np.where(shows >= 0, 4000 + shows, np.arange(4000))
    root = np.where(copy >= 0, root[copy], root)  # what shows the same: original, or evaluation image
    _, first = np.unique(root, return_index=True)
    expected = np.ones(4000, np.bool_)
    expected[first] = False
    expected |= root >= 4000
    status = read_status(tmp_path / "out")
    removed, overlap, leaks = np.isin(status, (4, 5)), status == Status.OVERLAP, root >= 4000
    assert (removed & expected).sum() / removed.sum() > 0.95  # precision
    assert (removed & expected).sum() / expected.sum() > 0.95  # recall
    assert (overlap & leaks).sum() / leaks.sum() > 0.95
    assert (overlap & leaks).sum() / overlap.sum() > 0.95
    taken = [int(row["path"].removeprefix("row ")) for row in manifest(tmp_path / "out")]
    assert len(np.unique(root[taken])) == len(taken)
    assert np.isin(label[taken], seeds).mean() > 2 * np.isin(label, seeds).mean()


# A shell's background jobs are born ignoring Ctrl-C, and their children with them.
DINOKIT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dinokit.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_stopped_curation_resumes_and_ends_with_the_same_manifest(planted, tmp_path, curate):
    curate(*settings_of(planted, tmp_path / "whole"))
    words = ["curate", "curate_small", *settings_of(planted, tmp_path / "out")]
    command = [sys.executable, "-c", DINOKIT, *words]
    for stage, number, message in (
        ("index", signal.SIGINT, "interrupted: the same command resumes"),
        ("neighbours", signal.SIGKILL, ""),
        ("retrieve", signal.SIGKILL, ""),
    ):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"{stage} ..."):
                    process.send_signal(number)
                    break
            _, err = process.communicate()
            assert message in err
            assert process.returncode == (130 if number == signal.SIGINT else -number)
    curate(*settings_of(planted, tmp_path / "out"))
    same = [(tmp_path / name / "manifest.csv").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]


def test_changed_settings_rerun_only_the_stages_they_affect(planted, tmp_path, curate):
    words = settings_of(planted, tmp_path / "out")
    curate(*words)
    stages = tmp_path / "out" / "stages"
    before = {path.parent.name: path.stat().st_mtime_ns for path in stages.glob("*/done.json")}
    time.sleep(0.01)
    curate(*words, "seeds.s.per_cluster=7", "balance.draw=central")
    after = {path.parent.name: path.stat().st_mtime_ns for path in stages.glob("*/done.json")}
    assert {name.partition(".")[0] for name in after.items() - before.items() for name in name[:1]} == {
        "retrieve", "manifest", "report",
    }  # fmt: skip
    assert len(after) == 12
    (tmp_path / "out" / "manifest.csv").unlink()
    curate(*words)
    assert (tmp_path / "out" / "manifest.csv").exists()


def test_a_manifest_of_settings_that_were_killed_is_never_taken_for_that_of_others(
    planted, tmp_path, curate, monkeypatch
):
    first, other = settings_of(planted, tmp_path / "out"), "seeds.s.k=2"
    curate(*first)
    before = (tmp_path / "out" / "manifest.csv").read_bytes()

    def die_after(self, name, current):
        if name == "manifest" and (current / "done.json").exists():
            raise SystemError
        return remove_old(self, name, current)

    remove_old = pipeline.Curation._remove_old
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Curation, "_remove_old", die_after)
        with pytest.raises(SystemError):
            main(["curate", "curate_small", *first, other, "--traceback"])
    assert (tmp_path / "out" / "manifest.csv").read_bytes() != before
    curate(*first)
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == before


def test_parts_of_stages_give_the_same_manifest(planted, tmp_path, curate, monkeypatch):
    monkeypatch.setattr(dedup, "QUERIES", 1000)
    curate(*settings_of(planted, tmp_path / "whole"))
    words = settings_of(planted, tmp_path / "out")
    error = curate(*words, "stage=neighbours", "part=0/3", fails=True)
    assert "First run the same command with stage=hash and without part" in error
    curate(*words, "stage=index")
    for number in (2, 0, 1):
        curate(*words, "stage=neighbours", f"part={number}/3")
    edges = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "stages").glob("neighbours.*/0*.npy")}
    assert len(edges) == 4
    curate(*words)
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "stages").glob("neighbours.*/0*.npy")}
    assert again == edges
    same = [(tmp_path / name / "manifest.csv").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]


def test_a_huge_group_of_duplicates_and_a_shortage_of_images_are_explained(tmp_path, curate, capsys):
    rng = np.random.default_rng(0)
    alike = 1 + 0.01 * rng.standard_normal((300, 16))
    apart = rng.standard_normal((30, 16))
    np.save(tmp_path / "pool.npy", np.concatenate([alike, apart]).astype(np.float32))
    np.save(tmp_path / "seeds.npy", apart[:20].astype(np.float32))
    words = [f"pool.embeddings={tmp_path / 'pool.npy'}", f"seeds.s.embeddings={tmp_path / 'seeds.npy'}",
             f"out={tmp_path / 'out'}", "dedup.keep=first"]  # fmt: skip
    assert main(["curate", "curate_small", *words]) == 0
    output = capsys.readouterr().out
    assert "One group of duplicates has 300 of 330 images (91%)" in output
    assert "raise dedup.similarity (0.95)" in output
    assert (
        "The seeds ask for 80 images (k each), but 31 are left: of 330 images 299 were removed (299: "
        in output
    )
    assert "One group of duplicates" in (tmp_path / "out" / "report.html").read_text()
    assert main(["curate", "curate_small", *words, "dedup.similarity=1", "seeds.s.k=3"]) == 0
    output = capsys.readouterr().out
    assert "One group of duplicates" not in output
    assert "The seeds ask for" not in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pool.embeddings={p}/pool.npy", "seeds.s.embeddings={p}/none.npy"), "there are no embeddings"),
        (
            ("pool.embeddings={p}/pool.npy", "balance.images=99999"),
            ": duplicate of another image, by embedding)",
        ),
        (
            (
                "pool.embeddings={p}/pool.npy",
                "seeds.s.embeddings={p}/seeds.npy",
                "seeds.s.rule=cluster",
                "seeds.s.min_hits=100",
            ),
            "No cluster has more than seeds.NAME.min_hits seeds of s. Lower min_hits",
        ),
        (
            ("pool.embeddings={p}/pool.npy", "seeds.s.embeddings={p}/pool.npy", "seeds.s.strict=1.5"),
            "a share of the seeds, from 0 to 1",
        ),
        (("pool.path={p}/nowhere", "weights=x"), "there is no such file or folder"),
    ],
)
def test_errors_name_the_cause_and_the_way_out(planted, tmp_path, curate, words, message):
    (tmp_path / "empty").mkdir()
    assert message in curate(*(w.format(p=planted) for w in words), f"out={tmp_path / 'out'}", fails=True)
