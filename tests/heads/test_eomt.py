"""EoMT against the networks of transformers with the same weights, and what its settings must do."""

import pytest
import torch
import transformers
from transformers import EomtConfig, EomtForUniversalSegmentation

from dinokit.config import registry
from dinokit.heads.eomt import EoMT, joint_blocks, restricted_shares

SIDE, WIDTH = 64, 48
SHARED = {
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 16, "num_blocks": 2, "num_queries": 5, "num_register_tokens": 3, "num_labels": 6,
}  # fmt: skip


def randomised(module):
    """All tensors random: gains of 1 and biases of 0 would hide a wrong connection."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        spread = 1.5 if "quer" in name else 0.3
        tensor.data = torch.randn(tensor.shape, generator=generator) * spread
    return module


def backbone(name, **more):
    sizes = {"width": WIDTH, "depth": 4, "heads": 2, "patch": 16, "size": SIDE, "registers": 3}
    return registry.build("models", {"name": name, "layer_scale": 1.0, **sizes, **more})


def linear(ours, prefix):
    return {f"{prefix}.weight": ours.weight, f"{prefix}.bias": ours.bias}


def common(head):
    """Tensors that both families have, under the names of transformers."""
    vit, found = head.backbone, {"query.weight": head.queries}
    found |= linear(head.classify, "class_predictor") | linear(vit.norm, "layernorm")
    for i, place in enumerate((0, 2, 4), 1):
        found |= linear(head.embed[place], f"mask_head.fc{i}")
    for i, each in enumerate(head.enlarge):
        found |= linear(each.up, f"upscale_block.block.{i}.conv1")
        found |= linear(each.norm, f"upscale_block.block.{i}.layernorm2d")
        found[f"upscale_block.block.{i}.conv2.weight"] = each.mix.weight
    for i, block in enumerate(vit.blocks):
        found |= linear(block.norm1, f"layers.{i}.norm1") | linear(block.norm2, f"layers.{i}.norm2")
        found[f"layers.{i}.layer_scale1.lambda1"] = block.ls1.gamma
        found[f"layers.{i}.layer_scale2.lambda1"] = block.ls2.gamma
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for letter, weight, bias in zip("qkv", weights, biases, strict=True):
            found[f"layers.{i}.attention.{letter}_proj.weight"] = weight
            found[f"layers.{i}.attention.{letter}_proj.bias"] = bias
    found["embeddings.cls_token"] = vit.cls_token
    return found


def dinov2():
    head = randomised(EoMT(backbone("vit"), 6, 5, 2))
    vit = head.backbone
    vit.pos_embed.data[:, 0] = 0  # theirs has no position of the class token
    theirs = EomtForUniversalSegmentation(EomtConfig(**SHARED))
    tensors = common(head)
    tensors["embeddings.register_tokens"] = vit.register_tokens
    tensors["embeddings.position_embeddings.weight"] = vit.pos_embed[0, 1:]
    tensors |= linear(vit.patch_embed.proj, "embeddings.patch_embeddings.projection")
    for i, block in enumerate(vit.blocks):
        tensors |= linear(block.attn.proj, f"layers.{i}.attention.out_proj")
        tensors |= linear(block.mlp.fc1, f"layers.{i}.mlp.fc1") | linear(block.mlp.fc2, f"layers.{i}.mlp.fc2")
    return head, theirs, tensors


def dinov3():
    if not hasattr(transformers, "EomtDinov3Config"):
        pytest.skip(f"transformers {transformers.__version__} has no EoMT on DINOv3")
    head = randomised(EoMT(backbone("dinov3"), 6, 5, 2))
    vit = head.backbone
    config = transformers.EomtDinov3Config(
        **SHARED, intermediate_size=4 * WIDTH, layer_norm_eps=1e-5, pos_embed_rescale=None
    )
    theirs = transformers.EomtDinov3ForUniversalSegmentation(config)
    tensors = {name: x for name, x in common(head).items() if not name.endswith("k_proj.bias")}
    tensors["embeddings.register_tokens"] = vit.storage_tokens
    tensors |= linear(vit.patch_embed.proj, "embeddings.patch_embeddings")
    for i, block in enumerate(vit.blocks):
        tensors |= linear(block.attn.proj, f"layers.{i}.attention.o_proj")
        tensors |= linear(block.mlp.fc1, f"layers.{i}.mlp.up_proj")
        tensors |= linear(block.mlp.fc2, f"layers.{i}.mlp.down_proj")
    return head, theirs, tensors


@pytest.mark.parametrize("family", [dinov2, dinov3])
def test_masks_classes_and_gradients_equal_those_of_transformers(family):
    head, theirs, tensors = family()
    expected = dict(theirs.named_parameters())
    assert set(tensors) == set(expected)
    theirs.load_state_dict({name: x.detach() for name, x in tensors.items()}, strict=False)
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    changed = []
    for shares in ([0.0, 0.0], [1.0, 1.0], [1.0, 0.4]):
        theirs.train().attn_mask_probs.copy_(torch.tensor(shares))
        for each in (head, theirs):
            each.zero_grad()
        torch.manual_seed(3)
        want = theirs(images)
        torch.manual_seed(3 if max(shares) else 4)
        found = head.train()(images, shares)
        assert len(found) == 3
        assert found[-1].masks.shape == (2, 5, 16, 16)
        assert torch.allclose(found[-1].masks, want.masks_queries_logits, atol=1e-4, rtol=1e-4)
        assert torch.allclose(found[-1].classes, want.class_queries_logits, atol=1e-4, rtol=1e-4)
        want.masks_queries_logits.square().mean().backward()
        found[-1].masks.square().mean().backward()
        gradient = theirs.query.weight.grad
        assert torch.allclose(head.queries.grad, gradient, atol=1e-4 * gradient.abs().max())
        changed.append(found[-1].masks.detach())
    assert (changed[0] - changed[1]).abs().max() > 0.1  # what a query may see matters here


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_joint_blocks_without_queries_are_those_of_the_backbone(name):
    vit = randomised(backbone(name)).eval()
    head = EoMT(vit, 3, 1, 2).eval()
    head.queries = torch.nn.Parameter(torch.empty(0, WIDTH))
    images = torch.randn(1, 3, 48, 80)
    seen = []
    head.enlarge = torch.nn.Identity()
    head.enlarge.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    head(images)
    want = vit([images], [None])[0].patches.transpose(1, 2).unflatten(2, (3, 5))
    assert torch.allclose(seen[-1], want, atol=1e-5)


def test_a_query_that_sees_only_its_mask_does_not_depend_on_other_patches():
    head = randomised(EoMT(backbone("vit"), 6, 1, 1))
    tokens = 1 + 4 + 16
    masks = torch.full((1, 1, 16, 16), -1.0)
    masks[..., :8, :8] = 1.0
    visible = head._visible(masks, tokens, (4, 4), 1.0)[0, 0]
    assert visible[0, 5:].view(4, 4).tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert visible[1:].all()
    assert visible[0, :5].all()


@pytest.mark.parametrize("tune", ["all", "joint", "none"])
def test_the_backbone_stays_as_it_was_and_only_what_is_tuned_gets_a_gradient(tune):
    vit = backbone("dinov3", drop_path=0.5).train()
    before = {name: x.clone() for name, x in vit.state_dict().items()}
    head = EoMT(vit, 3, 4, 1, tune).train()
    assert not any(module.training for module in head.backbone.modules())
    images = torch.randn(2, 3, 32, 32)
    found = head(images)
    assert torch.equal(found[-1].masks, head(images)[-1].masks)  # neither noise nor stochastic depth
    sum(x.square().mean() for each in found for x in each).backward()
    with_gradient = {name for name, p in head.backbone.named_parameters() if p.grad is not None}
    assert ("blocks.2.attn.qkv.weight" in with_gradient) == (tune == "all")
    assert ("cls_token" in with_gradient) == (tune == "all")
    assert ("blocks.3.attn.qkv.weight" in with_gradient) == (tune != "none")
    assert ("norm.weight" in with_gradient) == (tune != "none")
    assert head.queries.grad is not None
    torch.optim.SGD(head.parameters(), 1.0).step()
    assert all(torch.equal(x, before[name]) for name, x in vit.state_dict().items())
    assert vit.training


def test_shares_fall_one_block_after_the_other():
    at = {step: restricted_shares(step, 600, 4) for step in (0, 100, 150, 200, 399, 500, 599)}
    assert at[0] == at[100] == [1, 1, 1, 1]
    assert at[150] == [pytest.approx(0.5**0.9), 1, 1, 1]
    assert at[200] == [0, 1, 1, 1]
    assert at[399] == [0, 0, pytest.approx(0.01**0.9), 1]
    assert at[500] == at[599] == [0, 0, 0, 0]


def test_blocks_are_those_of_the_paper_and_other_backbones_are_refused():
    assert joint_blocks(backbone("vit", depth=12)) == 3
    assert joint_blocks(backbone("vit", depth=4)) == 1
    assert joint_blocks(backbone("vit"), 3) == 3
    with pytest.raises(ValueError, match=r"blocks=9: the backbone has 4"):
        joint_blocks(backbone("vit"), 9)
    with pytest.raises(ValueError, match=r"this is a RawPatches: `dinokit eval segmentation` takes any"):
        joint_blocks(registry.build("models", {"name": "raw_patches"}))
