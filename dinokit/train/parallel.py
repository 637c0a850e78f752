"""How a step is spread over processes: what is recomputed, then what is compiled, then FSDP2, DDP or nothing.

Everything here is public API of PyTorch. Student and teacher are cut alike, so that the teacher's average
needs no communication; the teacher's gradients do not exist.

    DDP   every process holds everything; gradients are averaged while the backward pass still runs
    FSDP  every process holds one part in n of each tensor (Rajbhandari et al. 2020, arXiv 1910.02054, stage
          3); a block's weights are gathered when it runs and dropped behind it. Across nodes it is hybrid:
          cut within a node, where the network is fast, and averaged like DDP between nodes (Zhao et al.
          2023, arXiv 2304.11277)
"""

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from dinokit.config.load import Recipe
from dinokit.models import Backbone, fused
from dinokit.runtime.device import DTYPES
from dinokit.runtime.distributed import full, launch, world_size
from dinokit.train.activations import activations
from dinokit.train.parts import FULL
from dinokit.train.start import Model
from dinokit.train.student_teacher import Network, build_backbone

STATE_BYTES = 5 * 4  # a parameter: student, gradient, two moments, teacher, in float32
GIB = 2**30


def spread(model: Model, recipe: Recipe, device: torch.device, images: int) -> nn.Module:
    """The model to call in a step, of `images` at a time: it, or it in DDP. FSDP changes it in place.

    Call it before the optimiser is made. What is recomputed in the backward pass, and what is compiled, is
    set on the blocks before this.

    Raises:
        ValueError: if run.parallel cannot be done.
    """
    kind = choose(recipe, model, device, images)
    if kind == "fsdp":
        shard(model, _mesh(device.type), _policy(recipe, device))
    if kind != "ddp":
        return model
    # The centres are the same in every process by themselves: they are sums over all. In DDP's own words, a
    # parameter that no loss reads is "unused", and looking for such costs a walk through the graph a step.
    return DistributedDataParallel(
        model,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=not _all_read(model.student, recipe),
    )


def choose(recipe: Recipe, model: Model, device: torch.device, images: int) -> Literal["none", "ddp", "fsdp"]:
    """What run.parallel comes to, for `images` at a time. With one process there is nothing to spread.

    Raises:
        ValueError: for `none` with several processes, which would train apart.
    """
    wanted, world = recipe.run.parallel, world_size()
    if world == 1:
        return "none"
    if wanted == "none":
        raise ValueError(
            f"{world} processes were started together, but run.parallel=none: each would train by itself. "
            f"Take run.parallel=auto, or start one process."
        )
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "ddp"
    parameters = sum(p.numel() for p in model.student.parameters())
    kept = activations(recipe, images)[1]
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    return "ddp" if fits_whole(parameters, kept, memory) else "fsdp"


def fits_whole(parameters: int, kept: float, memory: float) -> bool:
    """Whether a GPU of `memory` GiB has room for a run that is not cut: `auto` is DDP then.

    Args:
        parameters: of the student.
        kept: GiB that the backward pass needs.
        memory: GiB.
    """
    return parameters * STATE_BYTES / GIB + kept < FULL * memory


def shard(model: Model, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Cut the student and its average, a block at a time, then each head, then what is left."""
    # A backbone's tokens are views of its rows, which FSDP warns of writing into; nothing here does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in (model.student, model.average):
        for block in network.backbone.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        for part in network.children():
            # Tokens, positions, prototypes stay in float32: small, or of unit length, where bf16 is coarse.
            fully_shard(part, mesh=mesh, mp_policy=whole)
        if fused.reads_rows(network.backbone):
            register_fsdp_forward_method(network.get_submodule("backbone"), "read")
    fully_shard(model, mesh=mesh, mp_policy=whole)


def synced(replica: nn.Module, last: bool) -> AbstractContextManager[None]:
    """For forward and backward of one part of a step: DDP averages gradients after the last part alone."""
    if isinstance(replica, DistributedDataParallel) and not last:
        return replica.no_sync()
    return contextlib.nullcontext()


def whole_backbone(recipe: Recipe, backbone: Backbone) -> Backbone:
    """The backbone itself, or, if it is cut up, a copy put together, in every process; all must call it.

    An evaluator calls it as often as it likes, and not equally often in every process, which FSDP would wait
    for without end.
    """
    assert isinstance(backbone, nn.Module)
    if not any(hasattr(x, "full_tensor") for x in backbone.parameters()):
        return backbone
    with torch.device("meta"):
        copy = build_backbone(recipe)
    assert isinstance(copy, nn.Module)
    state = {name: full(x).detach() for name, x in backbone.state_dict().items()}
    copy.load_state_dict(state, strict=True, assign=True)
    copy.eval().requires_grad_(False)
    return copy


def _mesh(device: str) -> DeviceMesh:
    """One dimension in a node; two, averaged over and cut along, for several nodes of several processes."""
    ours = launch()
    if ours.nodes > 1 and ours.local_world > 1:
        sizes = (ours.nodes, ours.local_world)
        return init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (world_size(),), mesh_dim_names=("shard",))


def _policy(recipe: Recipe, device: torch.device) -> MixedPrecisionPolicy:
    # Half the bytes to gather on a GPU. Inputs stay as they are: the sums of the residual stream are float32,
    # and autocast decides what is computed in what. A CPU's layer norm refuses weights of another type.
    dtype = DTYPES[recipe.run.precision] if device.type == "cuda" else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _all_read(student: Network, recipe: Recipe) -> bool:
    """Whether some loss is known to read every parameter."""
    token = recipe.masks is not None or not hasattr(student.backbone, "mask_token")
    heads = "dino" in recipe.losses and ("ibot" in recipe.losses or student.shared)
    return token and heads
