"""dinokit completion bash|zsh|fish: print a script that completes commands, recipes, evaluators and keys.

The script holds the names that there are now: make it again after an update. It starts no Python when a key
is pressed.

dinokit completion bash > ~/.local/share/bash-completion/completions/dinokit
dinokit completion fish > ~/.config/fish/completions/dinokit.fish
eval "$(dinokit completion zsh)"      # in ~/.zshrc, after compinit
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from dinokit.commands import OPTIONS, Command
from dinokit.config import registry
from dinokit.config.load import Recipe

SHELLS = ["bash", "zsh", "fish"]


def run(command: Command) -> dict[str, Any]:
    shell = command.one_word("shell", SHELLS)
    if shell not in SHELLS or command.settings:
        near = registry.suggest(shell, SHELLS)
        raise ValueError(f"dinokit completion takes one shell.{near} There is: {', '.join(SHELLS)}.")
    candidates = {name: completions(name) for name in registry.names("commands")}
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](candidates)
    print(script)
    return {"shell": shell, "script": script}


def words() -> Sequence[str]:
    return SHELLS


def describe(words: Sequence[str]) -> str:
    return f"shells: {', '.join(SHELLS)}"


def completions(name: str) -> list[str]:
    """What may follow a command: its words, its keys with '=', and its options."""
    module = registry.find("commands", name)
    found = [*module.words()] if hasattr(module, "words") else []
    keys = [*getattr(module, "SHORT", {}), *getattr(module, "OWN", {})]
    if hasattr(module, "Config"):
        keys += _keys(module.Config)
    if hasattr(module, "SHORT"):
        keys += [*_keys(Recipe), "data.name", "data.path", "backbone.name"]
        keys += [f"losses.{loss}.weight" for loss in registry.names("losses")]
    if name == "eval":
        for evaluator in registry.names("eval"):
            keys += _keys(registry.read_config("eval", evaluator))
    options = [*OPTIONS, *getattr(module, "FLAGS", {})]
    return [*found, *(f"{key}=" for key in sorted({*keys})), *options]


def _keys(config: type[Any], prefix: str = "") -> list[str]:
    """The keys of a dataclass and of those in it; of a section that names a source, .name and .path."""
    found = []
    for item in fields(config):
        options = getattr(item.type, "__args__", (item.type,))
        inner = next((each for each in options if isinstance(each, type) and is_dataclass(each)), None)
        if inner is not None:
            found += _keys(inner, f"{prefix}{item.name}.")
        elif "registry" in item.metadata:
            found += [f"{prefix}{item.name}.{key}" for key in ("name", "path")]
        else:
            found.append(prefix + item.name)
    return found


def _bash(candidates: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(f"        {name}) words='{' '.join(each)}' ;;" for name, each in candidates.items())
    return f"""_dinokit() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words
    COMPREPLY=()
    case "$([ "$COMP_CWORD" -gt 1 ] && echo "${{COMP_WORDS[1]}}")" in
        ''|help) words='{" ".join(["help", *candidates])}' ;;
{cases}
    esac
    case "${{COMP_WORDS[COMP_CWORD-1]}}" in =) words='' ;; esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace ;; esac
}}
complete -o default -F _dinokit dinokit"""


def _zsh(candidates: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(f"        {name}) given=({' '.join(each)}) ;;" for name, each in candidates.items())
    return f"""_dinokit() {{
    local -a given keys rest
    if (( CURRENT == 2 )) || [[ $words[2] == help ]]; then
        compadd -- {" ".join(["help", *candidates])}
        return
    fi
    case $words[2] in
{cases}
    esac
    keys=(${{(M)given:#*=}})
    rest=(${{given:#*=}})
    compadd -S '' -- $keys
    compadd -- $rest
    _files
}}
compdef _dinokit dinokit"""


def _fish(candidates: Mapping[str, Sequence[str]]) -> str:
    lines = [f"complete -c dinokit -n __fish_use_subcommand -a '{' '.join(['help', *candidates])}'"]
    for name, each in candidates.items():
        lines.append(f"complete -c dinokit -n '__fish_seen_subcommand_from {name}' -a '{' '.join(each)}'")
    return "\n".join(lines)
