"""Released models that segment: SAM (arXiv 2304.02643) and SegGPT (arXiv 2304.03284).

A model is a folder as Hugging Face has it; the network is that of transformers. Nothing is downloaded, and no
code in a file is run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinokit.data.decode import ImageLike
from dinokit.data.transforms import size_of, thumbnail
from dinokit.runtime.device import pick_device
from dinokit.runtime.files import read_regular
from dinokit.segment.encoder import to_canvas
from dinokit.segment.promptable import Answer, Embedded
from dinokit.weights.architecture import MEAN, STD
from dinokit.weights.checkpoint import open_checkpoint
from dinokit.weights.formats.native import LARGEST

if TYPE_CHECKING:
    import numpy as np

    from dinokit.segment.prompts import Frame, Prompt

CLASSES = {"sam": "SamModel", "seggpt": "SegGptForImageSegmentation"}  # of transformers, by model_type
FILES = ("model.safetensors", "model.safetensors.index.json")
TIED = {  # of SAM: files have the second one alone
    "prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"
}
# Settings that are numbers of modules.
COUNTS = {"num_hidden_layers", "num_multimask_outputs", "num_point_embeddings", "iou_head_depth"}


def released_model(folder: str | Path, kind: str, device: str) -> Any:
    """The network in a folder with config.json and model.safetensors, or its index.

    Args:
        folder: as transformers writes it.
        kind: a key of CLASSES.
        device: as run.device.

    Raises:
        ValueError, LookupError: if there is no such model, it is damaged, or transformers is not installed.
    """
    settings = _settings(folder, "config.json")
    found = settings.get("model_type")
    if found != kind:
        what = f"its config.json says model_type={found}" if found else "it has no config.json"
        raise LookupError(
            f"weights={folder} is no folder of a released {kind} model: {what}. Give one, or head=RUN, a "
            f"head that dinokit train-head trained on these weights."
        )
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError:
        raise ValueError(
            f"A released {kind} model needs transformers, which is not installed: pip install "
            f"'.[huggingface]' in the clone."
        ) from None
    files = [Path(folder).expanduser() / name for name in FILES]
    tensors = open_checkpoint(next(filter(Path.is_file, files), files[0])).tensors
    with _named(folder):
        _check_settings(settings, len(tensors))
        network = getattr(transformers, CLASSES[kind])
        with torch.device("meta"):  # the config alone fills no memory: the tensors are those of the file
            model = network(network.config_class.from_dict(settings))
        for name, source in TIED.items():
            if source in tensors:
                tensors[name] = tensors[source]
        model.load_state_dict(tensors, strict=False, assign=True)  # an error names tensors of another shape
    absent = [name for name, x in model.state_dict().items() if x.is_meta]
    if absent:
        raise ValueError(f"weights={folder} lacks tensors of a {kind} model: {', '.join(absent[:5])}.")
    return model.to(pick_device(device), torch.float32).eval()


class Sam(nn.Module):
    """SAM in the place of the encoder and of the head of a Predictor.

    Of one click the answer is the likeliest of three masks, of other prompts the single one, as published.
    """

    channels = 3

    def __init__(self, folder: str | Path, device: str) -> None:
        super().__init__()
        self.model = released_model(folder, "sam", device)
        self.device = self.model.device
        with _named(folder):
            seen, asked = self.model.config.vision_config, self.model.config.prompt_encoder_config
            self.side = int(seen.image_size)
            if (asked.image_size, asked.patch_size) != (seen.image_size, seen.patch_size):
                raise ValueError("its config.json has two values of image_size or of patch_size")
        self.mean, self.std = (torch.tensor(row).view(-1, 1, 1) for row in _mean_and_std(folder))

    def encode(self, image: ImageLike) -> "tuple[Tensor, Tensor, Frame]":
        """One image: its embedding (c, h, w), its normalised pixels (1, 3, S, S), and its place."""
        canvas, frame = to_canvas(image, self.side, self.mean)
        pixels = ((canvas.float() / 255 - self.mean) / self.std)[None].to(self.device)
        return self.model.get_image_embeddings(pixels)[0], pixels, frame

    def embed(self, embedding: Tensor, pixels: Tensor) -> Embedded:
        """As PromptableHead.embed()."""
        return Embedded(embedding, None, pixels.shape[-1])

    def forward(self, embedded: Embedded, prompt: "Prompt") -> Answer:
        """The answers to M prompts for one image, all with as many points, and all or none with a box."""
        given: dict[str, Any] = {"image_embeddings": embedded.cells, "input_masks": prompt.masks}
        boxed = not prompt.boxes.isnan().any()
        if prompt.points.shape[1]:
            given |= {"input_points": prompt.points[None], "input_labels": prompt.signs[None]}
        if boxed:
            given["input_boxes"] = prompt.boxes[None] - 0.5  # SAM takes corners for indices of pixels
        three, one = (self.model(**given, multimask_output=several) for several in (True, False))
        logits, quality = one.pred_masks[0], one.iou_scores[0]
        if prompt.points.shape[1] == 1 and not boxed and prompt.masks is None:
            best = three.iou_scores[0].argmax(dim=1)
            rows = torch.arange(len(best), device=best.device)
            logits, quality = three.pred_masks[0][rows, best, None], three.iou_scores[0][rows, best, None]
        return Answer(
            torch.cat([logits, three.pred_masks[0]], dim=1), torch.cat([quality, three.iou_scores[0]], dim=1)
        )


class SegGpt:
    """SegGPT in the place of the network of a ByExample. It sees images as squares."""

    channels = 3

    def __init__(self, folder: str | Path, device: str) -> None:
        self.model = released_model(folder, "seggpt", device)
        mean, std = _mean_and_std(folder)
        with _named(folder):
            side = self.model.config.image_size[1]  # of an image: its canvas has two below each other
            self.processor = import_module("transformers").SegGptImageProcessor(
                size={"height": side, "width": side}, image_mean=mean, image_std=std
            )

    def remember(self, examples: "Sequence[tuple[ImageLike, np.ndarray]]", classes: int) -> dict[str, Any]:
        """Examples, as the network takes them: images with numbers (H, W) below `classes`."""
        return {
            "num_labels": classes - 1,
            **self.processor(
                images=None,
                prompt_images=[_rgb(image) for image, _ in examples],
                prompt_masks=[ids.astype("uint8") for _, ids in examples],
                num_labels=classes - 1,
                return_tensors="pt",
            ),
        }

    def answer(self, image: ImageLike, examples: dict[str, Any]) -> Tensor:
        """The numbers of the examples at each pixel, (H, W)."""
        prompts = {key: x.to(self.model.device) for key, x in examples.items() if key != "num_labels"}
        count, (width, height) = len(prompts["prompt_masks"]), size_of(image)
        pixels = self.processor(images=_rgb(image), return_tensors="pt")["pixel_values"]
        output = self.model(
            pixel_values=pixels.to(self.model.device).expand(count, -1, -1, -1),
            **prompts,
            feature_ensemble=count > 1,
            embedding_type="semantic",
        )
        sizes, labels = [(height, width)] * count, examples["num_labels"]
        found: Tensor = self.processor.post_process_semantic_segmentation(output, sizes, num_labels=labels)[0]
        return found


def _rgb(image: ImageLike) -> Any:
    return thumbnail(image, max(size_of(image)))


@contextmanager
def _named(folder: str | Path) -> Iterator[None]:
    """Errors get the name of the folder: a config.json of others fails in transformers in many ways."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"weights={folder} cannot be read: {type(error).__name__}: {error}. Copy or download it again."
        ) from None


def _check_settings(settings: Any, tensors: int) -> None:
    """Refuse a config.json with numbers that no model with so many tensors has, or that needs more code.

    Raises:
        ValueError: it names the key.
    """
    for key, value in settings.items():
        if key == "quantization_config" or "attn_implementation" in key:  # transformers would fetch a kernel
            if value not in (None, True, False, "eager", "sdpa"):
                raise ValueError(f"its config.json has {key}={value}, which needs other code")
        elif isinstance(value, dict):
            _check_settings(value, tensors)
        elif key in COUNTS and not (type(value) is int and 0 < value <= tensors):
            raise ValueError(f"its config.json has {key}={value}, and its file has {tensors} tensors")
        elif type(value) is int and value > LARGEST:
            raise ValueError(f"its config.json has {key}={value}, and {LARGEST} is the most")


def _mean_and_std(folder: str | Path) -> tuple[list[float], list[float]]:
    """Those of the three channels, in the file that transformers reads first; without one, ImageNet's."""
    settings = _settings(folder, "processor_config.json").get("image_processor")
    settings = _settings(folder, "preprocessor_config.json") if settings is None else settings
    with _named(folder):
        mean, std = (
            [float(x) for x in settings.get(key, usual)]
            for key, usual in (("image_mean", MEAN), ("image_std", STD))
        )
        if not (len(mean) == len(std) == 3 and all(map(isfinite, mean)) and all(0 < x < inf for x in std)):
            raise ValueError(f"image_mean={mean} and image_std={std} are not three numbers each, std above 0")
    return mean, std


def _settings(folder: str | Path, name: str) -> dict[str, Any]:
    """The content of a JSON file in a folder; nothing, if there is none.

    Raises:
        ValueError: if it is damaged; it names the file.
    """
    path = Path(folder).expanduser() / name
    try:
        return dict(json.loads(read_regular(path)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}. Copy or download it again.") from None
