import pytest

from dinokit.commands import comments, key_lines
from dinokit.config.registry import names, read_config

FILE = """
from dataclasses import dataclass, field
from typing import Any, Literal

from dinokit.config.registry import only_if


@dataclass
class Config:
    plain: int = 3  # images
    # Two lines of their own,
    # above it.
    above: dict[str, Any] | None = field(default=None, metadata={"registry": "losses"})
    long: tuple[int, ...] = (
        1,
        2,
    )  # after the bracket
    inside: Literal["a", "b"] = (
        "a"  # inside of it
    )
    bare: str = "a # b"
    hung: int = only_if(3, inside=("b",), long=True, plain=False)  # on others
    wanted: str = "???"


class Other:
    plain: int = 4  # of another class


def evaluate(cfg, backbone):
    return {}
"""


def test_a_comment_belongs_to_the_field_that_it_stands_beside_or_above(monkeypatch, tmp_path):
    (tmp_path / "spoken").mkdir()
    (tmp_path / "spoken" / "__init__.py").touch()
    (tmp_path / "spoken" / "keys.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    assert comments(read_config("eval", "spoken.keys")) == {
        "plain": "images",
        "above": "Two lines of their own, above it.",
        "long": "after the bracket",
        "inside": "inside of it",
        "bare": "",
        "hung": "on others",
        "wanted": "",
    }
    lines = key_lines("eval", "spoken.keys", without=["long"])
    assert lines[0] == f"{'    plain = 3':<32}images"
    names = "a section: above.path=..., above.name= one of coding_rate, contrastive, dino"
    assert lines[1].startswith(f"{'    above':<32}{names}")
    assert lines[2] == '    inside = "a"'.ljust(32) + "a, b; inside of it"
    assert lines[3] == '    bare = "a # b"'
    assert lines[4].split(maxsplit=3)[3] == "on others; only with inside=b and with long and without plain"
    assert lines[5:] == ["    wanted (must be given)"]


@pytest.mark.parametrize("name", names("eval"))
def test_every_key_of_an_evaluator_is_explained_but_for_the_plainest(name):
    texts = comments(read_config("eval", name))
    assert list(texts) == list(read_config("eval", name).__dataclass_fields__)
    bare = {key for key, text in texts.items() if not text}
    assert bare <= {"train", "test", "max_test", "seed", "steps", "batch", "lr", "weight_decay"}
