"""Rules of the layout: imports, sizes, packages and words. Each test names the files that break a rule."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted(path for top in ("dinokit", "eval", "slurm") for path in (ROOT / top).rglob("*.py"))
FILES = [path.relative_to(ROOT).as_posix() for path in PYTHON]

# A room is a file or folder right below dinokit/, or eval/, or slurm/. It imports those in its row alone.
MAY_IMPORT = {
    "__init__": "api embedder features viz weights",
    "__main__": "commands config runtime",
    "api": "commands config curate data evaluation features hub language models prediction results runtime "
           "weights",
    "bench": "config data features models runtime train",
    "commands": "bench config curate data evaluation features hub language models prediction report results "
                "runtime segment slurm train viz weights",
    "config": "",
    "curate": "config data features models report runtime weights",
    "data": "config runtime",
    "embedder": "api models runtime weights",
    "eval": "config data features heads language models runtime segment video weights",
    "evaluation": "config features models runtime weights",
    "features": "data models runtime",
    "heads": "features models runtime weights",
    "hub": "heads language models segment weights",
    "language": "config data features models runtime weights",
    "losses": "config models runtime",
    "models": "config",
    "report": "config data features models results runtime viz weights",
    "prediction": "data eval features heads models runtime",
    "results": "config runtime",
    "runtime": "config",
    "segment": "config data features language models runtime train weights",
    "slurm": "config runtime",
    "train": "config data features losses models runtime weights",
    "video": "config data features models runtime",
    "viz": "config data features models runtime",
    "weights": "config models runtime",
}  # fmt: skip

# Packages beyond the core, each with the files that are its door: nobody else misses one that is not there.
CORE = {"PIL", "numpy", "rich", "safetensors", "torch"}
DOORS = {
    "accelerate": "dinokit/language/*.py",
    "av": "dinokit/data/video.py",
    "datasets": "dinokit/data/sources/hf.py",
    "pydicom": "dinokit/data/dicom.py",
    "faiss": "dinokit/curate/index.py",
    "fastapi": "dinokit/commands/click.py",
    "gradio": "dinokit/commands/click.py",
    "uvicorn": "dinokit/commands/click.py",
    "huggingface_hub": "dinokit/commands/_card.py",
    "jinja2": "dinokit/report/__init__.py",
    "matplotlib": "dinokit/viz/draw.py dinokit/commands/_sweep_table.py",
    "omegaconf": "dinokit/config/*.py",
    "onnxruntime": "dinokit/weights/formats/onnx.py",
    "onnxscript": "dinokit/weights/formats/onnx.py",
    "peft": "dinokit/language/*.py",
    "pillow_heif": "dinokit/data/decode.py",
    "pyarrow": "dinokit/*parquet.py",
    "scipy": "dinokit/data/objects/__init__.py eval/eomt.py",
    "sklearn": "dinokit/embedder.py",
    "submitit": "slurm/submit.py",
    "tifffile": "dinokit/data/decode.py",
    "timm": "dinokit/*/timm*.py",
    "tokenizers": "dinokit/language/*.py",
    "torchvision": "dinokit/data/* dinokit/segment/*.py",
    "transformers": "dinokit/language/*.py dinokit/segment/released.py "
    "dinokit/weights/formats/huggingface*.py",
    "xformers": "dinokit/models/attention.py",
}


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported name in full: 'a.b' for `import a.b`, 'a.b.c' for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def room_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return parts[1] if parts[0] == "dinokit" else parts[0]


def uses(tree: ast.Module, name: str) -> list[int]:
    """The lines where a plain or dotted name, such as 'print' or 'os.environ', stands."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    return [node.lineno for node in nodes if ast.unparse(node) == name]


def test_the_readers_below_see_what_they_look_for() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d, e\nfrom . import f\ndef g():\n    import h\n    os.environ['x']"
    )
    assert sorted(imports(tree)) == ["..f", "a.b", "c.d", "c.e", "h"]
    assert uses(tree, "os.environ") == [6]
    assert "dinokit/config/load.py" in FILES
    assert "eval/__init__.py" in FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_the_floors_below(file: str) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{file}: say in MAY_IMPORT what the new room '{room}' may import"
    names = list(imports(parse(file)))
    assert not [name for name in names if name.startswith(".")], f"{file}: imports are written in full"
    rooms = {name.split(".")[1] for name in names if name.startswith("dinokit.")} & set(MAY_IMPORT)
    wrong = rooms - {room} - set(MAY_IMPORT[room].split())
    assert not wrong, f"{file} imports {sorted(wrong)}; '{room}' may import: {MAY_IMPORT[room] or 'nothing'}"


@pytest.mark.parametrize("file", FILES)
def test_a_package_enters_through_its_own_door(file: str) -> None:
    packages = {name.split(".")[0] for name in imports(parse(file))} - {"dinokit", *sys.stdlib_module_names}
    strangers = packages - CORE - set(DOORS)
    assert not strangers, f"{file} imports {sorted(strangers)}, which have no door"
    doors = {name: DOORS[name].split() for name in packages & set(DOORS)}
    wrong = sorted(name for name in doors if not any(fnmatch(file, door) for door in doors[name]))
    assert not wrong, f"{file} imports {wrong}; their doors are {[DOORS[name] for name in wrong]}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("eval/")])
def test_an_evaluator_never_imports_another(file: str) -> None:
    others = {f"dinokit.eval.{Path(other).stem}" for other in FILES if re.match(r"eval/[^_]", other)}
    names = imports(parse(file))
    siblings = [name for name in names if others & {name, name.rpartition(".")[0]}]
    assert not siblings, f"{file} imports {siblings}"


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_one_reason_to_be_opened(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{file} has {lines} lines, more than 400"


@pytest.mark.parametrize("file", FILES)
def test_a_function_fits_on_a_page(file: str) -> None:
    functions = [n for n in ast.walk(parse(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: n for f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > 60}
    assert not long, f"{file}: functions of more than 60 lines: {long}"


# Base classes of the project; inheritance from others is refused.
BASES = {"Backbone", "FrozenRun", "ImageConfig", "ClassificationConfig", "DenseConfig"}


def test_only_base_classes_are_inherited_from() -> None:
    classes = [(file, n) for file in FILES for n in ast.walk(parse(file)) if isinstance(n, ast.ClassDef)]
    ours = {node.name for _, node in classes if "Protocol" not in [ast.unparse(base) for base in node.bases]}
    ours -= BASES
    wrong = [
        f"{file}: {n.name}" for file, n in classes if ours & {ast.unparse(b).split(".")[-1] for b in n.bases}
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) not in ("__main__", "commands")])
def test_only_the_command_line_prints(file: str) -> None:
    assert not uses(parse(file), "print"), f"{file} prints on lines {uses(parse(file), 'print')}"


ENVIRONMENT = ("dinokit/runtime/distributed.py",)  # ranks of torchrun and SLURM


@pytest.mark.parametrize("file", [file for file in FILES if file not in ENVIRONMENT])
def test_only_one_file_reads_the_environment(file: str) -> None:
    tree = parse(file)
    lines = [line for name in ("os.environ", "os.getenv", "environ", "getenv") for line in uses(tree, name)]
    assert not lines, f"{file} reads the environment on lines {lines}"


@pytest.mark.parametrize("file", FILES)
def test_pillow_reads_only_formats_that_are_named(file: str) -> None:
    """Without `formats` it would read EPS as well, and run the program inside."""
    calls = [
        n for n in ast.walk(parse(file)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Image.open"
    ]
    wrong = [n.lineno for n in calls if "formats" not in {keyword.arg for keyword in n.keywords}]
    assert not wrong, f"{file}: Image.open without formats= on lines {wrong}; data/decode.py reads images"


def test_the_packages_of_the_wheel_are_the_folders_on_disk() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for package, folder in settings["package-dir"].items():
        holding = {path.parent for path in (ROOT / folder).rglob("*.py")}
        found |= {".".join([package, *path.relative_to(ROOT / folder).parts]) for path in holding}
    assert set(settings["packages"]) == found
    assert all((ROOT / folder / "__init__.py").is_file() for folder in settings["package-dir"].values())


def test_the_project_has_few_files() -> None:
    # 153 for training and evaluation; the rest are commands, tools around them, 25 for segmentation, 67 for
    # language and motion on frozen features (captioned boards, connectors and their training, texts beside
    # images, drawing, clips), and 3 for encoders that are read only
    assert len(FILES) <= 299


def test_the_training_loop_is_understood_from_few_files() -> None:
    """Files that train/trainer.py imports, directly or not; entries of registries come from recipes."""
    module_of = {file: re.sub(r"^(eval|slurm)/", r"dinokit/\1/", file) for file in FILES}
    names = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for file, path in module_of.items()
    }
    reached, remaining = set(), {"dinokit/train/trainer.py"}
    while remaining:
        file = remaining.pop()
        reached.add(file)
        if file == "dinokit/__init__.py":
            continue  # its imports are for type checkers
        for name in imports(parse(file)):
            found = {names[n] for n in (name, name.rpartition(".")[0]) if n in names}
            remaining |= found - reached
    assert len(reached) <= 70, sorted(reached)


def test_a_block_is_read_at_sight() -> None:
    assert len((ROOT / "dinokit/models/block.py").read_text(encoding="utf-8").splitlines()) <= 80


# Written so that the pattern does not match itself.
OLD_WORDS = r"\b(shel(f|ves)|judg(e|ed|ing)|hea[p]|tol[d]|ver[b])\b"
SOURCE = ("dinokit", "eval", "slurm", "configs", "docs", "tests", "README.md", "hubconf.py", "Makefile")


def test_old_words_are_gone() -> None:
    files = [ROOT / top for top in SOURCE if (ROOT / top).is_file()]
    for suffix in ("py", "md", "yaml"):
        files += [path for top in SOURCE for path in (ROOT / top).rglob(f"*.{suffix}")]
    words = {
        path.relative_to(ROOT).as_posix(): [
            m[0] for m in re.finditer(OLD_WORDS, path.read_text(encoding="utf-8"), re.I)
        ]
        for path in files
    }
    assert not {file: found for file, found in words.items() if found}
