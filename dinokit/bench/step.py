"""The speed of training steps, of attention with each kernel, and of the frozen network of evaluators.

Each form of a step runs in a process of its own, because a peak of memory is that of a process. Their rounds
take turns, because a machine that others use changes from minute to minute, and a ratio of neighbours is
still right.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from dinokit.bench import (
    SyntheticImages,
    matmul_rate,
    matmul_rates,
    measured_on,
    medians,
    once,
    seconds,
    settled,
    wait,
)
from dinokit.config import registry
from dinokit.config.load import Recipe
from dinokit.data.batch import Batch
from dinokit.data.loader import training_loader
from dinokit.features.tokens import frozen, normalised
from dinokit.models import fused
from dinokit.models.attention import KERNELS, Attention, Kernel, PackedBatch, unavailable_reason
from dinokit.models.fused import attend
from dinokit.runtime.device import DTYPES, keep_freed_memory, peak_memory
from dinokit.runtime.log import RunLog, watch
from dinokit.train.networks import block_masks, build_backbone
from dinokit.train.plan import tokens_per_crop
from dinokit.train.step import Step
from dinokit.train.student_teacher import StudentTeacher

# Every switch of `run` that is there for speed or memory, at its plainest.
PLAIN: dict[str, Any] = {
    "logits": "whole", "tokens": "all", "compile": "none", "checkpointing": "none", "attention": "sdpa",
    "keep_memory": False,
}  # fmt: skip
WARM_UP = 2  # steps
# Of each step: no signals of health; signals; these in metrics.jsonl and in the trackers of run.log as well.
Records = Literal["nothing", "signals", "all"]


@dataclass
class StepReport:
    """What one form of a step does; rates and times are medians over the rounds."""

    images_per_second: float
    milliseconds: dict[str, float]  # of a step, by phase, in one step more with a clock in it
    peak_gib: float
    idle_gib: float  # of it, before there was a network: Python, PyTorch, their libraries
    model_flops: float  # of a step: what must be multiplied and added
    share_of_matmul: float  # model FLOP/s over those of a matrix product in the run's precision
    matmul_fp32: float  # FLOP/s
    matmul_bf16: float
    matmul_fp16: float  # 0: not measured, as the run is in another precision
    seconds: list[float]  # of each round
    cpu_seconds: list[float]  # of each round, of this process on all its cores


def plain(recipe: Recipe) -> Recipe:
    """The same step with all logits at once, all tokens of the last block, SDPA, nothing compiled.

    Nothing is checkpointed either, and freed memory goes back. What has no switch stays: GELUs that are
    computed again, LayerScale multiplied into weights, and the fused AdamW.
    """
    with torch.device("meta"):
        network: Any = build_backbone(recipe)
    ours = any(isinstance(layer, Attention) for layer in network.modules())
    kernel = {} if ours else {"attention": recipe.run.attention}  # the network's own
    return replace(recipe, run=replace(recipe.run, **{**PLAIN, **kernel}))


def bench_steps(
    recipes: Sequence[Recipe], rounds: int, real: bool, records: Sequence[Records] = ()
) -> list[StepReport]:
    """Every recipe's step, in turn.

    Args:
        recipes: one a form.
        rounds: steps a form that count.
        real: whether to load images of the recipe's data; else two batches of synthetic images, in turn.
        records: what is recorded of a form's steps; without it, signals.

    Raises:
        ValueError: for a recipe with teacher.frozen, whose step has other phases.
        Exception: as a training run does.
    """
    for recipe in recipes:
        if recipe.teacher.frozen:
            raise ValueError(
                f"bench step measures a student whose teacher is its moving average, and {recipe.name} has "
                f"teacher.frozen={recipe.teacher.frozen}. Give a recipe without it."
            )
    context = get_context("spawn")
    pipes, children = [], []
    try:
        for recipe, kept in zip(recipes, records or ["signals"] * len(recipes), strict=True):
            ours, theirs = context.Pipe()
            # No daemon, for these may have no loader processes. It ends when our end of the pipe is gone.
            child = context.Process(target=_serve, args=(theirs, recipe, rounds, real, kept))
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
            _receive(ours)  # it has warmed up: one after another
        order = [pipe for _ in range(rounds) for pipe in pipes]
        for pipe in watch(order, len(order), "rounds"):
            pipe.send("round")
            _receive(pipe)
        reports = []
        for pipe in pipes:
            pipe.send("report")
            reports.append(StepReport(**_receive(pipe)))
        return reports
    finally:
        for pipe, child in zip(pipes, children, strict=True):
            pipe.close()
            child.join()


def _receive(pipe: Connection) -> Any:
    try:
        reply = pipe.recv()
    except EOFError:
        raise RuntimeError("A process that ran steps was killed; was there memory enough?") from None
    if isinstance(reply, Exception):
        raise reply
    return reply


def _serve(pipe: Connection, recipe: Recipe, rounds: int, real: bool, records: Records) -> None:
    """A child process: warm up, run a round at each request, then send the report."""
    try:
        form = Form(recipe, rounds, real, records)
        form.warm_up()
        pipe.send(None)
        while pipe.recv() == "round":
            form.round()
            pipe.send(None)
        pipe.send(asdict(form.report()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the parent is gone
    except Exception as error:  # the parent raises it
        pipe.send(error)


class Form:
    """One form of a step, its input, and what was measured of it."""

    def __init__(self, recipe: Recipe, rounds: int, real: bool, records: Records = "signals") -> None:
        self.recipe = settled(recipe)
        self.device = torch.device(self.recipe.run.device)
        self.idle = peak_memory(self.device)
        keep_freed_memory(recipe.run)
        torch.manual_seed(recipe.run.seed)
        self.step = Step(self.recipe, self.device)
        self.step.model.has_signals = records != "nothing"
        self.log = _Log(recipe.run.log, rounds) if records == "all" else None
        steps = WARM_UP + rounds + 2  # FLOPs are counted on one more, and phases timed on another
        self.batches = _batches(self.recipe, self.step, steps, real)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rates: list[dict[str, float]] = []

    def warm_up(self) -> None:
        """Two steps: the first makes the optimiser's state, the second is like all others."""
        for _ in range(WARM_UP):
            self.step(next(self.batches))

    def round(self) -> None:
        """One step that counts, and the machine's rate beside it."""
        begin = time.process_time()
        self.seconds.append(once(self.work, self.device))
        self.cpu_seconds.append(time.process_time() - begin)
        rates = {**matmul_rates(self.device), "matmul_fp16": 0.0}
        if self.recipe.run.precision == "fp16":
            rates["matmul_fp16"] = matmul_rate(torch.float16, self.device)
        self.rates.append(rates)

    def work(self) -> None:
        """One step, and its records."""
        values = self.step(next(self.batches))
        if self.log is not None:
            self.log(values)

    def report(self) -> StepReport:
        """The report of the rounds so far."""
        if self.log is not None:
            self.log.end()
        peak = peak_memory(self.device)
        elapsed, images = median(self.seconds), self.recipe.optim.batch
        rates = medians(self.rates)
        flops = model_flops(self.recipe, next(self.batches))
        rate = rates[f"matmul_{self.recipe.run.precision}"]
        return StepReport(
            images_per_second=images / elapsed,
            milliseconds=self._phases(),
            peak_gib=peak,
            idle_gib=self.idle,
            model_flops=flops,
            share_of_matmul=flops / elapsed / rate,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            **rates,
        )

    def _phases(self) -> dict[str, float]:
        step, model, clock = self.step, self.step.model, Clock(self.device)
        batch = clock.timed(lambda: next(self.batches), "load")()
        for owner, name, phase in [
            (step, "augment", "transfer"), (step, "photometric", "colour"), (step, "backward", "backward"),
            (model.teacher, "read", "teacher"), (model.teacher, "logits", "teacher"),
            (model, "forward", "student forward"), (model, "update_teacher", "EMA"),
            *((loss, "forward", "losses") for loss in model.losses),
        ]:  # fmt: skip
            clock.watch(owner, name, phase)
        clock.timed(step, "optimiser")(batch)
        return {phase: 1000 * seconds for phase, seconds in clock.seconds.items()}


class _Log:
    """metrics.jsonl and trackers of a run that writes them after each step, in a temporary folder."""

    def __init__(self, trackers: Sequence[str], steps: int) -> None:
        self.folder = TemporaryDirectory()
        # The values go to files and trackers as in a run, and not to this terminal.
        with redirect_stdout(StringIO()):
            self.log = RunLog(Path(self.folder.name), steps, 0, trackers)
        self.log.console.quiet = True
        self.steps = 0

    def __call__(self, values: Mapping[str, Tensor]) -> None:
        self.steps += 1
        row = torch.stack([value.float() for value in values.values()]).cpu().tolist()
        self.log.step(self.steps, dict(zip(values, row, strict=True)))

    def end(self) -> None:
        self.log.trackers.end()
        self.log.text.close()
        self.folder.cleanup()


class Clock:
    """Adds up the time of each phase, s. A nested call's time is its own alone, so the sum is the whole."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """From now on count calls of `owner.name` as `phase`."""
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def timed(self, work: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`work`, counted."""

        @wraps(work, updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            begin = time.perf_counter()
            self._inner.append(0.0)
            out = work(*args, **kwargs)
            wait(self.device)
            whole = time.perf_counter() - begin
            self.seconds[phase] = self.seconds.get(phase, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole
            return out

        return run


def model_flops(recipe: Recipe, batch: Batch) -> float:
    """FLOPs that a step needs, forward and backward, counted on tensors without data.

    Those of its plain form, without the rows of the last block that no loss reads.
    """
    form = plain(recipe)
    needed = replace(form, run=replace(form.run, tokens="read"))
    # Here, because their modules, 0.07 GiB that a step brings too, would count as those of an idle process.
    fakes, counters = map(import_module, ("torch._subclasses.fake_tensor", "torch.utils.flop_counter"))
    with torch.device("meta"):
        model = StudentTeacher(needed).train()
    fused.install(model)
    with (
        fakes.FakeTensorMode(allow_non_fake_inputs=True) as fake,
        counters.FlopCounterMode(display=False) as counter,
    ):
        model.to_empty(device="cpu")
        seen = replace(
            batch,
            global_crops=torch.empty(batch.global_crops.shape),
            local_crops=torch.empty(batch.local_crops.shape),
            masks=None if batch.masks is None else fake.from_tensor(batch.masks),
            masked=fake.from_tensor(batch.masked),
            mask_weight=fake.from_tensor(batch.mask_weight),
        )
        sum(model(seen, 0.07).values(), torch.zeros(())).backward()
    return float(counter.get_total_flops())


def _batches(recipe: Recipe, step: Step, steps: int, real: bool) -> Iterator[Batch]:
    source = registry.build("data.sources", recipe.data) if real else SyntheticImages(len(recipe.crops.mean))
    made = training_loader(
        source, recipe.crops, block_masks(recipe, step.model.student.backbone), seed=recipe.run.seed,
        start_step=0, steps=steps if real else 2, batch=recipe.optim.batch,
        workers=recipe.run.workers if real else 0, pin=step.device.type == "cuda",
    )  # fmt: skip
    if real:
        return iter(made)
    two = list(made)
    return (replace(batch, step=i) for i, batch in enumerate(itertools.cycle(two)))


def bench_attention(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Milliseconds of one attention over all crops of a step, by kernel, or why there are none.

    Raises:
        ValueError: if the backbone has an attention of its own.
    """
    run = settled(recipe).run
    device, dtype = torch.device(run.device), DTYPES[run.precision] or torch.float32
    with torch.device("meta"):
        backbone = build_backbone(recipe)
    layers = [module for module in backbone.blocks.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(
            f"backbone.name={recipe.backbone['name']} has its own attention; there is no choice."
        )
    groups = [
        (recipe.optim.batch * group.count, tokens_per_crop(backbone, group.size))
        for group in (recipe.crops.globals, recipe.crops.locals)
        if group.count
    ]
    segments = PackedBatch(tuple(groups))
    rows = sum(images * tokens for images, tokens in groups)
    qkv = torch.randn(rows, 3 * backbone.width, device=device).to(dtype).requires_grad_()
    times: dict[str, Any] = {}
    for kernel in KERNELS:
        reason = unavailable_reason(kernel, device, dtype)
        work = partial(_run, qkv, layers[0].heads, segments, kernel)
        times[kernel] = reason or 1000 * seconds(work, device, rounds)
    return {
        **measured_on(run.device, run.precision),
        "milliseconds": times,
        "rows": rows,
        "width": backbone.width,
        **matmul_rates(device),
    }


def _run(qkv: torch.Tensor, heads: int, segments: PackedBatch, kernel: Kernel) -> None:
    qkv.grad = None
    attend(qkv, heads, segments, kernel).sum().backward()


def bench_eval(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Images per second of the class token, from uint8 crops of the size of the global ones."""
    run = settled(recipe).run
    device, dtype = torch.device(run.device), DTYPES[run.precision]
    backbone = build_backbone(recipe).to(device).eval()
    size, batch = recipe.crops.globals.size, recipe.optim.batch
    crops = torch.randint(0, 256, (batch, backbone.channels, size, size), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with frozen(backbone), torch.inference_mode(), autocast:
        elapsed = seconds(lambda: backbone([normalised(backbone, crops)], [None])[0].cls, device, rounds)
    return {
        **measured_on(run.device, run.precision),
        "images_per_second": batch / elapsed,
        **matmul_rates(device),
    }
