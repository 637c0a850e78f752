import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def paint() -> Callable[[int], bytes]:
    """A small PNG that shows a number."""

    def paint(number: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (3, 2), (number % 256, number // 256, 7)).save(file, "PNG")
        return file.getvalue()

    return paint


def numbers_in(source: Any) -> list[tuple[int, int]]:
    """The number that each image shows, and its label."""
    pairs = [source[i] for i in range(len(source))]
    colours = [(np.asarray(image)[0, 0].tolist(), label) for image, label in pairs]
    return [(red + 256 * green, label) for (red, green, _), label in colours]


@pytest.fixture
def numbers() -> Callable[[Any], list[tuple[int, int]]]:
    return numbers_in


@pytest.fixture
def numbers_elsewhere() -> Callable[[Any], list[list[tuple[int, int]]]]:
    """The same, found by a forked process, by this one from a pickle, and by this one once more."""

    def everywhere(source: Any) -> list[list[tuple[int, int]]]:
        source[0]
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=lambda: theirs.send(numbers_in(source)))
        child.start()
        assert ours.poll(20), "the forked process says nothing"
        forked = ours.recv()
        child.join()
        return [forked, numbers_in(pickle.loads(pickle.dumps(source))), numbers_in(source)]

    return everywhere
