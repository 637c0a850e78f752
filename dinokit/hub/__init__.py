"""The models that DINO, DINOv2 and DINOv3 released: names, sizes and URLs. Importing it is fast."""

from collections.abc import Mapping
from dataclasses import dataclass, field

DINO = "https://dl.fbaipublicfiles.com/dino"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
LICENCE = "Apache-2.0"  # of the code and of the weights, in both projects
DINOV3_LICENCE = "DINOv3 License"  # Meta's own; it is no open-source licence


@dataclass(frozen=True)
class Released:
    """A released model of torch.hub."""

    name: str  # of the entry point
    parameters: int  # of the backbone
    url: str  # of its file; only its name for DINOv3, whose files are given to who accepts its licence
    size: str  # a key of SIZES in dinokit.models.vit or .dinov3; for `timm_convnext` the name of timm
    values: Mapping[str, object] = field(default_factory=dict)  # more fields of the vit's Config
    licence: str = LICENCE
    backbone: str = "vit"  # its name in a recipe

    @property
    def patch(self) -> object:
        """Pixels."""
        return self.values.get("patch", 16)

    def linear_url(self, layers: int) -> str:
        """The URL of the linear classifier on 1 or 4 blocks; only DINOv2 has them."""
        return self.url.replace(
            "_pretrain.pth", "_linear_head.pth" if layers == 1 else f"_linear{layers}_head.pth"
        )


def _dino(letter: str, patch: int, parameters: int) -> Released:
    size, file = {"s": ("small", "deitsmall"), "b": ("base", "vitbase")}[letter]
    folder = f"dino_{file}{patch}_pretrain"
    values = {"patch": patch, "size": 224, "layer_scale": 0.0, "mask_token": False}
    return Released(f"dino_vit{letter}{patch}", parameters, f"{DINO}/{folder}/{folder}.pth", size, values)


def _dinov2(letter: str, registers: int, parameters: int) -> Released:
    size = {"s": "small", "b": "base", "l": "large", "g": "giant2"}[letter]
    folder, suffix = f"dinov2_vit{letter}14", "_reg4" if registers else ""
    values = {
        "patch": 14,
        "size": 518,
        "ffn": "swiglu" if letter == "g" else "mlp",
        "layer_scale": 1.0,
        "registers": registers,
        "pos_offset": 0.0 if registers else 0.1,
        "pos_antialias": bool(registers),
    }
    name = f"{folder}_reg" if registers else folder
    return Released(name, parameters, f"{DINOV2}/{folder}/{folder}{suffix}_pretrain.pth", size, values)


def _dinov3(architecture: str, parameters: int, file: str) -> Released:
    name, file = f"dinov3_{architecture}", f"dinov3_{architecture}_pretrain_lvd1689m-{file}.pth"
    if architecture.startswith("convnext"):
        values = {"patch": 32}
        return Released(name, parameters, file, architecture, values, DINOV3_LICENCE, "timm_convnext")
    return Released(name, parameters, file, architecture, {}, DINOV3_LICENCE, "dinov3")


RELEASED = {
    model.name: model
    for model in (
        _dino("s", 16, 21_665_664),
        _dino("s", 8, 21_670_272),
        _dino("b", 16, 85_798_656),
        _dino("b", 8, 85_807_872),
        _dinov2("s", 0, 22_056_576),
        _dinov2("b", 0, 86_580_480),
        _dinov2("l", 0, 304_368_640),
        _dinov2("g", 0, 1_136_480_768),
        _dinov2("s", 4, 22_058_112),
        _dinov2("b", 4, 86_583_552),
        _dinov2("l", 4, 304_372_736),
        _dinov2("g", 4, 1_136_486_912),
        _dinov3("vits16", 21_601_152, "08c60483"),
        _dinov3("vits16plus", 28_697_472, "4057cbaa"),
        _dinov3("vitb16", 85_669_632, "73cec8be"),
        _dinov3("vitl16", 303_154_176, "8aa4cbdd"),
        _dinov3("vitl16plus", 403_915_776, "46503df0"),
        _dinov3("vith16plus", 840_633_600, "7c1da9a5"),
        _dinov3("vit7b16", 6_716_043_264, "a955f4ea"),
        _dinov3("convnext_tiny", 27_820_128, "21b726bb"),
        _dinov3("convnext_small", 49_454_688, "296db49d"),
        _dinov3("convnext_base", 87_566_464, "801f2ba9"),
        _dinov3("convnext_large", 196_230_336, "61fa432d"),
    )
}
