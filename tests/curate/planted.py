"""Plants duplicates and test images among photos, and evaluates what a curation found of them.

    python tests/curate/planted.py make PHOTOS.parquet OUT      # OUT/pool, 1,000 images; OUT/test, 180
    python tests/curate/planted.py evaluate OUT CURATED         # after `dinokit curate ... out=CURATED`

400 photos are in the pool, and of the first 120 five copies each: the same pixels, JPEG at quality 60, half
the size, other colours, a crop of 64 % of the area. The test set holds photos 80 to 160, and 100 of its own.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from dinokit.config import registry
from dinokit.curate.dedup import Status, load_status

PHOTOS, COPIED, LEAKED, OWN = 400, 120, (80, 160), 100
KINDS = ("exact", "jpeg", "half", "colour", "crop")


def make(photos: Path, out: Path) -> None:
    rng = np.random.default_rng(0)
    source = registry.build("data.sources", {"name": "parquet", "path": str(photos)})
    for folder in ("pool", "test"):
        (out / folder).mkdir(parents=True)
    for number, place in enumerate(rng.permutation(len(source))[: PHOTOS + OWN].tolist()):
        photo = source[place][0].convert("RGB")
        if number < PHOTOS:
            photo.save(out / "pool" / f"{number:04d}_photo.png")
        if number < COPIED:
            for kind, (copy, ending, how) in copies(photo, rng).items():
                copy.save(out / "pool" / f"{number:04d}_{kind}.{ending}", **how)
        if LEAKED[0] <= number < LEAKED[1] or number >= PHOTOS:
            photo.save(out / "test" / f"{number:04d}.jpg", quality=85)


def copies(photo, rng):
    """By kind: the copy, the ending of its file, how it is saved."""
    width, height = photo.size
    left, top = rng.uniform(0, 0.2, 2)
    box = (left * width, top * height, (left + 0.8) * width, (top + 0.8) * height)
    other = photo
    for change, low, high in (("Brightness", 0.7, 1.4), ("Contrast", 0.7, 1.4), ("Color", 0.3, 1.7)):
        other = getattr(ImageEnhance, change)(other).enhance(rng.uniform(low, high))
    good = {"quality": 90}
    return {
        "exact": (photo, "png", {"compress_level": 1}),
        "jpeg": (photo, "jpg", {"quality": 60}),
        "half": (photo.resize((width // 2, height // 2), Image.Resampling.BICUBIC), "jpg", good),
        "colour": (other, "jpg", good),
        "crop": (photo.crop(tuple(map(int, box))), "jpg", good),
    }


def evaluate(out: Path, curated: Path) -> dict[str, float]:
    """Shares: of each kind of copy, those in one group with their photo; of pairs within groups, the right
    ones; precision and recall of the images removed as test images."""
    names = [path.stem.split("_") for path in sorted((out / "pool").iterdir())]
    photo, kind = np.array([int(name[0]) for name in names]), np.array([name[1] for name in names])
    group = np.load(next((curated / "stages").glob("dedup.*")) / "groups.npz")["label"]
    status = load_status(next((curated / "stages").glob("overlap.*")))["status"]
    own = dict(zip(photo[kind == "photo"].tolist(), group[kind == "photo"].tolist(), strict=True))
    joined = group == np.array([own[number] for number in photo.tolist()])
    shares = {name: joined[kind == name].mean() for name in KINDS}
    pairs = np.triu(group[:, None] == group[None], 1)
    shares["right pairs"] = (photo[:, None] == photo[None])[pairs].mean()
    removed, leaked = status == Status.OVERLAP, (photo >= LEAKED[0]) & (photo < LEAKED[1])
    shares["overlap right"], shares["overlap found"] = leaked[removed].mean(), removed[leaked].mean()
    return {name: round(float(share), 3) for name, share in shares.items()}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.stdout.write(json.dumps(evaluate(Path(sys.argv[2]), Path(sys.argv[3]))) + "\n")
