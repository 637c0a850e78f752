"""What all commands have in common: keys, options, exit statuses, help, lists."""

import errno
import inspect
import json
import operator
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from dinokit.__main__ import main
from dinokit.commands import COMMON, LETTERS, OPTIONS, RECIPE_KEYS, _outcome, read_command
from dinokit.commands.completion import completions
from dinokit.commands.list import KINDS, entries
from dinokit.config import registry
from dinokit.config.load import load_recipe, parse_overrides, section_values
from dinokit.train.trainer import TrainingError

COMMANDS = registry.names("commands")
# Other names for a common key, which would make users guess.
SYNONYMS = {
    "model", "checkpoint", "ckpt", "pretrained", "output", "output_dir", "outdir", "save", "sheet", "file",
    "gpu", "cuda", "batch_size", "bs", "num_workers", "jobs", "dtype_compute", "dataset", "images_path",
    "config", "cfg", "neighbours", "resolution",
}  # fmt: skip


def own_keys(name: str) -> list[str]:
    module = registry.find("commands", name)
    return [f.name for f in fields(module.Config)] if hasattr(module, "Config") else []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_follows_the_conventions(name, capsys):
    module = registry.find("commands", name)
    usage, *rest = (module.__doc__ or "").splitlines()
    assert usage.startswith((f"dinokit {name} ", f"dinokit {name}:"))
    assert ": " in usage
    examples = [line for line in rest if line.startswith((f"dinokit {name} ", f'eval "$(dinokit {name}'))]
    assert len(examples) + rest.count(f"dinokit {name}") >= 2, "a help needs two examples"
    assert not {*getattr(module, "FLAGS", {})} & {*OPTIONS}, "options of all commands are not repeated"
    assert not SYNONYMS & {*own_keys(name)}, f"COMMON has a name for it: {COMMON}"
    assert inspect.signature(module.run).return_annotation == dict[str, Any]
    command = read_command(name, ["--json", "-q", "--traceback"])
    assert {"--json", "--quiet", "--traceback"} <= command.flags.keys()
    assert main([name, "--help"]) == 0
    by_option = capsys.readouterr().out
    assert main(["help", name]) == 0
    assert capsys.readouterr().out == by_option
    assert usage in by_option
    assert {"--json", "--quiet"} <= {*completions(name)}


def test_short_keys_are_keys_of_a_recipe_and_renamed_ones_have_a_new_name():
    assert RECIPE_KEYS.keys() <= COMMON.keys() | {"steps"}
    recipe = load_recipe("scenes_cpu", ["backbone.name=vit"])
    for key in set(RECIPE_KEYS.values()) - {"backbone.weights"}:
        section, _, field = key.partition(".")
        assert hasattr(getattr(recipe, section), field), key
    for name in COMMANDS:
        for old, new in getattr(registry.find("commands", name), "RENAMED", {}).items():
            assert old not in own_keys(name)
            assert new in own_keys(name)


def test_common_keys_have_one_meaning_in_all_commands_with_a_recipe():
    for name in ("train", "show", "demo"):
        words = read_command(name, [f"{key}=1" for key in RECIPE_KEYS])
        assert words.settings == [f"{full}=1" for full in RECIPE_KEYS.values()], name


def test_an_old_key_and_an_old_option_are_read_with_a_notice(capsys):
    assert read_command("search", ["sheet=a.png"]).settings == ["out=a.png"]
    assert "sheet= is now called out=" in capsys.readouterr().err
    assert read_command("scaling", ["--rounds", "3", "x"]).settings == ["rounds=3"]
    assert "--rounds is now called rounds=" in capsys.readouterr().err


def test_a_list_takes_commas_or_a_single_value():
    def knn(*words: str) -> tuple[int, ...]:
        return section_values("eval", "knn", parse_overrides(words), "")["k"]

    assert knn("k=5,20") == knn("k=[5,20]") == (5, 20)
    assert knn("k=5") == (5,)
    assert load_recipe("scenes_cpu", ["teacher.momentum=0.9,1"]).teacher.momentum == (0.9, 1.0)
    assert load_recipe("scenes_cpu", ["crops.globals.blur=0.1"]).crops.globals.blur == (0.1,)
    with pytest.raises(ValueError, match=r"teacher\.momentum"):
        load_recipe("scenes_cpu", ["teacher.momentum=0.9"])


QUICK = {
    "list": ["list", "losses"],
    "models": ["models", "dino_*"],
    "show": ["show", "scenes_cpu"],
    "completion": ["completion", "bash"],
    "submit": ["submit", "profile=gpu", "--dry-run", "--", "train", "scenes_cpu"],
}


@pytest.mark.parametrize("words", QUICK.values(), ids=QUICK)
def test_json_is_the_only_thing_on_standard_output(words, capsys):
    assert main([words[0], "--json", *words[1:]]) == 0
    out = capsys.readouterr().out
    assert isinstance(json.loads(out), dict)
    assert out.count("\n") == 1
    assert main([words[0], "--quiet", *words[1:]]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_error_with_json_is_an_object_too(capsys):
    assert main(["train", "scenes_cpi", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == 2
    assert "Did you mean 'scenes_cpu'" in answer["error"]


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


def test_exit_statuses():
    assert _outcome.exit_status(TrainingError("a loss is not finite")) == 4
    assert _outcome.exit_status(FileNotFoundError(errno.ENOENT, "x")) == 3
    assert _outcome.exit_status(OutOfMemoryError("CUDA")) == 5
    assert _outcome.exit_status(MemoryError()) == 5
    assert _outcome.exit_status(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")) == 5
    assert _outcome.exit_status(AssertionError()) == 1


def test_missing_data_and_wrong_usage_have_different_statuses(tmp_path, capsys):
    data = ["train.path=/no", "test.path=/no"]
    assert main(["eval", "knn", "backbone.name=pixels", "cache=null", *data]) == 3
    assert main(["eval", "knn", "backbone.name=pixels", "kk=3", *data]) == 2
    assert main(["models", "identify", str(tmp_path / "none.pth")]) == 3
    assert main(["eval", "knn", f"weights={tmp_path / 'none.pth'}"]) == 3
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["train", "eval", "extract", "export", "predict", "search", "viz", "curate", "sweep"]
)
def test_a_command_alone_is_answered_with_an_example(name, capsys):
    assert main([name]) == 2
    example = capsys.readouterr().err.splitlines()[-1].strip().removeprefix("As in: ")
    assert example in (registry.find("commands", name).__doc__ or "").splitlines()[1:]
    assert example.startswith(f"dinokit {name} ")


def test_an_unexpected_error_is_one_with_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(registry.find("commands", "list"), "entries", operator.index)
    assert main(["list", "losses"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("dinokit: ")
    assert "TypeError: 'str' object cannot be" in err.splitlines()[-1]


@pytest.mark.parametrize("words", [[], ["completion", "bash"]])
def test_a_reader_that_leaves_is_no_error(words):
    for unbuffered in ([], ["-u"]):
        process = subprocess.Popen(
            [sys.executable, *unbuffered, "-m", "dinokit", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.communicate()[1] == b""
        assert process.returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_listed_with_a_line(kind):
    found = entries(kind)
    assert found
    assert all(len(text) > 5 and "\n" not in text for text in found.values()), found


def test_lists_are_wrapped_on_a_terminal_and_whole_in_a_pipe(capsys, monkeypatch):
    name, text = max(entries("recipes").items(), key=lambda entry: len(entry[1]))
    assert len(text) > 150
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list", "recipes"]) == 0
    assert any(line.split(maxsplit=1) == [name, text] for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns, most in ((80, 80), (300, 110)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["list", "recipes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= most
        assert f"{name} {text}" in " ".join(" ".join(lines).split())


def test_a_list_with_a_name_has_its_keys_with_their_defaults(capsys):
    assert main(["list", "sources", "tar"]) == 0
    shown = capsys.readouterr().out
    assert "keys of tar:" in shown
    assert re.search(r"^    test_share = 0\.1 +\S", shown, re.MULTILINE)
    assert main(["list", "losses", "koleo", "--json", "--quiet"]) == 0
    keys = json.loads(capsys.readouterr().out)["koleo"]
    assert {key.partition(" = ")[0] for key in keys} >= {"weight", "group"}
    assert main(["list", "sources", "tarr"]) == 2
    assert "Did you mean 'tar'" in capsys.readouterr().err
    assert main(["list", "recipes", "laptop"]) == 2
    assert "dinokit show laptop has the keys of laptop" in capsys.readouterr().err
    assert main(["list", "sources", "tar", "hf"]) == 2
    assert main(["help", "extract"]) == 0
    assert "dinokit list sources NAME" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_its_shell_reads(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", str(script)], capture_output=True).stderr == b""
    assert "losses.koleo.weight=" in script.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["tr"], "train"),
        (["train", "scen"], "scenes_cpu"),
        (["eval", "kn"], "knn"),
        (["train", "optim.st"], "optim.steps="),
        (["list", "los"], "losses"),
        (["help", "wat"], "watch"),
    ],
)
def test_completion_in_bash_finds_names(typed, expected, capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    line = f"COMP_WORDS=(dinokit {' '.join(typed)}); COMP_CWORD={len(typed)}; _dinokit 2>/dev/null"
    shown = [*script.splitlines(), line, 'echo "${COMPREPLY[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(shown)], capture_output=True, text=True)
    assert expected in done.stdout.split()


def test_letters_stand_for_options(capsys):
    assert set(LETTERS.values()) <= OPTIONS.keys()
    assert main(["-V"]) == main(["list", "-V"]) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 1


def test_helps_are_made_after_the_command_list_was_imported():
    """Its module is an attribute of the package then, and hides the built-in list there."""
    registry.find("commands", "list")
    assert main(["eval", "knn", "--help"]) == main(["curate", "--help"]) == 0
