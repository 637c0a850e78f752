"""Files of weights: ours, and those of DINO, DINOv2, timm and Hugging Face. Nothing in a file is ever run.

Importing this needs torch alone: hubconf.py is used where dinokit is not installed. What needs more waits in
functions.
"""

from dinokit.weights.coverage import Coverage
from dinokit.weights.fill import fill
from dinokit.weights.formats.native import save_backbone
from dinokit.weights.locate import NAME
from dinokit.weights.reader import describe, load_backbone

__all__ = ["NAME", "Coverage", "describe", "fill", "load_backbone", "save_backbone"]
