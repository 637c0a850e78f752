"""A mostly useless pool: satellite images drowned in noise, flat colours, copies and photos of other things.

    python tests/curate/useless.py EUROSAT.parquet OUT [OTHER.parquet ...]

writes OUT/pool (a tenth of 24,000 images are of EuroSAT's training half), OUT/seeds (50 others of it), and
OUT/random.csv, a manifest of 2,400 images of the pool drawn by chance. All are of 64 x 64 pixels.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dinokit.config import registry

COUNT, OTHERS, SEEDS, SIDE = 24_000, 800, 50, 64


def photos(path, rng, count, **more):
    source = registry.build("data.sources", {"name": "parquet", "path": str(path), **more})
    for number in rng.permutation(len(source))[:count]:
        yield ImageOps.fit(source[int(number)][0].convert("RGB"), (SIDE, SIDE))


def noise(rng, count):
    for _ in range(count):
        cells = 1 << int(rng.integers(2, 7))  # of 4 to 64 a side
        pixels = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        yield Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def flat(rng, count):
    for _ in range(count):
        yield Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(0, 256, 3).tolist()))


def copies(images, rng, count):
    for _ in range(count):
        image = images[rng.integers(len(images))]
        low = rng.integers(0, 5, 2)
        yield image.crop((*low, *(low + 60))).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def make(eurosat: Path, out: Path, others: list[Path]) -> None:
    rng = np.random.default_rng(0)
    useful = COUNT // 10
    satellite = list(photos(eurosat, rng, useful + SEEDS, split="train"))
    strange = [image for path in others for image in photos(path, rng, OTHERS)]
    rest = COUNT - useful - len(strange)
    pool = [*satellite[SEEDS:], *strange, *noise(rng, rest // 3), *flat(rng, rest // 3)]
    pool += list(copies(list(noise(rng, 20)), rng, COUNT - len(pool)))
    for folder in ("pool", "seeds"):
        (out / folder).mkdir(parents=True)
    for number, image in enumerate(satellite[:SEEDS]):
        image.save(out / "seeds" / f"{number:02d}.png")
    order = rng.permutation(COUNT)
    for number, place in enumerate(order):
        kind = "eurosat" if place < useful else "other"
        pool[place].save(out / "pool" / f"{number:05d}_{kind}.png")
    names = sorted((out / "pool").iterdir())
    some = np.sort(rng.choice(COUNT, useful, replace=False))
    (out / "random.csv").write_text("path\n" + "".join(f"{names[n].absolute()}\n" for n in some))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
