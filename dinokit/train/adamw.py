"""AdamW with PyTorch's fused kernel, and without torch.optim.

torch.optim imports PyTorch's compiler and Triton when it is first used: 0.1 GiB that a process never gives
back, and most of a second of every start.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinokit.runtime.distributed import local


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        groups: each with `params`, and with `lr` and `weight_decay`, which step() reads anew every time.
        betas: of the moving averages of the gradient and of its square.
        eps: added to the root of the latter.

    Attributes:
        param_groups: the groups.
        state: of each parameter that has been stepped: `exp_avg` and `exp_avg_sq`, shaped and sharded as it
            is, and `step`, (), how often.
    """

    # GradScaler then hands over whether a gradient overflowed as a tensor, and does not wait for it.
    _step_supports_amp_scaling = True

    def __init__(
        self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        self.param_groups = list(groups)
        self.betas, self.eps = betas, eps
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient; with GradScaler, none if any of them overflowed."""
        overflow: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            state = [self._state(p) for p in params]
            steps = [s["step"] for s in state]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(s["exp_avg"]) for s in state],
                [local(s["exp_avg_sq"]) for s in state],
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=overflow,
            )
            if overflow is not None:
                torch._foreach_sub_(steps, [overflow] * len(steps))

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state
