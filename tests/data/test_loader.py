"""The loader: the same batches for any workers, processes and starting step; damaged images."""

import os
import pickle
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.config.load import CropGroup, Crops, Masks
from dinokit.data.augment import Photometric
from dinokit.data.batch import Batch
from dinokit.data.loader import (
    DenseBatch,
    ImageBatch,
    dense_loader,
    dense_training_loader,
    image_loader,
    training_loader,
)
from dinokit.data.masks import BlockMasks
from dinokit.data.sampler import RangeSampler, image_at
from dinokit.data.transforms import CenterCrop, FitTransform

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores, on purpose

CROPS = Crops(globals=CropGroup(size=32), locals=CropGroup(count=2, size=16, scale=(0.05, 0.32)))
MASKS = BlockMasks(Masks(), (4, 4))
TENSORS = ("global_crops", "local_crops", "global_colour", "local_colour", "masks")


class Plain:
    """Image i is of one colour, i; some cannot be read, and one kills the process that asks for it."""

    classes = ("even", "odd")

    def __init__(self, count: int = 23, bad: Iterable[int] = (), deadly: int = -1) -> None:
        self.count, self.bad, self.deadly = count, set(bad), deadly

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index in self.bad:
            raise (OSError, ValueError, SyntaxError)[index % 3]("damaged")
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        image = np.full((40, 48, 3), index, dtype=np.uint8)
        image[:, :24, 0] = np.arange(40)[:, None]  # so that where a crop lies can be seen
        return image, index % 2

    def name(self, index: int) -> str:
        return f"images/{index}.jpg"


class Files:
    """JPEG files in a folder."""

    classes = ()

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), -1

    def name(self, index: int) -> str:
        return self.paths[index].name


def run(source: object, *, start: int = 0, steps: int = 6, **changes: object) -> list[Batch]:
    settings = {"masks": MASKS, "seed": 3, "batch": 4, "workers": 0, **changes}
    return list(training_loader(source, CROPS, start_step=start, steps=steps, **settings))


def shown(batch: Batch) -> list[int]:
    """Which image each row of the first crops shows: its last channel says."""
    return [int(value) for value in batch.global_crops[: batch.images, 2, 16, 16]]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert [b.step for b in one] == [b.step for b in other]
    for a, b in zip(one, other, strict=True):
        assert a.unreadable == b.unreadable
        for key in (*TENSORS, "masked", "mask_weight"):
            assert torch.equal(getattr(a, key), getattr(b, key)), key


@pytest.fixture(scope="module")
def uninterrupted() -> list[Batch]:
    return run(Plain())


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers(workers: int, uninterrupted: list[Batch]) -> None:
    assert_same(run(Plain(), workers=workers), uninterrupted)


def test_a_resumed_run_sees_the_rest_of_an_uninterrupted_one(uninterrupted: list[Batch]) -> None:
    assert_same(run(Plain(), start=4), uninterrupted[4:])
    assert run(Plain(), start=6) == []


@pytest.mark.parametrize("world", [2, 4])
def test_the_batches_of_all_processes_make_that_of_one(world: int, uninterrupted: list[Batch]) -> None:
    ranks = [run(Plain(), rank=rank, world=world) for rank in range(world)]
    for whole, *shares in zip(uninterrupted, *ranks, strict=True):
        for key in TENSORS:
            crop_major = [getattr(share, key).unflatten(0, (-1, share.images)) for share in shares]
            assert torch.equal(torch.cat(crop_major, dim=1).flatten(0, 1), getattr(whole, key)), key


def test_each_image_comes_once_a_pass_and_passes_differ() -> None:
    seen = [index for batch in run(Plain(20), steps=10) for index in shown(batch)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]


def test_another_seed_is_another_run(uninterrupted: list[Batch]) -> None:
    other = run(Plain(), seed=4)
    assert shown(other[0]) + shown(other[1]) != shown(uninterrupted[0]) + shown(uninterrupted[1])
    assert not torch.equal(other[0].global_colour, uninterrupted[0].global_colour)


def test_half_of_a_steps_crops_are_masked_over_all_processes(uninterrupted: list[Batch]) -> None:
    for batch in uninterrupted:
        assert batch.masks is not None
        assert batch.masks.any(dim=1).sum() <= 4
    total = sum(int(b.masks.any(dim=1).sum()) for b in uninterrupted if b.masks is not None)
    assert total >= 20  # of 24; a share of a few patches may be rounded to none


def test_loading_leaves_torchs_own_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(Plain(), steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_can_be_coloured() -> None:
    batch = run(Plain(), steps=1)[0]
    colour = Photometric(CROPS)
    assert colour(batch.global_crops, batch.global_colour).isfinite().all()
    assert colour(batch.local_crops, batch.local_colour).shape == (8, 3, 16, 16)


def test_without_masks_or_local_crops_batches_have_none() -> None:
    crops = Crops(globals=CropGroup(size=32), locals=CropGroup(count=0))
    batch = next(
        iter(training_loader(Plain(), crops, None, seed=0, start_step=0, steps=1, batch=4, workers=0))
    )
    assert batch.masks is None
    assert len(batch.local_crops) == len(batch.local_colour) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_another_takes_its_place(
    workers: int, uninterrupted: list[Batch]
) -> None:
    bad = {2, 3, 4}
    batches = run(Plain(bad=bad), workers=workers)
    named = Counter(name for batch in batches for name in batch.unreadable)
    turns = {image_at(3, position, 23) for position in range(24)}
    assert {f"images/{i}.jpg" for i in bad & turns} <= set(named) <= {f"images/{i}.jpg" for i in bad}
    for batch, before in zip(batches, uninterrupted, strict=True):
        for now, then in zip(shown(batch), shown(before), strict=True):
            assert now not in bad
            assert now == then or then in bad
        assert torch.equal(batch.global_colour, before.global_colour)
    assert_same(batches, run(Plain(bad=bad)))


def test_the_reason_why_an_image_cannot_be_read_is_reported_with_its_name_once() -> None:
    class Bands(Plain):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            if index in self.bad:
                raise ValueError(f"{self.name(index)} cannot be read: it has 4 channels. Set channels=4.")
            return super().__getitem__(index)

    reasons = {
        name: why for batch in run(Bands(bad={2, 3}), workers=1) for name, why in batch.unreadable.items()
    }
    assert reasons == {f"images/{i}.jpg": "it has 4 channels. Set channels=4." for i in (2, 3)}


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:300])
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"GIF89a" + bytes(5))
    batches = run(Files(tmp_path), batch=6, steps=2)
    named = {name for batch in batches for name in batch.unreadable}
    assert named == {"1.jpg", "2.jpg", "3.jpg"}


def test_an_image_of_other_channels_counts_as_unreadable() -> None:
    class OneGray(Plain):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            image, label = super().__getitem__(index)
            return (image[:, :, :1] if index == 5 else image), label

    named = [name for batch in run(OneGray()) for name in batch.unreadable]
    assert set(named) == {"images/5.jpg"}


@pytest.mark.parametrize(("count", "tried"), [(1, "1"), (3, "3"), (200, "2[01]")])
def test_a_set_without_readable_images_stops_the_run_with_names(count: int, tried: str) -> None:
    with pytest.raises(OSError, match=rf"^{tried} images in a row .*images/\d+\.jpg: damaged"):
        run(Plain(count, bad=range(count)))


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed|exited)"):
        run(Plain(deadly=image_at(3, 1, 23)), workers=1)


@pytest.mark.parametrize(("batch", "world"), [(4, 3), (2, 4)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch: int, world: int) -> None:
    with pytest.raises(ValueError, match=rf"optim\.batch={batch} .* {world} processes: .* such as"):
        run(Plain(), batch=batch, world=world)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        run(Plain(0))


def test_what_workers_receive_can_be_pickled() -> None:
    data = training_loader(Plain(), CROPS, MASKS, seed=0, start_step=0, steps=2, batch=4, workers=2)
    for received in (data.dataset, data.collate_fn, data.worker_init_fn):
        pickle.dumps(received)


def center_crops(source: Plain, batch: int, workers: int) -> Iterable[ImageBatch]:
    return image_loader(source, CenterCrop(40, 32), RangeSampler([range(len(source))], batch), workers)


def test_images_for_evaluation_come_in_order_with_their_labels() -> None:
    source = Plain(11, bad=[7])
    for workers in (0, 2):
        batches = list(center_crops(source, batch=4, workers=workers))
        assert [len(b.indices) for b in batches] == [4, 4, 3]
        assert torch.cat([b.indices for b in batches]).tolist() == list(range(11))
        assert torch.cat([b.labels for b in batches]).tolist() == [-1 if i == 7 else i % 2 for i in range(11)]
        assert torch.cat([b.valid for b in batches]).tolist() == [i != 7 for i in range(11)]
        images = torch.cat([b.images for b in batches])
        assert images.shape == (10, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert images[:, 2, 16, 16].tolist() == [i for i in range(11) if i != 7]
        assert [b.unreadable for b in batches] == [[], ["images/7.jpg"], []]
        assert [b.errors for b in batches] == [[], ["images/7.jpg: damaged"], []]


def test_a_second_reading_for_evaluation_equals_the_first() -> None:
    data = center_crops(Plain(5), batch=2, workers=1)
    first, second = list(data), list(data)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


class Mixed(Plain):
    """Images of two shapes and two bit depths."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = super().__getitem__(index)
        image = image if index % 2 else image[:20]
        return (image.astype(np.float32) / 255 if index == 3 else image), label


def test_images_of_one_shape_are_stacked_with_their_places() -> None:
    transform = FitTransform("resize", 0, 0, patch=4)
    (batch,) = image_loader(Mixed(6, bad=[4]), transform, RangeSampler([range(6)], 6), workers=0)
    assert [(tuple(images.shape), places.tolist()) for images, places in batch.groups] == [
        ((2, 3, 20, 48), [0, 2]),
        ((3, 3, 40, 48), [1, 3, 5]),
    ]
    assert batch.groups[1][0].dtype == torch.float32  # an 8-bit image is scaled to [0, 1] beside a float one
    torch.testing.assert_close(batch.groups[1][0][:, 2, 5, 5], torch.tensor([1, 3, 5]) / 255)
    with pytest.raises(ValueError, match="2 shapes"):
        _ = batch.images


def test_a_batch_without_a_readable_image_has_no_group() -> None:
    (batch,) = center_crops(Plain(2, bad=[0, 1]), batch=4, workers=0)
    assert batch.groups == []
    assert batch.valid.tolist() == [False, False]


class Maps:
    """Image i is of one colour, i, and so is its map; one may be damaged."""

    classes = ()

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == self.bad:
            raise ValueError("damaged")
        return np.full((8, 8, 3), index, np.uint8), np.full((8, 8), index, np.int16)

    def name(self, index: int) -> str:
        return f"maps/{index}.png"


def shifted(
    image: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A transform that shows which random numbers it was given."""
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(target + rng.integers(1000))


def dense_run(start: int = 0, **changes: int) -> list[DenseBatch]:
    settings = {"seed": 5, "steps": 5, "batch": 4, "workers": 0, **changes}
    return list(dense_training_loader(Maps(), shifted, start_step=start, **settings))


def test_dense_batches_do_not_depend_on_workers_start_or_processes() -> None:
    all_batches = dense_run()
    for other in (dense_run(workers=2), dense_run(start=2)):
        for one, two in zip(all_batches[-len(other) :], other, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.targets, two.targets)
    for one, *shares in zip(all_batches, dense_run(world=2), dense_run(world=2, rank=1), strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), one.images)
        assert torch.equal(torch.cat([share.targets for share in shares]), one.targets)
    indices = [int(image[0, 0, 0]) for batch in all_batches for image in batch.images]
    assert indices == [image_at(5, position, 7) for position in range(20)]
    with pytest.raises(ValueError, match=r"batch=4 .* 3 processes"):
        dense_run(world=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_map_stops_the_work_with_its_name(workers: int) -> None:
    samples = list(dense_loader(Maps(), [3, 1], workers))
    assert [(s.index, int(s.image[0, 0, 0]), int(s.target[0, 0])) for s in samples] == [(3, 3, 3), (1, 1, 1)]
    with pytest.raises(ValueError, match=r"^maps/2\.png: damaged$"):
        list(dense_loader(Maps(bad=2), range(4), workers))
    with pytest.raises(ValueError, match=r"^maps/2\.png: damaged$"):
        list(dense_training_loader(Maps(2), shifted, seed=5, start_step=0, steps=5, batch=4, workers=workers))
