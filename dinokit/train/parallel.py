"""How a step is computed: attention kernel, checkpointing and compilation of blocks; FSDP2, DDP or neither.

What is learnt is the same. Student and EMA are sharded alike, so that the EMA needs no communication.

    DDP   every process has everything; gradients are averaged while the backward pass still runs
    FSDP  every process has one shard of n of each tensor (Rajbhandari et al. 2020, arXiv 1910.02054, stage
          3); a block's weights are gathered when it runs and dropped behind it. Across nodes it is hybrid:
          sharded within a node, where the network is fast, and averaged like DDP between nodes (Zhao et al.
          2023, arXiv 2304.11277)
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.compiler import config
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinokit.config.load import Recipe, Run
from dinokit.models import Backbone, fused
from dinokit.models.attention import use_kernel
from dinokit.runtime.device import DTYPES
from dinokit.runtime.distributed import full, group, launch, world_size
from dinokit.train.networks import Network, build_backbone
from dinokit.train.plan import GIB, activation_memory, fits_unsharded
from dinokit.train.student_teacher import StudentTeacher

# What `selective` saves of a block: results that cost a matrix product with weights, or a fused attention.
SAVED = frozenset({
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
})  # fmt: skip


def prepare_blocks(model: StudentTeacher, run: Run, device: torch.device) -> None:
    """Install fused modules, `run.attention`, `run.checkpointing` and `run.compile`; parameter names stay.

    Raises:
        ValueError: if the attention kernel cannot be used here.
    """
    student, teacher = model.student.backbone, model.teacher.backbone
    modules = nn.ModuleList([model, teacher])  # a frozen teacher is not a module of the model
    fused.install(modules, read_rows=run.tokens == "read")
    use_kernel(modules, run.attention, device, DTYPES[run.precision] or torch.float32)
    for block in student.blocks:
        _checkpoint(block, run)
    if run.compiles("blocks"):
        _compile([*_blocks_of_fixed_shapes(student), *_blocks_of_fixed_shapes(teacher)])


def eager(run: Run) -> AbstractContextManager[Any]:
    """Compile nothing inside this block: for calls with many shapes, such as those of an evaluation."""
    return torch.compiler.set_stance("force_eager") if run.compiles("blocks") else nullcontext()


def _checkpoint(block: nn.Module, run: Run) -> None:
    """Save less of the block's forward pass, and compute the rest again in the backward pass."""
    if run.checkpointing == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if run.checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _save_products)
    forward = block.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:  # a partial would hide the block from the compiler
        return checkpoint(forward, *args, **options, **kwargs)

    # On the instance: a wrapping module would change the names of the parameters.
    block.forward = checkpointed


def _blocks_of_fixed_shapes(backbone: Backbone) -> list[nn.Module]:
    """The blocks with the same shapes in every step: the last one may return as many rows as are masked."""
    blocks = list(backbone.blocks)
    return blocks[:-1] if fused.reads_rows(backbone) else blocks


def _compile(blocks: Sequence[nn.Module]) -> None:
    # Each rate of stochastic depth needs a graph, or two where global and local crops come one after another.
    # Beyond eight of one function PyTorch would give up and run the rest uncompiled.
    config.recompile_limit = max(config.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)


def _save_products(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def parallelize(model: StudentTeacher, recipe: Recipe, device: torch.device, images: int) -> nn.Module:
    """The module to call in a step of `images` at a time: the model, or DDP around it. FSDP works in place.

    Call it after prepare_blocks() and before the optimiser is made.

    Raises:
        ValueError: if run.parallel cannot be done.
    """
    mode = choose(recipe, model, device, images)
    if mode == "fsdp":
        shard(model, _mesh(device.type), _mixed_precision(recipe, device))
    if mode != "ddp":
        return model
    # Buffers are not synchronised: centres are sums over all processes, so they are equal. Looking for unused
    # parameters costs a walk through the graph in every step.
    return DistributedDataParallel(
        model,
        process_group=group(),
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=not _all_used(model.student, recipe),
    )


def choose(
    recipe: Recipe, model: StudentTeacher, device: torch.device, images: int
) -> Literal["none", "ddp", "fsdp"]:
    """The mode of run.parallel for `images` at a time; with one process there is nothing to distribute.

    Raises:
        ValueError: for `none` with several processes, which would train apart.
    """
    mode, world = recipe.run.parallel, world_size()
    if world == 1:
        return "none"
    if mode == "none":
        raise ValueError(
            f"{world} processes were started together, but run.parallel=none: each would train alone. "
            f"Set run.parallel=auto, or start one process."
        )
    if mode != "auto":
        return mode
    if device.type != "cuda":
        return "ddp"
    parameters = sum(p.numel() for p in model.student.parameters())
    activations = activation_memory(recipe, images)[1]
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    return "ddp" if fits_unsharded(parameters, activations, memory) else "fsdp"


def shard(model: StudentTeacher, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard the student and its EMA, a block at a time, then each head, then what is left."""
    # A backbone's tokens are views of its rows, and FSDP warns about writes into these; nothing here does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    gram: list[Any] = [model.gram_teacher] if hasattr(model, "gram_teacher") else []
    for network in (model.student, model.ema, *gram):
        for block in network.backbone.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The heads in `guide` are called one by one, not by it.
        guide = [*network.get_submodule("guide").children()] if hasattr(network, "guide") else []
        for child in [*guide, *network.children()]:
            # Tokens, positions, prototypes stay in float32: small, or of unit length, where bf16 is coarse.
            fully_shard(child, mesh=mesh, mp_policy=float32)
        if fused.reads_rows(network.backbone):
            register_fsdp_forward_method(network.get_submodule("backbone"), "read")
    fully_shard(model, mesh=mesh, mp_policy=float32)


def gradient_sync(replica: nn.Module, last: bool) -> AbstractContextManager[None]:
    """For forward and backward of one micro-batch: DDP averages gradients only after the last one."""
    if isinstance(replica, DistributedDataParallel) and not last:
        return replica.no_sync()
    return nullcontext()


def unsharded_backbone(recipe: Recipe, backbone: Backbone) -> Backbone:
    """The backbone itself, or an unsharded copy of a sharded one, in every process; all must call it.

    An evaluator may call the result more often in one process than in another; FSDP would wait for ever.
    """
    if not any(hasattr(x, "full_tensor") for x in backbone.parameters()):
        return backbone
    with torch.device("meta"):
        copy = build_backbone(recipe)
    state = {name: full(x).detach() for name, x in backbone.state_dict().items()}
    copy.load_state_dict(state, strict=True, assign=True)
    copy.licence = backbone.licence
    copy.eval().requires_grad_(False)
    return copy


def _mesh(device: str) -> DeviceMesh:
    """One dimension in a node; for several nodes of several processes two: replicate and shard.

    One of several students has one dimension.
    """
    if group() is not None:
        return DeviceMesh.from_group(group(), device, mesh_dim_names=("shard",))
    ours = launch()
    if ours.nodes > 1 and ours.local_world > 1:
        sizes = (ours.nodes, ours.local_world)
        return init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (world_size(),), mesh_dim_names=("shard",))


def _mixed_precision(recipe: Recipe, device: torch.device) -> MixedPrecisionPolicy:
    # Half the bytes to gather on a GPU. Inputs stay as they are: the sums of the residual stream are float32,
    # and autocast decides what is computed in what. A CPU's layer norm refuses weights of another type.
    dtype = DTYPES[recipe.run.precision] if device.type == "cuda" else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _all_used(student: Network, recipe: Recipe) -> bool:
    """Whether every parameter is known to be used by some loss."""
    token = recipe.masks is not None or not hasattr(student.backbone, "mask_token")
    heads = "dino" in recipe.losses and ("ibot" in recipe.losses or student.one_head)
    norms = recipe.crops.locals.count > 0 or not hasattr(student.backbone, "local_cls_norm")
    always = all(tuple(values.get("phase", (0, 1))) == (0, 1) for values in recipe.losses.values())
    return token and heads and norms and always
