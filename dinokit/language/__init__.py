"""Language on frozen features. The language models, their training and their text are those of transformers.

Nothing here is needed to train or to evaluate backbones. Only this package imports transformers' language
models, tokenizers, peft and accelerate, and only when they are used.
"""

from importlib import import_module
from typing import Any


def needed(package: str, extra: str = "language") -> Any:
    """A package that dinokit does without otherwise.

    Raises:
        ValueError: if it is not installed; it says how to install it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise  # it is there, and what it needs itself is not
        raise ValueError(
            f"This needs {package}, which is not installed: pip install 'dinokit[{extra}]', or "
            f"pip install '.[{extra}]' in the clone."
        ) from None
