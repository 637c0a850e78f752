"""dinokit imagine train | draw DIR CAPTION | decode DIR IMAGE | eval DIR: draw from words (experimental).

As Emu2 does, a small language model learns to predict the next word, or the next visual embedding, on
captioned boards of one or two things; a decoder turns embeddings into pixels. decode shows images beside what
their 16 embeddings keep of them. The encoder is frozen: weights=FILE_OR_RUN, or backbone.name=NAME. It shows
a mechanism at small size, and draws nothing but these boards.

dinokit imagine train weights=runs/demo out=imagined
dinokit imagine draw imagined "a red disc at the top left and a blue cross at the middle right" out=drawn.png
dinokit imagine decode imagined photo.png out=kept.png
dinokit imagine eval imagined
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, image_files, key_lines
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least, check_from_file, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from dinokit.models import Backbone

READ = {  # the keys that each action reads
    "train": {
        "weights", "backbone", "out", "size", "images", "steps", "decoder_steps", "batch", "lr", "width",
        "layers", "seed",
    },
    "draw": {"out"},
    "decode": {"weights", "backbone", "out"},
    "eval": {"weights", "backbone", "test"},
}  # fmt: skip
ACTIONS = tuple(READ)
HEADS = 4  # of attention, as in imagine.Shape; the rotary positions take pairs of channels of each


@dataclass
class Config:
    weights: str = ""  # the frozen encoder: whatever load_backbone() reads
    backbone: dict[str, Any] = field(default_factory=dict)  # in place of weights: backbone.name=NAME
    out: str = ""  # train: the folder to write; draw, decode: the picture, drawn.png if not given
    size: int = 64  # train: pixels of the images
    images: int = 6_000  # train: boards that are drawn
    steps: int = 2_000  # train: of the language model
    decoder_steps: int = 1_000  # train: of the decoder, before
    batch: int = 64  # train: sequences in a step
    lr: float = 2e-3  # train: the highest rate
    width: int = 128  # train: of the language model, a multiple of 8
    layers: int = 3  # train: of the language model
    test: int = 1_000  # eval: boards
    seed: int = 0  # train: of all random numbers

    def __post_init__(self) -> None:
        check_at_least(
            self, size=32, images=2, steps=1, decoder_steps=1, batch=2, width=8, layers=1, test=2, seed=0
        )
        for key, step in (("width", 2 * HEADS), ("size", 4)):
            if getattr(self, key) % step:
                raise ValueError(f"{key}={getattr(self, key)}: it must be a multiple of {step}.")


def words() -> Sequence[str]:
    return ACTIONS


def run(command: Command) -> dict[str, Any]:
    action, *rest = command.words or [""]
    if action not in ACTIONS:
        near = suggest(action, [*ACTIONS])
        raise ValueError(f"dinokit imagine takes one of {', '.join(ACTIONS)}.{near} See --help.")
    given = parse_overrides(command.settings)
    cfg = Config(**checked_values(Config, given))
    _refuse_unread(action, given)
    if action == "train":
        Command(rest, []).no_words(" Give weights=FILE_OR_RUN and out=DIR.")
        result = _train(cfg)
    elif not rest:
        raise ValueError(f"Which folder? dinokit imagine {action} DIR: the out= of dinokit imagine train.")
    else:
        result = {"draw": _draw, "decode": _decode, "eval": _eval}[action](cfg, rest[0], rest[1:])
    command.show(result)
    return result


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "imagine")])


def _refuse_unread(action: str, given: Collection[str]) -> None:
    """Refuse keys that an action would ignore."""
    for key in given:
        if key not in READ[action]:
            readers = [name for name, keys in READ.items() if key in keys]
            does = f"{', '.join(readers)} {'do' if len(readers) > 1 else 'does'}"
            raise ValueError(f"{key}=: dinokit imagine {action} does not read it; {does}. Leave it out.")


def _train(cfg: Config) -> dict[str, Any]:
    if bool(cfg.weights) == bool(cfg.backbone) or not cfg.out:
        raise ValueError("Give out=DIR, and either weights=FILE_OR_RUN or backbone.name=NAME.")
    import torch

    from dinokit.features import fingerprint
    from dinokit.language import needed
    from dinokit.language.imagine import Imagine, Shape, save
    from dinokit.language.imagine_train import encode, train

    needed("transformers"), needed("accelerate")
    section = cfg.backbone or {"weights": cfg.weights}
    backbone = _backbone(section)
    print(f"{cfg.images} boards are drawn and encoded", flush=True)
    scenes = encode(backbone, "train", cfg.images, cfg.size, cfg.seed)
    torch.manual_seed(cfg.seed)
    channels = scenes.embeddings.shape[2]
    model = Imagine(Shape(channels, cfg.width, cfg.layers, pixels=cfg.size))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.steps} steps", flush=True)
    steps = cfg.decoder_steps, cfg.steps
    settings = {"per_device_train_batch_size": cfg.batch, "learning_rate": cfg.lr, "seed": cfg.seed}
    losses = train(model, scenes, steps, settings, partial(print, flush=True))
    about = {"backbone": section, "fingerprint": fingerprint(backbone, settings=True), "seed": cfg.seed}
    save(model, Path(cfg.out), {**about, "images": cfg.images, "steps": steps, "batch": cfg.batch})
    return {"out": cfg.out, **losses}


def _draw(cfg: Config, folder: str, words: Sequence[str]) -> dict[str, Any]:
    from dinokit.language.imagine import check_words, load

    (model, _), caption = load(folder), " ".join(words)
    check_words(model, caption)
    return {"out": _picture(cfg, model.decoder(model.imagine([caption]))), "caption": caption}


def _decode(cfg: Config, folder: str, files: Sequence[str]) -> dict[str, Any]:
    import torch

    from dinokit.data.sources.memory import as_source
    from dinokit.data.transforms import center_crop, to_uint8
    from dinokit.language.imagine import load
    from dinokit.language.imagine_train import embed

    model, about = load(folder)
    side, source = model.shape.pixels, as_source([*image_files(files)])
    crops = [center_crop(source[i][0], side, side) for i in range(len(source))]
    pixels = torch.stack([x if x.dtype == torch.uint8 else to_uint8(x) for x in crops])
    kept = model.decoder(model.standardised(embed(_encoder(cfg, folder, about), pixels)))
    return {"out": _picture(cfg, torch.cat([pixels / 255, kept], dim=3)), "images": len(pixels)}


def _eval(cfg: Config, folder: str, words: Sequence[str]) -> dict[str, Any]:
    from dinokit.language.imagine import load
    from dinokit.language.imagine_train import encode, evaluate

    Command([*words], []).no_words()
    model, about = load(folder)
    backbone, size, seed = _encoder(cfg, folder, about), model.shape.pixels, int(about["seed"])
    scenes = encode(backbone, "test", cfg.test, size, seed, distinct=True)
    trained = encode(backbone, "train", int(about["images"]), size, seed)
    return {"run": folder, **evaluate(model, scenes, trained)}


def _picture(cfg: Config, pixels: "Tensor") -> str:
    """Write drawings (b, 3, S, S), one below the other."""
    from PIL import Image

    from dinokit.runtime.files import atomic

    out, rows = Path(cfg.out or "drawn.png"), pixels.clamp(0, 1).permute(0, 2, 3, 1).flatten(0, 1)
    with atomic(out) as temporary:
        Image.fromarray((rows * 255).round().byte().numpy()).save(temporary, format="PNG")
    return str(out)


def _encoder(cfg: Config, folder: str, about: dict[str, Any]) -> "Backbone":
    """The frozen encoder of a folder, which may have been moved."""
    from dinokit.features import fingerprint

    section = cfg.backbone or ({"weights": cfg.weights} if cfg.weights else {})
    if not section:  # out of the folder, which anybody may have written; what the user gives is not refused
        section = about["backbone"]
        check_from_file(section, folder, "weights= or backbone.name=")
    backbone = _backbone(section)
    if fingerprint(backbone, settings=True) != about["fingerprint"]:
        raise ValueError(f"{folder} was trained on another encoder than {section}: give weights= of that.")
    return backbone


def _backbone(section: dict[str, Any]) -> "Backbone":
    import torch

    from dinokit.weights import build_section

    torch.manual_seed(0)
    return build_section(section)
