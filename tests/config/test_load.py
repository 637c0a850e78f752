"""Recipes: what is read, what is filled in, and what is said of each mistake."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dinokit import results
from dinokit.config.check import RANGES, range_of, settings_of
from dinokit.config.load import (
    Optim,
    load_recipe,
    parse_overrides,
    read_data_section,
    section_values,
    to_yaml,
)
from dinokit.config.registry import recipe_names

BASE = """
backbone: {name: vit, size: 64, width: 96, depth: 2, heads: 3, patch: 8}
heads: {cls: {prototypes: 1_024}}
losses:
  dino: {weight: 1.0}
  ibot: {targets: centering}
  koleo: {weight: 0.1}
crops:
  globals: {size: 64, blur: [1.0, 0.1]}
  locals: {count: 4, size: 32}
masks: {images: 0.5}
data: {name: scenes, size: 64, count: 500}
optim: {steps: 625_000, batch: 64, lr: 2e-4, warmup: 10}
evals: {knn: {every: 100}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(BASE)
    return path


def test_a_recipe_is_completed_by_the_defaults_of_every_section(base):
    recipe = load_recipe(base)
    assert recipe.name == "mine"
    assert recipe.run.out == "runs/mine"
    assert recipe.backbone["ffn"] == "mlp"
    assert recipe.losses["ibot"] == {
        "weight": 1.0, "phase": (0.0, 1.0),
        "targets": "centering", "student_temp": 0.1, "center_momentum": 0.9,
        "patches": "masked",
    }  # fmt: skip
    assert recipe.data["test_count"] == 2_000
    assert recipe.evals["knn"]["every"] == 100
    assert recipe.evals["knn"]["k"] == (10, 20, 100, 200)
    assert recipe.heads.patch is None


def test_numbers_may_have_underscores_and_exponents(base):
    recipe = load_recipe(base, ["optim.min_lr=1e-6", "heads.cls.prototypes=65_536"])
    assert (recipe.optim.steps, recipe.optim.lr, recipe.optim.min_lr) == (625_000, 2e-4, 1e-6)
    assert recipe.heads.cls.prototypes == 65_536


def test_an_override_wins_over_the_file_and_the_last_one_over_the_first(base):
    recipe = load_recipe(
        base, ["optim.batch=8", "run.out=elsewhere", "optim.batch=16", "crops.locals.size=48"]
    )
    assert (recipe.optim.batch, recipe.run.out) == (16, "elsewhere")
    assert (recipe.crops.locals.size, recipe.crops.locals.count) == (48, 4)


def test_overrides_are_yaml():
    given = ["a.b=[1, 2]", "a.c=null", "d=x=y", "e=true", "f='1'"]
    assert parse_overrides(given) == {"a": {"b": [1, 2], "c": None}, "d": "x=y", "e": True, "f": "1"}


def test_a_section_with_another_name_starts_from_that_files_defaults(base, tmp_path):
    recipe = load_recipe(base, ["data.name=folder", f"data.path={tmp_path}"])
    assert recipe.data["path"] == str(tmp_path)
    assert "count" not in recipe.data
    assert load_recipe(base, ["data.name=scenes", "data.seed=3"]).data["count"] == 500
    assert load_recipe(base, ["backbone.name=pixels"]).backbone == {
        "name": "pixels", "channels": 3, "size": 64, "grid": 16
    }  # fmt: skip


def test_null_removes_a_loss_an_evaluator_and_an_optional_section(base):
    recipe = load_recipe(base, ["losses.ibot=null", "masks=null", "evals.knn=null"])
    assert list(recipe.losses) == ["dino", "koleo"]
    assert recipe.masks is None
    assert recipe.evals == {}


def test_braces_empty_a_section_and_leave_its_defaults(base):
    assert load_recipe(base, ["evals={}"]).evals == {}
    base.write_text(BASE.replace("koleo: {weight: 0.1}", "koleo: {weight: 9}"))
    assert load_recipe(base, ["losses.koleo={}"]).losses["koleo"]["weight"] == 0.1
    with pytest.raises(ValueError, match=r"^losses is empty"):
        load_recipe(base, ["losses={}"])


@pytest.mark.parametrize("reset", ["null", "{}", "~"])
def test_a_key_after_a_reset_adds_to_nothing(base, reset):
    base.write_text(
        BASE.replace("koleo: {weight: 0.1}", "koleo: {weight: 9}").replace("images: 0.5", "images: 1")
    )
    alone = ["losses.ibot=null", "losses.koleo=null", "losses.dino.weight=2", "masks=null"]
    short = [f"losses={reset}", "losses.dino.weight=2", "masks=null"]
    assert load_recipe(base, short).losses == load_recipe(base, alone).losses
    assert load_recipe(base, [f"masks={reset}", "masks.patches=[0.2, 0.3]"]).masks.images == 0.5
    assert load_recipe(base, ["evals.knn.k=[3]", "evals=null"]).evals == {}  # the last one counts
    koleo = load_recipe(base, [f"losses.koleo={reset}", "losses.koleo.distributed=true"]).losses["koleo"]
    assert koleo["weight"] == 0.1


@pytest.mark.parametrize("reset", ["null", "{}", "~", "{ }", ""])
def test_the_later_of_a_key_and_a_reset_of_its_section_counts(base, reset):
    again = [
        f"losses={reset}",
        "losses.dino.weight=3",
        f"losses={reset}",
        "losses.koleo.weight=2",
        "masks=null",
    ]
    assert load_recipe(base, again).losses.keys() == {"koleo"}
    assert load_recipe(base, ["losses.koleo.weight=2", "losses.koleo={}"]).losses["koleo"]["weight"] == 0.1
    assert (
        load_recipe(base, ["losses.koleo.weight=2", "losses={dino: {weight: 3}}"]).losses["koleo"]
        == (
            load_recipe(base, ["losses.koleo.weight=2"]).losses["koleo"]  # values add to a section
        )
    )
    assert parse_overrides(["a.b=1", f"a={reset}"])["a"] in (None, {})
    assert parse_overrides(["a.b=1", "ab.c=2", f"a={reset}", "a.d=3"]) == {"a": {"d": 3}, "ab": {"c": 2}}


def test_the_folder_of_a_run_and_a_name_nearly_right_are_answered_with_the_file(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    with pytest.raises(LookupError, match=r"Did you mean 'mine\.yaml'\?"):
        load_recipe("mine.yml")
    base.rename(base.parent / "recipe.yaml")
    with pytest.raises(LookupError, match=r"not a recipe\. The recipe of a run is .*recipe\.yaml"):
        load_recipe(str(base.parent))
    (base.parent / "photos").mkdir()
    with pytest.raises(LookupError, match=r"photos is a folder, not a recipe\. Images are data\.path=photos"):
        load_recipe("photos")


def test_a_loss_can_be_added_on_the_command_line(base):
    assert load_recipe(base, ["losses.koleo.weight=0.5"]).losses["koleo"]["weight"] == 0.5
    base.write_text(BASE.replace("  koleo: {weight: 0.1}\n", ""))
    assert "koleo" not in load_recipe(base).losses
    assert load_recipe(base, ["losses.koleo={}"]).losses["koleo"] == {
        "weight": 0.1,
        "phase": (0.0, 1.0),
        "eps": 1e-8,
        "distributed": False,
        "group": 0,
    }


def test_evaluation_data_given_by_its_path_alone_is_a_folder_with_a_class_a_sub_folder(base):
    given = ["evals.knn.train.path=a", "evals.knn.test.path=b", "evals.knn.test.name=tar"]
    knn = load_recipe(base, given).evals["knn"]
    assert (knn["train"]["name"], knn["train"]["path"], knn["train"]["labels"]) == ("folder", "a", "folders")
    assert (knn["test"]["name"], knn["test"]["path"]) == ("tar", "b")


def test_evaluation_data_given_by_a_file_are_read_by_the_source_of_its_suffix(base):
    given = ["evals.knn.train.path=a.parquet", "evals.knn.test.path=b.csv"]
    knn = load_recipe(base, given).evals["knn"]
    assert (knn["train"]["name"], knn["test"]["name"]) == ("parquet", "manifest")
    assert "labels" not in knn["train"]  # they are a column of the file


METHODS = {
    "segmentation": ["linear", "ms", "knn", "logreg", "majority"],
    "depth": ["linear", "dpt", "mean"],
}


@pytest.mark.parametrize(("name", "method"), [(name, each) for name in METHODS for each in METHODS[name]])
def test_a_saved_recipe_has_every_default_of_an_evaluator_whatever_its_method_reads(
    base, tmp_path, name, method
):
    recipe = load_recipe(base, [f"evals.{name}={{every: 3, method: {method}}}"])
    (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_all_sources_give_as_many_channels_as_the_backbone_takes(base):
    given = ["backbone.channels=4", "data.name=folder", "data.path=a", "evals.knn.train.path=b"]
    recipe = load_recipe(base, given)
    assert recipe.data["channels"] == recipe.evals["knn"]["train"]["channels"] == 4


def test_a_saved_recipe_is_read_back_as_it_was(base, tmp_path):
    given = ["evals.knn.train.path=a", "optim.betas=[0.9, 0.95]", "heads.patch.bottleneck=64", "name=other"]
    recipe = load_recipe(base, given)
    (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert read_data_section(to_yaml(recipe), "w") == recipe.data
    assert recipe.name == "other"


ASKED = {  # what a shipped recipe leaves open beside its data
    "dinov2_continue": ["backbone.weights=x", "backbone.name=vit"],
    "dinov2_distill_vits14": ["teacher.frozen=x"],
    "dinov3_distill": ["teacher.frozen=x", "student=vits16"],
    "dinov3_vitl16_gram": ["teacher.start=x", "teacher.gram.weights=x"],
    "dinov3_vitl16_highres": ["teacher.start=x", "teacher.gram.weights=x"],
    "dinov3_vit7b16_gram": ["teacher.start=x", "teacher.gram.weights=x"],
    "dinov3_vit7b16_highres": ["teacher.start=x", "teacher.gram.weights=x"],
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_read_back_as_it_was(name):
    given = ["data.path=somewhere"] if "path: ???" in shipped(name) else []
    recipe = load_recipe(name, [*given, *ASKED.get(name, [])])
    assert read_data_section(to_yaml(recipe), "w") == recipe.data


def shipped(name: str) -> str:
    return (Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text().replace('"???"', "???")


@pytest.mark.parametrize(("rule", "peak"), [("none", 1e-3), ("sqrt", 2e-3), ("linear", 4e-3)])
def test_the_learning_rate_grows_with_the_batch_by_the_rule(rule, peak):
    optim = Optim(steps=1, batch=4096, lr=1e-3, lr_batch=1024, lr_rule=rule)
    assert optim.peak_lr == pytest.approx(peak, rel=1e-12)


MISTAKES = {
    "optims.steps=3": "optims: there is no key 'optims'. Did you mean 'optim'? There is: name",
    "optim.warmpu=3": "optim.warmpu: there is no key 'warmpu' in 'optim'. Did you mean 'warmup'?",
    "heads.cls.protoypes=3": "heads.cls.protoypes: there is no key 'protoypes' in 'heads.cls'. Did you mean",
    "heads.patch.protoypes=3": "heads.patch.protoypes: there is no key 'protoypes' in 'heads.patch'.",
    "backbone.widht=3": "backbone.widht: there is no key 'widht' in 'backbone'. Did you mean 'width'?",
    "losses.koleo.wait=3": "losses.koleo.wait: there is no key 'wait' in 'losses.koleo'. Did you mean",
    "evals.knn.tmep=3": "evals.knn.tmep: there is no key 'tmep' in 'evals.knn'. Did you mean 'temp'?",
    "evals.knn.train.pth=3": "evals.knn.train.pth: there is no key 'pth' in 'evals.knn.train'.",
    "optim.steps=many": "optim.steps: 'many' is not a whole number.",
    "optim.steps=1.5": "optim.steps: 1.5 is not a whole number.",
    "optim.lr_rule=sqr": "optim.lr_rule: 'sqr' is not one of none, sqrt, linear. Did you mean 'sqrt'?",
    "optim.betas=[0.9]": "optim.betas=[0.9]: it needs 2 values, not 1.",
    "optim.betas=0.9": "optim.betas: it is a list and needs brackets: optim.betas=[...].",
    "run.seed=null": "run.seed: it cannot be null.",
    "losses.koleo.weight=heavy": "losses.koleo.weight: 'heavy' is not a number.",
    "data.split=trian": "data.split: 'trian' is not one of all, train, test. Did you mean 'train'?",
    "crops.globals.blur=[a]": "crops.globals.blur: 'a' is not a number.",
    "run.report=2": "run.report: 2 is not true or false.",
    "run.seed=true": "run.seed: true is not a whole number.",
    "run.out=[a]": 'run.out: ["a"] is not a word.',
    "heads.cls=null": "heads.cls: it cannot be null.",
    "run.out=${oc.env:NOT_THERE}": "run.out: KeyError raised while resolving interpolation: ",
    "crops=3": "crops=3: it is a section with the keys: globals, locals,",
    "losses.dino=3": "losses.dino=3: it is a section with the keys: weight,",
    "data.name=folder": "data.path must be given, as in data.path=VALUE.",
    "data.name=null": "data.name must be given; there is: ",
    "data=null": "data.name must be given; there is: ",
    "backbone=null": "backbone.name must be given; there is: ",
    "backbone=vit": "backbone=vit: it is a section. Give backbone.name=vit",
    "evals.knn.every=null": "evals.knn.every must be given: the number of steps between two evaluations",
    "optim.steps=???": "optim.steps must be given, as in optim.steps=VALUE.",
    "teacher.frozen=???": "teacher.frozen must be given, as in teacher.frozen=VALUE.",
    "optim.steps=0": "optim.steps=0: it must be 1 or more.",
    "run.keep=0": "run.keep=0: it must be 1 or more.",
    "optim.warmup=625000": "optim.warmup=625000 leaves nothing of optim.steps=625000. For a short run",
    "run.keep_every=7": "run.keep_every=7 is not a multiple of run.checkpoint_every=",
    "masks.images=0.001": "masks.images=0.001 of 128 global crops in a step is none",
    "run.accumulate=7": "optim.batch=64 cannot be divided into run.accumulate=7 equal micro-batches.",
    "crops.globals.blur=[0,0,1]": "crops.globals.blur gives 3 probabilities for crops.globals.count=2 crops",
    "crops.locals.solarize=[0,0]": "crops.locals.solarize gives 2 probabilities for crops.locals.count=4",
    "crops.mean=[0.5]": "crops.mean has 1 channels, crops.std has 3.",
    "crops.mean=0.5": "crops.mean has 1 channels, crops.std has 3.",
    "crops.blur_kernel=4": "crops.blur_kernel=4 must be odd.",
    "losses=null": "losses is empty, so there is nothing to learn from. There is: ",
    "losses.contrastive={}": "losses.contrastive compares projections, but there is no section",
    "heads.projector={}": "`heads.projector` is given, but no loss of this recipe uses it",
    "losses.dino.phase=[0.5,0.2]": "losses.dino.phase=[0.5, 0.2]: give two shares of the run",
    "masks=null": "losses.ibot learns from masked patches, but there is no section `masks`.",
    "losses.ibot=null": "`masks` is given, but no loss of this recipe uses it; remove it with masks=null.",
    "run.accumulate=64": "losses.koleo needs 2 images at a time, but optim.batch=64 in",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_value_that_cannot_be_is_named_with_its_full_key(base, override):
    with pytest.raises(ValueError, match=f"^{re.escape(MISTAKES[override])}"):
        load_recipe(base, [override])


def test_every_number_of_a_recipe_has_a_range():
    anchored = ["losses.gram.weight=1", "teacher.gram.refreshes=3"]  # a section that may be missing
    recipe = load_recipe("satellite64", ["data.path=x", *anchored])
    numbers = {
        key
        for key, value in settings_of(recipe)
        if isinstance(value, int | float | tuple) and not isinstance(value, bool) and value != ()
    }
    own = {key for key in numbers if key.startswith("losses.")}  # a loss checks its other keys
    assert {key for key in numbers - own if range_of(key) is None} == set()
    used = {key for key in RANGES if any(fnmatch(number, key) for number in numbers)}
    assert used == RANGES.keys()


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optim.lr_rule=sqr", " Did you mean 'sqrt'?"),
        ("run.precision=bf61", " Did you mean 'bf16'?"),
        ("losses.dino.targets=Sinkhorn", " Did you mean 'sinkhorn'?"),
        ("evals.knn.train.split=trian", " Did you mean 'train'?"),
        ("data.split=val", ""),  # which is not all
    ],
)
def test_a_word_that_is_near_to_one_of_those_that_may_be_given_is_answered_with_it(base, override, near):
    with pytest.raises(ValueError, match=rf"is not one of .*\.{re.escape(near)}$"):
        load_recipe(base, [override])


def test_a_warm_up_shorter_than_one_stair_is_refused(base):
    with pytest.raises(ValueError, match=r"temp_warmup=9 is less than teacher.temp_every=10"):
        load_recipe(base, ["teacher.temp_warmup=9", "teacher.temp_every=10"])


UNKNOWN = {
    "losses.kolo.weight=1": "'kolo' is not in the registry 'losses', which has: ",
    "data.name=fodler": "data.name: 'fodler' is not in the registry 'data.sources', which has: ",
    "backbone.name=vitt": "backbone.name: 'vitt' is not in the registry 'models', which has: ",
    "evals.knnn.every=3": "'knnn' is not in the registry 'eval', which has: ",
    "evals.knn.test.name=tarr": "evals.knn.test.name: 'tarr' is not in the registry 'data.sources'",
    "data.name=my_package.lmdb": "data.name: 'my_package.lmdb' (for the registry 'data.sources') ",
    "data.name=_files": "data.name: '_files' is not in the registry 'data.sources'",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_a_name_that_no_file_has_is_answered_with_what_there_is(base, override):
    with pytest.raises(LookupError, match=f"^{re.escape(UNKNOWN[override])}"):
        load_recipe(base, [override])


def test_the_error_suggests_the_nearest_name_and_how_to_add_one(base):
    expected = r"which has: .*\bscenes\b.*\. Did you mean 'folder'\? A module of a package .* my_package"
    with pytest.raises(LookupError, match=expected):
        load_recipe(base, ["data.name=fodler"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "scenes_cup",
            "There is no recipe 'scenes_cup'. Did you mean 'scenes_cpu'? Recipes are: ",
        ),
        ("mine.yaml", "There is no recipe file 'mine.yaml' (looked from "),
        ("folder/mine", "There is no recipe file 'folder/mine' (looked from "),
    ],
)
def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(recipe, message):
    with pytest.raises(LookupError, match=f"^{re.escape(message)}"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [1", "line 1, column 8"),
        ("- optim", "it should hold keys such as name (must be given), backbone,"),
        ("", "it should hold keys such as name (must be given), backbone,"),
        ("name: x", "optim.batch, optim.lr and optim.steps must be given, as in optim.batch=VALUE."),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_place(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.steps", "'optim.steps' is not of the form key=value."),
        ("optim.betas=[0.9", "These overrides cannot be read: optim.betas=[0.9: "),
    ],
)
def test_an_override_that_cannot_be_read_is_repeated(base, override, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_recipe(base, [override])


@pytest.mark.slow
def test_no_recipe_needs_torch_to_be_read():
    code = (
        "import sys\n"
        "from dinokit.config.load import load_recipe, to_yaml\n"
        "from dinokit.config.registry import recipe_names\n"
        f"asked = {ASKED}\n"
        "for name in recipe_names():\n"
        "    to_yaml(load_recipe(name, ['data.name=folder', 'data.path=x', *asked.get(name, [])]))\n"
        "heavy = {'torch', 'numpy', 'PIL', 'timm', 'faiss', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "optim.lr=-1.0: it must be 0 or more"),
        ("masks.images=2", "masks.images=2.0: it must be from 0 to 1"),
        ("crops.globals.blur=[0.5,7]", r"crops.globals.blur=\(0.5, 7.0\): it must be from 0 to 1"),
        ("crops.hue=0.6", "crops.hue=0.6: it must be from 0 to 0.5"),
        ("crops.locals.scale=[0.5,0.1]", "crops.locals.scale=.* the smaller number comes first"),
        ("crops.globals.count=0", "crops.globals.count=0"),
        ("run.keep=0", "run.keep=0: it must be 1 or more"),
        ("optim.steps=0", "optim.steps=0: it must be 1 or more"),
        ("teacher.momentum=[0.9,1.1]", "teacher.momentum=.* from 0 to 1"),
        ("optim.lr=.nan", "optim.lr=nan"),
        ("losses.dino.weight=-1", "^losses.dino.weight=-1.0: it must be 0 or more"),
        ("losses.koleo.weight=.inf", "^losses.koleo.weight=inf: it must be 0 or more, and finite"),
        ("losses.dino.local_weight=-0.5", "^losses.dino.local_weight=-0.5: it must be 0 or more"),
        ("losses.sigreg.weight=-1", "^losses.sigreg.weight=-1.0: it must be 0 or more"),
        ("losses.coding_rate.weight=-1", "^losses.coding_rate.weight=-1.0: it must be 0 or more"),
        ("losses.gram.ramp=-1", "^losses.gram.ramp=-1: it must be 0 or more"),
        ("optim.weight_decay=[0.1,-1]", r"^optim.weight_decay=\(0.1, -1.0\): it must be 0 or more"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(base, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(base, [override])


def test_the_environment_in_a_recipe_is_used_and_written_unresolved(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    file = tmp_path / "a.yaml"
    file.write_text(
        "{backbone: {name: vit}, losses: {dino: {}}, optim: {steps: 1, batch: 4, lr: 1e-3},"
        " data: {name: parquet, path: '/${oc.env:SECRET}', classes: [a, '${oc.env:SECRET}']}}"
    )
    recipe = load_recipe(file, ["run.out=/out/${oc.env:SECRET}"])
    recipe = replace(recipe, run=replace(recipe.run, precision="fp32"))
    assert (recipe.run.out, recipe.data["path"]) == ("/out/s3cret", "/s3cret")
    assert "s3cret" not in to_yaml(recipe)
    assert to_yaml(recipe).count("${oc.env:SECRET}") == 3


def test_the_environment_is_unresolved_in_results_too(monkeypatch):
    monkeypatch.setenv("SECRET", "/s3cret")
    given = parse_overrides(["train.path=${oc.env:SECRET}/a", "test.path=/plain", "max_train=3"])
    values = section_values("eval", "knn", given, "")
    assert values["train"]["path"] == "/s3cret/a"
    line = results.record("knn", "w", {"top1@5": 0.5}, values, {})
    assert line["about"]["data"]["train"]["path"] == "${oc.env:SECRET}/a"
    assert line["about"]["data"]["test"]["path"] == "/plain"
    assert "s3cret" not in json.dumps(line)


def test_other_weights_replace_the_fingerprint_of_a_recipe(base, tmp_path):
    recorded = ["backbone.weights=old.pth", "backbone.fingerprint=ab"]
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(load_recipe(base, recorded)))
    assert load_recipe(file, ["backbone.weights=old.pth"]).backbone["fingerprint"] == "ab"
    assert "fingerprint" not in load_recipe(file, ["backbone.weights=new.pth"]).backbone
    both = load_recipe(file, ["backbone.weights=new.pth", "backbone.fingerprint=cd"])
    assert both.backbone["fingerprint"] == "cd"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not a recipe: it should hold keys"),
        (b"{name: x", "is not a recipe: "),
        (b"\x80\xff\x00", "is not a recipe: "),
        (b"[" * 100_000, "nested too deeply"),
        (b"- " * 100_000, "nested too deeply"),
        (b"{a: " * 100_000, "nested too deeply"),
        (b"\n".join(b" " * i + b"a:" for i in range(2000)), "nested too deeply"),
    ],
)
def test_a_recipe_that_is_empty_cut_binary_or_endless_is_named(tmp_path, content, why):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"recipe\.yaml .*{why}"):
        load_recipe(tmp_path / "recipe.yaml")


def test_an_infinite_rate_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"optim\.lr=inf: it must be 0 or more, and finite"):
        load_recipe("scenes_cpu", ["optim.lr=.inf"])
