"""Mistakes in a loss, backbone, source or evaluator of one's own: each is named before it can do harm."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from dinokit.__main__ import main
from dinokit.config.check import USES
from dinokit.losses import DECLARED

PAGE = (Path(__file__).parent.parent / "docs" / "extend.md").read_text(encoding="utf-8")
ARRAY = "rng.integers(0, 100, (40, 40, 3), dtype=np.uint8) + np.uint8(100 * label), label"
TOKENS = "[Tokens(cls=x.mean(dim=1), registers=x[:, :0], patches=x) for x in rows]"
VALUE = "-views.student_feature.float().var(dim=1).mean()"
SCORES = '{"distance": float((means[0] - means[1]).norm())}'
# The file, what is written in place of what, and what is answered.
MISTAKES = {
    "a number for each image": (
        "spread", VALUE, "views.student_feature.var(dim=-1)",
        "losses.my_package.spread gives a tensor (2, 4): its forward(views) must return one number",
    ),
    "a float": ("spread", VALUE, "0.5", "losses.my_package.spread gives a float"),
    "no value": ("spread", f"return {VALUE}", "pass", "losses.my_package.spread gives a NoneType"),
    "a field that is not there": (
        "spread", "student_feature", "student_features",
        "views has no 'student_features'. Did you mean 'student_feature'?",
    ),
    "a field that is not declared": (
        "spread", "student_feature", "student_patches", "frozenset({...}) with 'gram' in it. (",
    ),
    "a use that is not there": (
        "spread", "    weight: float = 0.5", "    uses = frozenset({'patches'})\n    weight: float = 0.5",
        "losses.my_package.spread: `uses` has 'patches', and it may have gram, heads, masks, projection.",
    ),
    "a parameter": (
        "spread", "self.weight = cfg.weight", "self.scale = nn.Linear(1, 1)",
        "losses.my_package.spread has parameters, such as scale.weight",
    ),
    "no weight": (
        "spread", "    weight: float", "    factor: float",
        "losses.my_package.spread: its Config needs the field `weight: float = 1.0`",
    ),
    "a weight below 0": (
        "spread", "weight: float = 0.5", "weight: float = -0.5",
        "losses.my_package.spread.weight=-0.5: it must be 0 or more",
    ),
    "a weight below 0 in a list": (
        "spread", "weight: float = 0.5", "weight: tuple[float, ...] = (1.0, -0.1)",
        "losses.my_package.spread.weight=(1.0, -0.1): it must be 0 or more",
    ),
    "a weight that is a list": (
        "spread", "weight: float = 0.5", "weight: tuple[float, ...] = (1.0, 0.1)",
        "losses.my_package.spread.weight=(1.0, 0.1): it is one number over the whole run",
    ),
    "no function": ("spread", "build = Spread", "", "'my_package.spread' is no entry of the registry "),
    "no Python": ("spread", "build = Spread", "build = (", "SyntaxError: '(' was never closed ("),
    "no blocks": ("conv", "blocks", "layers_", "my_package.conv builds a Conv without blocks"),
    "two names of a module": (
        "conv", "        self.blocks =", "        self.again = self.stem\n        self.blocks =",
        "one parameter under two names, stem.weight and again.weight",
    ),
    "a patch too few": (
        "conv", "patches=x)", "patches=x[:, 1:])",
        "Conv.forward() gives patches of the shape (1, 15, 8) for a crop of 32 pixels",
    ),
    "no tokens": ("conv", TOKENS, "rows", "Conv.forward() gives a Tensor for a group of crops"),
    "no name": ("noise", "def name", "def title", "my_package.noise builds a Noise without name"),
    "numbers of 64 bits": ("noise", ARRAY, "rng.random((40, 40, 3)), label", "float32 in [0, 1], not"),
    "a tensor": (
        "noise", ARRAY, "__import__('torch').zeros(3, 40, 40), label", "an array (H, W, C), not a tensor",
    ),
    "no image": ("noise", ARRAY, "None, label", "12 of 12 images cannot be read. "),
    "a change of the backbone": (
        "separation", f"return {SCORES}",
        f"backbone.stem.weight.requires_grad_(False).zero_(); backbone.train(); return {SCORES}",
        "my_package.separation changed the weights of the backbone that it evaluates",
    ),
    "no scores": ("separation", f"return {SCORES}", "pass", "must return a dict of numbers by name"),
    "a list": ("separation", SCORES, '{"both": [0.1, 0.2]}', "the score 'both' must be one number"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files of docs/extend.md."""
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "my_package/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def change(folder, file, old, new):
    path = folder / f"my_package/{file}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def train(*words):
    return main(["train", "my_recipe.yaml", "run.out=run", "run.device=cpu", "run.precision=fp32", *words])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_of_ones_own_is_named(mistake, folder, capsys):
    file, old, new, answer = MISTAKES[mistake]
    change(folder, file, old, new)
    few = ["losses.my_package.spread={}", "evals=null"] if file in ("spread", "conv") else []
    assert train(*few) != 0
    shown = capsys.readouterr().err
    assert answer in shown
    assert "unexpected error" not in shown
    assert not (folder / "run/teacher.safetensors").exists()


def test_logits_that_a_loss_does_not_declare_are_named(folder, capsys):
    change(folder, "spread", "    weight: float = 0.5", "    uses = frozenset()\n    weight: float = 0.5")
    change(folder, "spread", VALUE, "views.student_cls.logits().float().mean()")
    (folder / "my_recipe.yaml").write_text((folder / "my_recipe.yaml").read_text().replace("dino: {}, ", ""))
    assert train("evals=null") != 0
    assert "that it reads views.student_cls. If yours does, its Config has uses: " in capsys.readouterr().err


def test_a_loss_may_change_a_copy_of_the_views_and_print_them(folder):
    change(folder, "spread", VALUE, f"{VALUE.replace('views', 'replace(views, seed=len(repr(views)))')}")
    change(folder, "spread", "import dataclass", "import dataclass, replace")
    assert train("evals=null") == 0


def test_a_backbone_with_two_names_of_a_module_is_evaluated(folder):
    change(folder, "conv", "        self.blocks =", "        self.again = self.stem\n        self.blocks =")
    data = ["test.name=my_package.noise", "test.split=test"]
    assert main(["eval", "my_package.separation", "backbone.name=my_package.conv", "device=cpu", *data]) == 0


def test_numbers_beyond_one_are_named_and_a_score_may_be_a_tensor(folder, capsys):
    change(folder, "noise", ARRAY, "rng.integers(0, 255, (40, 40, 3)).astype(np.float32), label")
    change(folder, "separation", "float((means[0] - means[1]).norm())", "(means[0] - means[1]).norm()")
    assert train() == 0
    shown = capsys.readouterr()
    assert "and crops.mean is for numbers in [0, 1]: give uint8, or divide by 255" in shown.err
    assert "my_package.separation after step 4: distance " in shown.out


def test_a_config_may_inherit_from_a_class_of_its_package(folder):
    (folder / "my_package/base.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass\nclass Base:\n    weight: float = 0.25\n"
    )
    change(
        folder,
        "spread",
        "\n\n@dataclass\nclass Config:",
        "\nfrom my_package.base import Base\n\n\n@dataclass\nclass Config(Base):",
    )
    change(folder, "spread", "    weight: float = 0.5  #", "    other: int = 1  #")
    assert train("evals=null", "losses.my_package.spread={other: 2}") == 0
    assert "my_package.spread:\n    weight: 0.5\n    other: 2" in (folder / "run/recipe.yaml").read_text()


HALVES = """
from dataclasses import dataclass

import numpy as np


@dataclass
class Config:
    split: str = "train"


class Halves:
    classes = ("dark", "light")

    def __init__(self, cfg):
        self.cfg = cfg

    def __len__(self):
        return 4

    def __getitem__(self, index):
        rng = np.random.default_rng([index, len(self.cfg.split)])
        mask = np.zeros((32, 32), np.uint8)
        mask[:, 8 * (1 + index % 3) :] = 1
        image = rng.integers(0, 40, (32, 32, 3), dtype=np.uint8) + 200 * mask[..., None]
        return image, mask

    def name(self, index):
        return f"half {index}"


build = Halves
"""


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("mask", '"mIoU": 1.0'),
        ("mask[:24]", "half 0: the map has 32 x 24 pixels, its image 32 x 32"),
        (
            "255 * mask",
            "half 0: the map has 255, and the classes are 0 to 1; -1 is for pixels that do not count",
        ),
        ("image", "half 0: a map is (h, w), and this has the shape (32, 32, 3)"),
    ],
)
def test_maps_of_ones_own_are_checked_as_those_of_files(given, answer, folder, capsys):
    (folder / "my_package/halves.py").write_text(
        HALVES.replace("return image, mask", f"return image, {given}")
    )
    words = ["backbone.name=raw_patches", "backbone.size=32", "backbone.patch=4", "method=knn", "resize=32"]
    data = [
        f"{split}.{key}"
        for split in ("train", "test")
        for key in ("name=my_package.halves", f"split={split}")
    ]
    status = main(["eval", "segmentation", *words, *data, "workers=0", "device=cpu", "precision=fp32"])
    shown = capsys.readouterr()
    assert answer in shown.out + shown.err
    assert status == (0 if given == "mask" else 3)


def test_a_list_of_evaluators_has_sections_of_ones_own(folder, capsys):
    (folder / "list.yaml").write_text(
        "all: {test: {name: my_package.noise, split: test}}\nmy_package.separation: {}\n"
        "again: {eval: my_package.separation, size: 16}\nmy_package.inner.separation: {}\n"
    )
    (folder / "my_package/inner").mkdir()
    (folder / "my_package/inner/__init__.py").touch()
    shutil.copy(folder / "my_package/separation.py", folder / "my_package/inner")
    words = ["eval", "all", "recipe=list.yaml", "backbone.name=my_package.conv", "device=cpu"]
    assert main([*words, "my_package.separation.size=40", "my_package.inner.separation.size=24"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["about"]["settings"]["size"] for line in lines] == [40, 16, 24]
    assert main([*words, "my_package.separation=null", "my_package.inner.separation=null"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main([*words, "my_package.counting.size=40"]) == 2
    assert "reads a key 'my_package'" in capsys.readouterr().err


def test_recipes_know_every_use_that_a_loss_can_declare():
    assert set(DECLARED) == USES  # checks of recipes import no torch, so the names stand twice


def test_the_page_names_what_a_loss_can_read():
    for name in ["student_feature", *(name for names in DECLARED.values() for name in names)]:
        assert f"`{name}`" in PAGE


def test_a_source_without_images_is_named(folder, capsys):
    change(folder, "noise", "return self.cfg.count", "return 0")
    assert train("evals=null") == 3
    assert capsys.readouterr().err == "dinokit: data.name=my_package.noise gives no images.\n"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["losses.spread.weight=1"], "Did you mean 'my_package.spread'?"),
        (["losses.my_package/spread.weight=1"], "Did you mean 'my_package.spread'?"),
        (["losses.mine.x.phase=[0,0.5]"], "No module named 'mine'. It would be the file mine/x.py in "),
        (["evals.mine.x.every=2"], "'mine.x' (for the registry 'eval') cannot be imported"),
        (["losses.my_package.spread.phase=[0,1]"], "add the field `phase: tuple[float, float] = (0.0, 1.0)`"),
        (["losses.my_package.spread.ramp=3"], "add the field `ramp: int = 0` to the Config of my_package"),
        (["losses.my_package.weight=1"], "'my_package.conv' or 'my_package.noise' or 'my_package.spread'?"),
        (["evals.separation.every=2"], "Did you mean 'my_package.separation'?"),
        (["losses.my_package.separation.weight=1"], "separation.py defines no function `build`"),
        (["evals.my_package.spread.every=2"], "spread.py defines no function `evaluate`"),
        (["evals.my_package.separation.evry=2"], "Did you mean 'every'?"),
        (["evals.my_package.separation=3"], "Give evals.my_package.separation.every=3"),
        (["losses.my_package/spread.py.weight=1"], "Did you mean 'my_package.spread'?"),
        (["data=my_package.noise"], "Give data.name=my_package.noise"),
        (["lr=1"], "Did you mean 'optim.lr'?"),
        (["optim.lr", "=", "1"], "'optim.lr' is not of the form key=value, without spaces, and "),
        (["losses.ibot={}", "heads.patch={}", "masks={}"], "its code would need a parameter `mask_token`"),
    ],
)  # fmt: skip
def test_a_slip_on_the_command_line_is_answered_with_what_was_meant(words, answer, folder, capsys):
    assert train(*words) == 2
    assert answer in capsys.readouterr().err
