"""Linear classifiers of images that our evaluators save: weights, classes, and how their features are made.

b  images     W  numbers in a feature vector     K  classes
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinokit.features import Pooling, fingerprint
from dinokit.models import Backbone
from dinokit.weights.checkpoint import read_safetensors, write_tensors
from dinokit.weights.formats.native import LARGEST

NAME = "classifier.safetensors"
KEY = "dinokit_classifier"  # of its metadata


@dataclass
class Classifier:
    """A linear map from the feature vectors of a backbone to classes."""

    weight: Tensor  # (K, W)
    bias: Tensor  # (K,)
    classes: list[str]
    pooling: Pooling
    resize: int  # pixels of the shorter side before the centre crop
    size: int  # pixels of the crop
    fingerprint: str  # of the backbone
    several: bool = False  # whether an image may have several classes

    def probabilities(self, x: Tensor) -> Tensor:
        """Features (b, W) -> (b, K), which sum to 1 unless an image may have several classes."""
        logits = x.float() @ self.weight.to(x.device).float().T + self.bias.to(x.device).float()
        return logits.sigmoid() if self.several else logits.softmax(dim=1)

    def save(self, folder: Path) -> Path:
        """Write the file NAME into a folder, atomically. Returns it."""
        about = {
            "classes": self.classes, "blocks": self.pooling.blocks, "pool": self.pooling.pool,
            "resize": self.resize, "size": self.size, "fingerprint": self.fingerprint,
            "several": self.several,
        }  # fmt: skip
        tensors = {key: x.detach().float().cpu() for key, x in (("weight", self.weight), ("bias", self.bias))}
        write_tensors(folder / NAME, tensors, {KEY: json.dumps(about)})
        return folder / NAME


def load_classifier(path: str | Path, backbone: Backbone) -> Classifier:
    """The classifier in a file, or in the folder of an evaluator.

    Raises:
        LookupError: if there is no such file; it says which command makes one.
        ValueError: if it is another file, or was trained on other weights.
    """
    file = Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    if not file.is_file():
        raise LookupError(
            f"There is no classifier {file} (looked from {Path.cwd()}). dinokit eval linear or logreg saves "
            f"one: RUN/linear/{NAME}, or in out=FOLDER."
        )
    try:
        tensors, metadata = read_safetensors(file)
        about = json.loads(metadata[KEY])
        pooling = Pooling(int(about["blocks"]), about["pool"])
        result = Classifier(
            tensors["weight"], tensors["bias"], list(about["classes"]), pooling, int(about["resize"]),
            int(about["size"]), about["fingerprint"], bool(about["several"]),
        )  # fmt: skip
        count, sizes = len(result.classes), (result.size, result.resize)
        if tuple(result.weight.shape[:1]) != (count,) or tuple(result.bias.shape) != (count,):
            raise ValueError(f"it has {count} classes")  # noqa: TRY301 - named below
        if not all(0 < side <= LARGEST for side in sizes) or not all(type(c) is str for c in result.classes):
            raise ValueError(f"sizes {sizes}, or classes without names")  # noqa: TRY301
    except (KeyError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{file} is no classifier that dinokit eval linear or logreg saved: {error}."
        ) from None
    width = result.weight.shape[1] if result.weight.ndim == 2 else 0
    if result.fingerprint != fingerprint(backbone) or width != pooling.width(backbone):
        raise ValueError(f"{file} was trained on the features of other weights: give those as weights=.")
    return result
