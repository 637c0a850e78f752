"""Commands of the `dinokit` program. A registry: each file that defines `run` is a command.

The docstring of a command is its help; the first line is 'usage: purpose'. A command defines

    run(command: Command) -> None

and may define

    FLAGS: dict[str, str]                      # its options with their help: {"--json": "print JSON"};
                                               # an option "--against=" takes a value
    describe(words: Sequence[str]) -> str      # more help, made only for --help: available names and keys
    check(command: Command) -> Any             # checks the settings, as `dinokit submit` does before a job
                                               # waits in the queue; raises ValueError or LookupError
    MULTI_PROCESS = True                       # several processes can share its work
    RESUMES = True                             # the same command resumes after a stop

Imports of torch and other large packages stand inside these functions, after the checks of the settings, so
that help and error messages appear at once.
"""

import ast
import json
import sys
import tokenize
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, get_args, get_origin

from dinokit.config import registry

WIDTH, COLUMN = 110, 32  # characters in a line; column of the meaning


@dataclass
class Command:
    """The parsed words of a command line after the name of the command."""

    words: list[str]  # without '=', as names of recipes
    settings: list[str]  # key=value
    flags: dict[str, str] = field(default_factory=dict)  # options such as "--json", with value or ""
    rest: list[str] = field(default_factory=list)  # everything after --

    def one_word(self, meaning: str, available: Sequence[str] = ()) -> str:
        """The only word.

        Args:
            meaning: what the word names, for the error.
            available: names that may be given, for the error.

        Raises:
            ValueError: if there is no word, or more than one.
        """
        if len(self.words) == 1:
            return self.words[0]
        listed = f" There is: {', '.join(available)}." if available else ""
        if not self.words:
            raise ValueError(f"Which {meaning}?{listed}")
        raise ValueError(
            f"'{self.words[1]}' is not of the form key=value, and the {meaning} was given already: "
            f"'{self.words[0]}'."
        )

    def no_words(self, hint: str = "") -> None:
        """Refuse words.

        Raises:
            ValueError: if there are any.
        """
        if self.words:
            raise ValueError(f"'{self.words[0]}' is not of the form key=value.{hint}")


def parse(name: str, argv: Sequence[str], options: Sequence[str]) -> Command:
    """Parse the command line of the command `name`.

    Args:
        name: of the command, for errors.
        argv: the words after it.
        options: available options; one that ends in '=' takes a value, as --option=value or --option value.

    Raises:
        ValueError: for an unknown option, a missing value, or a value for an option without one.
    """
    command, remaining = Command([], []), list(argv)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            command.rest, remaining = remaining, []
        elif word.startswith("-"):
            option, equals, value = word.partition("=")
            if option not in options and f"{option}=" not in options:
                near = registry.suggest(option, [each.rstrip("=") for each in options])
                raise ValueError(
                    f"There is no option {option} of dinokit {name}.{near} Settings are given as key=value."
                )
            takes_value = f"{option}=" in options
            if takes_value and not equals and remaining:
                value = remaining.pop(0)
            if takes_value != bool(value):
                needs = "a value" if takes_value else "no value"
                raise ValueError(f"{option} takes {needs}: dinokit {name} --help.")
            command.flags[option] = value
        else:
            (command.settings if "=" in word else command.words).append(word)
    return command


def parse_part(text: str) -> tuple[int, int]:
    """Parse the setting part=I/N: '3/16' is (3, 16), and '' is (0, 1).

    Raises:
        ValueError: if the text is neither.
    """
    if not text:
        return 0, 1
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or int(number) >= int(count):
        raise ValueError(f"part={text}: it is I/N, with I from 0 to N - 1, as part=0/16.")
    return int(number), int(count)


def key_lines(kind: str, name: str, without: Collection[str] = ()) -> list[str]:
    """Lines for each key of a registry entry but those in `without`. The file is not imported.

    Raises:
        LookupError: if there is no such file, or it defines no Config.
    """
    return config_lines(registry.read_config(kind, name), without=without)


def config_lines(config: type[Any], prefix: str = "", without: Collection[str] = ()) -> list[str]:
    """Lines for each field of a dataclass but those in `without`; those of a section are SECTION.KEY."""
    texts, lines = comments(config), []
    for item in fields(config):
        if is_dataclass(item.type) and isinstance(item.type, type):
            lines += config_lines(item.type, f"{prefix}{item.name}.")
        elif item.name not in without:
            lines.append(key_line(prefix + _default(item), _meaning(item, texts[item.name])))
    return lines


def key_line(key: str, meaning: str) -> str:
    """`key = default` and its meaning: beside it, or below it if the key is long."""
    left = f"    {key}"
    beside = len(left) < COLUMN - 1
    if not meaning:
        return left
    text = fill(meaning, WIDTH, initial_indent=" " * COLUMN, subsequent_indent=" " * COLUMN)
    return f"{left}{text[len(left) :]}" if beside else f"{left}\n{text}"


def comments(config: type[Any]) -> dict[str, str]:
    """The comment of each field of a dataclass and its base classes: beside it, or on lines above it."""
    result: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if is_dataclass(cls):
            result |= _class_comments(Path(sys.modules[cls.__module__].__file__ or ""), cls.__name__)
    return result


def _class_comments(path: Path, class_name: str) -> dict[str, str]:
    with path.open("rb") as file:
        words = list(tokenize.tokenize(file.readline))
    beside = {w.start[0]: w.string.lstrip("# ") for w in words if w.type == tokenize.COMMENT}
    alone = {w.start[0] for w in words if w.type == tokenize.COMMENT and not w.line[: w.start[1]].strip()}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    result = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            result[node.target.id] = " ".join(beside[line] for line in lines if line in beside)
    return result


def _default(item: "Field[Any]") -> str:
    if item.default_factory is not MISSING:
        return item.name
    if item.default in (MISSING, "???"):
        return f"{item.name} (must be given)"
    return item.name if item.default is None else f"{item.name} = {json.dumps(item.default, default=list)}"


def _meaning(item: "Field[Any]", comment: str) -> str:
    options = get_args(item.type) if get_origin(item.type) is Literal else ()
    if "registry" in item.metadata:
        have = ", ".join(registry.names(item.metadata["registry"]))
        inside = f"{item.name}.NAME" if "many" in item.metadata else item.name
        options = (f"a section: {inside}.path=..., {inside}.name= one of {have}, and its keys",)
        return ". ".join(filter(None, [options[0], comment]))
    conditions = [registry.condition_text(*pair) for pair in item.metadata.get("only_if", {}).items()]
    when = f"only {' and '.join(conditions)}" if conditions else ""
    return "; ".join(filter(None, [", ".join(map(str, options)), comment, when]))
