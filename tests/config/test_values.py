"""Values against a dataclass: conversions, and keys of sections that must be given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from dinokit.config.values import validated


@dataclass
class Inner:
    file: str
    size: int = 3


@dataclass
class Outer:
    level: Literal[1, 2] = 1
    switch: Literal["on", "3"] = "3"
    place: Path = Path()
    text: str = ""
    inner: Inner | None = None
    many: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"level": 2}, 2),
        ({"level": "2"}, 2),
        ({"switch": True}, "on"),  # YAML reads on as a boolean
        ({"switch": 3}, "3"),
        ({"place": "a"}, Path("a")),
        ({"place": Path("a")}, Path("a")),
        ({"text": Path("a")}, "a"),  # from Python
        ({"inner": {"file": "x"}}, Inner("x", 3)),
        ({"many": {"a": {"file": "x", "size": "5"}}}, {"a": Inner("x", 5)}),
    ],
)
def test_a_value_gets_the_type_that_its_field_declares(given, expected):
    ((key, _),) = given.items()
    found = validated(Outer, given, "")
    assert found[key] == expected
    assert type(found[key]) is type(expected)
    assert {name: found[name] for name in found if name != key} == {
        name: value for name, value in vars(Outer()).items() if name != key
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": True}, "p.level: true is not one of 1, 2."),
        ({"level": 1.0}, "p.level: 1.0 is not one of 1, 2."),
        ({"place": 3.5j}, "p.place: "),
        ({"inner": {}}, "p.inner.file must be given, as in p.inner.file=VALUE."),
        ({"inner": {"size": 1}}, "p.inner.file must be given"),
        ({"many": {"a": {}}}, "p.many.a.file must be given"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_key(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        validated(Outer, given, "p")
