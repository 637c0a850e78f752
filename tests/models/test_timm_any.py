"""Models of timm for frozen use: timm's own forward_features is the oracle."""

import pytest
import timm
import torch

from dinokit.features import dense, fingerprint, frozen, patch_width
from dinokit.features.tokens import Pooling
from dinokit.models.timm_any import Config, TimmAny

# Five families, small: with registers, without a class token, rotary positions, a CNN, CLIP.
FAMILIES = {
    "vit_small_patch14_reg4_dinov2": "class", "vit_base_patch16_siglip_224": "pooled",
    "eva02_tiny_patch14_224": "class", "convnext_atto": "head", "vit_base_patch32_clip_224.laion2b": "class",
}  # fmt: skip
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3}  # of a ViT


def build(model: str, **values) -> TimmAny:
    values.setdefault("args", SMALL if "vit" in model or "eva" in model else {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TimmAny(Config(model=model, **values)).eval()


@pytest.mark.parametrize(("name", "kind"), FAMILIES.items())
@torch.no_grad()
def test_features_are_timms_own(name, kind, generator):
    ours = build(name)
    args = {} if kind == "head" else {**SMALL, "dynamic_img_size": True}
    theirs = timm.create_model(name, num_classes=0, **args)
    theirs.load_state_dict(ours.net.state_dict())
    theirs.eval()
    x = torch.randn(2, 3, 2 * ours.patch, 3 * ours.patch, generator=generator)
    rows = theirs.forward_features(x)
    (got,) = ours([x], [None])
    assert ours.cls_kind == kind
    if kind == "head":
        patches, cls = rows.flatten(2).transpose(1, 2), theirs.forward_head(rows, pre_logits=True)
        registers = patches[:, :0]
    else:
        prefix = theirs.num_prefix_tokens
        patches, registers = rows[:, prefix:], rows[:, 1:prefix]
        cls = rows[:, 0] if prefix else theirs.attn_pool(rows)
    for mine, want in ((got.patches, patches), (got.registers, registers), (got.cls, cls)):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-5)
    assert got.patches.shape == (2, 6, ours.width)
    last = ours.layers(x, [len(ours.blocks) - 1])[0]
    torch.testing.assert_close(last.patches, got.patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(last.cls, got.cls, rtol=0, atol=1e-5)


@torch.no_grad()
def test_blocks_are_those_of_a_loop_over_timms_blocks(generator):
    ours = build("vit_small_patch14_reg4_dinov2", args={**SMALL, "depth": 4})
    x = torch.randn(1, 3, 28, 28, generator=generator)
    net, want = ours.net, []
    rows = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for block in net.blocks:
        rows = block(rows)
        want.append(rows)
    for norm in (False, True):
        for i, tokens in zip((1, 3), ours.layers(x, [3, 1], norm), strict=True):
            rows = net.norm(want[i]) if norm else want[i]
            torch.testing.assert_close(tokens.cls, rows[:, 0])
            torch.testing.assert_close(tokens.registers, rows[:, 1:5])
            torch.testing.assert_close(tokens.patches, rows[:, 5:])


@torch.no_grad()
def test_without_class_token_and_pool_it_is_the_mean_and_the_fingerprint_says_so(generator):
    gap = build("vit_tiny_patch16_224")
    gap.cls_kind = "mean"
    x = torch.randn(1, 3, 32, 32, generator=generator)
    tokens = gap([x], [None])[0]
    torch.testing.assert_close(tokens.cls, tokens.patches.mean(dim=1))
    other = build("vit_tiny_patch16_224")
    assert fingerprint(gap) == fingerprint(other)
    assert fingerprint(gap, settings=True) != fingerprint(other, settings=True)


@torch.no_grad()
def test_stages_of_a_cnn_are_on_one_grid_and_their_widths_are_not_mixed_by_mistake(generator):
    ours = build("convnext_atto")
    x = torch.randn(2, 3, 64, 96, generator=generator)
    stages = ours.layers(x, [1, 3], norm=False)
    assert [t.patches.shape for t in stages] == [(2, 6, 80), (2, 6, 320)]
    maps = ours.net.stages[1](ours.net.stages[0](ours.net.stem(x)))  # stride 8: 4 x 4 places in one of 32
    want = maps.unflatten(3, (3, 4)).unflatten(2, (2, 4)).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stages[0].patches, want)
    with pytest.raises(ValueError, match=r"differ in their widths, \[160, 320\]"):
        Pooling(blocks=2)(ours, x)
    with frozen(ours):
        assert dense(ours, torch.rand(1, 3, 50, 64), [3])[0].patches.shape == (1, 320, 2, 2)


def test_images_are_those_of_the_weights():
    siglip = build("vit_base_patch16_siglip_224")
    assert (siglip.input.size, siglip.input.mean) == (224, (0.5, 0.5, 0.5))
    assert build("vit_tiny_patch16_224", size=64).input.size == 64
    assert build("convnext_atto", size=64).input.size == 64
    with pytest.raises(ValueError, match="images of 224 pixels only"):
        build("mixer_s32_224", size=64)
    with pytest.raises(ValueError, match=r"channels=1, but .* was trained on 3"):
        build("convnext_atto", channels=1)
    with pytest.raises(ValueError, match="needs multiples of 32"):
        build("convnext_atto")([torch.zeros(1, 3, 40, 64)], [None])
    with pytest.raises(ValueError, match="no mask token: timm_any is for frozen"):
        siglip([torch.zeros(1, 3, 32, 32)], [torch.zeros(1, 4, dtype=torch.bool)])


def test_the_width_of_a_model_of_a_single_size_is_found():
    beit = build("beit_base_patch16_224", args={**SMALL, "depth": 1})
    with frozen(beit), pytest.raises(ValueError, match="does not take images of 32 x 32 pixels"):
        dense(beit, torch.rand(1, 3, 32, 32), [0])
    assert patch_width(beit) == 96


@pytest.mark.parametrize(
    ("model", "args", "error"),
    [
        ("vit_tiny_patch16_224", {"num_heads": 7}, "AssertionError"),
        ("vit_tiny_patch16_224", {"num_heads": 0}, "ZeroDivisionError"),
        ("vit_tiny_patch16_224", {"depth": -1}, "RuntimeError"),
        ("convnext_atto", {"depths": [1]}, "IndexError"),
        ("vit_tiny_patch16_224", {"nothing": 1}, "TypeError"),
        ("vit_tiny_patch16_224", {"depth": 0}, "gives no features of places"),
    ],
)
def test_arguments_that_timm_does_not_take_are_named(model, args, error):
    with pytest.raises(ValueError, match=f"backbone.model={model} ") as found:
        build(model, args=args)
    assert error in str(found.value)
    assert error.startswith("gives") or f"args={args}" in str(found.value)


def test_names_are_checked_and_quick_gelu_is_warned_of():
    with pytest.raises(LookupError, match="Did you mean 'convnext_atto'"):
        build("convnext_ato")
    with pytest.raises(LookupError, match=r"no weights 'nobody' .* It has: .*openai"):
        build("vit_base_patch32_clip_224.nobody")
    with pytest.warns(UserWarning, match=r"model=vit_base_patch32_clip_quickgelu_224\.openai"):
        build("vit_base_patch32_clip_224.openai")


@torch.no_grad()
def test_a_mixer_has_a_row_for_each_place(generator):
    ours = build("mixer_s32_224")
    x = torch.randn(2, 3, 224, 224, generator=generator)
    (got,) = ours([x], [None])
    rows = ours.net.forward_features(x)
    torch.testing.assert_close(got.patches, rows)
    torch.testing.assert_close(got.cls, rows.mean(dim=1))
    torch.testing.assert_close(ours.layers(x, [len(ours.blocks) - 1])[0].patches, rows)


@torch.no_grad()
def test_a_pool_that_widens_is_replaced_by_the_mean(generator):
    ours = build("mobilenetv3_small_050")
    (got,) = ours([torch.randn(1, 3, 64, 64, generator=generator)], [None])
    assert got.patches.shape == (1, 4, ours.width)
    torch.testing.assert_close(got.cls, got.patches.mean(dim=1))


def test_rows_that_are_no_places_are_refused(generator):
    ours = build("convit_tiny", args={"depth": 2, "local_up_to_layer": 1})
    with pytest.raises(ValueError, match=r"197, 192.*196 places"):
        ours([torch.randn(1, 3, 224, 224, generator=generator)], [None])
