"""Parsing of a command line."""

import pytest

from dinokit.commands import parse


def test_words_settings_options_and_the_rest_are_parsed():
    command = parse(
        "v",
        ["what", "a=1", "--json", "--against", "plain", "b.c=-2", "--", "train", "x=1"],
        ["--json", "--against="],
    )
    assert command.words == ["what"]
    assert command.settings == ["a=1", "b.c=-2"]
    assert command.flags == {"--json": "", "--against": "plain"}
    assert command.rest == ["train", "x=1"]
    assert parse("v", ["--against=plain"], ["--against="]).flags == {"--against": "plain"}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--jsn"], "There is no option --jsn of dinokit v. Did you mean '--json'?"),
        (["--json=1"], "--json takes no value"),
        (["--against"], "--against takes a value"),
    ],
)
def test_a_wrong_option_is_named(words, answer):
    with pytest.raises(ValueError, match=r"option|value") as error:
        parse("v", words, ["--json", "--against="])
    assert answer in str(error.value)


def test_one_word_is_one():
    assert parse("v", ["a"], []).one_word("recipe") == "a"
    with pytest.raises(ValueError, match="Which recipe"):
        parse("v", [], []).one_word("recipe")
    with pytest.raises(ValueError, match="'b' is not of the form key=value"):
        parse("v", ["a", "b"], []).one_word("recipe")
    with pytest.raises(ValueError, match="'a' is not"):
        parse("v", ["a"], []).no_words()
