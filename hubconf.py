"""Entry points for torch.hub.load(FOLDER_OR_REPOSITORY, NAME, ...). Importing it needs torch only.

The names and the API of the models are those of facebookresearch/dino and facebookresearch/dinov2.
"""

from dinokit.hub.entry import backbone_entry as _backbone
from dinokit.hub.entry import classifier_entry as _classifier
from dinokit.hub.entry import depth_entry as _depther
from dinokit.hub.entry import dinokit_backbone
from dinokit.hub.entry import segmentation_entry as _segmenter

__all__ = ["dinokit_backbone"]
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

dinov2_vits14_lc = _classifier("dinov2_vits14")
dinov2_vitb14_lc = _classifier("dinov2_vitb14")
dinov2_vitl14_lc = _classifier("dinov2_vitl14")
dinov2_vitg14_lc = _classifier("dinov2_vitg14")

dinov2_vits14_reg_lc = _classifier("dinov2_vits14_reg")
dinov2_vitb14_reg_lc = _classifier("dinov2_vitb14_reg")
dinov2_vitl14_reg_lc = _classifier("dinov2_vitl14_reg")
dinov2_vitg14_reg_lc = _classifier("dinov2_vitg14_reg")

dinov2_vits14_ld = _depther("dinov2_vits14", "ld")
dinov2_vitb14_ld = _depther("dinov2_vitb14", "ld")
dinov2_vitl14_ld = _depther("dinov2_vitl14", "ld")
dinov2_vitg14_ld = _depther("dinov2_vitg14", "ld")

dinov2_vits14_dd = _depther("dinov2_vits14", "dd")
dinov2_vitb14_dd = _depther("dinov2_vitb14", "dd")
dinov2_vitl14_dd = _depther("dinov2_vitl14", "dd")
dinov2_vitg14_dd = _depther("dinov2_vitg14", "dd")

dinov2_vits14_seg = _segmenter("dinov2_vits14")
dinov2_vitb14_seg = _segmenter("dinov2_vitb14")
dinov2_vitl14_seg = _segmenter("dinov2_vitl14")
dinov2_vitg14_seg = _segmenter("dinov2_vitg14")
