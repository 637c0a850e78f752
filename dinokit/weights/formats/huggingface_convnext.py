"""Writes a ConvNeXt as Hugging Face's DINOv3ConvNextModel; timm_convnext.py reads it back."""

from pathlib import Path
from typing import Any

from dinokit.models.timm_convnext import TimmConvNeXt
from dinokit.weights.formats import Exported
from dinokit.weights.formats.huggingface import write_folder
from dinokit.weights.formats.timm_convnext import renamed

NAMES = (  # timm's -> those in files of transformers
    (r"^stem\.", "stages.0.downsample_layers."),
    (r"\.downsample\.", ".downsample_layers."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".depthwise_conv."),
    (r"(?<=\d)\.norm\.", ".layer_norm."),
    (r"\.mlp\.fc([12])\.", r".pointwise_conv\1."),
    (r"^head\.norm\.", "layer_norm."),
)


def write(net: TimmConvNeXt, out: Path, size: int | None = None) -> Exported:
    """Write a folder for AutoModel.from_pretrained and AutoImageProcessor.from_pretrained."""
    tensors = {renamed(name, NAMES): t.detach().cpu().clone() for name, t in net.net.state_dict().items()}
    stages: Any = net.net.stages
    config = {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "num_channels": net.channels,
        "hidden_sizes": [info["num_chs"] for info in net.net.feature_info],
        "depths": [len(stage.blocks) for stage in stages],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": net.input.size,
        "dtype": "float32",
        "license": net.licence,
    }
    return write_folder(net, out, config, tensors, registers=0, every_size=True)
