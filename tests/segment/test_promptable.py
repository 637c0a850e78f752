"""The promptable head: equal to SAM's decoder at its sizes, and what holds for any weights."""

from dataclasses import replace

import pytest
import torch

from dinokit.segment.promptable import PromptableHead, TwoWayBlock
from dinokit.segment.prompts import PADDING, Frame, PromptEncoder, check_points, empty_prompt
from dinokit.segment.recipe import Head


def random_head(features=12, **sizes):
    torch.manual_seed(1)
    head = PromptableHead(features, Head(**{"hidden": 32, **sizes})).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return head


@pytest.fixture
def head():
    return random_head()


def close(a, b, rows=slice(None)):
    torch.testing.assert_close(a.logits[rows], b.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.quality[rows], b.quality, rtol=1e-4, atol=1e-5)


# SAM as transformers has it, with random weights.

ATTENTION = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj"))


def sam_names(depth):
    """From names of the head to those of transformers' SamModel."""
    names = {"neck.0": "vision_encoder.neck.conv1", "neck.1": "vision_encoder.neck.layer_norm1",
             "neck.2": "vision_encoder.neck.conv2", "neck.3": "vision_encoder.neck.layer_norm2",
             "up1": "mask_decoder.upscale_conv1", "up_norm": "mask_decoder.upscale_layer_norm",
             "up2": "mask_decoder.upscale_conv2"}  # fmt: skip
    masks = ("conv1", "layer_norm1", None, "conv2", "layer_norm2", None, "conv3")
    names |= {
        f"prompts.mask.{i}": f"prompt_encoder.mask_embed.{name}" for i, name in enumerate(masks) if name
    }
    layers = (("0", "proj_in"), ("2", "layers.0"), ("4", "proj_out"))
    for ours, theirs in layers:
        names[f"quality.{ours}"] = f"mask_decoder.iou_prediction_head.{theirs}"
        for k in range(4):
            names[f"kernels.{k}.{ours}"] = f"mask_decoder.output_hypernetworks_mlps.{k}.{theirs}"
    where = "mask_decoder.transformer"
    for i in range(depth):
        parts = (("self_attn", "self_attn"), ("token_to_image", "cross_attn_token_to_image"),
                 ("image_to_token", "cross_attn_image_to_token"))  # fmt: skip
        for ours, theirs in parts:
            for a, b in ATTENTION:
                names[f"transformer.blocks.{i}.{ours}.{a}"] = f"{where}.layers.{i}.{theirs}.{b}"
        for n in range(1, 5):
            names[f"transformer.blocks.{i}.norm{n}"] = f"{where}.layers.{i}.layer_norm{n}"
        for a, b in (("0", "lin1"), ("2", "lin2")):
            names[f"transformer.blocks.{i}.mlp.{a}"] = f"{where}.layers.{i}.mlp.{b}"
    for a, b in ATTENTION:
        names[f"transformer.final.{a}"] = f"{where}.final_attn_token_to_image.{b}"
    names["transformer.norm"] = f"{where}.layer_norm_final_attn"
    return names


def from_sam(head, sam):
    """Copy the weights of transformers' SamModel into the head."""
    theirs = sam.state_dict()
    state = {}
    for ours, name in sam_names(head.config.depth).items():
        for part in ("weight", "bias"):
            if f"{name}.{part}" in theirs:
                state[f"{ours}.{part}"] = theirs[f"{name}.{part}"]
    points = [theirs[f"prompt_encoder.point_embed.{i}.weight"][0] for i in range(4)]
    state |= {
        "prompts.directions": theirs["shared_image_embedding.positional_embedding"],
        "prompts.signs": torch.stack(points[:2]),
        "prompts.corners": torch.stack(points[2:]),
        "prompts.no_box": theirs["prompt_encoder.not_a_point_embed.weight"][0],
        "prompts.no_mask": theirs["prompt_encoder.no_mask_embed.weight"][0],
        "quality_token": theirs["mask_decoder.iou_token.weight"],
        "mask_tokens": theirs["mask_decoder.mask_tokens.weight"],
    }
    head.load_state_dict(state)


@pytest.fixture(scope="module")
def sam():
    transformers = pytest.importorskip("transformers")
    vision = transformers.SamVisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
        output_channels=64, mlp_dim=32, window_size=2, global_attn_indexes=[0], num_pos_feats=32,
    )  # fmt: skip
    prompts = transformers.SamPromptEncoderConfig(hidden_size=64, image_size=64, patch_size=16)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=64, mlp_dim=48, num_attention_heads=4, iou_head_hidden_dim=64
    )
    torch.manual_seed(0)
    model = transformers.SamModel(
        transformers.SamConfig(
            vision_config=vision.to_dict(),
            prompt_encoder_config=prompts.to_dict(),
            mask_decoder_config=decoder.to_dict(),
        )
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    # transformers has these in three places, equal in a file that is read.
    table = model.shared_image_embedding.positional_embedding
    model.prompt_encoder.shared_embedding.positional_embedding = table
    return model


@pytest.mark.parametrize("kind", ["points", "box", "points and box", "mask"])
@torch.no_grad()
def test_the_decoder_is_that_of_sam(sam, kind):
    head = PromptableHead(24, Head(width=64, hidden=48, detail=False, bounded=False)).eval()
    from_sam(head, sam)
    torch.manual_seed(3)
    features, cells = torch.randn(1, 24, 4, 4), torch.randn(1, 64, 16, 16)
    neck = sam.vision_encoder.neck(features.permute(0, 2, 3, 1))
    points, signs = torch.rand(1, 1, 3, 2) * 63, torch.tensor([[[1, 0, 1]]])
    box = torch.tensor([[[5.0, 7.0, 40.0, 50.0]]])
    inputs, ours = {"image_embeddings": neck}, empty_prompt(torch.tensor([0]))
    if "points" in kind or kind == "mask":
        inputs |= {"input_points": points, "input_labels": signs}
        ours = replace(ours, points=points[0], signs=signs[0])
    if "box" in kind:
        inputs["input_boxes"] = box
        ours = replace(ours, boxes=box[0] + 0.5)  # SAM moves corners by half a pixel
    if kind == "mask":
        inputs["input_masks"] = cells[:, :1]
        ours = replace(ours, masks=cells[:, :1])
    single, three = (sam(**inputs, multimask_output=several) for several in (False, True))
    answer = head(head.embed(features, torch.zeros(1, 3, 64, 64)), ours)
    masks = torch.cat([single.pred_masks, three.pred_masks], dim=2)[0]
    qualities = torch.cat([single.iou_scores, three.iou_scores], dim=2)[0]
    torch.testing.assert_close(answer.logits, masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.quality, qualities, rtol=1e-4, atol=1e-4)


def test_the_published_sizes_have_the_published_number_of_parameters():
    with torch.device("meta"):
        head = PromptableHead(768, Head(width=256, heads=8, hidden=2048, detail=False))
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in head.named_children()}
    encoder, neck = parts.pop("prompts"), parts.pop("neck")
    tokens = head.quality_token.numel() + head.mask_tokens.numel()
    assert encoder == 6_220
    assert sum(parts.values()) + tokens == 4_058_340
    assert neck == 768 * 256 + 256 * 256 * 9 + 4 * 256


# What holds for any weights.


@torch.no_grad()
def test_each_prompt_is_independent_of_the_others(head, embedded, prompt):
    together = head(embedded, prompt)
    for i in range(3):
        close(together, head(embedded, prompt.rows(slice(i, i + 1))), slice(i, i + 1))


@torch.no_grad()
def test_neither_the_order_of_points_nor_padding_matters(head, embedded, prompt):
    before = head(embedded, prompt)
    swapped = replace(prompt, points=prompt.points.flip(1), signs=prompt.signs.flip(1))
    close(before, head(embedded, swapped))
    more = prompt.with_points(torch.full((3, 2), 17.0), torch.full((3,), PADDING))
    close(before, head(embedded, more))
    elsewhere = replace(prompt, points=torch.where((prompt.signs == PADDING)[..., None], 9.0, prompt.points))
    close(before, head(embedded, elsewhere))


@torch.no_grad()
def test_every_part_of_a_prompt_counts(head, embedded, prompt):
    before = head(embedded, prompt).logits
    changed = {
        "signs": replace(prompt, signs=torch.where(prompt.signs == 1, 0, prompt.signs)),
        "points": replace(prompt, points=prompt.points + 3),
        "boxes": replace(prompt, boxes=prompt.boxes + 2),
        "masks": replace(prompt, masks=torch.randn(3, 1, 16, 16)),
        "image": replace(prompt, image=1 - prompt.image),
    }
    rows = {"signs": [0, 1], "points": [0, 1], "boxes": [1, 2], "masks": [0, 1, 2], "image": [0, 1, 2]}
    for name, other in changed.items():
        difference = (head(embedded, other).logits - before).abs().amax(dim=(1, 2, 3))
        assert [i for i in range(3) if difference[i] > 1e-3] == rows[name], name


def test_the_middle_of_the_canvas_has_zeros_and_ones():
    encoder = PromptEncoder(64)
    middle = encoder.places(torch.tensor([0.5, 0.5]))
    assert middle.tolist() == [0.0] * 32 + [1.0] * 32
    grid = encoder.grid(2, 4)
    torch.testing.assert_close(grid[5], encoder.places(torch.tensor([1.5 / 4, 1.5 / 2])))


def test_without_output_projections_the_image_passes_a_block_unchanged_but_for_its_norm():
    block = TwoWayBlock(64, 4, 32, first=True)
    for attention in (block.self_attn, block.token_to_image, block.image_to_token):
        torch.nn.init.zeros_(attention.out.weight)
        torch.nn.init.zeros_(attention.out.bias)
    image, used = torch.randn(2, 9, 64), torch.ones(2, 5, dtype=torch.bool)
    _, after = block(torch.randn(2, 5, 64), image, torch.randn(2, 5, 64), torch.randn(9, 64), used)
    torch.testing.assert_close(after, torch.nn.functional.layer_norm(image, (64,)))


# Frames.


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (333, 500), (17, 5), (64, 64)])
def test_places_and_masks_come_back_from_the_canvas(height, width):
    frame = Frame(height, width, 64)
    corners = torch.tensor([[0.0, 0.0], [width - 1.0, height - 1.0]])
    on_canvas = frame.points_to_canvas(corners) + 0.5
    assert (on_canvas > 0).all()
    assert (on_canvas <= 64).all()
    box = frame.boxes_to_canvas(torch.tensor([[0.0, 0.0, width, height]]))[0]
    assert box.tolist() == pytest.approx([0, 0, frame.shape[1], frame.shape[0]])
    ones = frame.mask_to_canvas(torch.ones(height, width, dtype=torch.bool))
    assert ones.sum() == frame.shape[0] * frame.shape[1]
    same = frame.from_canvas(torch.full((2, 16, 16), 3.0))
    torch.testing.assert_close(same, torch.full_like(same, 3.0))
    left = torch.zeros(height, width, dtype=torch.bool)
    left[:, : width // 2 + 1] = True
    back = frame.from_canvas((frame.mask_to_canvas(left).float() - 0.5)[None])[0] > 0
    wrong = (back != left).float().mean() * width  # columns at the border
    assert wrong <= max(1.0, 1.5 / frame.scale)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_thin_object_does_not_vanish_from_the_canvas(width):
    """One that is thinner than a pixel of the canvas stays as long as it is; nothing stays nothing."""
    frame, mask = Frame(400, 400, 32), torch.zeros(400, 400, dtype=torch.bool)
    assert not frame.mask_to_canvas(mask).any()
    mask[100:300, 203 : 203 + width] = True
    rows = frame.mask_to_canvas(mask).any(dim=1).nonzero().flatten()
    assert (rows[0].item(), rows[-1].item()) == (8, 23)


@pytest.mark.parametrize(("x", "y"), [(-1, 3), (5, 4), (9, 0)])
def test_a_point_outside_names_itself_and_the_size(x, y):
    with pytest.raises(ValueError, match=rf"\({x}, {y}\) is outside the image, which is 5 pixels wide and 4"):
        check_points([(0, 0), (x, y)], (4, 5))


def test_a_width_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"head.width=96: it is a multiple of 64"):
        PromptableHead(8, Head(width=96))
