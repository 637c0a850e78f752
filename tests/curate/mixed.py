"""A pool mixed from unlike sets of images, of which one is sought: for measuring retrieval and balance.

    python tests/curate/mixed.py FOLDER_OF_PARQUET_FILES OUT

writes OUT/pool, 660 images called SET__NUMBER_CLASS.jpg, and OUT/seeds0 to OUT/seeds4, 20 other flowers each.
"""

import sys
from pathlib import Path

import numpy as np

from dinokit.config import registry

SOUGHT, DRAWS, SEEDS = "tf_flowers", 5, 20
COUNTS = {
    SOUGHT: 120, "caltech101": 300, "eurosat": 60, "pets3_seg": 60, "ccp_seg": 40, "cracks_seg": 20,
    "dsb2018_nuclei": 20, "tum_rgbd": 20, "feral_cats_pool": 20,
}  # fmt: skip


def make(data: Path, out: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        source = registry.build("data.sources", {"name": "parquet", "path": str(data / f"{name}.parquet")})
        order = rng.permutation(len(source))
        into = {"pool": order[:count]}
        if name == SOUGHT:
            rest = order[count : count + DRAWS * SEEDS].reshape(DRAWS, SEEDS)
            into |= {f"seeds{number}": some for number, some in enumerate(rest)}
        for folder, places in into.items():
            (out / folder).mkdir(parents=True, exist_ok=True)
            for number, place in enumerate(places.tolist()):
                picture, label = source[place]
                kind = f"_{source.classes[label]}" if len(source.classes) else ""
                picture.convert("RGB").save(out / folder / f"{name}__{number:03d}{kind}.jpg", quality=95)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
