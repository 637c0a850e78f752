"""How the blocks are computed: attention kernel, checkpointing, compilation. What is learnt is the same."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinokit.config import Run
from dinokit.device import DTYPES
from dinokit.layers.attention import use_kernel
from dinokit.layers.block import Block
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
    for block in student.blocks:
        _checkpoint(block, run)
    if run.compiles("blocks"):
        for block in (*student.blocks, *teacher.blocks):
            block.compile(dynamic=False)


def _checkpoint(block: nn.Module, run: Run) -> None:
    """Keep less of the block's forward pass, and compute it again in the backward pass."""
    if run.checkpointing == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if run.checkpointing == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        if isinstance(block, Block):
            block.overwrite = False  # what a product gives is kept, and must stay as it is
    # On the instance: a wrapping module would change the names of the parameters.
    block.forward = partial(checkpoint, block.forward, **how)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
