"""Draw docs/picture.png: images, what the teacher sees of them, and what the student sees.

python docs/picture.py [RECIPE] [key=value ...]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dinokit.config import registry
from dinokit.config.load import load_recipe
from dinokit.data.augment import Photometric
from dinokit.data.loader import training_loader
from dinokit.data.masks import BlockMasks

TILE, GAP, TOP = 96, 6, 22  # pixels
IMAGES, LOCALS = 4, 4
# The scenes with the usual crops: their own recipe has no small ones.
CROPS = [
    "backbone.size=64", "crops.globals.size=64", f"crops.locals.count={LOCALS}", "crops.locals.size=32",
    "crops.locals.scale=[0.1,0.4]", "crops.locals.blur=[0.0]", "crops.hue=0.1", "crops.gray=0.2",
]  # fmt: skip


def main(recipe_name: str = "scenes_cpu", *overrides: str) -> None:
    """Write the picture for the first images of a recipe."""
    fixed = ["optim.batch=8", "masks.images=1.0", "run.workers=0", *CROPS]
    recipe = load_recipe(recipe_name, [*fixed, *overrides])
    source, crops = registry.build("data.sources", recipe.data), recipe.crops
    side = crops.globals.size // recipe.backbone["patch"]
    masks = BlockMasks(recipe.masks, (side, side))
    batch = next(
        iter(training_loader(source, crops, masks, seed=3, start_step=0, steps=1, batch=8, workers=0))
    )
    photometric = Photometric(crops)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (crops.mean, crops.std))
    global_crops = photometric(batch.global_crops, batch.global_colour) * std + mean  # (2 * 8, 3, S, S)
    local_crops = photometric(batch.local_crops, batch.local_colour) * std + mean
    hidden = batch.masks.unflatten(1, (side, side))[:, None].repeat_interleave(TILE // side, 2)
    hidden = hidden.repeat_interleave(TILE // side, 3)  # (2 * 8, 1, TILE, TILE)

    columns = ["teacher: two large crops", "", "student: the same, masked", "", "and small crops"]
    columns += [""] * (LOCALS - 1)
    width, height = len(columns) * (TILE + GAP) + GAP, IMAGES * (TILE + GAP) + TOP + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((GAP + column * (TILE + GAP), GAP), title, fill="black")
    for row in range(IMAGES):
        tiles = [enlarged(global_crops[crop * 8 + row]) for crop in range(2)]
        tiles += [tile * ~hidden[crop * 8 + row] for crop, tile in enumerate(list(tiles))]
        tiles += [enlarged(local_crops[crop * 8 + row]) for crop in range(LOCALS)]
        for column, tile in enumerate(tiles):
            pixels = (tile.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            place = (GAP + column * (TILE + GAP), TOP + row * (TILE + GAP))
            sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)), place)
    sheet.save(Path(__file__).with_name("picture.png"), optimize=True)


def enlarged(crop: torch.Tensor) -> torch.Tensor:
    """A crop (3, S, S) as (3, TILE, TILE)."""
    return torch.nn.functional.interpolate(crop[None], size=(TILE, TILE))[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
