"""Block masks: the counts they promise over a whole step; a slow generator with sets as the oracle."""

import math

import numpy as np
import pytest

from dinokit.config.load import Masks
from dinokit.data.masks import BlockMasks
from dinokit.data.sampler import generator


def step_of(cfg: Masks, grid: tuple[int, int], total: int, seed: int = 0, step: int = 0) -> np.ndarray:
    masks = BlockMasks(cfg, grid)
    return np.stack([masks(seed, step, j, total, generator(seed, step, j, 2)) for j in range(total)])


def by_hand(
    target: int, rows: int, columns: int, rng: np.random.Generator
) -> tuple[set[tuple[int, int]], list[int]]:
    """The rule as a loop over sets of cells; also the sizes of what each box added."""
    covered: set[tuple[int, int]] = set()
    added = []
    while len(covered) < target:
        cap = min(target - len(covered), 0.5 * rows * columns)
        for _ in range(10):
            area, ratio = (
                rng.uniform(min(4, cap), max(4, cap)),
                math.exp(rng.uniform(math.log(0.3), -math.log(0.3))),
            )
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h >= rows or w >= columns:
                continue
            top, left = rng.integers(rows - h + 1), rng.integers(columns - w + 1)
            box = {(top + i, left + j) for i in range(h) for j in range(w)}
            if 0 < len(box - covered) <= cap:
                added.append(len(box - covered))
                covered |= box
                break
        else:
            break
    return covered, added


@pytest.mark.parametrize("grid", [(3, 3), (6, 6), (14, 14), (16, 16), (7, 12), (37, 37)])
def test_half_of_the_crops_are_masked_and_their_shares_climb_evenly(grid: tuple[int, int]) -> None:
    cfg, total = Masks(), 64
    cells = grid[0] * grid[1]
    counts = np.sort(step_of(cfg, grid, total).sum(axis=1))
    assert (counts[:32] == 0).all()
    edges = np.linspace(0.1, 0.5, 33)
    assert (counts[32:] <= cells * edges[1:]).all()  # never more than the slice's upper end
    lower = np.floor(cells * edges[:-1]) - counts[32:]
    assert lower.max() <= max(4, 0.06 * cells)  # a box that does not fit leaves a few patches out
    assert abs(counts[32:].mean() / cells - 0.3) < 0.04 + 0.6 / cells  # whole patches, rounded down


def test_slices_are_dealt_to_crops_anew_each_step() -> None:
    steps = [step_of(Masks(), (8, 8), 16, step=s).any(axis=1) for s in range(200)]
    often = np.mean(steps, axis=0)  # (16,) how often each crop was masked
    assert all(masked.sum() == 8 for masked in steps)
    assert np.abs(often - 0.5).max() < 0.15
    assert len({tuple(masked) for masked in steps}) > 150


def test_the_number_of_patches_and_their_places_are_as_by_the_rule_written_with_sets() -> None:
    cfg = Masks(images=1.0, patches=(0.3, 0.3))
    target, tries = int(0.3 * 144), 1500
    mine = step_of(cfg, (12, 12), tries).reshape(tries, 12, 12)
    rng = np.random.Generator(np.random.PCG64(0))
    theirs = np.zeros((tries, 12, 12), dtype=bool)
    for mask in theirs:
        for cell in by_hand(target, 12, 12, rng)[0]:
            mask[cell] = True
    assert mine.sum(axis=(1, 2)).max() <= target
    assert mine.sum(axis=(1, 2)).mean() == pytest.approx(theirs.sum(axis=(1, 2)).mean(), abs=0.4)
    deviation = math.sqrt(2 * 0.25 / tries)
    assert np.abs(mine.mean(axis=0) - theirs.mean(axis=0)).max() < 4.5 * deviation
    # How blocky: neighbours that agree, across and down.
    for axis in (1, 2):
        edges = [np.diff(m.astype(int), axis=axis).astype(bool).mean() for m in (mine, theirs)]
        assert edges[0] == pytest.approx(edges[1], rel=0.05)


def test_a_mask_of_few_patches_is_a_box_that_never_spans_the_grid() -> None:
    masks = step_of(Masks(images=1.0, patches=(0.2, 0.2)), (8, 10), 300).reshape(300, 8, 10)
    for mask in masks:
        assert not mask.all(axis=0).any() or mask.sum() > 8
        assert mask.sum() <= 16
    assert masks.any(axis=0).all()  # every patch is masked now and then


def test_a_crop_alone_gets_the_mask_that_it_has_in_the_step() -> None:
    together = step_of(Masks(), (14, 14), 32, seed=5, step=9)
    alone = BlockMasks(Masks(), (14, 14))(5, 9, 17, 32, generator(5, 9, 17, 2))
    np.testing.assert_array_equal(alone, together[17])
    assert alone.dtype == np.bool_


def test_no_share_of_images_is_no_mask_and_a_whole_share_masks_all() -> None:
    assert not step_of(Masks(images=0.0), (14, 14), 8).any()
    assert not step_of(Masks(images=0.1), (14, 14), 8).any()  # less than one crop
    assert step_of(Masks(images=1.0), (14, 14), 8).any(axis=1).all()


@pytest.mark.parametrize(
    ("grid", "patches"), [((2, 9), (0.1, 0.5)), ((9, 2), (0.1, 0.5)), ((3, 3), (0.0, 0.1))]
)
def test_a_grid_too_small_to_mask_is_refused(grid: tuple[int, int], patches: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"crops\.globals\.size .* masks\.patches=.* smaller patch"):
        BlockMasks(Masks(patches=patches), grid)


@pytest.mark.parametrize("cfg", [Masks(images=1.5), Masks(patches=(0.5, 0.1)), Masks(patches=(-0.1, 0.5))])
def test_shares_outside_zero_to_one_are_refused(cfg: Masks) -> None:
    with pytest.raises(ValueError, match=r"are shares"):
        BlockMasks(cfg, (14, 14))
