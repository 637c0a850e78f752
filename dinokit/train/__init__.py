"""Pretraining: the student, the teacher, and the loop that moves them.

The package can be called: `dinokit.train(...)` is the function `train` of dinokit.api.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    """A module that is a function too: importing a module below it would replace a function of its name."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return import_module("dinokit.api").train(*arguments, **keywords)


sys.modules[__name__].__class__ = _Train
