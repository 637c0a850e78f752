"""The command line: quick answers without torch, and words for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.runtime.signals import STOP_SIGNALS
from dinokit.weights import save_backbone

QUICK = """
import sys
from dinokit.__main__ import main
status = main(sys.argv[1:])
heavy = {"torch", "numpy", "PIL", "timm", "torchvision"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


def quick(*words: str) -> subprocess.CompletedProcess:
    """A command line, which must be answered without importing anything heavy."""
    without = {**os.environ, "PATH": str(Path(sys.executable).parent)}  # programs of SLURM, if there are any
    done = subprocess.run([sys.executable, "-c", QUICK, *words], capture_output=True, text=True, env=without)
    assert "imported" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "dinokit train "),
        (["--help"], "dinokit train "),
        (["--help"], "    evaluate frozen features"),
        (["train", "--help"], "scenes_cpu"),
        (["eval", "knn", "--help"], "few_shot"),
        (["eval", "all", "--help"], "eval_scenes"),
        (["eval", "linear", "--help"], "held_out = 0.1              share of the training images"),
        (["results", "--help"], "options of every command"),
        (["submit", "--help"], "profiles: cpu, gpu"),
        (["submit", "profile=gpu", "nodes=2", "--dry-run", "--", "train", "scenes_cpu"], "#SBATCH --nodes=2"),
        (
            ["submit", "profile=gpu", "--dry-run", "--", "extract", "weights=x", "data.path=y", "out=z"],
            "scontrol requeue",
        ),
        (["submit", "profile=gpu", "--dry-run", "--", "eval", "knn", "weights=x"], "scontrol requeue"),
        (
            ["submit", "profile=gpu", "gpus=2", "--dry-run", "--", "eval", "knn", "weights=x"],
            "--ntasks-per-node=2",
        ),
        (["curate", "--help"], "curate_lvd"),
        (["search", "--help"], "nearest.png"),
        (["--version"], "dinokit 0"),
    ],
)
def test_help_is_given_at_once(words, answer):
    done = quick(*words)
    assert done.returncode == 0
    assert answer in done.stdout


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian", "scenes_cpu"], "There is no command 'trian'. Did you mean 'train'?"),
        (["train", "scene_cpu"], "There is no recipe 'scene_cpu'. Did you mean 'scenes_cpu'?"),
        (["train", "scenes_cpu", "optm.lr=1"], "there is no key 'optm'. Did you mean 'optim'?"),
        (
            ["train", "scenes_cpu", "optim.lrr=1"],
            "optim.lrr: there is no key 'lrr' in 'optim'. Did you mean 'lr",
        ),
        (["train", "scenes_cpu", "crops.globals.sise=1"], "crops.globals.sise: there is no key 'sise'"),
        (["train", "scenes_cpu", "optim.steps=many"], "optim.steps: 'many' is not a whole number."),
        (["train", "scenes_cpu", "losses.kolo.weight=1"], "Did you mean 'koleo'?"),
        (["train", "scenes_cpu", "losses.kolo=null"], "Did you mean 'koleo'?"),
        (["train", "scenes_cpu", "evals.kn=null"], "Did you mean 'knn'?"),
        (["train", "scenes_cpu", "losses.koleo.wieght=1"], "losses.koleo.wieght: there is no key 'wieght'"),
        (["train", "scenes_cpu", "data.name=foldr"], "Did you mean 'folder'?"),
        (["train", "scenes_cpu", "data.name=folder"], "data.path must be given"),
        (["train", "scenes_cpu", "backbone.depht=3"], "Did you mean 'depth'?"),
        (["train", "scenes_cpu", "evals.knn.evry=3"], "evals.knn.evry: there is no key 'evry'"),
        (["train", "scenes_cpu", "nonsense", "more"], "'nonsense' is not of the form key=value"),
        (["train", "scenes_cpu", "--resume"], "There is no option --resume"),
        (["train"], "Which recipe, or data.path=FOLDER to have one chosen? There is: "),
        (["eval", "kn", "weights=x"], "Did you mean 'knn'?"),
        (["eval", "knn", "weights=x", "kk=3"], "there is no key 'kk'"),
        (
            ["eval", "knn", "weights=x", "devcie=cpu"],
            "Did you mean 'device'? There is: weights, backbone, device, out,",
        ),
        (["eval", "knn"], "weights=FILE_OR_RUN"),
        (["eval", "linear", "weights=x", "setps=3"], "there is no key 'setps'. Did you mean 'steps'?"),
        (["eval", "linear", "weights=x", "steps=0"], "steps=0, but it must be 1 or more"),
        (["eval", "linear", "weights=x", "also.a.paht=y"], "also.a.paht: there is no key 'paht'"),
        (
            ["eval", "segmentation", "weights=x", "method=majority", "k=7", "lr=0.1", "steps=3"],
            "dinokit: k: only with method=knn, and here method=majority; lr, steps: only with method=linear "
            "or ms, and here method=majority. Remove the keys that have no effect",
        ),
        (["eval", "segmentation", "weights=x", "cache_gib=9"], "only without augment, and here augment=true"),
        (["eval", "depth", "weights=x", "head=f", "steps=3"], "steps: only without head, and here head=f."),
        (
            ["eval", "depth", "weights=x", "hub_range_bug=true"],
            "hub_range_bug: only with head, and head is not given.",
        ),
        (["eval", "knn", "weights=x", "tries=3"], "tries: only with few_shot, and few_shot is not given."),
        (
            ["train", "scenes_cpu", "evals.linear={every: 9, mode: online, views: 2}"],
            "evals.linear.views: only with mode=cached, and here evals.linear.mode=online.",
        ),
        (
            ["eval", "all", "weights=x", "recipe=eval_scenes", "depth.method=mean", "depth.lr=1"],
            "depth.lr: only with method=linear or dpt, and here depth.method=mean.",
        ),
        (["eval", "all", "weights=x"], "recipe must be given"),
        (["eval", "all", "weights=x", "recipe=eval_scene"], "Did you mean 'eval_scenes'?"),
        (["eval", "all", "weights=x", "recipe=eval_scenes", "knn.kk=3"], "knn.kk: there is no key 'kk'"),
        (["eval", "all", "weights=x", "recipe=eval_scenes", "kn=3"], "reads a key 'kn'. Did you mean 'knn'?"),
        (["results", "a=1"], "dinokit results takes folders"),
        (["submit", "profile=gpu"], "Which command? Give it after --"),
        (["submit", "--", "train", "scenes_cpu"], "profile must be given. Profiles are: cpu, gpu"),
        (["submit", "statsu"], "Did you mean 'status'?"),
        (["submit", "status", "12"], "No job 12 was submitted from here"),
        (["submit", "logs"], "Nothing was submitted from here"),
        (["submit", "cancel"], "Which job?"),
        (["submit", "profile=mine.yaml", "--", "train", "scenes_cpu"], "slurm/profiles: cpu, gpu."),
        (
            ["submit", "profile=gpu", "masks=null", "--", "train", "scenes_cpu"],
            "The keys of a profile are: partition, account, qos, constraint, nodes, gpus, tasks, cpus, "
            "memory, hours, notice, restarts, at_once, venv, container, setup, sbatch. Give settings of "
            "dinokit train after --: -- train ... masks=null",
        ),
        (
            ["submit", "profile=gpu", "--", "train", "scenes_cpu", "--dry-run"],
            "Give settings of the job before --: --dry-run -- ...",
        ),
        (["submit", "profile=gpu", "--", "eval", "knn", "weights=x", "gpus=1"], "before --: gpus=1 -- ..."),
        (["submit", "profile=gpu", "--", "eval", "knn", "wieghts=x"], "Did you mean 'weights'?"),
        (["submit", "profile=gpu", "--", "extract", "wieghts=x"], "Did you mean 'weights'?"),
        (["submit", "profile=gpu", "--", "curate", "curate_small", "out=x"], "pool.path must be given"),
        (["submit", "profile=gpu", "--", "dinokit", "train"], "'dinokit' to submit. Leave that word out."),
        (["submit", "run.out=x", "--", "train"], "profile must be given. Profiles are"),
        (
            ["submit", "run.out=x", "--", "train"],
            "train after --: -- train ... run.out=x",
        ),
        (["submit", "profile=gpu", "k=5", "--", "eval", "knn"], "after --: -- eval ... k=5"),
        (["submit", "profile=gpu", "--", "train", "scenes_cpu", "nodes=2"], "before --: nodes=2 -- ..."),
        (
            ["submit", "profile=gpu", "--", "trian", "scenes_cpu"],
            "no command 'trian' to submit. Did you mean 'train'?",
        ),
        (["submit", "profile=gpu", "--", "train", "scenes_cpu", "optim.lrr=1"], "Did you mean 'lr"),
        (
            ["submit", "profile=gpu", "nodes=3", "tasks=1", "--", "train", "scenes_cpu"],
            "nodes=3 and 1 process a node: optim.batch=64 images cannot be divided evenly over 3",
        ),
        (
            ["submit", "profile=gpu", "nodes=3", "tasks=1", "--", "train", "scenes_cpu"],
            "nodes may be 1, 2, 4.",
        ),
        (["submit", "profile=gpu", "nodes=2", "--", "export", "weights=x"], "export works in one process"),
        (["submit", "profile=gpu", "array=1-3", "--", "eval", "knn"], "all its jobs would be the same"),
        (["submit", "profile=gpu", "array=no/*", "--", "eval", "knn", "weights={}"], "has no values"),
        (
            ["submit", "profile=gpu", "after=soon", "--", "train", "scenes_cpu"],
            "after=soon: give numbers of jobs",
        ),
        (
            ["submit", "profile=gpu", "--", "train", "scenes_cpu"],
            "There is no SLURM here: the program sbatch",
        ),
        (["curate", "curate_smal"], "There is no recipe 'curate_smal'. Did you mean 'curate_small'?"),
        (["curate", "curate_small", "out=x"], "pool.path must be given"),
        (["curate", "curate_small", "pool.path=x"], "out must be given"),
        (["curate", "curate_small", "out=x", "pool.path=x"], "weights=FILE_OR_RUN must be given"),
        (
            ["curate", "curate_small", "out=x", "pool.nme=tar", "pool.path=x"],
            "pool.nme: there is no key 'nme'",
        ),
        (
            ["curate", "curate_small", "out=x", "pool.path=x", "seeds.a.rul=sample"],
            "there is no key 'rul'",
        ),
        (["curate", "curate_small", "out=x", "pool.path=x", "dedup.kk=3"], "dedup.kk: there is no key 'kk'"),
        (["curate", "curate_small", "stage=hsh"], "Did you mean 'hash'?"),
        (["curate", "curate_small", "part=3/3", "stage=hash"], "from 0 to N - 1"),
        (["curate", "curate_small", "part=1/3", "stage=dedup"], "needs stage= with one of: hash, embed"),
        (["search", "index=x"], "Which image?"),
        (["search", "indx=x", "a.jpg"], "Did you mean 'index'?"),
    ],
)
def test_every_mistake_is_answered_at_once_with_what_was_meant(words, answer):
    done = quick(*words)
    assert done.returncode == 2
    assert answer in done.stderr


@pytest.mark.parametrize(("typo", "meant"), [("hors", "hours"), ("node", "nodes"), ("mem", "memory")])
def test_a_mistyped_key_of_a_profile_is_not_sent_behind_the_dashes(typo, meant):
    done = quick("submit", "profile=gpu", f"{typo}=4", "--", "train", "scenes_cpu")
    assert done.returncode == 2
    assert f"there is no key '{typo}'. Did you mean '{meant}'?" in done.stderr
    assert "stands behind" not in done.stderr


def test_show_says_what_a_recipe_amounts_to_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "dinov2_vitl16_short", "data.path=/nowhere"]) == 0
    out = capsys.readouterr().out
    assert "backbone 303," in out
    assert "dino_head 23,662,848" in out
    assert "0.005657 at the peak" in out
    assert "2,048 images" in out or "2048 images" in out
    assert list(tmp_path.iterdir()) == []


def test_the_last_line_of_an_evaluation_is_json(capsys):
    words = [
        "train.name=scenes",
        "train.split=train",
        "train.count=60",
        "test.name=scenes",
        "test.split=test",
        "test.count=30",
    ]
    assert main(["eval", "knn", "backbone.name=pixels", "k=[5]", *words]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["eval"] == "knn"
    assert 0 <= last["top1@5"] <= 1
    assert last["images_train"] == 60
    assert last["about"]["settings"]["precision"] == "auto"
    assert last["about"]["precision"] in ("fp32", "bf16")  # what it came to here


@pytest.mark.slow
def test_heads_of_two_files_in_one_folder_do_not_meet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section = {"name": "vit", "width": 8, "depth": 1, "heads": 1, "size": 16, "patch": 8}
    words = ["cache=null", "resize=16", "size=16", "blocks=[1]", "steps=2", "step_batch=20", "batch=20"]
    for side in ("train", "test"):
        words += [f"{side}.{key}" for key in ("name=scenes", f"split={side}", "count=40", "size=32")]
    for name in ("step_1", "step_2"):
        save_backbone(tmp_path / f"{name}.safetensors", registry.build("models", section), section)
        assert main(["eval", "linear", f"weights={name}.safetensors", *words]) == 0, capsys.readouterr().err
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.pth"))
    assert kept == ["step_1_linear/linear_head.pth", "step_2_linear/linear_head.pth"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_an_error_in_a_run_is_a_sentence_and_a_traceback_on_request(capsys, tmp_path):
    words = [
        "train",
        "scenes_cpu",
        "data.name=folder",
        f"data.path={tmp_path / 'nothing'}",
        f"run.out={tmp_path / 'out'}",
    ]
    assert main(words) == 3
    err = capsys.readouterr().err
    assert "nothing" in err
    assert "Traceback" not in err
    with pytest.raises((ValueError, LookupError, OSError)):
        main([*words, "--traceback"])


LATE = """
import atexit, runpy, signal, sys
number = sys.argv.pop(1)
atexit.register(lambda: signal.raise_signal(int(number)))
runpy.run_module("dinokit", run_name="__main__")
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["no-such-command"], 2)])
def test_a_signal_that_comes_while_the_process_ends_leaves_its_status(number, words, status):
    command = [sys.executable, "-c", LATE, str(int(number)), *words]
    assert subprocess.run(command, capture_output=True).returncode == status
