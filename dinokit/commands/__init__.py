"""What `dinokit` can be told to do. A shelf: a file here is a verb of the command line.

A file's docstring is its help: the first line says how it is called and what it does. It defines

    run(command: Command) -> None

and may define

    FLAGS: dict[str, str]                       # its own options, such as {"--json": "print JSON alone"};
                                                # "--against=" is one that takes a value
    describe(words: Sequence[str]) -> str       # more help, once asked: what may be given
    check(command: Command) -> Any              # what run() begins with: it raises for settings that cannot
                                                # be, and `dinokit submit` asks it before a night in the queue
    MULTI_PROCESS = True                               # processes that were started together share its work
    RESUMES = True                              # given again, it goes on where it stopped

Every heavy import waits inside these functions, and settings are checked before it: help and typos are
answered at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dinokit.config.registry import suggest


@dataclass
class Command:
    """What was typed behind the verb."""

    words: list[str]  # those without '='
    settings: list[str]  # key=value
    flags: dict[str, str] = field(default_factory=dict)  # by name, dashes included; "" without a value
    rest: list[str] = field(default_factory=list)  # what stood behind --

    def one_word(self, of: str, have: Sequence[str] = ()) -> str:
        """The only word.

        Args:
            of: what it names, for the error.
            have: what may be given, for the error.

        Raises:
            ValueError: if there is none, or more than one.
        """
        if len(self.words) == 1:
            return self.words[0]
        there = f" There is: {', '.join(have)}." if have else ""
        if not self.words:
            raise ValueError(f"Which {of}?{there}")
        raise ValueError(
            f"'{self.words[1]}' is not of the form key=value, and the {of} was given already: "
            f"'{self.words[0]}'."
        )

    def no_words(self, hint: str = "") -> None:
        """Refuse words.

        Raises:
            ValueError: if there are any.
        """
        if self.words:
            raise ValueError(f"'{self.words[0]}' is not of the form key=value.{hint}")


def parse(verb: str, words: Sequence[str], options: Sequence[str]) -> Command:
    """The words behind `verb`, sorted.

    Args:
        verb: for the errors.
        words: what was typed.
        options: those that there are; one that ends in '=' takes a value, as --name=value or --name value.

    Raises:
        ValueError: for an option that there is not, or one with a value too many or too few.
    """
    command, todo = Command([], []), list(words)
    while todo:
        word = todo.pop(0)
        if word == "--":
            command.rest, todo = todo, []
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            if name not in options and f"{name}=" not in options:
                near = suggest(name, [option.rstrip("=") for option in options])
                raise ValueError(
                    f"There is no option {name} of dinokit {verb}.{near} Settings are given as key=value."
                )
            wants = f"{name}=" in options
            if wants and not equals and todo:
                value = todo.pop(0)
            if wants != bool(value):
                raise ValueError(f"{name} takes {'a value' if wants else 'no value'}: dinokit {verb} --help.")
            command.flags[name] = value
        else:
            (command.settings if "=" in word else command.words).append(word)
    return command


def parse_part(text: str) -> tuple[int, int]:
    """The number of a part, from 0, and how many there are: 3/16 is (3, 16), and nothing is (0, 1).

    Raises:
        ValueError: if the text is neither.
    """
    if not text:
        return 0, 1
    number, slash, of = text.partition("/")
    if not slash or not number.isdecimal() or not of.isdecimal() or int(number) >= int(of):
        raise ValueError(f"part={text}: it is I/N, with I from 0 to N - 1, as part=0/16.")
    return int(number), int(of)
