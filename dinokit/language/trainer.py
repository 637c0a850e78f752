"""What every training by transformers' Trainer needs: one device a process, and parts that stay frozen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dinokit.language import needed
from dinokit.runtime.device import pick_device
from dinokit.runtime.distributed import gather_objects, rank, torchrun_variables, world_size
from dinokit.runtime.files import read_regular, write_text

BEGAN = "facts.json"  # of a run: facts about its backbone and data


def training_arguments(device: str, **keys: Any) -> Any:
    """TrainingArguments for this process.

    Args:
        device: as run.device.
        keys: of TrainingArguments.

    Raises:
        ValueError: if `device` is a GPU that the Trainer would not take.
        RuntimeError: if the Trainer does not find the processes that work together.
    """
    transformers, chosen = needed("transformers"), pick_device(device)
    needed("accelerate")
    if chosen.type == "cuda" and chosen.index and world_size() == 1:
        raise ValueError(
            f"run.device={device}: transformers' Trainer takes the first GPU that it sees. Set the "
            f"environment variable CUDA_VISIBLE_DEVICES={chosen.index} and run.device=cuda."
        )
    with torchrun_variables():
        args = transformers.TrainingArguments(
            use_cpu=chosen.type == "cpu", dataloader_pin_memory=chosen.type == "cuda", **keys
        )
        args._n_gpu = min(args.n_gpu, 1)  # several would multiply the batch
    if args.world_size != world_size():
        raise RuntimeError(
            f"transformers' Trainer sees {args.world_size} processes, and {world_size()} work together."
        )
    return args


def keys_of_run(run: Any) -> dict[str, Any]:
    """Keys of TrainingArguments that a recipe's section `run` sets, and those that all trainings share."""
    return {
        "logging_steps": run.log_every,
        "save_steps": run.checkpoint_every,
        "save_total_limit": run.keep,
        "seed": run.seed,
        "bf16": run.precision == "bf16",
        "dataloader_num_workers": run.workers,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "log_level": "error",
    }


def stay_frozen(module: nn.Module) -> None:
    """Keep a module without gradients and in eval mode, also when train() of a module around it is called."""
    module.requires_grad_(False)
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def check_began(out: Path, facts: Mapping[str, Any], anew: bool) -> None:
    """Record what a run begins with, and refuse to resume it with something else. All processes call it.

    Args:
        out: folder of the run.
        facts: of the backbone and the data, by name.
        anew: whether the run begins anew, and what is recorded is forgotten.

    Raises:
        ValueError: if a fact is another one than at the beginning of the run; it names the fact.
    """
    file = out / BEGAN
    before = json.loads(read_regular(file)) if file.exists() and not anew else facts
    for name, value in facts.items():
        if before.get(name, value) != value:  # a run of an older version may not have recorded it
            raise ValueError(
                f"The {name} was {before[name]} when {out} began, and now is {value}: a run resumes with "
                f"what it began with. Bring it back, choose another out, or begin anew with run.resume=never."
            )
    gather_objects(None)  # all have read it
    if rank() == 0:
        write_text(file, json.dumps(facts))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes the state of its loop last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
