"""AdamW with the parameter groups of DINOv2 (layer-wise learning rates), and gradient clipping.

A group has the parameters that share a factor on the learning rate, weight decay or none, and a schedule.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from dinokit.config.load import Optim
from dinokit.models import Backbone
from dinokit.runtime.distributed import full, local
from dinokit.train.networks import Network


def parameter_groups(student: Network, cfg: Optim) -> list[dict[str, Any]]:
    """Every trainable parameter of the student once, in groups for AdamW.

    A group has `lr_scale`, `decays` and `role` (backbone, heads, prototypes) beside `params`. Biases, norms
    and LayerScale gains (all that has one dimension) do not decay; tokens, positions and the prototypes'
    lengths do, as in DINOv2.
    """
    groups: dict[tuple[float, bool, str], list[Tensor]] = {}
    for name, p, scale in _scaled(student, cfg):
        if p.requires_grad:
            groups.setdefault((scale, p.ndim > 1, _role(name)), []).append(p)
    return [
        {"params": params, "lr_scale": scale, "decays": decays, "role": role}
        for (scale, decays, role), params in groups.items()
    ]


def build_optimizer(student: Network, cfg: Optim) -> AdamW:
    """AdamW over parameter_groups(); its rates and decay are set every step by set_rates()."""
    return AdamW(parameter_groups(student, cfg), betas=cfg.betas, fused=True)


def set_rates(optimizer: AdamW, rates: Mapping[str, float], weight_decay: float) -> None:
    """Give every group its share of this step's learning rate, by role, and of the weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]] * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(student: Network, cfg: Optim) -> dict[str, Tensor]:
    """Scale gradients down to norm `clip`, child by child or tensor by tensor. Never waits for the device.

    Returns:
        The norm of each child's gradient, (), before clipping.
    """
    norms = {}
    for name, child in student.named_children():
        grads = [p.grad for p in child.parameters() if p.grad is not None]
        if not grads:  # a head that no loss reads
            continue
        each = full(torch.stack(torch._foreach_norm(grads)))  # (tensors,)
        grads = [local(g) for g in grads]
        norms[name] = each.norm()
        if cfg.clip and cfg.clip_per == "part":
            torch._foreach_mul_(grads, (cfg.clip / (norms[name] + 1e-6)).clamp(max=1))
        elif cfg.clip:
            torch._foreach_mul_(grads, list((cfg.clip / (each + 1e-6)).clamp(max=1).unbind()))
    return norms


def drop_prototype_gradients(optimizer: AdamW) -> None:
    """Leave the prototypes out of the next step: DINO's way of freezing, which keeps Adam's moments too."""
    for group in optimizer.param_groups:
        if group["role"] == "prototypes":
            for p in group["params"]:
                p.grad = None


def _role(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    return "prototypes" if "last_layer" in name else "heads"


def _scaled(student: Network, cfg: Optim) -> Iterator[tuple[str, Tensor, float]]:
    """Each parameter with its name and its factor on the learning rate."""
    scales = _layer_scales(student.backbone, cfg.layer_decay)
    for name, p in student.named_parameters():
        yield name, p, scales.get(id(p), 1.0) * (cfg.patch_lr if "patch_embed" in name else 1.0)


def _layer_scales(backbone: Backbone, decay: float) -> dict[int, float]:
    """By id of the parameter: decay ** (n - i) in block i of n, decay ** (n + 1) before, 1 after them."""
    depth = len(backbone.blocks)
    scales = {
        id(p): decay ** (depth - i) for i, block in enumerate(backbone.blocks) for p in block.parameters()
    }
    first = decay ** (depth + 1)
    for p in backbone.parameters():  # in order of registration: tokens and embeddings, blocks, final norm
        if id(p) in scales:
            first = 1.0
        else:
            scales[id(p)] = first
    return scales
