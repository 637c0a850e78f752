"""Entry points for torch.hub.load(FOLDER_OR_REPOSITORY, NAME, ...). Importing it needs torch only.

The names and the API of the models are those of facebookresearch/dino, dinov2 and dinov3.
"""

from dinokit.hub.entry import backbone_entry as _backbone
from dinokit.hub.entry import dinokit_aligned, dinokit_backbone, dinokit_predictor
from dinokit.hub.entry import head_entry as _head

__all__ = ["dinokit_aligned", "dinokit_backbone", "dinokit_predictor"]
dependencies = ["torch"]

dino_vits16 = _backbone("dino_vits16")
dino_vits8 = _backbone("dino_vits8")
dino_vitb16 = _backbone("dino_vitb16")
dino_vitb8 = _backbone("dino_vitb8")

dinov2_vits14 = _backbone("dinov2_vits14")
dinov2_vitb14 = _backbone("dinov2_vitb14")
dinov2_vitl14 = _backbone("dinov2_vitl14")
dinov2_vitg14 = _backbone("dinov2_vitg14")

dinov2_vits14_reg = _backbone("dinov2_vits14_reg")
dinov2_vitb14_reg = _backbone("dinov2_vitb14_reg")
dinov2_vitl14_reg = _backbone("dinov2_vitl14_reg")
dinov2_vitg14_reg = _backbone("dinov2_vitg14_reg")

# DINOv3's weights are not downloaded: weights=PATH, or the file in the cache of torch.hub.
dinov3_vits16 = _backbone("dinov3_vits16")
dinov3_vits16plus = _backbone("dinov3_vits16plus")
dinov3_vitb16 = _backbone("dinov3_vitb16")
dinov3_vitl16 = _backbone("dinov3_vitl16")
dinov3_vitl16plus = _backbone("dinov3_vitl16plus")
dinov3_vith16plus = _backbone("dinov3_vith16plus")
dinov3_vit7b16 = _backbone("dinov3_vit7b16")

dinov3_convnext_tiny = _backbone("dinov3_convnext_tiny")  # these need timm
dinov3_convnext_small = _backbone("dinov3_convnext_small")
dinov3_convnext_base = _backbone("dinov3_convnext_base")
dinov3_convnext_large = _backbone("dinov3_convnext_large")

dinov2_vits14_lc = _head("dinov2_vits14", "lc")
dinov2_vitb14_lc = _head("dinov2_vitb14", "lc")
dinov2_vitl14_lc = _head("dinov2_vitl14", "lc")
dinov2_vitg14_lc = _head("dinov2_vitg14", "lc")

dinov2_vits14_reg_lc = _head("dinov2_vits14_reg", "lc")
dinov2_vitb14_reg_lc = _head("dinov2_vitb14_reg", "lc")
dinov2_vitl14_reg_lc = _head("dinov2_vitl14_reg", "lc")
dinov2_vitg14_reg_lc = _head("dinov2_vitg14_reg", "lc")

dinov2_vits14_ld = _head("dinov2_vits14", "ld")
dinov2_vitb14_ld = _head("dinov2_vitb14", "ld")
dinov2_vitl14_ld = _head("dinov2_vitl14", "ld")
dinov2_vitg14_ld = _head("dinov2_vitg14", "ld")

dinov2_vits14_dd = _head("dinov2_vits14", "dd")
dinov2_vitb14_dd = _head("dinov2_vitb14", "dd")
dinov2_vitl14_dd = _head("dinov2_vitl14", "dd")
dinov2_vitg14_dd = _head("dinov2_vitg14", "dd")

dinov2_vits14_seg = _head("dinov2_vits14", "seg")
dinov2_vitb14_seg = _head("dinov2_vitb14", "seg")
dinov2_vitl14_seg = _head("dinov2_vitl14", "seg")
dinov2_vitg14_seg = _head("dinov2_vitg14", "seg")
