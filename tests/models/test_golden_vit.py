"""The ViT against features recorded from the reference implementations."""

import pytest
import torch

from dinokit.models.vit import Config, VisionTransformer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def config_of(weights: dict[str, torch.Tensor], heads: int) -> Config:
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    gamma = weights.get("blocks.0.ls1.gamma")
    return Config(
        channels=channels,
        size=side * patch,
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        heads=heads,
        patch=patch,
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in weights else "mlp",
        layer_scale=0.0 if gamma is None else 1.0,
        registers=registers,
        mask_token="mask_token" in weights,
        pos_offset=0.0 if registers else 0.1,
        pos_antialias=bool(registers),
    )


def load(weights: dict[str, torch.Tensor], heads: int) -> VisionTransformer:
    vit = VisionTransformer(config_of(weights, heads)).eval()
    vit.load_state_dict(weights, strict=True)
    return vit


def load_by_features(
    weights: dict[str, torch.Tensor], x: torch.Tensor, cls: torch.Tensor
) -> VisionTransformer:
    """A file of weights does not tell the number of heads; its features do."""
    width = weights["cls_token"].shape[-1]
    tried = [load(weights, heads) for heads in range(1, width + 1) if width % heads == 0]
    errors = [(vit([x], [None])[0].cls - cls).abs().max().item() for vit in tried]
    return tried[errors.index(min(errors))]


@pytest.mark.parametrize("name", ["vit_v2", "vit_v2_reg_swiglu"])
@torch.no_grad()
def test_dinov2_features_are_the_recorded_ones(golden, name):
    recorded = golden(name)
    vit = load_by_features(recorded.under("weights/"), recorded["io/0/x"], recorded["io/0/cls"])
    depth, j = len(vit.blocks), 0
    while f"io/{j}/x" in recorded:
        io = recorded.under(f"io/{j}/")
        got = vit.forward_features(io["x"])
        torch.testing.assert_close(got["x_norm_clstoken"], io["cls"], **CLOSE)
        torch.testing.assert_close(got["x_norm_patchtokens"], io["patches"], **CLOSE)
        torch.testing.assert_close(
            got["x_norm_regtokens"], io["registers"].reshape(got["x_norm_regtokens"].shape), **CLOSE
        )
        torch.testing.assert_close(got["x_prenorm"], io["prenorm"], **CLOSE)
        masked = vit([io["x"]], [io["mask"]])[0]
        torch.testing.assert_close(masked.cls, io["masked_cls"], **CLOSE)
        torch.testing.assert_close(masked.patches, io["masked_patches"], **CLOSE)
        for k, (patches, cls) in enumerate(vit.get_intermediate_layers(io["x"], 2, True, True)):
            torch.testing.assert_close(patches, io[f"last2_map_{k}"], **CLOSE)
            torch.testing.assert_close(cls, io[f"last2_cls_{k}"], **CLOSE)
        first, last = vit.get_intermediate_layers(io["x"], [depth - 1, 0], norm=False)
        torch.testing.assert_close(first, io["block0_raw"], **CLOSE)
        torch.testing.assert_close(last, io[f"block{depth - 1}_raw"], **CLOSE)
        j += 1
    assert j > 0
    groups = [recorded[f"io/{i}/x"] for i in range(j)]
    for i, tokens in enumerate(vit(groups, [None] * j)):  # all sizes in one pass
        torch.testing.assert_close(tokens.cls, recorded[f"io/{i}/cls"], **CLOSE)
        torch.testing.assert_close(tokens.patches, recorded[f"io/{i}/patches"], **CLOSE)


@torch.no_grad()
def test_dino_features_are_the_recorded_ones(golden):
    recorded = golden("vit_v1")
    vit = load(recorded.under("weights/"), heads=recorded["last_attention"].shape[1])
    x, y = vit([recorded["x"], recorded["y"]], [None, None])
    torch.testing.assert_close(x.cls, recorded["cls"], **CLOSE)
    torch.testing.assert_close(y.cls, recorded["y_cls"], **CLOSE)
    layers = vit.get_intermediate_layers(recorded["x"], 2, return_class_token=True)
    for k, (patches, cls) in enumerate(layers):
        tokens = torch.cat([cls[:, None], patches], dim=1)
        torch.testing.assert_close(tokens, recorded[f"last2_tokens_{k}"], **CLOSE)
