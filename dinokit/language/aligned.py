"""Images and texts in one space: a head over the tokens of a frozen backbone, and a tower of texts.

The head has the form of dino.txt (arXiv 2412.16334): class token, registers and patches pass further blocks;
a vector is the class token beside the mean of patches. The second half of a text's vector is compared with
each patch for a map. Registers are in neither. With `local` the patches of mean and map are those before the
blocks, after a perceptron.

    b  images     T  tokens: class, registers, patches     D  their width     h, w  patches down and across
    E  width of the common space     c  texts
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.data.batch import stack
from dinokit.data.decode import ImageLike, as_image
from dinokit.data.transforms import resize, size_of, to_tensor
from dinokit.features import device_of, fingerprint, frozen
from dinokit.features.tokens import block_tokens, normalised
from dinokit.language.align_recipe import Head, View
from dinokit.language.text import TextTower, open_tower
from dinokit.models import Backbone
from dinokit.models.attention import PackedBatch
from dinokit.models.block import Block
from dinokit.runtime.device import pick_device
from dinokit.weights import load_backbone
from dinokit.weights.checkpoint import read_safetensors, write_tensors
from dinokit.weights.formats.native import LARGEST

NAME, TEXT = "head.safetensors", "text"  # in the folder of a run
KEY = "dinokit_align"  # of the metadata
BATCH = 64  # images at a time


class FrozenTokens:
    """The tokens that a frozen backbone gives of images, in float16.

    Args:
        backbone: on its device.
        view: how it is shown images.

    Raises:
        ValueError: if the side is no multiple of the patch, or there is no such block.
    """

    def __init__(self, backbone: Backbone, view: View) -> None:
        self.backbone, self.side = backbone, view.size or backbone.input.size
        if self.side % backbone.patch:
            near = max(1, round(self.side / backbone.patch)) * backbone.patch
            raise ValueError(
                f"view.size={self.side} is no multiple of the backbone's patch of {backbone.patch} pixels: "
                f"take view.size={near}."
            )
        depth = max(1, len(backbone.blocks))
        if not -depth <= view.block < depth:
            raise ValueError(f"view.block={view.block}: the backbone has blocks 0 to {depth - 1}.")
        self.norm = view.norm or not backbone.has_layers
        self.block = view.block % depth if len(backbone.blocks) else -1
        self.grid = (self.side // backbone.patch,) * 2
        shape = self(torch.zeros(1, backbone.channels, self.side, self.side, dtype=torch.uint8)).shape
        self.tokens, self.width = shape[1], shape[2]

    def square(self, image: ImageLike) -> Tensor:
        """The whole image as a square, (C, S, S) uint8 or float32."""
        return resize(to_tensor(image), self.side, self.side)[0]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Squares (b, C, S, S) -> (b, T, D) float16, on the backbone's device.

        Raises:
            ValueError: if a token is too large for float16.
        """
        device = device_of(self.backbone)
        precision = torch.bfloat16 if device.type == "cuda" else None
        with frozen(self.backbone), torch.autocast(device.type, precision, enabled=precision is not None):
            crops = normalised(self.backbone, pixels.to(device))
            found = block_tokens(self.backbone, crops, [self.block], self.norm)[0]
        tokens = torch.cat([found.cls[:, None], found.registers, found.patches], dim=1).half()
        if not tokens.isfinite().all():
            raise ValueError("The backbone's tokens are too large for 16 bits: set view.norm=true.")
        return tokens


class ImageHead(nn.Module):
    """Tokens (b, T, D) to the common space.

    Args:
        cfg: sizes.
        width: D.
        grid: h, w; the last h * w tokens are patches.
    """

    mean: Tensor
    deviation: Tensor
    places: Tensor

    def __init__(self, cfg: Head, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        # Channels of tokens that no norm has passed differ in scale by orders of magnitude.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("places", sine_places(grid, cfg.width), persistent=False)
        self.inside = nn.Linear(width, cfg.width)
        self.blocks = nn.ModuleList(
            Block(cfg.width, cfg.heads, cfg.ffn, cfg.layer_scale, cfg.drop_path) for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.width)
        self.local = perceptron(width, cfg.width) if cfg.local else None
        self.of_class = nn.Linear(cfg.width, cfg.embedding // 2, bias=False)
        self.of_patches = nn.Linear(cfg.width, cfg.embedding // 2, bias=False)

    @torch.no_grad()
    def standardise(self, tokens: Tensor) -> None:
        """Take mean and deviation of each channel from some tokens (n, T, D)."""
        rows = tokens.flatten(0, 1).double()
        self.mean.copy_(rows.mean(dim=0))
        self.deviation.copy_(rows.std(dim=0).clamp(min=1e-4))

    def seen(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (b, E / 2) and the patches (b, h * w, E / 2) in the common space."""
        scaled = (tokens.float() - self.mean) / self.deviation
        x = self.inside(scaled)
        n, patches = x.shape[1], len(self.places)
        x = torch.cat([x[:, :-patches], x[:, -patches:] + self.places], dim=1)
        batch, rows = PackedBatch(((len(x), n),)), x.flatten(0, 1)
        for block in self.blocks:
            rows = block(rows, batch)
        x = self.norm(rows).unflatten(0, (-1, n))
        seen = x[:, -patches:] if self.local is None else self.local(scaled[:, -patches:])
        return self.of_class(x[:, 0]), self.of_patches(seen)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, T, D) -> (b, E), of any length."""
        cls, patches = self.seen(tokens)
        return torch.cat([cls, patches.mean(dim=1)], dim=1)

    def dense(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """The cosine of each patch with the second half of each text (c, E): (b, c, h, w)."""
        _, patches = self.seen(tokens)
        of_patches = texts[:, texts.shape[1] // 2 :]
        maps = F.normalize(patches, dim=2) @ F.normalize(of_patches, dim=1).T
        return maps.transpose(1, 2).unflatten(2, self.grid)


def perceptron(width: int, hidden: int) -> nn.Sequential:
    """Two layers for each patch alone: (b, h * w, width) -> (b, h * w, hidden).

    No norm follows: it would give patches without contrast the length of others, and a map their noise.
    """
    layers = nn.Linear(width, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
    return nn.Sequential(*layers)


def sine_places(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of the places of patches (arXiv 1706.03762, in two directions), (h * w, width).

    Places are in [0, 1], so a grid of another size has the same waves.
    """
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    waves = math.pi * 16 ** torch.linspace(0, 1, width // 4)
    angles = [place.flatten()[:, None] * waves for place in (y, x)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


@dataclass
class About:
    """What the file of a head says."""

    view: dict[str, Any]
    head: dict[str, Any]  # sizes
    pool: str  # of the tower of texts
    length: int  # tokens of a text, at most
    fingerprint: str  # of the backbone
    data: dict[str, Any] | None  # the section of the images and captions that it was trained on
    steps: int


class Aligned(nn.Module):
    """A trained alignment. All vectors are on the unit sphere: their products are cosines."""

    def __init__(
        self, frozen_tokens: FrozenTokens, head: ImageHead, project: nn.Module, tower: TextTower
    ) -> None:
        super().__init__()
        self.frozen_tokens, self.head, self.project, self.tower = frozen_tokens, head, project, tower
        self.about: About | None = None

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.head.inside.weight.device

    def tokens(self, images: Any) -> Tensor:
        """The frozen tokens of images: a path, Pillow image or array, several, or a tensor (b, C, H, W)."""
        several = isinstance(images, Sequence) and not isinstance(images, str)
        listed = images if several or (isinstance(images, Tensor) and images.ndim == 4) else [images]
        seen, channels = self.frozen_tokens, self.frozen_tokens.backbone.channels
        squares = []
        for image in listed:
            if isinstance(image, Tensor):
                squares.append(resize(image[None], seen.side, seen.side)[0])
            else:
                squares.append(seen.square(as_image(image, channels)))
        parts = [stack(squares[i : i + BATCH]) for i in range(0, len(squares), BATCH)]
        return torch.cat([seen(part) for part in parts]).to(self.device)

    @torch.no_grad()
    def image(self, images: Any) -> Tensor:
        """The vectors of images, (b, E); they are given as for tokens()."""
        rows = [self.head(part) for part in self.tokens(images).split(BATCH)]
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """The vectors of texts, (c, E).

        Raises:
            ValueError: if one is empty.
        """
        empty = [text for text in texts if not text.strip()]
        if empty or not texts:
            raise ValueError("A text is empty: give one word or more.")
        rows = []
        for start in range(0, len(texts), BATCH):
            given = self.tower.tokenize(texts[start : start + BATCH])
            rows.append(self.project(self.tower(**{name: x.to(self.device) for name, x in given.items()})))
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def dense(self, images: Any, texts: Sequence[str]) -> Tensor:
        """How well each patch of the squared images fits each text, (b, c, h, w): cosines."""
        vectors = self.text(texts)
        return torch.cat([self.head.dense(part, vectors) for part in self.tokens(images).split(BATCH)])

    def place(self, image: Any, text: str) -> Tensor:
        """How well each pixel of an image fits a text, (H, W) at its size: cosines, bilinear."""
        image = as_image(image, self.frozen_tokens.backbone.channels)
        width, height = size_of(image)
        return F.interpolate(self.dense([image], [text]), (height, width), mode="bilinear")[0, 0]


def save_aligned(folder: Path, head: ImageHead, project: nn.Module, tower: TextTower, about: About) -> None:
    """Write head.safetensors and the folder text/."""
    parts = {"head": head, "project": project}
    tensors = {
        f"{part}.{name}": x.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, x in module.state_dict().items()
    }
    tower.save(folder / TEXT)
    write_tensors(folder / NAME, tensors, {KEY: json.dumps(asdict(about))})


def load_aligned(path: str | Path, weights: str | Path | Backbone, device: str = "auto") -> Aligned:
    """The alignment in the folder of a run of `dinokit align`, on the backbone that it was trained on.

    Args:
        path: the folder.
        weights: what load_backbone() reads, or a backbone.
        device: as run.device; a backbone that is given stays where it is.

    Raises:
        LookupError: if there is none; it says which command makes one.
        ValueError: if it is damaged, or was trained on other weights.
    """
    folder = Path(path).expanduser()
    file = folder / NAME
    if not file.is_file():
        raise LookupError(
            f"There is no alignment {file} (looked from {Path.cwd()}). dinokit align writes one: RUN/{NAME} "
            f"and RUN/{TEXT}."
        )
    about, tensors = _read(file)
    backbone = weights if isinstance(weights, Backbone) else load_backbone(weights).to(pick_device(device))
    if about.fingerprint != fingerprint(backbone):
        raise ValueError(
            f"{file} was trained on the features of other weights: give those as weights=, or align these: "
            f"dinokit align RECIPE weights=..."
        )
    seen = FrozenTokens(backbone, View(**about.view))
    head = ImageHead(Head(**about.head), seen.width, seen.grid)
    tower = open_tower(folder / TEXT, "last" if about.pool == "last" else "mean", about.length, "align")
    project = nn.Linear(tower.width, Head(**about.head).embedding, bias=False)
    try:
        nn.ModuleDict({"head": head, "project": project}).load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    aligned = Aligned(seen, head, project, tower).to(device_of(backbone)).eval().requires_grad_(False)
    aligned.about = about
    return aligned


def _read(file: Path) -> tuple[About, dict[str, Tensor]]:
    """What a file says, and its tensors; sizes are checked before anything of them is built."""
    try:
        tensors, metadata = read_safetensors(file)
        about = About(**json.loads(metadata[KEY]))
        head, view = Head(**about.head), View(**about.view)
        sizes = [head.width, head.heads, head.embedding, about.length]
        if not all(type(n) is int and 0 < n <= LARGEST for n in sizes) or not 0 <= head.depth <= len(tensors):
            raise ValueError(f"sizes {sizes}")  # noqa: TRY301 - named below
        if type(view.size) is not int or not 0 <= view.size <= LARGEST or head.width % head.heads:
            raise ValueError(f"view {view}")  # noqa: TRY301
    except (KeyError, OverflowError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{file} is no head that dinokit align saved.") from None
    return about, tensors
