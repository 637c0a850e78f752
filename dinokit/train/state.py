"""Model and optimiser as tensors by name, whole or cut up: what a checkpoint is made of.

model.NAME is a parameter or buffer; optimizer.KEY.NAME is what AdamW keeps of the parameter NAME. A parameter
that has not been stepped yet, such as a frozen prototype, has nothing there, and gets nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dinokit.runtime.distributed import local

MODEL, OPTIMIZER = "model.", "optimizer."


def tensors(model: nn.Module, trained: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Every tensor of the model, and of the optimiser of `trained`, which is a part of it."""
    state = {f"{MODEL}{name}": x for name, x in model.state_dict().items()}
    for name, p in trained.named_parameters():
        state |= {f"{OPTIMIZER}{key}.{name}": x for key, x in optimizer.state.get(p, {}).items()}
    return state


def targets(
    stored: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    trained: nn.Module,
    optimizer: AdamW,
) -> dict[str, Tensor]:
    """Tensors to read a checkpoint with these names and shapes into; then give them to restore().

    Raises:
        ValueError: if it does not fit the model.
    """
    have, parameters = model.state_dict(), dict(trained.named_parameters())
    absent = [name for name in have if f"{MODEL}{name}" not in stored]
    done: dict[str, Tensor] = {}
    for key, shape in stored.items():
        if key.startswith(MODEL):
            x = have.get(key.removeprefix(MODEL))
            # A centre learns its length from the first batch, so a new one is of another shape.
            done[key] = x if x is not None and tuple(x.shape) == shape else torch.zeros(shape)
            absent += [key] if x is None else []
        else:
            p = parameters.get(key.removeprefix(OPTIMIZER).split(".", 1)[1])
            absent += [key] if p is None else []
            if p is not None:
                done[key] = torch.zeros_like(p) if tuple(p.shape) == shape else torch.zeros(shape)
    if absent:
        raise ValueError(
            f"The checkpoint was written for another model, or by another version of dinokit: "
            f"{', '.join(absent[:5])} {'is' if len(absent) == 1 else 'are'} on one side only."
        )
    return done


@torch.no_grad()
def restore(read: Mapping[str, Tensor], model: nn.Module, trained: nn.Module, optimizer: AdamW) -> None:
    """Put what was read where it belongs."""
    model.load_state_dict({k.removeprefix(MODEL): x for k, x in read.items() if k.startswith(MODEL)})
    parameters = dict(trained.named_parameters())
    for name, x in read.items():
        if name.startswith(OPTIMIZER):
            key, _, of = name.removeprefix(OPTIMIZER).partition(".")
            p = parameters[of]
            optimizer.state[p][key] = x.to(local(p).device)
