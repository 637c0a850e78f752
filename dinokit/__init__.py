"""dinokit: train, evaluate and use self-supervised visual features.

    backbone = dinokit.load_backbone("runs/photos")
    features = dinokit.encode(backbone, "photo.jpg")  # (1, D)

The names in __all__ are the library; each is imported when it is first used, so `import dinokit` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dinokit import viz
    from dinokit.api import (
        create_model,
        encode,
        evaluate,
        export,
        extract,
        list_models,
        predict,
        search,
        train,
        transform,
    )
    from dinokit.embedder import Embedder
    from dinokit.features import open_store
    from dinokit.weights import load_backbone

_HOMES = {
    "Embedder": "dinokit.embedder",
    "load_backbone": "dinokit.weights",
    "open_store": "dinokit.features",
}
_MODULES = ("train", "viz")  # names of modules; dinokit.train is called as a function, see its file

__all__ = [
    "Embedder", "create_model", "encode", "evaluate", "export", "extract", "list_models", "load_backbone",
    "open_store", "predict", "search", "train", "transform", "viz",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dinokit.{name}")
    if name in __all__:
        value = getattr(import_module(_HOMES.get(name, "dinokit.api")), name)
        globals()[name] = value
        return value
    near = import_module("dinokit.config.registry").suggest(name, __all__)
    raise AttributeError(f"dinokit has no '{name}'.{near} It has: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
