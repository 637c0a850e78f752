"""What `make gpu-check` runs: the tests that need a GPU, then benches, and a page of their results.

    python tests/gpu/check.py [--out PAGE] [--minutes 9.5] [--device cpu]

Without a GPU it says so and ends with status 2. With --device cpu it takes the same way on small networks,
so that this file itself can be tried anywhere. Status 1: a test failed, or a bench did not end.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LEAST = 20.0  # seconds that a bench needs; with less left it is not begun
TESTS_SHARE = 0.5  # of the time, at most
PHASES = (
    "load", "transfer", "colour", "teacher", "student forward", "losses", "backward", "optimiser", "EMA",
)  # fmt: skip
SMALL = [
    "backbone.width=64", "backbone.depth=2", "backbone.heads=2", "crops.globals.size=32",
    "crops.locals.size=16", "backbone.size=32", "heads.cls.prototypes=64", "heads.cls.hidden=16",
    "heads.cls.bottleneck=8", "run.workers=0",
]  # fmt: skip
SWITCHES = (
    "run.compile=none", "run.compile=colour", "run.compile=blocks", "run.compile=all",
    "run.attention=xformers", "run.attention=varlen", "run.precision=fp16", "run.checkpointing=full",
    "run.checkpointing=selective",
)  # fmt: skip
SMALL_IMAGES, TRAINED_STEPS = 8, 40
VITS = {"ViT-S/16": ("dinov1_vits16_in1k", 64), "ViT-L/16": ("dinov2_vitl16_short", 32)}  # recipe, images


@dataclass
class Check:
    """What is run, until when, and the page so far."""

    device: str
    until: float
    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # attention kernels that do not work here, and why

    @property
    def small(self) -> bool:
        """Whether only this file is tried."""
        return self.device == "cpu"

    @property
    def networks(self) -> dict[str, tuple[str, int]]:
        """Recipe and images of a step, by name."""
        return dict(list(VITS.items())[: 1 if self.small else None])

    def run(self, words: list[str], what: str) -> str | None:
        """The output of a command of dinokit; None if it did not end well, which is on the page."""
        left = self.until - time.monotonic()
        if left < LEAST:
            self.failed.append(what)
            self.lines.append(f"- {what}: left out, there was no time")
            return None
        print(f"{what} ...", flush=True)
        done = finish(words, left)
        if done is not None and done.returncode == 0:
            return done.stdout
        self.failed.append(what)
        said = "it took too long" if done is None else (done.stderr or done.stdout).strip().splitlines()[-1:]
        self.lines.append(f"- {what}: failed: {said if isinstance(said, str) else ' '.join(said)}")
        return None

    def bench(self, kind: str, recipe: str, batch: int, *words: str, what: str) -> dict | None:
        """The JSON of `dinokit bench`."""
        if self.small:
            words, batch = (*words, *SMALL), 4
        rounds = 1 if self.small else 10
        given = [f"batch={batch}", f"rounds={rounds}", f"run.device={self.device}", *words, "--json"]
        output = self.run([sys.executable, "-m", "dinokit", "bench", kind, recipe, *given], what)
        return json.loads(output.splitlines()[-1]) if output else None

    def table(self, title: str, head: list[str], rows: list[list[object]]) -> None:
        if rows:
            cells = [head, ["---"] * len(head), *rows]
            text = [
                "| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |"
                for row in cells
            ]
            self.lines += ["", f"## {title}", "", *text]


def finish(words: list[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None, with all its processes ended, if it takes longer than `seconds`."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.md"), help="the page")
    parser.add_argument("--minutes", type=float, default=9.5, help="what it may take in all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this file")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            f"There is no GPU here that PyTorch {torch.__version__} can use, so nothing was run: "
            f"`nvidia-smi` shows whether the driver sees one. --device cpu tries this program without."
        )
        return 2
    check = Check(given.device, time.monotonic() + 60 * given.minutes)
    begun = time.monotonic()
    machine(check)
    tests(check)
    for part in (steps, attention, switches, features, several_cards):
        part(check)
    minutes = (time.monotonic() - begun) / 60
    end = f"Failed: {', '.join(check.failed)}." if check.failed else "Everything ran."
    check.lines += ["", f"{end} It took {minutes:.1f} minutes."]
    given.out.write_text("\n".join(check.lines) + "\n", encoding="utf-8")
    print(f"{end} The page: {given.out}")
    return 1 if check.failed else 0


def machine(check: Check) -> None:
    """What it runs on."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cards = ", ".join(names) if not check.small else "none: tried on a CPU, so no number means anything"
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    where = f"Commit {commit.stdout.strip() or 'unknown'}, {versions}; cards: {cards}."
    check.lines += ["# GPU check", "", where, ""]


def tests(check: Check) -> None:
    """The tests that are marked `gpu`; on a CPU some that are not."""
    chosen = ["tests/gpu/test_emulated_gpu.py"] if check.small else ["-m", "gpu", "tests"]
    limit = TESTS_SHARE * (check.until - time.monotonic())
    print("tests ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        # The session ends between two tests, so that there is a report.
        options = ["-q", "-p", "no:cacheprovider", f"--session-timeout={limit:.0f}", f"--junitxml={report}"]
        words = [sys.executable, "-m", "pytest", *options, *chosen]
        done = finish(words, 1.5 * limit)
        if done is None or done.returncode:
            output = f"stopped after {1.5 * limit:.0f} s" if done is None else done.stdout or done.stderr
            check.failed.append("tests")
            check.lines.append(f"- tests: {' '.join(output.strip().splitlines()[-1:])}")
        if not report.exists():
            return
        cases = ET.parse(report).getroot().iter("testcase")
        results = [(f"{case.get('classname')}::{case.get('name')}", _outcome(case)) for case in cases]
    counts = {kind: sum(kind == k for _, (k, _) in results) for kind in ("passed", "skipped", "failed")}
    check.lines.append("Tests: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()) + ".")
    for name, (kind, why) in results:
        if kind != "passed":
            check.lines.append(f"- {kind}: {name}: {why}")


def _outcome(case: ET.Element) -> tuple[str, str]:
    for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return kind, " ".join((found.get("message") or "").split())[:300]
    return "passed", ""


def steps(check: Check) -> None:
    """A step of each network by phase, beside its plain form."""
    rows, phases = [], []
    for name, (recipe, batch) in check.networks.items():
        found = check.bench("step", recipe, batch, "--against", "plain", what=f"step {name}")
        if found:
            ours, theirs = found["as given"], found["plain"]
            rows.append([
                name, found["batch"], found["precision"], ours["images_per_second"],
                theirs["images_per_second"], found["speed_against_plain"], 100 * ours["share_of_matmul"],
                ours["peak_gib"], theirs["peak_gib"],
            ])  # fmt: skip
            phases.append([name, *(ours["milliseconds"].get(phase, "") for phase in PHASES)])
    head = ["network", "batch", "precision", "images/s", "plain", "ratio", "% of matmul", "peak GiB", "plain"]
    check.table("Steps", head, rows)
    check.table("Milliseconds of a step by phase, one after the other", ["network", *PHASES], phases)


def attention(check: Check) -> None:
    """Every kernel: its time, or why it does not work here."""
    rows = []
    for name, (recipe, batch) in check.networks.items():
        found = check.bench("attention", recipe, batch, what=f"attention {name}") or {"milliseconds": {}}
        rows += [[name, kernel, value] for kernel, value in found["milliseconds"].items()]
    check.absent |= {kernel: value for _, kernel, value in rows if isinstance(value, str)}
    title = "Attention over all crops of a step, forward and backward"
    check.table(title, ["network", "kernel", "ms, or the reason why not"], rows)


def switches(check: Check) -> None:
    """The same step with one switch changed."""
    recipe, batch = VITS["ViT-S/16"]
    rows = []
    for word in SWITCHES[-1:] if check.small else SWITCHES:
        reason = check.absent.get(word.removeprefix("run.attention="))
        if reason:
            check.lines.append(f"- {word}: left out: {reason}")
            continue
        found = check.bench("step", recipe, batch, word, what=f"step with {word}")
        if found:
            ours = found["as given"]
            rows.append([word, ours["images_per_second"], ours["peak_gib"], ours["milliseconds"]["colour"]])
    check.table("One switch changed, ViT-S/16", ["switch", "images/s", "peak GiB", "ms of colour"], rows)


def features(check: Check) -> None:
    """The frozen network, as evaluators and extraction use it; and the loader on this machine's cores."""
    rows = []
    for name, (recipe, batch) in check.networks.items():
        found = check.bench("eval", recipe, batch, what=f"features {name}")
        rows += [[name, found["images_per_second"]]] if found else []
    check.table("Features", ["network", "images/s"], rows)
    found = check.bench("data", VITS["ViT-S/16"][0], 64, what="data")
    if found:
        loader = found["loader"]["images_per_second"]
        check.lines += ["", f"Loader, all worker processes: {loader:.4g} images/s."]


def several_cards(check: Check) -> None:
    """Training with NCCL on one and on two cards."""
    cards = 2 if check.small else torch.cuda.device_count()
    if cards < 2:
        check.lines += ["", "NCCL with two processes: left out, there is one card."]
        return
    rows = []
    for world in (2,) if check.small else (1, 2):
        what = f"{world} process{'es' * (world > 1)}"
        with tempfile.TemporaryDirectory() as folder:
            found = _train(check, world, Path(folder) / "run", what)
        rows += [[what, found]] if found else []
    check.table(
        "Training, ViT-S/16, images of the built-in scenes, by processes", ["processes", "images/s"], rows
    )


def _train(check: Check, world: int, out: Path, what: str) -> float | None:
    """Images per second of the second half of a short training."""
    recipe, batch = VITS["ViT-S/16"]
    steps, batch = (6, SMALL_IMAGES) if check.small else (TRAINED_STEPS, 2 * batch)
    words = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--master-port=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "dinokit", "train", recipe,
        "data={name: scenes}", f"optim.steps={steps}", "optim.warmup=0", f"optim.batch={batch}", "evals=null",
        f"run.out={out}", f"run.device={check.device}", "run.log_every=1", "run.report=false",
        *(SMALL if check.small else []),
    ]  # fmt: skip
    if check.run(words, f"training with {what}") is None:
        return None
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [
        record["images_per_second"] for record in map(json.loads, lines) if "images_per_second" in record
    ]
    return sorted(rates[len(rates) // 2 :])[len(rates) // 4]


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
