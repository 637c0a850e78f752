"""Properties of the ViT beside its recorded features."""

import math

import pytest
import torch

from dinokit.models.vit import SIZES, Config, VisionTransformer, interpolate_grid

PUBLISHED = [
    ({**SIZES["tiny"], "patch": 16}, 1, 5_524_416),
    ({**SIZES["tiny"], "patch": 8}, 1, 5_526_720),
    ({**SIZES["small"], "patch": 16}, 1, 21_665_664),
    ({**SIZES["small"], "patch": 8}, 1, 21_670_272),
    ({**SIZES["base"], "patch": 16}, 1, 85_798_656),
    ({**SIZES["base"], "patch": 8}, 1, 85_807_872),
    ({**SIZES["small"], "patch": 14}, 2, 22_056_576),
    ({**SIZES["base"], "patch": 14}, 2, 86_580_480),
    ({**SIZES["large"], "patch": 14}, 2, 304_368_640),
    ({**SIZES["giant2"], "patch": 14, "ffn": "swiglu"}, 2, 1_136_480_768),
    ({**SIZES["small"], "patch": 14, "registers": 4}, 2, 22_058_112),
    ({**SIZES["giant2"], "patch": 14, "ffn": "swiglu", "registers": 4}, 2, 1_136_486_912),
]


@pytest.mark.parametrize(("values", "generation", "count"), PUBLISHED)
def test_it_has_as_many_parameters_as_the_published_ones(values, generation, count):
    more = {"size": 518} if generation == 2 else {"size": 224, "layer_scale": 0.0, "mask_token": False}
    with torch.device("meta"):
        vit = VisionTransformer(Config(**values, **more))
    assert sum(p.numel() for p in vit.parameters()) == count


def small(**values) -> VisionTransformer:
    defaults = {"size": 32, "width": 24, "depth": 2, "heads": 3, "patch": 8, "layer_scale": 1.0}
    return VisionTransformer(Config(**{**defaults, **values})).eval()


@torch.no_grad()
def test_groups_in_one_pass_are_groups_one_by_one(generator):
    vit = small(registers=2)
    crops = [
        torch.randn(b, 3, h, w, generator=generator) for b, h, w in ((2, 32, 32), (3, 16, 24), (1, 48, 8))
    ]
    masks = [torch.rand(2, 16, generator=generator) < 0.4, None, None]
    together = vit(crops, masks)
    for x, mask, tokens in zip(crops, masks, together, strict=True):
        (alone,) = vit([x], [mask])
        for name in ("cls", "registers", "patches"):
            torch.testing.assert_close(getattr(tokens, name), getattr(alone, name))


@torch.no_grad()
def test_masked_patches_have_no_effect(generator):
    vit = small()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of the 4 x 4 grid
    x = torch.randn(1, 3, 32, 32, generator=generator)
    y = x.clone()
    y[:, :, 8:16, 8:16] = 0
    torch.testing.assert_close(vit([x], [mask])[0].patches, vit([y], [mask])[0].patches)
    assert not torch.allclose(vit([x], [None])[0].patches, vit([y], [None])[0].patches)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, which PyTorch uses without antialias."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def by_hand(line: list[float], count: int, offset: float) -> list[float]:
    """Bicubic resampling of a line, sampled at the scale that an offset makes."""
    side, out = len(line), []
    for i in range(count):
        at = (i + 0.5) * side / (count + offset) - 0.5
        low = math.floor(at)
        out.append(sum(line[min(max(low + k, 0), side - 1)] * cubic(at - low - k) for k in range(-1, 3)))
    return out


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("count", [3, 5, 16])
def test_positions_are_resampled_at_the_scale_of_the_offset(count, offset, generator):
    line = torch.randn(7, generator=generator)
    grid = line.view(1, 7, 1, 1).expand(1, 7, 7, 1)
    got = interpolate_grid(grid, count, 7, offset, antialias=False)
    torch.testing.assert_close(got[0, :, 3, 0], torch.tensor(by_hand(line.tolist(), count, offset)))


@pytest.mark.parametrize(("offset", "antialias"), [(0.1, False), (0.0, True)])
def test_every_size_gets_its_own_grid(offset, antialias):
    grid = torch.randn(1, 37, 37, 1)
    for side in range(1, 147):
        assert interpolate_grid(grid, side, 147 - side, offset, antialias).shape == (1, side, 147 - side, 1)


def test_the_stored_size_uses_the_stored_positions():
    vit = small()
    assert vit._positions(4, 4) is vit.pos_embed
    assert vit._positions(2, 8).shape == vit.pos_embed.shape  # as many patches, another grid
    assert not torch.equal(vit._positions(2, 8), vit.pos_embed)


def test_layers_come_in_the_order_of_depth_and_missing_ones_are_refused(generator):
    vit = small(depth=3)
    x = torch.randn(2, 3, 32, 16, generator=generator)
    a, b = vit.get_intermediate_layers(x, [2, 0], reshape=True)
    assert a.shape == (2, 24, 4, 2)
    torch.testing.assert_close(b, vit.get_intermediate_layers(x, 1, reshape=True)[0])
    with pytest.raises(ValueError, match="they are 0 to 2"):
        vit.get_intermediate_layers(x, [3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 33}, "size=33 is no multiple of backbone.patch=8"),
        ({"heads": 5}, "no multiple of backbone.heads=5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        small(**values)


def test_an_image_size_that_does_not_fit_names_one_that_does():
    with pytest.raises(ValueError, match=r"35 x 32 pixels .* such as 32 x 32"):
        small()([torch.zeros(1, 3, 35, 32)], [None])


def test_many_channels_are_seen(generator):
    vit = small(channels=5)
    assert vit([torch.randn(2, 5, 32, 32, generator=generator)], [None])[0].cls.shape == (2, 24)


def test_positions_start_as_waves_of_row_and_column() -> None:
    vit = small(width=16, heads=2, positions="sincos")
    grid = vit.pos_embed[0, 1:].reshape(4, 4, 16).detach()
    assert grid.square().mean().sqrt().item() == pytest.approx(0.5)
    ratio = grid[2, 3] / torch.tensor(
        [f(place / 10_000 ** (i / 4)) for place in (2, 3) for f in (math.sin, math.cos) for i in range(4)]
    )
    torch.testing.assert_close(ratio, ratio[:1].expand(16))  # one scale for all
    with pytest.raises(ValueError, match="that four divides, not 6"):
        small(width=6, positions="sincos")


def test_weights_by_fan_in_keep_the_size_of_their_outputs_at_any_width() -> None:
    torch.manual_seed(0)
    for width in (32, 128):
        vit = small(width=width, heads=2, init="fan_in")
        for linear in (vit.blocks[0].attn.qkv, vit.blocks[0].mlp.fc2):
            out = linear(torch.randn(500, linear.in_features))
            assert out.std().item() == pytest.approx(0.7, rel=0.05)


@torch.no_grad()
def test_a_stem_of_convolutions_is_convolutions_normalisation_and_gelu_in_turn(generator):
    vit = small(width=32, heads=2, patch=4, stem="conv")
    x = torch.randn(2, 3, 16, 24, generator=generator)
    parameters = vit.patch_embed.state_dict()
    want = x.double()
    for first in (0, 3):
        kernel, scale, shift = (
            parameters[f"layers.{name}"].double()
            for name in (f"{first}.weight", f"{first + 1}.weight", f"{first + 1}.bias")
        )
        padded = torch.nn.functional.pad(want, (1, 1, 1, 1))
        windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)  # (b, C, h, w, 3, 3)
        want = torch.einsum("bchwij,ocij->bohw", windows, kernel)
        groups = want.unflatten(1, (8, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        spread = (groups.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt()
        want = ((groups - mean) / spread).flatten(1, 2) * scale[:, None, None] + shift[:, None, None]
        want = want * (1 + torch.erf(want / 2**0.5)) / 2
    want = torch.einsum("bchw,oc->bohw", want, parameters["layers.6.weight"][:, :, 0, 0].double())
    want = want + parameters["layers.6.bias"][:, None, None].double()
    have = vit.patch_embed(x).double()
    torch.testing.assert_close(have, want.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_with_a_stem_of_convolutions_groups_and_masks_work_as_without(generator):
    vit = small(width=32, heads=2, stem="conv", registers=1)
    crops = [torch.randn(2, 3, 32, 32, generator=generator), torch.randn(3, 3, 16, 16, generator=generator)]
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5] = True
    together = vit(crops, [mask, None])
    for tokens, x, m in zip(together, crops, (mask, None), strict=True):
        torch.testing.assert_close(tokens.patches, vit([x], [m])[0].patches)
    assert together[0].patches.shape == (2, 16, 32)
    assert not torch.equal(together[0].cls, vit(crops[:1], [None])[0].cls)


def test_a_stem_of_convolutions_refuses_what_it_cannot_halve():
    with pytest.raises(ValueError, match=r"backbone.patch of 2, 4, 8, 16 or 32, not 14"):
        small(width=32, heads=2, patch=14, size=28, stem="conv")
    with pytest.raises(ValueError, match=r"patch 8 needs a multiple of 32 as backbone.width, not 24"):
        small(stem="conv")
