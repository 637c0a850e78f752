"""dinokit segment IMAGE|FOLDER weights=FILE_OR_RUN [head=RUN] PROMPT [out=PATH]: segment objects.

PROMPT is points=[[x,y,1],[x,y,0]] (1 on the object, 0 beside it), box=[x0,y0,x1,y1], mask=FILE.png (white on
the object so far), strokes=[[[x,y],[x,y],...],...] (lines on the object) or strokes=FILE.png, several of
these for one object, or everything=true for all objects. Numbers are pixels of the image. A mask is written
as PNG, white on the object, with a picture of it over the image; everything writes for each image its JSON in
the layout of SA-1B (`dinokit train-head objects.name=sa1b` reads it), a PNG of numbers and a picture.

With a head of kind in_context, like=[EXAMPLE.jpg,MASK.png] finds in IMAGE, or in all images of FOLDER, what
is marked in an example: white on black, or numbers from 1. like=[[A.jpg,A.png],[B.jpg,B.png]] gives several.
Without head=, weights is a folder of Hugging Face with a released SAM, or for like= with a released SegGPT.

With a head of kind unified, text="a red disc" marks what has these words, region=[OTHER.jpg,MASK.png] what
looks like the object that is white in MASK. Both go together, and with the other prompts.

text="a red disc" with align=RUN of `dinokit align` marks the pixels that fit the words; with a promptable
head= its point is where they fit best.

dinokit segment photo.jpg weights=runs/demo head=runs/head points=[[120,80,1],[40,60,0]] out=mask.png
dinokit segment photo.jpg weights=runs/demo head=runs/head box=[30,20,200,180] several=true out=mask.png
dinokit segment PHOTOS weights=runs/demo head=runs/head everything=true out=masks
dinokit segment PHOTOS weights=runs/demo head=runs/examples like=[a.jpg,a.png] out=masks
dinokit segment photo.jpg weights=runs/demo head=runs/unified text="a red disc" out=mask.png
dinokit segment photo.jpg weights=runs/demo align=runs/aligned text="a red disc" out=mask.png
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, key_lines
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least, only_if

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from dinokit.data.decode import ImageLike
    from dinokit.segment.predictor import Predictor

PROMPTS = ("points", "box", "mask", "strokes", "text", "region")
COLOURS = ((230, 60, 60), (60, 180, 75), (0, 130, 200), (245, 180, 40), (145, 30, 180), (70, 220, 220))


@dataclass
class Config:
    weights: str = (
        "???"  # whatever load_backbone() reads; without a head, a folder of a released SAM or SegGPT
    )
    head: str = ""  # a head of dinokit train-head, or the folder of its run
    out: str = ""  # the PNG, or the folder for several images; empty: segmented/, beside nothing of yours
    points: tuple[tuple[float, ...], ...] = ()  # x, y, and 1 on the object or 0 beside it
    box: tuple[float, ...] = ()  # x0, y0, x1, y1 around the object
    mask: str = ""  # a PNG of the object so far, to be corrected by points
    strokes: tuple[Any, ...] = ()  # on the object: a line of points, several lines, or a PNG, white on them
    text: str = ""  # words for what to mark, for a unified head, or with align
    region: tuple[str, ...] = ()  # for a unified head: another image and a mask of an object in it
    align: str = ""  # with text: the folder of a run of dinokit align on these weights
    # without a head: cosines above this share of the way from the lowest to the highest are marked
    level: float = only_if(0.5, text=True, head=False)
    several: bool = only_if(False, everything=False, like=False)  # three masks, the likeliest first
    everything: bool = False  # all objects, by a grid of points
    like: tuple[Any, ...] = ()  # an example and its mask, or a list of such pairs
    side: int = only_if(16, everything=True)  # of the grid: points along the long side
    quality: float = only_if(0.5, everything=True)  # masks that the head expects a lower IoU of are left out
    # likewise, of the IoU of the mask at a high and at a low threshold
    stability: float = only_if(0.6, everything=True)
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one

    def __post_init__(self) -> None:
        check_at_least(self, side=1, quality=0, stability=0, level=0)
        prompts = [key for key in PROMPTS if getattr(self, key)]
        alone = prompts == ["text"] and (self.head or not self.several)
        if (self.align and not alone) or (self.text and not self.align and not self.head):
            raise ValueError(
                "text=WORDS needs align=RUN, which dinokit align made on these weights, or head=RUN of a "
                "unified head. With align it goes with no other prompt; several=true needs head=RUN besides."
            )
        if self.region and len(self.region) != 2:
            raise ValueError(f"region={list(self.region)}: it is an image and a mask in it, [a.jpg,a.png].")
        if any(isinstance(part, str) for part in self.strokes) and len(self.strokes) != 1:
            raise ValueError(f"strokes={list(self.strokes)}: give one file, or lines of points.")
        if prompts and (self.everything or self.like):
            other = "everything=true finds all objects" if self.everything else "like finds what is marked"
            raise ValueError(f"{other}; {prompts[0]} asks for one object. Leave one out.")
        if self.everything and self.like:
            raise ValueError("everything=true and like ask for different things. Leave one out.")
        if self.like and not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in self.examples):
            raise ValueError(
                f"like={list(self.like)}: it is an image and its mask, [a.jpg,a.png], or a list of these."
            )
        if not prompts and not self.everything and not self.like:
            raise ValueError(
                "Give a prompt: points=[[x,y,1]], box=[x0,y0,x1,y1], mask=FILE, strokes=FILE, text=WORDS, "
                "region=[IMAGE,MASK] or everything=true."
            )
        for point in self.points:
            if len(point) not in (2, 3) or (len(point) == 3 and point[2] not in (0, 1)):
                raise ValueError(
                    f"points: {list(point)} is no point. One is [x, y, 1] on the object, [x, y, 0] beside it."
                )

    @property
    def examples(self) -> list[Any]:
        """The pairs of `like`."""
        single = self.like and isinstance(self.like[0], str)
        return [self.like] if single else [*self.like]


def run(command: Command) -> dict[str, Any]:
    cfg = Config(**checked_values(Config, parse_overrides(command.settings)))
    word = Path(command.one_word("image or folder"))
    images, root = _images(word)
    if len(images) > 1 and not cfg.everything and not cfg.like:
        raise ValueError(
            f"{word} has {len(images)} images, and a prompt is for one: name it, or everything=true."
        )
    targets = _targets(cfg, images, root)
    if cfg.like:
        result = _by_example(cfg, targets)
    elif cfg.text and not cfg.head:
        result = _by_text(cfg, targets)
    else:
        from dinokit.segment.predictor import Predictor

        predictor = Predictor.load(cfg.weights, cfg.head, cfg.device)
        result = (_everything if cfg.everything else _one)(cfg, predictor, targets)
    command.show(result)
    return result


def _images(path: Path) -> tuple[list[Path], Path]:
    """The image, or the images in a folder and below, and the folder.

    Raises:
        ValueError: if there is none.
    """
    from dinokit.data.decode import SUFFIXES, suffix
    from dinokit.data.files import existing

    found = existing(str(path))
    if found.is_file():
        return [found], found.parent
    images = sorted(p for p in found.rglob("*") if suffix(p.name) in SUFFIXES)
    if not images:
        raise ValueError(f"{path} has no image.")
    return images, found


def _targets(cfg: Config, images: list[Path], root: Path) -> dict[Path, list[Path]]:
    """By image, the files that are written for it; the picture of it is the last.

    Raises:
        ValueError: before any work, if `out` is of the wrong kind, a file would be written over an image, or
            for two of them.
    """
    out, result = Path(cfg.out or "segmented"), {}
    if not cfg.everything and not cfg.like:
        out = out if cfg.out else out / f"{images[0].stem}.png"
        if out.suffix.lower() != ".png":
            raise ValueError(f"out={out}: the mask is written as PNG, such as out={out.with_suffix('.png')}.")
        masks = [out, *(out.with_stem(f"{out.stem}_{n}") for n in (2, 3) if cfg.several)]
        result[images[0]] = [*masks, out.with_stem(f"{out.stem}_overlay").with_suffix(".jpg")]
    elif out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file, and several are written: give a folder.")
    for path in images if not result else ():
        name = path.relative_to(root)
        if cfg.everything:
            beside = out / "pictures" / name
            ends = beside.with_suffix(".ids.png"), beside.with_suffix(".overlay.jpg")
            result[path] = [out / name, (out / name).with_suffix(".json"), *ends]
        else:
            mask = (out / name).with_suffix(".png")
            result[path] = [mask, mask.with_name(f"{mask.stem}_overlay.jpg")]
    drawn = [part for part in cfg.strokes if isinstance(part, str)]
    given = [*drawn, *cfg.region, *(path for pair in cfg.examples for path in pair), cfg.mask]
    images_read = {Path(str(path)).resolve() for path in [*images, *filter(None, given)]}
    written: dict[Path, Path] = {}
    for path, files in result.items():
        for file in files:
            if file.resolve() in images_read:
                raise ValueError(
                    f"{file} is one of your images, and would be written over: give another out."
                )
            if written.setdefault(file.resolve(), path) is not path:
                raise ValueError(
                    f"{file} would be written for {written[file.resolve()]} and {path}: rename one."
                )
    return result


def _by_example(cfg: Config, targets: Mapping[Path, list[Path]]) -> dict[str, Any]:
    """What the examples show, in each image: a PNG of their numbers and a picture."""
    from PIL import Image

    from dinokit.data.decode import as_image, decode_map
    from dinokit.runtime.files import read_regular
    from dinokit.segment.by_example import ByExample

    segmenter = ByExample.load(cfg.weights, cfg.head, cfg.device)
    pairs = [(Path(str(a)), decode_map(read_regular(Path(str(b))), str(b))) for a, b in cfg.examples]
    segmenter.set_examples(pairs)
    areas = []
    for path, (mask, picture) in targets.items():
        image = as_image(path, segmenter.channels)
        ids = segmenter.predict(image)
        areas.append(int((ids > 0).sum()))
        numbers = range(1, int(ids.max()) + 1)
        _save(Image.fromarray(ids if segmenter.most > 1 else ids * 255), mask)
        _save(overlay(image, [ids == number for number in numbers]), picture)
    return {"images": len(targets), "area": areas, "out": cfg.out or "segmented"}


def _by_text(cfg: Config, targets: Mapping[Path, list[Path]]) -> dict[str, Any]:
    """The pixels that fit the words, as a PNG file."""
    from PIL import Image

    from dinokit.data.decode import as_image
    from dinokit.language.aligned import load_aligned

    ((path, (file, picture)),) = targets.items()
    aligned = load_aligned(cfg.align, cfg.weights, cfg.device)
    image = as_image(path, aligned.frozen_tokens.backbone.channels)
    cosine = aligned.place(image, cfg.text).cpu().numpy()
    mask = cosine >= cosine.min() + cfg.level * (cosine.max() - cosine.min())
    _save(Image.fromarray(mask.astype("uint8") * 255), file)
    _save(overlay(image, [mask]), picture)
    highest = round(float(cosine.max()), 4)
    return {
        "masks": 1,
        "cosine": highest,
        "area": [int(mask.sum())],
        "out": [str(file)],
        "overlay": str(picture),
    }


def _point(cfg: Config, image: "ImageLike") -> list[tuple[float, ...]]:
    """The middle of the pixel that fits the words best."""
    from dinokit.language.aligned import load_aligned

    cosine = load_aligned(cfg.align, cfg.weights, cfg.device).place(image, cfg.text)
    y, x = divmod(int(cosine.argmax()), cosine.shape[1])
    return [(x + 0.5, y + 0.5, 1)]


def _white(path: str) -> "np.ndarray":
    """The pixels of a PNG that are nearer to white than to black, (H, W) bool."""
    from dinokit.data.decode import decode_map
    from dinokit.runtime.files import read_regular

    mask = decode_map(read_regular(Path(path)), path)
    return mask >= max(1, (int(mask.max()) + 1) // 2)


def _one(cfg: Config, predictor: "Predictor", targets: Mapping[Path, list[Path]]) -> dict[str, Any]:
    """The masks of one prompt, as PNG files beside each other."""
    from PIL import Image

    from dinokit.data.decode import as_image

    ((path, (*files, picture)),) = targets.items()
    image = as_image(path, predictor.encoder.channels)
    predictor.set_image(image)
    mask = _white(cfg.mask) if cfg.mask else None
    strokes: Any = cfg.strokes or None
    if strokes and isinstance(strokes[0], str):
        strokes = _white(strokes[0])
    region = (cfg.region[0], _white(cfg.region[1])) if cfg.region else None
    points, text = (_point(cfg, image), "") if cfg.align else (cfg.points, cfg.text)
    signs = [int(point[2]) if len(point) == 3 else 1 for point in points]
    places = [point[:2] for point in points]
    answer = predictor.predict(places, signs, cfg.box or None, mask, cfg.several, strokes, text, region)
    shown = min(len(files), len(answer.masks))  # the best of those that a head gives, with names for three
    files = files[:shown]
    for file, each in zip(files, answer.masks[:shown], strict=True):
        _save(Image.fromarray(each.astype("uint8") * 255), file)
    _save(overlay(image, [answer.masks[0]]), picture)
    return {
        "masks": len(files),
        **({"words": answer.words} if answer.words else {}),
        "quality": [round(float(q), 4) for q in answer.quality],
        "area": [int(each.sum()) for each in answer.masks],
        "out": [str(file) for file in files],
        "overlay": str(picture),
    }


def _everything(cfg: Config, predictor: "Predictor", targets: Mapping[Path, list[Path]]) -> dict[str, Any]:
    """All objects of each image: a copy of it, JSON, a PNG of numbers and a picture, in one folder."""
    import numpy as np
    from PIL import Image

    from dinokit.data.decode import as_image
    from dinokit.runtime.files import write_text

    count = 0
    for path, (copy, record, ids, picture) in targets.items():
        image = as_image(path, predictor.encoder.channels)
        predictor.set_image(image)
        found = predictor.everything(cfg.side, cfg.quality, cfg.stability)
        count += len(found)
        numbers = np.zeros(predictor.size, np.uint16)
        masks = [each.mask for each in found]
        for number, mask in reversed([*enumerate(masks, 1)]):  # the better one lies above
            numbers[mask] = number
        _copy(path, image, copy)
        write_text(record, json.dumps(_record(found, copy.name, *predictor.size)))
        _save(Image.fromarray(numbers), ids)
        _save(overlay(image, masks[::-1]), picture)
    if not count:
        limits = f"quality={cfg.quality:g} and stability={cfg.stability:g}"
        print(f"dinokit: No mask passed {limits}: lower them, or train longer.", file=sys.stderr)
    return {"images": len(targets), "masks": count, "out": cfg.out or "segmented"}


def _copy(path: Path, image: "ImageLike", target: Path) -> None:
    """A copy with its pixels upright, as those of its masks are: byte for byte, unless EXIF turns them.

    Raises:
        ValueError: for an image that EXIF turns and that has more than 8 bits.
    """
    import numpy as np
    from PIL import Image

    from dinokit.data.decode import decode
    from dinokit.runtime.files import atomic, read_regular

    data, pixels = read_regular(path), np.asarray(image)
    stored = decode(data, str(path), pixels.shape[2] if pixels.ndim == 3 else 1, orient="stored")
    if np.array_equal(pixels, np.asarray(stored)):
        with atomic(target) as temporary:
            temporary.write_bytes(data)
    elif isinstance(image, Image.Image):
        _save(image, target)
    else:
        raise ValueError(
            f"{path} is turned by its EXIF orientation and has more than 8 bits: store it upright."
        )


def _record(found: Sequence[Any], name: str, height: int, width: int) -> dict[str, Any]:
    """The JSON of one image, as SA-1B has it."""
    from dinokit.data.objects.rle import to_json

    annotations = [
        {
            "id": number,
            "segmentation": to_json(each.rle),
            "area": each.rle.area,
            "bbox": [each.box[0], each.box[1], each.box[2] - each.box[0], each.box[3] - each.box[1]],
            "predicted_iou": round(each.quality, 4),
            "stability_score": round(each.stability, 4),
            "point_coords": [list(each.point)],
        }
        for number, each in enumerate(found, 1)
    ]
    return {"image": {"file_name": name, "height": height, "width": width}, "annotations": annotations}


def overlay(image: "ImageLike", masks: "Sequence[np.ndarray]") -> "Image.Image":
    """The image with each mask in a colour, half transparent, and its outline."""
    import numpy as np
    from PIL import Image

    from dinokit.data.transforms import size_of, thumbnail

    pixels = np.array(thumbnail(image, max(size_of(image))), np.float32)
    for number, mask in enumerate(masks):
        colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
        ring = np.pad(mask, 1)
        inner = ring[:-2, 1:-1] & ring[2:, 1:-1] & ring[1:-1, :-2] & ring[1:-1, 2:]
        pixels[mask] = 0.55 * pixels[mask] + 0.45 * colour
        pixels[mask & ~inner] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _save(image: "Image.Image", path: Path) -> None:
    from PIL import Image

    from dinokit.runtime.files import atomic

    with atomic(path) as temporary, temporary.open("wb") as file:
        kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")  # a copy may have no suffix
        image.save(file, kind, quality=95)


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "segment")])
