"""The commands and Python blocks of README.md and docs/ are run, in a folder that has what they name.

`<!-- not run: REASON -->` above a block, or below the title for a whole page, excepts it: it needs data, a
GPU or a cluster. The commands of such blocks are still read: command, options, recipe and keys must exist.
"""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from dinokit.__main__ import main
from dinokit.commands import read_command
from dinokit.config import registry
from dinokit.config.load import load_recipe, student_shares
from dinokit.data.sources.scenes import Config, build

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN_ELSEWHERE = {"docs/api.md": "tests/test_api.py", "docs/extend.md": "tests/test_extend.py"}
COMMANDS, DATA = ("", "sh", "bash"), ("text", "yaml", "csv", "json")
# What makes a run tiny; a command of a page is completed by it.
TINY = [
    "backbone.size=32", "backbone.width=32", "backbone.depth=4", "backbone.heads=2", "backbone.patch=8",
    "heads.cls.prototypes=32", "heads.cls.hidden=32", "heads.cls.bottleneck=16", "crops.globals.size=32",
    "crops.locals.size=16", "crops.locals.count=1", "optim.steps=1", "optim.batch=4", "optim.warmup=0",
    "optim.head_frozen=0", "optim.head_warmup=0", "teacher.temp_warmup=0", "evals=null", "run.workers=0",
]  # fmt: skip
ADDED = {
    "train": TINY,
    "eval": ["workers=0"],
    "eval linear": ["steps=2"],
    "extract": ["workers=0"],
    "viz": ["count=4"],
    "curate": ["embed.workers=0", "dedup.similarity=1", "balance.images=5", "balance.levels=[8,4]"],
}
# Programs and commands whose lines are read only, with the reason.
NOT_RUN = {
    "eval all": "tests/test_walk.py runs a list",
    "torchrun": "several GPUs",
    "submit": "a cluster",
    "bench": "minutes",
    "scaling": "minutes",
    "sweep": "minutes; tests/commands/test_sweep.py",
    "align": "minutes; tests/language/test_align_use.py",
    "instruct": "minutes; tests/language/test_instruct.py",
    "ask": "it needs the model; tests/language/test_answerer.py",
    "train-head": "minutes; tests/segment/test_predictor.py",
    "segment": "it needs the head; tests/segment/test_predictor.py",
    "click": "it needs the head and a browser; tests/segment/test_click.py",
    "completion": "tests/commands/test_conventions.py",
}
PRELUDE = """
import dinokit, torch, numpy as np
images, h, w = torch.rand(2, 3, 32, 32), 4, 4
indices = [0, 1]
from dinokit.weights import load_backbone
backbone = load_backbone("runs/demo")
"""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str  # the reason, or ""


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    whole = re.match(r"# [^\n]*\n\n<!-- not run: (.*?) -->", text)
    pattern = r"(?:<!-- not run: (?P<reason>[^\n]*?) -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```"
    for match in re.finditer(pattern, text, re.M | re.S):
        line = text[: match.start("body")].count("\n") + 1
        reason = match["reason"] or (whole[1] if whole else "") or RUN_ELSEWHERE.get(page, "")
        yield Block(page, line, match["language"], match["body"], reason)


def typed(block):
    """The commands of a block: words without comments, of lines that end in a backslash joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words:
            yield words


ALL = [block for page in PAGES for block in blocks(page)]


def test_a_block_has_a_language_that_says_what_it_is():
    assert len(ALL) > 50
    known = (*COMMANDS, *DATA, "python")
    assert not [f"{b.page}:{b.line} {b.language}" for b in ALL if b.language not in known]


@pytest.mark.parametrize("page", PAGES)
def test_commands_options_recipes_and_keys_of_a_page_exist(page):
    for block in blocks(page):
        if block.language not in COMMANDS or page in RUN_ELSEWHERE:
            continue
        for words in typed(block):
            if words[0] != "dinokit" or len(words) == 1 or words[1].startswith("-") or "COMMAND" in words:
                continue
            if words[1] == "help":
                words.pop(1)
            command = read_command(words[1], words[2:])
            open_ended = {"...", "RECIPE"} & set(words) or any("$" in word for word in words)
            of_run = "".join(command.words[:1]).endswith("/recipe.yaml")
            if words[1] in ("train", "show") and command.words and not open_ended and not of_run:
                settings = [text for text in command.settings if "." in text.partition("=")[0]]
                assert command.words[0] in registry.recipe_names(), f"{page}:{block.line}"
                settings += [f"student={name}" for name in list(student_shares(command.words[0]))[:1]]
                load_recipe(command.words[0], ["data.path=X", *settings] if "scenes" not in command.words[0]
                            else settings, lambda path: {"name": "vit"})  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with everything that the pages name."""
    place = tmp_path_factory.mktemp("pages")
    scenes = build(Config(size=64, count=40, test_count=20))
    for index in range(60):
        image, label = scenes[index]
        names = (
            ["POOL", "PHOTOS"]
            if index < 40
            else [f"LABELLED/{'test' if index % 4 < 2 else 'train'}/{label % 2}"]
        )
        names += ["FLOWERS"] if index < 4 else []
        for name in names:
            (place / name).mkdir(parents=True, exist_ok=True)
            image.save(place / name / f"{index:02}.jpg")
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        scenes[0][0].save(place / name)
    Image.new("L", (64, 64)).save(place / "grey.png")
    listed = "\n".join(str(path) for path in sorted((place / "PHOTOS").iterdir()))
    for name in ("LIST", "list.txt"):
        (place / name).write_text(listed)
    for name in ("CELLS", "NEW"):
        shutil.copytree(place / "PHOTOS", place / name)
    shutil.copytree(place / "LABELLED/train", place / "IMAGENET")
    before = Path.cwd()
    os.chdir(place)  # so that the recipe of the run has the path that the pages name
    linear = "backbone.stem=linear"  # docs/weights.md exports the run to every format
    photos = ["data.path=PHOTOS", "minutes=60", linear, *TINY, "run.out=runs/photos", "--quiet"]
    assert main(["train", *photos]) == 0
    released = ["data.path=PHOTOS", *TINY, "run.out=runs/released", "--quiet"]  # as ImageNet is normalised
    assert main(["train", "small_photos", *released]) == 0
    os.chdir(before)
    shutil.copytree(place / "runs/photos", place / "runs/demo")
    shutil.copy(place / "runs/released/teacher.safetensors", place / "FILE")
    return place


RUN = [block for block in ALL if not block.not_run and block.language in (*COMMANDS, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_the_blocks_of_a_page_run(page, folder, tmp_path, monkeypatch, capsys):
    place = shutil.copytree(folder, tmp_path / "page")
    if page == "docs/tutorial.md":
        shutil.rmtree(place / "runs/photos")  # it trains this run itself
    monkeypatch.chdir(place)
    names: dict = {}
    exec(PRELUDE, names)
    for block in [block for block in RUN if block.page == page]:
        if block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
            continue
        for words in typed(block):
            if {words[0], "".join(words[1:2]), " ".join(words[1:3])} & set(NOT_RUN):
                continue
            assert words[0] == "dinokit", f"{page}:{block.line}: a block of commands that are not dinokit's"
            own = {word.partition("=")[0] for word in words}
            completed = [*ADDED.get("".join(words[1:2]), []), *ADDED.get(" ".join(words[1:3]), [])]
            added = [text for text in completed if text.partition("=")[0] not in own - SHRUNK]
            assert main([*words[1:], *added]) == 0, f"{page}:{block.line} {words}\n{capsys.readouterr().err}"


# Keys that a page gives for a real run, and which this test makes small.
SHRUNK = {"optim.steps", "optim.warmup", "teacher.temp_warmup", "optim.batch", "balance.images"}
