"""Several students of one frozen teacher in one job, each on its share of the processes.

All processes load one global batch together and run the teacher on a slice each (DINOv3, arXiv 2508.10104,
section 5.2: the cost of the teacher is shared, and students with more processes take no longer than others).
Crops and what the teacher computed up to the prototypes are gathered; then the processes of a student, which
divide the whole batch among themselves, work as they would without the others. So a student learns what it
would learn alone on the same images, and its folder is that of an ordinary run.

W  processes that were started      B  images of a step over all of them      c  images of a slice
G  global crops      N  patches of one      w  width before the prototypes; without heads, of the backbone
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.batch import Batch
from dinokit.data.sampler import process_places
from dinokit.data.sources import ImageSource
from dinokit.losses import uses
from dinokit.runtime.distributed import (
    broadcast,
    gather_from_everyone,
    group,
    launch,
    max_of_everyone,
    objects_of_everyone,
    part,
    rank,
    world_size,
)
from dinokit.runtime.launch import check_consistency, digest
from dinokit.train import checkpoint
from dinokit.train.checkpoint import SavedCheckpoint
from dinokit.train.networks import FrozenTeacher
from dinokit.train.run_dir import run_facts, with_precision

if TYPE_CHECKING:
    from dinokit.train.step import Step


@dataclass(frozen=True)
class Students:
    """The students of a job, with the processes of each, and the one of this process."""

    name: str
    ranks: Mapping[str, range]

    @property
    def first(self) -> int:
        """The process that writes for this student."""
        return self.ranks[self.name][0]

    @property
    def where(self) -> str:
        """For errors: which process this is, and which student each has."""
        ours = launch().rank
        listed = "; ".join(f"{name} {', '.join(map(str, each))}" for name, each in self.ranks.items())
        return f"This is process {ours}, of student {self.name}. Students, by process: {listed}."


@contextmanager
def together(
    students: Students | None, recipe: Recipe, source: ImageSource, device: torch.device
) -> Iterator[Recipe]:
    """For the length of the block, the processes of a student work together. All processes enter it.

    Args:
        students: of the job; None: a recipe of one student, for which nothing changes.
        recipe: of this process's student.
        source: the images.
        device: of this process.

    Gives the recipe, for several students with run.precision resolved: they exchange tensors, so all have
    that of process 0.

    Raises:
        ValueError: if the processes were not given the same command, code, kind of device and images.
    """
    if students is None:
        yield recipe
        return
    optim = {"batch": recipe.optim.batch, "steps": recipe.optim.steps}
    out = Path(recipe.run.out)
    of_all = {
        **{key: value for key, value in asdict(recipe).items() if key not in ("name", "backbone", "heads")},
        "optim": optim, "data": None, "run": {**asdict(recipe.run), "out": str(out.parent)},
    }  # fmt: skip
    facts = {
        **run_facts(recipe, source),
        "list of students": digest({name: [*ranks] for name, ranks in students.ranks.items()}),
        "recipe": digest(of_all),
    }
    check_consistency(facts, out.parent, "run.out")
    recipe = with_precision(recipe, device)
    with part(list(students.ranks.values())):
        try:
            yield recipe
        except Exception as error:
            error.add_note(students.where)
            raise


def resume_together(out: Path, saved: SavedCheckpoint | None) -> SavedCheckpoint | None:
    """The checkpoint of this student in folder `out` from which all students resume; None: from step 0.

    Process 0 of a student reads its folder for all of them. Without several students, `saved` is returned.

    Args:
        out: the folder of this student's run.
        saved: the checkpoint from which it would resume alone.

    Raises:
        ValueError: as common_step().
    """
    if group() is None:
        return saved
    mine: dict[int, SavedCheckpoint] = {}
    if rank() == 0 and saved is not None:
        mine = {each.step: each for each in checkpoint.readable(out / "checkpoints")}
    mine, began = broadcast((mine, (out / "recipe.yaml").is_file()))
    everyone = objects_of_everyone((out.name, (sorted(mine), began)))
    return mine.get(common_step(dict(everyone), out.parent))


def common_step(everyone: Mapping[str, tuple[list[int], bool]], folder: Path) -> int:
    """The newest step that all students have saved; 0: none has saved any, or all begin anew.

    A job may be killed at any time, so some students may have a checkpoint that others lack. A student whose
    run began may have none at all only if the others have a single one: the job was killed at the first.

    Args:
        everyone: by name of the student, the steps of its checkpoints, and whether its folder is of a run.
        folder: of all students, for the message.

    Raises:
        ValueError: if there is no such step, and this job was not killed at its first checkpoint.
    """
    common = set.intersection(*(set(steps) for steps, _ in everyone.values()))
    if common:
        return max(common)
    found = {step for steps, _ in everyone.values() for step in steps}
    if len(found) > 1 or (found and not all(began for _, began in everyone.values())):
        have = "; ".join(f"{name} {steps or 'none'}" for name, (steps, _) in everyone.items())
        raise ValueError(
            f"The students in {folder} have no checkpoint of the same step: {have}. Copy the lost ones "
            f"back, train those that are behind alone (student=NAME), or begin anew with run.resume=never."
        )
    return 0


class SharedTeacher:
    """Runs the teacher on a batch once for all students; see the top of this file.

    Args:
        step: of this process's student, whose model, photometric augmentation and settings are used.

    Raises:
        ValueError: if a head of the teacher looks at all rows of a forward pass, which slices would change.
    """

    def __init__(self, step: "Step") -> None:
        teacher = step.model.teacher
        assert isinstance(teacher, FrozenTeacher)
        heads = [] if teacher.heads is None else [*teacher.heads.children()]
        if any(getattr(head, "standardize", False) for head in heads):
            raise ValueError(
                f"teacher.frozen={step.recipe.teacher.frozen} has heads with heads.*.standardize, which "
                f"depend on the other images of a process: distil one student at a time, with student=NAME."
            )
        self.teacher, self.step, self.batch = teacher, step, step.recipe.optim.batch
        self.patches = any("masks" in uses(name) for name in step.recipe.losses)

    @property
    def places(self) -> list[int]:
        """This process's slice (c) of a step's B places; equally many everywhere, so the last may repeat."""
        ours = launch()
        size = -(-self.batch // ours.world)
        return [min(ours.rank * size + i, self.batch - 1) for i in range(size)]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """This process's share of its student's batch, from the slices (c) of all, with teacher tokens."""
        batch = self._as_everyone(batch).to(self.step.device)
        cls, patches = self._teach(batch)
        mine = process_places(self.batch, rank(), world_size(), self.step.accumulation, "optim.batch")
        groups = (batch.global_crops, batch.local_crops, batch.global_colour, batch.local_colour, cls)
        large, small, large_colour, small_colour, cls = (_share(x, batch.images, mine) for x in groups)
        return replace(
            batch, images=len(mine), global_crops=large, local_crops=small, global_colour=large_colour,
            local_colour=small_colour, teacher_cls=cls,
            teacher_patches=_share(patches, batch.images, mine) if self.patches else None,
        )  # fmt: skip

    def _teach(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens (G*c, w) and (G*c, N, w) up to the prototypes, for as many crops at a time as in a step."""
        step = self.step
        crops = step.photometric(batch.global_crops, batch.global_colour)
        at_once = max(step.images_at_once * step.recipe.crops.globals.count, 1)
        patch = self.teacher.backbone.patch
        grid = (crops.shape[2] // patch) * (crops.shape[3] // patch) if self.patches else 0
        rows: list[tuple[Tensor, Tensor]] = []
        with step.autocast():
            for some in crops.split(at_once):
                places = torch.arange(len(some) * grid, device=some.device)
                tokens = self.teacher.read([some], [None], places)
                cls, patches = self.teacher.shared_tokens(tokens.cls[0], tokens.patches)
                rows.append((cls, patches.view(len(some), grid, patches.shape[-1])))
        return torch.cat([cls for cls, _ in rows]), torch.cat([patches for _, patches in rows])

    def wait(self) -> None:
        """Wait until all processes call it."""
        objects_of_everyone(None)

    def is_any(self, number: int) -> bool:
        """Whether a number is above 0 in any process. All processes call it."""
        return bool(max_of_everyone(torch.tensor(number)) > 0)

    def _as_everyone(self, batch: Batch) -> Batch:
        """The batch with pixels of the type that all processes have, and unreadable images of all.

        It reduces two numbers between CPUs, before anything is on a GPU: nothing waits for one.
        """
        floats = batch.global_crops.dtype != torch.uint8
        flags = max_of_everyone(torch.tensor([int(floats), int(bool(batch.unreadable))])).tolist()
        if flags[0] and not floats:
            batch = replace(
                batch,
                global_crops=batch.global_crops.float() / 255,
                local_crops=batch.local_crops.float() / 255,
            )
        if flags[1]:
            found = objects_of_everyone(batch.unreadable)
            batch.unreadable = {name: reason for each in found for name, reason in each.items()}
        return batch


def _share(x: Tensor, images: int, places: Sequence[int]) -> Tensor:
    """Rows of some places, from crop-major slices (crops * c, ...) of each process: (crops * b, ...)."""
    if not len(x):
        return x
    slices = gather_from_everyone(x.unflatten(0, (-1, images))).transpose(0, 1)  # (crops, W, c, ...)
    chosen: Any = torch.tensor(places, device=x.device)
    return slices.flatten(1, 2).index_select(1, chosen).flatten(0, 1)
