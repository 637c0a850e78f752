"""From what a person gives, a file or a folder, to the file that holds the weights."""

from pathlib import Path

from dinokit.config.registry import suggest

NAME = "teacher.safetensors"  # of the weights in a run's folder
OTHERS = (  # of the weights in a folder of Hugging Face or timm, in the order in which they are looked for
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
KINDS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def locate(source: str | Path) -> Path:
    """The file of weights that `source` is, or that is in the folder `source`.

    Raises:
        LookupError: if there is none; it lists what there is.
        ValueError: if the folder is a diffusion pipeline.
    """
    path = Path(source)
    if path.is_dir():
        for name in (NAME, *OTHERS):
            if (path / name).is_file():
                return path / name
        if (path / "model_index.json").is_file():
            raise ValueError(
                f"{path} is a pipeline of the library diffusers: it makes images; no backbone of DINO."
            )
        have = _weights_in(path)
        hint = f" Give the path of one that is: {', '.join(have)}." if have else ""
        raise LookupError(f"There is no {NAME} in the folder {path}, nor {' or '.join(OTHERS[:3])}.{hint}")
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise LookupError(f"There is no file {path}, and no folder {path.parent} (looked from {Path.cwd()}).")
    weights = _weights_in(path.parent)
    hint = f" Weights there: {', '.join(weights[:10])}." if weights else ""
    near = suggest(path.name, sorted(p.name for p in path.parent.iterdir()))
    raise LookupError(f"There is no file {path}.{near}{hint}")


def _weights_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in KINDS and not p.name.startswith("."))
