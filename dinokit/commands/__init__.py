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

from collections.abc import Sequence
from dataclasses import dataclass, field

from dinokit.config.registry import suggest


@dataclass
class Command:
    """The parsed words of a command line behind the name of the command."""

    words: list[str]  # without '=', as names of recipes
    settings: list[str]  # key=value
    flags: dict[str, str] = field(default_factory=dict)  # options such as "--json", with value or ""
    rest: list[str] = field(default_factory=list)  # everything behind --

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
        argv: the words behind it.
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
                near = suggest(option, [each.rstrip("=") for each in options])
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
