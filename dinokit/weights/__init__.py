"""Files of weights: ours, and those of DINO, DINOv2, timm and Hugging Face. No code in a file is ever run.

Importing this needs torch only: hubconf.py is used where dinokit is not installed. Functions import other
packages.
"""

from dinokit.weights.checkpoint import NAME
from dinokit.weights.formats.native import save_backbone
from dinokit.weights.load import Coverage, build_section, describe, fill, load_backbone

__all__ = ["NAME", "Coverage", "build_section", "describe", "fill", "load_backbone", "save_backbone"]
