"""The model card beside exported weights, and the upload to the hub of Hugging Face."""

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit import results
from dinokit.config.load import read_text_mapping
from dinokit.runtime.files import printable

if TYPE_CHECKING:
    from dinokit.models import Backbone

LIBRARIES = {"hf": "transformers", "timm": "timm"}
# Keys whose values are places on the author's disk.
PRIVATE = {"path", "out", "weights", "frozen", "initial", "against", "cache", "about", "images"}
PAPERS = """\
- Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv 2104.14294
- Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023, arXiv 2304.07193"""
LIMITS = """\
- The features follow the training images: on images of another kind they may distinguish little. Evaluate
  them on your own labelled images before you rely on them.
- They were learnt without labels, and nobody has examined them for bias, safety or medical use.
- Images must be prepared as above: the same size, mean and deviation as in training."""


def card(to: str, repo: str, backbone: "Backbone", about: Mapping[str, Any], lines: list[dict[str, Any]],
         licence: str) -> str:  # fmt: skip
    """The text of README.md.

    Args:
        to: hf or timm.
        repo: USER/NAME on the hub, or the folder.
        backbone: that was exported.
        about: dinokit.weights.describe() of its file.
        lines: of results.jsonl.
        licence: as the hub spells it, such as apache-2.0; empty: not stated.
    """
    recipe = read_text_mapping(about["recipe"]) if about["recipe"] else {}
    shown = backbone.input
    head = [
        "---",
        f"license: {licence or 'other'}",
        f"library_name: {LIBRARIES[to]}",
        "pipeline_tag: image-feature-extraction",
        "tags: [self-supervised, dino, dinokit]",
        "---",
        f"# {repo.rstrip('/').rpartition('/')[2]}",
        f"An image backbone: {sum(p.numel() for p in backbone.parameters()):,} parameters, patches of "
        f"{backbone.patch} pixels, {backbone.width} numbers a feature, {backbone.channels} channels. "
        f"Source of the weights: {printable(about['format'])}.",
        "" if licence else "\nThe author has not stated a licence: ask before you use or share the weights.",
    ]
    parts = [
        "\n".join(head),
        f"## Use\n\n```python\n{_usage(to, repo)}\n```",
        f"## Images\n\nThe shorter side is resized to {round(shown.size * 256 / 224)} pixels (bicubic), the "
        f"centre of {shown.size} x {shown.size} is cut out, and values in [0, 1] are normalised by mean "
        f"{list(shown.mean)} and deviation {list(shown.std)}.",
        f"## Training\n\n{_training(recipe)}",
        f"## Figures\n\n{_figures(lines)}",
        f"## Limits\n\n{LIMITS}",
        f"## Papers\n\n{PAPERS}",
    ]
    return "\n\n".join(parts) + "\n"


def _usage(to: str, repo: str) -> str:
    if to == "timm":
        prefix = "hf-hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) else "local-dir"
        return f"import timm\n\nmodel = timm.create_model('{prefix}:{repo}', pretrained=True).eval()"
    return (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f"processor = AutoImageProcessor.from_pretrained('{repo}')\n"
        f"model = AutoModel.from_pretrained('{repo}').eval()\n"
        "tokens = model(**processor(image, return_tensors='pt')).last_hidden_state  # class token first"
    )


def _training(recipe: Mapping[str, Any]) -> str:
    """The recipe without places on the author's disk."""
    if not recipe:
        return "The file does not say how it was trained."
    optim, losses, data = (  # out of a file that may have anything there
        dict(section) if isinstance(section := recipe.get(key), Mapping) else {}
        for key in ("optim", "losses", "data")
    )
    text = json.dumps(_without_places(recipe), indent=1)
    count = f"{optim.get('steps')} steps of {optim.get('batch')} images"
    name, kind = (
        printable(str(each)).replace("`", "'") for each in (recipe.get("name", ""), data.get("name"))
    )
    used = ", ".join(map(printable, map(str, losses)))
    return (
        f"Recipe `{name}` of dinokit: {printable(count)} from a source of the kind `{kind}`, losses {used}."
        "\n\n"
        f"<details><summary>All settings</summary>\n\n```json\n{text}\n```\n\n</details>"
    )


def _without_places(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_places(value) for key, value in values.items() if key not in PRIVATE}
    return [_without_places(value) for value in values] if isinstance(values, list) else values


def _figures(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        scores = [
            f"{key} {value:.4g}"
            for key, value in line.items()
            if key not in results.NOT_SCORES
            and not key.startswith("images_")
            and isinstance(value, int | float)
        ]
        images = line.get("images_test", "")
        rows.append(f"| {line['eval']} | {', '.join(scores[:4])} | {images} |")
    if not rows:
        return "None were measured. `dinokit eval knn` does so."
    return "\n".join(["| evaluator | scores | test images |", "|---|---|---|", *dict.fromkeys(rows)])


def check_push(repo: str) -> None:
    """Refuse an upload that cannot succeed, before anything is written.

    Raises:
        ValueError: if `repo` is not USER/NAME.
        RuntimeError: if huggingface_hub or a token is missing; it says how to get them.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"push={repo}: it is USER/NAME, as in push=marie/photos-vits16.")
    if not _hub().get_token():
        raise RuntimeError(
            f"push={repo}: there is no token of Hugging Face on this machine. Run `hf auth login`, or set "
            f"the environment variable HF_TOKEN, to a token that may write (https://huggingface.co/settings/tokens)."
        )


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload a folder; a new repository is private unless `public`. Returns its address."""
    hub = _hub()
    hub.create_repo(repo, private=not public, exist_ok=True)
    hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Weights exported by dinokit")
    return f"https://huggingface.co/{repo}"


def _hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise RuntimeError("push= needs huggingface_hub: pip install huggingface_hub") from None
