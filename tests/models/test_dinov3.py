"""DINOv3's ViT: sizes of the released models, rotary positions by closed forms, masked bias, untied norms."""

import cmath
import math

import pytest
import torch

from dinokit.features.tokens import attention
from dinokit.models import fused
from dinokit.models.attention import PackedBatch, rotate
from dinokit.models.dinov3 import SIZES, Config, DINOv3, swiglu_hidden
from dinokit.models.timm_convnext import Config as ConvNeXtConfig
from dinokit.models.timm_convnext import TimmConvNeXt

RELEASED = {  # parameters, tensors of the state dict
    "vits16": (21_601_152, 188),
    "vits16plus": (28_697_472, 212),
    "vitb16": (85_669_632, 188),
    "vitl16": (303_154_176, 368),
    "vitl16plus": (403_915_776, 416),
    "vith16plus": (840_633_600, 552),
    "vit7b16": (6_716_043_264, 610),
}


@pytest.mark.parametrize(("name", "want"), RELEASED.items())
def test_it_has_as_many_parameters_and_tensors_as_the_released_one(name, want):
    with torch.device("meta"):
        vit = DINOv3(Config(**SIZES[name]))
    assert (sum(p.numel() for p in vit.parameters()), len(vit.state_dict())) == want


def test_the_satellite_model_has_a_norm_more():
    with torch.device("meta"):
        vit = DINOv3(Config(**SIZES["vitl16"], untied_local_norm=True))
    assert (sum(p.numel() for p in vit.parameters()), len(vit.state_dict())) == (303_156_224, 370)


@pytest.mark.parametrize(
    ("model", "width", "want"),
    [("tiny", 768, 27_820_128), ("large", 1536, 196_230_336)],
)
def test_the_convnexts_have_the_released_sizes(model, width, want):
    with torch.device("meta"):
        net = TimmConvNeXt(ConvNeXtConfig(model=f"convnext_{model}"))
    assert (net.width, net.patch, sum(p.numel() for p in net.parameters())) == (width, 32, want)


def test_the_widths_inside_a_swiglu():
    found = [swiglu_hidden(6, 384), swiglu_hidden(6, 1280), swiglu_hidden(3, 4096, 64), swiglu_hidden(4, 100)]
    assert found == [1536, 5120, 8192, 272]


def small(**values) -> DINOv3:
    torch.manual_seed(0)
    defaults = {"width": 48, "depth": 2, "heads": 3, "patch": 8, "layer_scale": 1.0, "rope_rescale": 1.0}
    vit = DINOv3(Config(**{**defaults, **values})).double()
    for p in vit.parameters():  # defaults of 0 and of 1 would hide mistakes
        torch.nn.init.normal_(p, std=0.2)
    return vit.eval()


def test_the_periods_are_those_of_the_paper():
    periods = DINOv3(Config(depth=1)).rope_embed.periods
    got = [float(periods[i]) for i in (0, 1, 2, 8, 15)]
    assert got == pytest.approx([1, 1.333521, 1.778279, 10, 74.989421], rel=1e-6)


def test_rotation_is_a_product_with_complex_numbers(generator):
    """Channel pair (c, c + d / 2) times e^(i angle): rows in the first quarter, columns in the second."""
    vit, d, (h, w), prefix = small(), 16, (2, 3), 5
    table = vit.rope_embed.table(vit.rope_embed.coordinates(h, w), prefix)
    batch = PackedBatch(((1, prefix + h * w),), (table,))
    qkv = torch.randn(prefix + h * w, 3 * 48, generator=generator, dtype=torch.float64)
    got = rotate(qkv, 3, batch)
    assert torch.equal(got[:prefix], qkv[:prefix])
    assert torch.equal(got[:, 96:], qkv[:, 96:])  # values
    for token in range(h * w):
        y, x = 2 * (token // w + 0.5) / h - 1, 2 * (token % w + 0.5) / w - 1
        for channel in range(d // 2):
            at = y if channel < d // 4 else x
            angle = 2 * math.pi * at / 100 ** (4 * (channel % (d // 4)) / d)
            for start in (0, d, 48 + 2 * d):  # queries of two heads, keys of the third
                pair = [float(qkv[prefix + token, start + c]) for c in (channel, channel + d // 2)]
                want = complex(*pair) * cmath.exp(1j * angle)
                have = [float(got[prefix + token, start + c]) for c in (channel, channel + d // 2)]
                assert have == pytest.approx([want.real, want.imag], abs=1e-6)  # periods are in float32


def test_scores_depend_on_the_distance_of_patches_alone(generator):
    vit, n = small(), 4
    table = vit.rope_embed.table(vit.rope_embed.coordinates(n, n), 0)
    qk = torch.randn(1, 3 * 48, generator=generator, dtype=torch.float64).expand(n * n, -1)
    q, k, _ = rotate(qk, 3, PackedBatch(((1, n * n),), (table,))).unflatten(1, (3, 3, 16)).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k).unflatten(1, (n, n)).unflatten(3, (n, n))
    torch.testing.assert_close(scores[:, 1:, 1:, 1:, 1:], scores[:, :-1, :-1, :-1, :-1], rtol=0, atol=1e-10)
    assert scores.std() > 0.1
    torch.testing.assert_close(q.norm(dim=-1)[0], q.norm(dim=-1)[-1])


def test_tables_of_special_grids():
    rope = small().rope_embed
    one = rope.table(rope.coordinates(1, 1), 0)
    assert torch.equal(one, torch.stack([torch.ones(1, 16), torch.zeros(1, 16)]).double())
    square = rope.table(rope.coordinates(3, 3), 0).unflatten(1, (3, 3))
    rows, columns = square[..., :4], square[..., 4:8]
    assert torch.equal(rows.transpose(1, 2), columns)
    for sides, longest in {"max": 1.0, "min": 2.0}.items():
        rope.sides = sides
        x = rope.coordinates(2, 4)
        assert float(x[-1, 1]) == pytest.approx(2 * 3.5 / (4 / longest) - 1)
        assert float(x[-1, 0]) == pytest.approx(2 * 1.5 / (4 / longest) - 1)


def draws(vit: DINOv3, depth_groups: int) -> list[torch.Tensor]:
    """The table of every block and group of one forward pass."""
    seen = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1].rotations))
    crops = [torch.zeros(1, 3, 16, 16).double()] * depth_groups
    vit(crops, [None] * depth_groups)
    return seen


def test_noise_is_drawn_for_each_block_and_group_or_once():
    tables = draws(small(rope_rescale=2.0).train(), 2)
    assert len({float(x[0, -1, 0]) for x in tables}) == 2 * 2
    once = draws(small(rope_rescale=2.0, rope_noise="forward").train(), 2)
    assert torch.equal(once[0], once[2])
    assert torch.equal(once[1], once[3])
    assert not torch.equal(once[0], once[1])
    clean = draws(small(rope_rescale=2.0), 2)  # in evaluation mode
    assert all(torch.equal(x, clean[0]) for x in clean)


@torch.no_grad()
def test_each_noise_stays_in_its_range():
    torch.manual_seed(0)
    start = torch.tensor([[0.5, -0.25]]).double()
    for values, low, high, same in (
        ({"rope_shift": 0.3}, -0.3, 0.3, False),
        ({"rope_jitter": 3.0}, 1 / 3, 3, False),
        ({"rope_rescale": 3.0}, 1 / 3, 3, True),
    ):
        rope = small(**values).rope_embed.train()
        found = torch.cat([rope.add_noise(start) for _ in range(500)])
        change = found - start if "rope_shift" in values else found / start
        assert low <= change.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < change.max() <= high
        assert torch.allclose(change[:, 0], change[:, 1]) == same
        if low > 0:  # uniform in the logarithm
            assert abs(float(change.log().mean())) < 0.1


@torch.no_grad()
def test_a_bias_of_keys_has_no_effect(generator):
    vit, x = small(), torch.randn(1, 3, 16, 24, generator=generator, dtype=torch.float64)
    before = vit([x], [None])[0].patches
    vit.blocks[0].attn.qkv.bias[48:96] = 7.0
    assert torch.equal(vit([x], [None])[0].patches, before)
    vit.blocks[0].attn.qkv.bias[96] += 1.0
    assert not torch.allclose(vit([x], [None])[0].patches, before)
    assert small(qkv_bias="none").blocks[0].attn.qkv.bias is None


@torch.no_grad()
def test_the_norm_of_local_crops_is_used_in_training_for_their_prefix(generator):
    vit = small(untied_local_norm=True)
    crops = [torch.randn(2, 3, s, s, generator=generator, dtype=torch.float64) for s in (16, 8)]

    def outputs() -> list[torch.Tensor]:
        return [x for tokens in vit(crops, [None, None]) for x in vars(tokens).values()]

    for training, changed in ((False, []), (True, [3, 4])):  # class tokens and registers of the second group
        vit.train(training)
        before = outputs()
        vit.local_cls_norm.weight.mul_(2)
        after = outputs()
        assert [i for i in range(6) if not torch.equal(before[i], after[i])] == changed
    vit = small(untied_cls_norm=True)
    before = vit(crops, [None, None])
    vit.cls_norm.weight.mul_(2)
    after = vit(crops, [None, None])
    assert torch.equal(before[0].patches, after[0].patches)
    assert not torch.equal(before[0].cls, after[0].cls)
    torch.testing.assert_close(vit.layers(crops[0], [1])[0].cls, after[0].cls)


def test_the_epsilon_of_the_norms_is_that_of_the_released_models():
    norms = [m for m in DINOv3(Config(depth=1)).modules() if isinstance(m, torch.nn.LayerNorm)]
    x = torch.randn(1, 384) * 1e-3
    want = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    assert len(norms) == 3
    for norm in norms:
        torch.testing.assert_close(norm(x), want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_groups_in_one_pass_are_groups_one_by_one(generator):
    vit = small()
    crops = [torch.randn(b, 3, h, w, generator=generator).double() for b, h, w in ((2, 32, 32), (3, 16, 24))]
    masks = [torch.rand(2, 16, generator=generator) < 0.4, None]
    for x, mask, tokens in zip(crops, masks, vit(crops, masks), strict=True):
        (alone,) = vit([x], [mask])
        for name in ("cls", "registers", "patches"):
            torch.testing.assert_close(getattr(tokens, name), getattr(alone, name), rtol=0, atol=1e-12)
    last = vit.layers(crops[0], [0, 1])[-1]
    torch.testing.assert_close(last.patches, vit([crops[0]], [None])[0].patches)


@pytest.mark.parametrize("values", [{}, {"ffn": "swiglu"}, {"qkv_bias": "none", "drop_path": 0.4}])
def test_the_faster_forms_are_the_plain_ones(values, generator):
    vit = small(**values, rope_rescale=2.0).train()
    crops = [torch.randn(b, 3, s, s, generator=generator).double() for b, s in ((5, 16), (7, 8))]
    results = []
    for install in (False, True):
        if install:
            fused.install(vit)
        vit.zero_grad()
        torch.manual_seed(3)
        tokens = vit(crops, [None, None])
        loss = sum((t.cls.square().sum() + t.patches.pow(3).sum()) for t in tokens)
        loss.backward()
        results.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    assert len(results[0]) > 20
    torch.testing.assert_close(results[0], results[1])


@torch.no_grad()
def test_attention_of_the_class_token_includes_the_positions(generator):
    vit, x = small(), torch.randn(1, 3, 16, 24, generator=generator).double()
    weights, layer, seen = attention(vit, x, 1), vit.blocks[1].attn, {}
    layer.qkv.register_forward_hook(lambda _, __, out: seen.update(values=out[:, 96:]))
    layer.proj.register_forward_pre_hook(lambda _, inputs: seen.update(mixed=inputs[0]))
    vit([x], [None])
    want = torch.einsum("ht,thd->hd", weights[0], seen["values"].unflatten(1, (3, 16)).float())
    torch.testing.assert_close(want.flatten(), seen["mixed"][0].float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_convnext_gives_the_mean_and_the_places_of_its_last_map(generator):
    net = TimmConvNeXt(ConvNeXtConfig(model="convnext_atto")).eval()
    x = torch.randn(2, 3, 64, 96, generator=generator)
    (tokens,) = net([x], [None])
    assert tokens.registers.shape == (2, 0, 320)
    torch.testing.assert_close(tokens.cls, net.net(x))  # timm's own pooled output
    last = net.net.forward_features(x)
    norm = net.net.head.norm
    want = torch.nn.functional.layer_norm(last[1, :, 1, 2], (320,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(tokens.patches[1, 5], want, rtol=1e-4, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="heads=7 must be a multiple of 4"):
        Config(width=42, heads=7)
    with pytest.raises(ValueError, match=r"rope_rescale=0\.5 must be 1"):
        Config(rope_rescale=0.5)
    with pytest.raises(ValueError, match="such as 16 x 8"):
        small()([torch.zeros(1, 3, 20, 8).double()], [None])
    with torch.device("meta"), pytest.raises(ValueError, match="no ConvNeXt with a norm after"):
        TimmConvNeXt(ConvNeXtConfig(model="convnext_tiny_hnf"))
    with pytest.raises(LookupError, match="Did you mean 'convnext_tiny'"):
        TimmConvNeXt(ConvNeXtConfig(model="convnext_tini"))
    with pytest.raises(ValueError, match="no mask token"):
        TimmConvNeXt(ConvNeXtConfig(model="convnext_atto"))([torch.zeros(1, 3, 32, 32)], [torch.ones(1, 1)])
