"""A good file with one change is read, or refused by an error that names it; DINOKIT_FUZZ=1000 tries more.

Reading has GIB more memory than the process has, and a change that hangs ends the test.
"""

import io
import json
import os
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinokit import report
from dinokit.commands import sweep, watch
from dinokit.config.load import load_recipe, read_mapping
from dinokit.config.values import validated
from dinokit.curate.image_sets import ImageSearch
from dinokit.data.decode import decode
from dinokit.data.sources import manifest, parquet, tar
from dinokit.evaluation import read_list
from dinokit.features.store import RECORD, open_store
from dinokit.train.checkpoint import Checkpoints, load, newest, shapes, verify
from dinokit.weights.checkpoint import open_checkpoint, write_tensors
from slurm.profile import load_profile

EXAMPLES = int(os.environ.get("DINOKIT_FUZZ", "15"))
REFUSED = (ValueError, LookupError, OSError)
GIB, WAIT = 2 << 30, 100  # bytes; seconds, on a machine that does much else


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 16), 60).convert("RGB").save(file, kind)
    return file.getvalue()


def write_recipe(path: Path) -> None:
    path.write_text(
        "data: {name: folder, path: images}\nbackbone: {name: vit}\n"
        "optim: {lr: 0.001, batch: 8, steps: 10}\n"
        "losses: {dino: {}}\nrun: {out: runs/x}\n"
    )


def write_profile(path: Path) -> None:
    path.write_text("partition: gpu\nhours: 6\n")


def write_manifest(path: Path) -> None:
    for name in "abc":
        (path.parent / f"{name}.png").write_bytes(picture("PNG"))
    path.write_text("path,label,split\na.png,emu,train\nb.png,ant,test\nc.png,emu,train\n")


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in "abc":
            info = tarfile.TarInfo(f"{name}.png")
            data = picture("PNG")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def write_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": picture("PNG"), "path": f"{n}.png"} for n in range(4)]
    meta = {"dinokit": json.dumps({"classes": ["ant", "emu"]})}
    table = pa.table({"image": images, "label": [0, 1, 0, 1]}).replace_schema_metadata(meta)
    pq.write_table(table, path, row_group_size=2)


def write_safetensors(path: Path) -> None:
    write_tensors(path, {"a.weight": torch.rand(4, 3), "b": torch.rand(5)}, {"note": "x"})


def write_pickle(path: Path) -> None:
    torch.save({"teacher": {"a.weight": torch.rand(4, 3)}, "epoch": 3}, path)


def write_checkpoint(path: Path) -> None:
    with Checkpoints(path.parent.parent, keep=1) as saved:
        saved.save(7, {"x": torch.arange(6.0), "m": torch.ones(2, 3)}, {"images": {"names": "ab"}})


def read_checkpoint(path: Path) -> object:
    saved = newest(path.parent.parent)
    assert saved is not None
    verify(saved)
    tensors = {name: torch.zeros(shape) for name, shape in shapes(saved).items()}
    load(saved, tensors)
    return saved.step, saved.values, {name: x.tolist() for name, x in tensors.items()}


def write_list(path: Path) -> None:
    path.write_text(
        "all: {train: {name: scenes, split: train}, test: {name: scenes, split: test}, size: 64}\n"
        "knn: {k: [20]}\nmore: {eval: logreg, powers: [-4, 2], count: 4}\n"
    )


def write_store(path: Path) -> None:
    """A store of features, which a curation has too; only numpy is needed to write one."""
    folder = path.parent if path.parent.name == "store" else path.parent.parent
    token = {"shape": [3, 8], "dtype": "float16"}
    about = {
        "format": "dinokit features 1", "weights": "w", "data": {"name": "folder", "path": "x"}, "shard": 4,
        "images": 3, "files": "npy", "tokens": {"cls": token}, "fingerprint": "f", "layers": "last",
    }  # fmt: skip
    (folder / "store.json").write_text(json.dumps(about))
    (folder / "names.txt").write_text("a.png\nb.png\nc.png\n")
    for name, rows in {"cls": np.ones((3, 8), np.float16), "images": np.ones(3, RECORD)}.items():
        (folder / name).mkdir(exist_ok=True)
        np.save(folder / name / "00000.npy", rows)


def read_store(path: Path) -> None:
    store = open_store(path.parent if path.parent.name == "store" else path.parent.parent)
    assert len(store.names) == len(store)
    assert len(store["cls"][:]) == len(store.valid)
    ImageSearch(store.out).search(np.ones((1, 8), np.float32), 2)


def write_run(path: Path) -> None:
    """What a report and a sweep read of a run."""
    recipe = "data: {name: scenes}\nlosses: {dino: {}}\nheads: {cls: {prototypes: 8}}\n"
    recipe += (
        "backbone: {name: vit}\noptim: {lr: 0.001, batch: 8, steps: 10, warmup: 1}\nrun: {out: runs/x}\n"
    )
    (path.parent / "recipe.yaml").write_text(recipe)
    records = [{"step": n, "lr": 0.1, "dino": 2.0 / n, "images_per_second": 50.0} for n in (1, 2, 3)]
    records += [{"step": 3, "knn/top1@20": 0.5}, {"step": 3, "verdict": "collapse", "advice": "lower lr"}]
    line = {"eval": "knn", "weights": "w", "top1": 0.5, "about": {"data": {"test": {"path": "x"}}}}
    for name, values in {"metrics.jsonl": records, "results.jsonl": [line, line]}.items():
        (path.parent / name).write_text("".join(f"{json.dumps(each)}\n" for each in values))
    (path.parent / "env.json").write_text(json.dumps({"command": ["a"], "packages": {"torch": "2"}}))


def read_run_folder(path: Path) -> None:
    run = report.read_run(path.parent)
    report.summary(run)
    if path.name == "metrics.jsonl":  # of which the charts are: drawing them takes most of the time
        list(report._curves([run]))
    report._results([path.parent])
    report._system(run.env)
    watch.progress_of(path.parent, run.recipe)
    result = sweep.read_result(sweep.Run("base", 0, path.parent, [], run.recipe), "")
    if result.curve:
        sweep._markdown(sweep._table({"base": [result]}, less_is_better=False))


def write_sweep(path: Path) -> None:
    path.write_text(
        "recipe: scenes_cpu\nset: [data.seed=3]\ngrid: {optim.lr: [5e-4, 1e-3]}\n"
        "seeds: [1]\nout: runs/lr\nmetric: knn/top1@20\n"
    )


def read_sweep(path: Path) -> None:
    sweep.plan(
        sweep.Config(**validated(sweep.Config, read_mapping(path, "sweep", sweep.Config), "")), path.parent
    )


def read_source(module: Any) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        source = module.build(module.Config(path=str(path)))
        return [(source.stored(n), source.name(n)) for n in range(len(source))]

    return read


def read_weights(path: Path) -> None:
    open_checkpoint(path)


def read_image(path: Path) -> object:
    return np.asarray(decode(path.read_bytes(), str(path), 3)).tolist()


Reader = tuple[Callable[[Path], Any], Callable[[Path], Any]]
READERS: dict[str, Reader] = {
    "recipe.yaml": (write_recipe, load_recipe),
    "profile.yaml": (write_profile, lambda path: load_profile(str(path), {})),
    "list.csv": (write_manifest, read_source(manifest)),
    "shard.tar": (write_tar, read_source(tar)),
    "rows.parquet": (write_parquet, read_source(parquet)),
    "model.safetensors": (write_safetensors, read_weights),
    "model.pth": (write_pickle, read_weights),
    "eval_list.yaml": (write_list, lambda path: read_list(str(path), {})),
    "sweep.yaml": (write_sweep, read_sweep),
}
READERS |= {
    f"image.{kind}": (lambda path, kind=kind: path.write_bytes(picture(kind)), read_image)
    for kind in ("png", "jpeg", "tiff", "webp", "gif", "bmp", "ppm")
}
STEP = "checkpoints/step_0000007"
READERS |= dict.fromkeys(
    (f"{STEP}/complete.json", f"{STEP}/shard-00001-model-00001-of-00001.safetensors"),
    (write_checkpoint, read_checkpoint),
)
READERS |= dict.fromkeys(
    ("store/store.json", "store/names.txt", "store/cls/00000.npy", "store/images/00000.npy"),
    (write_store, read_store),
)
READERS |= dict.fromkeys(
    ("run/metrics.jsonl", "run/results.jsonl", "run/env.json", "run/recipe.yaml"),
    (write_run, read_run_folder),
)
# A change that leaves another text of the same kind cannot be seen; these files have checksums.
CHECKED = (STEP, "image.png")
# Of these, errors name a key: their values may come from the command line too.
KEYED = ("recipe.yaml", "eval_list.yaml", "sweep.yaml")


@contextmanager
def little_memory() -> Iterator[None]:
    """Allow GIB more than the process has now, and WAIT seconds for what hangs."""
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hangs)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def hangs(*_: object) -> None:
    raise AssertionError("the change made the reader hang")


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One change: a flipped bit, a cut, bytes put in, a doubled piece, or zeros."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero"]))
    start, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 64))
    bit, extra = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=16))

    def change(data: bytes) -> bytes:
        a = int(start * len(data))
        b = min(a + size, len(data))
        return {
            "flip": data[:a] + bytes([data[a] ^ 1 << bit]) + data[a + 1 :],
            "cut": data[:a],
            "insert": data[:a] + extra + data[a:],
            "double": data[:b] + data[a:],
            "zero": data[:a] + bytes(b - a) + data[b:],
        }[kind]

    return change


SLOW = "run/metrics.jsonl"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == SLOW else name for name in READERS]
)
def test_a_file_with_one_change_is_read_or_refused_by_its_name(tmp_path: Path, name: str) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    good = path.read_bytes()
    right = read(path)  # the file is good before it is changed

    @settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 15)  # more examples, and they are new ones
    @given(changes())
    def check(change: Callable[[bytes], bytes]) -> None:
        path.unlink(missing_ok=True)  # never in place: an older example may still be mapped
        path.write_bytes(change(good))
        signal.alarm(WAIT)
        try:
            found = read(path)
        except REFUSED as error:
            message = str(error)
        else:
            assert found == right or not name.startswith(CHECKED), "another content was read"
            return
        assert name.endswith(KEYED) or str(tmp_path) in message, message

    with little_memory():
        check()
