"""Batches: the order of their rows, what is masked, and their micro-batches, against loops over samples."""

import pickle

import pytest
import torch

from dinokit.data.batch import Batch, Sample, collate, stack

B, G, L, N = 6, 2, 3, 5


def samples(masks: bool = True, local_crops: int = L) -> list[Sample]:
    """Sample i's crop c is filled with 10 * i + c, its local ones with 100 more."""
    g = torch.Generator().manual_seed(0)

    def filled(i: int, count: int, size: int, more: int) -> torch.Tensor:
        return torch.stack(
            [torch.full((3, size, size), 10 * i + c + more, dtype=torch.uint8) for c in range(count)]
        )

    return [
        Sample(
            step=7,
            global_crops=filled(i, G, 4, 0),
            local_crops=filled(i, local_crops, 2, 100)
            if local_crops
            else torch.zeros(0, 3, 2, 2, dtype=torch.uint8),
            global_colour=torch.arange(G * 2.0).view(G, 2) + 10 * i,
            local_colour=torch.arange(local_crops * 2.0).view(local_crops, 2) + 100 * i,
            masks=torch.rand(G, N, generator=g) < 0.4 if masks else None,
            unreadable={f"bad{i}.jpg": "cut short"} if i == 4 else {},
        )
        for i in range(B)
    ]


def test_rows_are_crop_major() -> None:
    batch = collate(samples())
    assert (batch.step, batch.images, batch.unreadable) == (7, B, {"bad4.jpg": "cut short"})
    assert batch.global_crops.shape == (G * B, 3, 4, 4)
    assert batch.local_crops.shape == (L * B, 3, 2, 2)
    for i, sample in enumerate(samples()):
        for c in range(G):
            assert (batch.global_crops[c * B + i] == 10 * i + c).all()
            assert torch.equal(batch.global_colour[c * B + i], sample.global_colour[c])
            assert sample.masks is not None
            assert batch.masks is not None
            assert torch.equal(batch.masks[c * B + i], sample.masks[c])
        for c in range(L):
            assert (batch.local_crops[c * B + i] == 10 * i + c + 100).all()
            assert torch.equal(batch.local_colour[c * B + i], sample.local_colour[c])


def check_masked(batch: Batch) -> None:
    assert batch.masks is not None
    places, weights = [], []
    for row, mask in enumerate(batch.masks.tolist()):
        for column, hidden in enumerate(mask):
            if hidden:
                places.append(row * N + column)
                weights.append(1 / sum(mask))
    assert batch.masked.tolist() == places
    assert batch.mask_weight.tolist() == pytest.approx(weights)
    assert batch.masked.dtype == torch.int64


def test_masked_patches_are_found_and_each_masked_crop_weighs_one() -> None:
    batch = collate(samples())
    check_masked(batch)
    assert batch.masks is not None
    assert batch.mask_weight.sum().item() == pytest.approx(batch.masks.any(dim=1).sum().item())


def test_without_masks_nothing_is_masked() -> None:
    batch = collate(samples(masks=False))
    assert batch.masks is None
    assert batch.masked.shape == batch.mask_weight.shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_micro_batch_is_the_batch_of_its_samples(count: int) -> None:
    size = B // count
    for i, micro_batch in enumerate(collate(samples()).split(count)):
        alone = collate(samples()[i * size : (i + 1) * size])
        check_masked(micro_batch)
        assert micro_batch.images == alone.images == size
        assert micro_batch.unreadable == ({"bad4.jpg": "cut short"} if i == 0 else {})
        for key in (
            "global_crops",
            "local_crops",
            "global_colour",
            "local_colour",
            "masks",
            "masked",
            "mask_weight",
        ):
            torch.testing.assert_close(getattr(micro_batch, key), getattr(alone, key))


def test_micro_batches_without_local_crops_or_masks_have_none() -> None:
    for micro_batch in collate(samples(masks=False, local_crops=0)).split(2):
        assert micro_batch.local_crops.shape == (0, 3, 2, 2)
        assert micro_batch.local_colour.shape == (0, 2)
        assert micro_batch.masks is None
        assert len(micro_batch.global_crops) == G * 3


def test_unequal_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 images .* 4 equal micro-batches"):
        collate(samples()).split(4)


def test_moving_leaves_the_colour_where_it_is_read() -> None:
    moved = collate(samples()).to("meta")
    for key in ("global_crops", "local_crops", "masks", "masked", "mask_weight"):
        assert getattr(moved, key).device.type == "meta"
    assert moved.global_colour.device.type == moved.local_colour.device.type == "cpu"
    assert collate(samples(masks=False)).to("cpu").masks is None


def test_a_batch_survives_the_way_between_processes() -> None:
    batch = collate(samples())
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.masked, batch.masked)
    assert again.unreadable == batch.unreadable


def test_images_of_mixed_depth_keep_their_brightness_in_one_batch() -> None:
    deep, plain = torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 51, dtype=torch.uint8)
    torch.testing.assert_close(stack([deep, plain])[:, 0, 0, 0], torch.tensor([0.5, 0.2]))
    assert stack([plain, plain]).dtype == torch.uint8


@pytest.mark.gpu
def test_pinned_memory_is_pinned_and_equal() -> None:
    batch = collate(samples())
    pinned = batch.pin_memory()
    assert pinned.global_crops.is_pinned()
    assert torch.equal(pinned.to("cuda").global_crops.cpu(), batch.global_crops)
