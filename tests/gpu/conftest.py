"""An emulated GPU: tensors that say they are on cuda:0 and are computed on the CPU, or not at all.

It proves what does not depend on the card: that tensors which meet are on one device, that dtypes are those
of autocast on CUDA, and that the host never waits. It says nothing about CUDA's own kernels, about speed and
about memory: that is for the tests marked `gpu`.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from dinokit.config.load import load_recipe
from dinokit.data.loader import training_loader
from dinokit.data.sources.scenes import Config, build
from dinokit.train.networks import block_masks

aten = torch.ops.aten
GPU = torch.device("cuda:0")
STAGED = 2**16  # bytes: CUDA copies so many from pageable memory without waiting for the device

# Operations whose CUDA kernel brings a number, or the size of its result, to the host.
WAITS = frozenset({
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.bincount.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten._linalg_check_errors.default,
})  # fmt: skip
INDEXING = frozenset({
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
})  # fmt: skip


class OnGpu(Tensor):
    """A tensor on cuda:0. Its numbers are in `held`, on the CPU; or it has none, on the device "meta"."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=GPU,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnGpu({self.held})"

    def tolist(self):  # PyTorch has none for a subclass
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("a tensor on cuda:0 has no array: copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the emulated GPU")

    __torch_function__ = torch._C._disabled_torch_function_impl


class EmulatedGpu(TorchDispatchMode):
    """Meanwhile there is a device cuda:0.

    Args:
        held: where its tensors' numbers are: "cpu", or "meta" for none; reading one then raises.

    Attributes:
        waits: what made the host wait for the device, in order.
        uploads: shapes of the tensors that were copied to the device.
    """

    def __init__(self, held="cpu"):
        super().__init__()
        self.device, self.waits, self.uploads = torch.device(held), [], []
        self.pinned = {}  # tensors in page-locked memory, by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        with unset_fake_temporarily():
            if func is aten._pin_memory.default:
                return self._pin(args[0])
            if not ours and to != "cuda":
                return func(*args, **kwargs)
            self._note(func, args, kwargs, to)
            self._check_devices(func, tensors, ours)
            if to is not None:
                kwargs["device"] = self.device if to == "cuda" else torch.device("cpu")
            kwargs.pop("pin_memory", None)
            args_held, kwargs_held = tree_map(self._held, (args, kwargs))
            out = func(*args_held, **kwargs_held)
            there = to == "cuda" if to is not None else bool(ours)
            if func is aten.copy_.default:
                there = isinstance(args[0], OnGpu)
            if not there or not any(isinstance(x, Tensor) for x in tree_leaves(out)):
                return out
            out = tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, out)
            return return_and_correct_aliasing(func, args, kwargs, out)

    def _held(self, x):
        return x.held if isinstance(x, OnGpu) else x

    def _pin(self, x):
        out = x.clone()
        self.pinned[out.untyped_storage()._cdata] = out
        return out

    def _check_devices(self, func, tensors, ours):
        # A number () may stay on the CPU, as may an index; a copy is there to change the device.
        apart = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]
        if ours and apart and func is not aten.copy_.default and func not in INDEXING:
            shapes = [tuple(x.shape) for x in apart]
            raise RuntimeError(f"{func}: all tensors must be on one device, but {shapes} are on the CPU")

    def _note(self, func, args, kwargs, to):
        if func in WAITS:
            self.waits.append(str(func))
        elif func is aten._to_copy.default:
            self._move(args[0], to or args[0].device.type, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._move(args[1], args[0].device.type, args[2] if len(args) > 2 else False)
        elif func in INDEXING:
            for index in (x for x in args[1] if x is not None):
                if index.device.type == "cpu":
                    self.waits.append(f"{func} by an index on the CPU")
                elif index.dtype == torch.bool:
                    self.waits.append(f"{func} by a mask")

    def _move(self, x, to, non_blocking):
        if (x.device.type, to) == ("cuda", "cpu"):
            self.waits.append(f"copy of {tuple(x.shape)} to the CPU")
        elif (x.device.type, to) == ("cpu", "cuda"):
            self.uploads.append(tuple(x.shape))
            pinned = x.nbytes <= STAGED or x.untyped_storage()._cdata in self.pinned
            if not (non_blocking and pinned):
                self.waits.append(f"copy of {tuple(x.shape)} from pageable memory")


def run_backward(tensors, gradients, *_, **__):
    """The backward pass, node by node. Autograd's own engine asks CUDA's driver for its streams."""
    waiting, seen = {}, {x.grad_fn for x in tensors}
    remaining = list(seen)
    while remaining:
        for node, _ in remaining.pop().next_functions:
            if node is not None:
                waiting[node] = waiting.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    remaining.append(node)
    inputs = {node: [None] * len(node._input_metadata) for node in seen}

    def add(node, place, gradient):
        if gradient is None:
            return
        meta, before = node._input_metadata[place], inputs[node][place]
        assert gradient.device == meta.device, f"{node}: a gradient on {gradient.device}"
        gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)
        inputs[node][place] = gradient if before is None else before + gradient

    for x, gradient in zip(tensors, gradients, strict=True):
        add(x.grad_fn, x.output_nr, torch.ones_like(x) if gradient is None else gradient)
    ready = [x.grad_fn for x in tensors]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = inputs.pop(node)
            results = (None,) * len(node.next_functions)
            if any(x is not None for x in given):
                results = getattr(node, "apply", node)(*given)
                results = results if isinstance(results, tuple) else (results,)
            for (following, place), gradient in zip(node.next_functions, results, strict=False):
                if following is not None:
                    add(following, place, gradient)
                    waiting[following] -= 1
                    if not waiting[following]:
                        ready.append(following)
    return ()


@pytest.fixture
def emulated(monkeypatch):
    """with emulated() as gpu: ...; there is a device cuda:0, for whoever names it."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    # Inference mode refuses views of a subclass of Tensor: nothing but gradients is left out here.
    monkeypatch.setattr(torch.inference_mode, "__enter__", torch.no_grad.__enter__)
    monkeypatch.setattr(torch.inference_mode, "__exit__", torch.no_grad.__exit__)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)  # what checkpointing asks for
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()

    @contextmanager
    def enter(held="cpu"):
        gpu = EmulatedGpu(held)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            # FakeTensorMode computes nothing here; while it is entered, PyTorch does not start CUDA.
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                torch.compiler.set_stance("force_eager"),
                torch.backends.cudnn.flags(enabled=False),  # else batch norm would call its kernel by name
                gpu,
            ):
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)

    return enter


TINY = """
backbone: {name: vit, size: 32, width: 24, depth: 2, heads: 2, patch: 8, layer_scale: 1.0, drop_path: 0.2}
heads: {cls: {prototypes: 32, hidden: 32, bottleneck: 16}}
losses: {dino: {}, ibot: {}, koleo: {}}
teacher: {momentum: [0.9, 1.0], temp: [0.04, 0.07], temp_warmup: 4}
crops: {globals: {count: 2, size: 32}, locals: {count: 2, size: 16}}
masks: {images: 0.5, patches: [0.2, 0.5]}
optim: {steps: 6, batch: 4, lr: 1e-3, lr_rule: none, warmup: 2}
data: {name: scenes, size: 48}
run: {precision: fp32, workers: 0, log_every: 1, checkpoint_every: 2}
"""


@pytest.fixture
def tiny(tmp_path):
    """tiny(*overrides): the recipe of a small run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return lambda *overrides: load_recipe(path, [f"run.out={tmp_path / 'run'}", *overrides])


@pytest.fixture
def batches():
    """batches(recipe, model, steps): as the loader hands them over."""

    def load(recipe, model, steps):
        masks = block_masks(recipe, model.student.backbone)
        return training_loader(
            build(Config(size=48)), recipe.crops, masks, seed=0, start_step=0, steps=steps,
            batch=recipe.optim.batch, workers=0,
        )  # fmt: skip

    return load
