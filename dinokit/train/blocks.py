"""How the blocks are computed: attention kernel, checkpointing, compilation. What is learnt is the same."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.compiler import config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinokit.config.load import Run
from dinokit.models import Backbone, fused
from dinokit.models.attention import use_kernel
from dinokit.runtime.device import DTYPES
from dinokit.train.start import Model

# What `selective` keeps of a block: results that cost a matrix product with weights, or a fused attention.
_KEPT = frozenset({
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
})  # fmt: skip


def prepare(model: Model, run: Run, device: torch.device) -> None:
    """Do as `run.attention`, `run.checkpointing` and `run.compile` say, in place; parameter names stay.

    Raises:
        ValueError: if the attention kernel cannot be used here.
    """
    student, teacher = model.student.backbone, model.teacher.backbone
    # A frozen teacher is no part of the model.
    both = nn.ModuleList(x for x in (model, teacher) if isinstance(x, nn.Module))
    use_kernel(both, run.attention, device, DTYPES[run.precision] or torch.float32)
    fused.install(both, read_rows=run.tokens == "read")
    for block in student.blocks:
        _checkpoint(block, run)
    if run.compiles("blocks"):
        _compile([block for backbone in (student, teacher) for block in _steady(backbone)])


def as_written(run: Run) -> AbstractContextManager[Any]:
    """Inside of it nothing is compiled: for calls that are few of a shape, as an evaluation's are."""
    return torch.compiler.set_stance("force_eager") if run.compiles("blocks") else nullcontext()


def _checkpoint(block: nn.Module, run: Run) -> None:
    """Keep less of the block's forward pass, and compute it again in the backward pass."""
    if run.checkpointing == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if run.checkpointing == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    forward = block.forward

    def checkpointed(*given: Any, **named: Any) -> Any:  # a partial would hide the block from the compiler
        return checkpoint(forward, *given, **how, **named)

    # On the instance: a wrapping module would change the names of the parameters.
    block.forward = checkpointed


def _steady(backbone: Backbone) -> list[nn.Module]:
    """The blocks that see the same shapes in every step: the last one may give as many rows as are masked."""
    blocks = list(backbone.blocks)
    return blocks[:-1] if fused.reads_rows(backbone) else blocks


def _compile(blocks: Sequence[nn.Module]) -> None:
    # Each rate of stochastic depth needs a graph, or two where global and local crops come one after another.
    # Beyond eight of one function PyTorch would give up and compute the rest as it is written.
    config.recompile_limit = max(config.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
