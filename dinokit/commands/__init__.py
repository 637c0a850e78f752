"""Commands of the `dinokit` program. A registry: each file that defines `run` is a command.

The docstring of a command is its help; the first line is 'usage: purpose'. A command defines

    run(command: Command) -> dict[str, Any]    # the result, which --json prints as one object

and may define

    words() -> Sequence[str]                   # names that may be given without key=, for completion
    RENAMED: dict[str, str]                    # old keys and options with their new name: read, with a notice
    SHORT = RECIPE_KEYS                        # common keys of the command, with their place in a recipe
    FLAGS: dict[str, str]                      # its options with their help: {"--json": "print JSON"};
                                               # an option "--against=" takes a value
    describe(words: Sequence[str]) -> str      # more help, made only for --help: available names and keys
    check(command: Command) -> Any             # checks the settings, as `dinokit submit` does before a job
                                               # waits in the queue; raises ValueError or LookupError
    MULTI_PROCESS = True                       # several processes can share its work
    RESUMES = True                             # the same command resumes after a stop

Keys that several commands have are named as in COMMON. The options in OPTIONS work in all commands; the
program itself implements them.

Imports of torch and other large packages stand inside these functions, after the checks of the settings, so
that help and error messages appear at once. Functions here do not call list(): in this package the name is
that of the command.
"""

import ast
import json
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, get_args, get_origin

from dinokit.config import registry

WIDTH, COLUMN = 110, 32  # characters in a line; column of the meaning
OPTIONS = {
    "--help": "help for a command: usage, keys, examples",
    "--json": "print the result as one JSON object; everything else goes to standard error",
    "--quiet": "print nothing but errors, and with --json the object",
    "--version": "the version of dinokit",
    "--traceback": "show the Python traceback of an error",
    "--trust=": "packages, as a,b, whose modules a file of weights may name",
}
LETTERS = {"-h": "--help", "-V": "--version", "-q": "--quiet"}
COMMON = {  # keys with the same name and meaning in every command that has them
    "weights": "a file or a run to start from, or to use",
    "out": "the file or folder to write",
    "device": "cpu, cuda, cuda:1 ...; auto: a GPU if there is one",
    "batch": "images at a time; of training, images in a step",
    "workers": "processes that load images",
    "precision": "auto, fp32, bf16 or fp16",
    "seed": "of all random numbers",
    "size": "pixels of the images",
    "k": "neighbours",
    "data": "images: data.path=FOLDER, or data.name=SOURCE and what it takes",
    "train": "images to learn from: train.path=FOLDER",
    "test": "images to test on: test.path=FOLDER",
    "recipe": "a name in configs/, or the path of a YAML file",
}
# Common keys of commands that take a recipe: each is short for a key of the recipe.
RECIPE_KEYS = {
    "weights": "backbone.weights",
    "out": "run.out",
    "device": "run.device",
    "batch": "optim.batch",
    "workers": "run.workers",
    "precision": "run.precision",
    "seed": "run.seed",
    "steps": "optim.steps",
}


class FailedError(RuntimeError):
    """Work of a command that failed after it began, as one of several evaluations.

    Args:
        text: for the user.
        exit_status: of the program, as in dinokit.commands._outcome; by default of a training that stopped.
        result: what the command has found, which --json prints beside the error.
    """

    def __init__(self, text: str, exit_status: int = 4, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self.exit_status, self.result = exit_status, result or {}


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
            f"'{self.words[1]}' is not of the form key=value, without spaces, and '{self.words[0]}' is the "
            f"{meaning} already."
        )

    def no_words(self, hint: str = "") -> None:
        """Refuse words.

        Raises:
            ValueError: if there are any.
        """
        if self.words:
            raise ValueError(f"'{self.words[0]}' is not of the form key=value.{hint}")

    def show(self, result: Mapping[str, Any]) -> None:
        """Print a result as a line of JSON; not with --json, which prints what the command returns."""
        if "--json" not in self.flags:
            print(json.dumps(result), flush=True)


def parse(name: str, argv: Sequence[str], options: Sequence[str]) -> Command:
    """Parse the command line of the command `name`.

    Args:
        name: of the command, for errors.
        argv: the words after it.
        options: available options; one that ends in '=' takes a value, as --option=value or --option value.

    Raises:
        ValueError: for an unknown option, a missing value, or a value for an option without one.
    """
    command, remaining = Command([], []), [*argv]
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


def read_command(name: str, argv: Sequence[str]) -> Command:
    """Parse the command line of a command of the registry; old and short keys get their present names.

    Raises:
        ValueError, LookupError: as parse(); or if there is no such command, or a key is given twice.
    """
    module = registry.find("commands", name)
    renamed, short = getattr(module, "RENAMED", {}), getattr(module, "SHORT", {})
    old_flags = [f"{key}=" for key in renamed if key.startswith("--")]
    command = parse(name, argv, [*OPTIONS, *LETTERS, *getattr(module, "FLAGS", {}), *old_flags])
    command.flags = {LETTERS.get(option, option): value for option, value in command.flags.items()}
    for option in [option for option in command.flags if option in renamed]:
        command.settings.append(f"{renamed[option]}={command.flags.pop(option)}")
        print(f"dinokit: {option} is now called {renamed[option]}=.", file=sys.stderr)
    command.settings = [_present_name(text, renamed, short) for text in command.settings]
    return command


def _present_name(text: str, renamed: Mapping[str, str], short: Mapping[str, str]) -> str:
    key, equals, value = text.partition("=")
    if key in renamed:
        print(f"dinokit: {key}= is now called {renamed[key]}=.", file=sys.stderr)
        key = renamed[key]
    return full_key(f"{key}{equals}{value}", short)


def full_key(text: str, short: Mapping[str, str] = RECIPE_KEYS) -> str:
    """`key=value` with the key in full, as in a recipe, where it is short for one."""
    key, equals, value = text.partition("=")
    return f"{short.get(key, key)}{equals}{value}"


def image_files(words: Sequence[str]) -> Sequence[str]:
    """The files that `words` name, with those of a folder, and of the folders in it, in its place.

    Raises:
        ValueError, LookupError: if a folder has no image.
    """
    files = []
    for word in words:
        if Path(word).is_dir():
            from dinokit.data.sources import folder

            source: Any = folder.build(folder.Config(path=word))
            files += [str(source.file(index)) for index in range(len(source))]
        else:
            files.append(word)
    return files


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
    """Lines for each key of a registry entry but those in `without`. A file of dinokit is not imported.

    Raises:
        LookupError: if there is no such file, or it defines no Config.
    """
    return config_lines(registry.read_config(kind, name), without=without)


def config_lines(config: type[Any], without: Collection[str] = ()) -> list[str]:
    """Lines for each field of a dataclass but those in `without`; those of a section are SECTION.KEY."""
    return [key_line(*pair) for pair in config_keys(config, without=without)]


def config_keys(
    config: type[Any], prefix: str = "", without: Collection[str] = (), section: Any = None
) -> Iterator[tuple[str, str]]:
    """`key = default` and the meaning of each field of a dataclass but those in `without`.

    The defaults of a section of that dataclass are those of `section`, an instance, if it is given.
    """
    texts = comments(config)
    for item in fields(config):
        if is_dataclass(item.type) and isinstance(item.type, type):
            inner = item.default_factory() if item.default_factory is not MISSING else None
            inner = getattr(section, item.name, inner)
            yield from config_keys(item.type, f"{prefix}{item.name}.", section=inner)
        elif item.name not in without:
            default = item.default if section is None else getattr(section, item.name)
            yield prefix + _default(item, default), _meaning(item, texts[item.name])


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
        words = [*tokenize.tokenize(file.readline)]
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


def _default(item: "Field[Any]", default: object) -> str:
    if item.default_factory is not MISSING:
        return item.name
    if default in (MISSING, "???"):
        return f"{item.name} (must be given)"
    return item.name if default is None else f"{item.name} = {json.dumps(default, default=tuple)}"


def _meaning(item: "Field[Any]", comment: str) -> str:
    options = get_args(item.type) if get_origin(item.type) is Literal else ()
    if "registry" in item.metadata:
        have = ", ".join(registry.names(item.metadata["registry"]))
        inside = f"{item.name}.NAME" if "many" in item.metadata else item.name
        listed = {"models": "backbones", "eval": "evaluators"}.get(item.metadata["registry"])
        listed = listed or item.metadata["registry"].rpartition(".")[2]
        options = (
            f"a section: {inside}.path=..., {inside}.name= one of {have}, and its keys "
            f"(dinokit list {listed} NAME)",
        )
        return ". ".join(filter(None, [options[0], comment]))
    conditions = [registry.condition_text(*pair) for pair in item.metadata.get("only_if", {}).items()]
    when = f"only {' and '.join(conditions)}" if conditions else ""
    return "; ".join(filter(None, [", ".join(map(str, options)), comment, when]))
