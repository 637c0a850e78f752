"""docs/promises.md: every promise has tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("| ").rsplit(" | ", 1)]
    for line in (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| promise ")
]


@pytest.mark.parametrize(("promise", "tests"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_a_promise_names_tests(promise, tests):
    """That they exist is checked for every page, in test_names.py; `::test_x` is in the file before it."""
    named = re.findall(r"`([^`]+)`", tests)
    assert named or tests.startswith("the same"), promise
    assert not named or named[0].startswith("tests/"), promise
    assert all(re.match(r"tests/.*\.py|::test_", name) for name in named), promise


def test_no_promise_is_made_twice():
    assert len({promise for promise, _ in ROWS}) == len(ROWS) > 30
