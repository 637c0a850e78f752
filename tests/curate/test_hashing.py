"""Perceptual hashes: duplicates are near, other images far, and the search finds every near pair."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from dinokit.curate.dedup import Status
from dinokit.curate.hashing import (
    FREQUENCIES,
    RECORD,
    SIDE,
    find_duplicates,
    hash_image,
    hash_images,
    near_pairs,
    perceptual_hash,
)  # fmt: skip
from dinokit.data.sources.scenes import Config, build


@pytest.fixture(scope="module")
def photos():
    source = build(Config(count=40, size=160))
    return [source[i][0] for i in range(40)]


def encoded(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def differ(a, b):
    return int(np.bitwise_count(perceptual_hash(a) ^ perceptual_hash(b)).sum())


def test_the_hash_is_the_sign_of_the_cosine_transform_of_scipy(photos):
    thumb = np.asarray(photos[0].convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    bits = dctn(thumb)[:FREQUENCIES, :FREQUENCIES] > 0
    bits[0, 0] = False
    assert np.array_equal(np.unpackbits(perceptual_hash(photos[0]).view(np.uint8)), bits.ravel())


def test_duplicates_are_near_and_other_images_far(photos):
    for photo in photos:
        half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BICUBIC)
        assert max(differ(photo, copy) for copy in (encoded(photo, 75), encoded(photo, 50), half)) <= 12
        assert differ(photo, photo.convert("L")) == 0
    others = [differ(a, b) for i, a in enumerate(photos) for b in photos[:i]]
    assert min(others) > 40


def test_brightness_moves_a_hash_less_than_another_image_does(photos):
    assert np.median([differ(p, ImageEnhance.Brightness(p).enhance(1.2)) for p in photos]) < 20


def test_blank_images_have_no_near_duplicates():
    white, noisy = Image.new("L", (50, 50), 255), np.full((50, 50), 128, np.uint8)
    noisy[10, 10] += 3
    assert not perceptual_hash(white).any()
    assert not perceptual_hash(Image.fromarray(noisy)).any()
    assert not sum(len(a) for a, _ in near_pairs(np.zeros((4, 4), np.uint64), 12))


def test_16_bit_images_of_many_channels_have_the_hash_of_their_grey_image(photos):
    grey = np.asarray(photos[0].convert("L"))
    deep = grey.astype(np.uint16)[..., None] * 257
    assert differ(photos[0].convert("L"), deep.repeat(5, axis=2)) <= 4


@pytest.mark.parametrize("most", [0, 3, 12])
def test_the_search_finds_every_near_pair(most):
    rng = np.random.default_rng(most)
    hashes = rng.integers(0, 2**63, (300, 4), dtype=np.uint64)
    for place in range(100, 300):  # most of them are a few bits away from another
        hashes[place] = hashes[rng.integers(0, place)]
        for bit in rng.choice(256, rng.integers(0, 16), replace=False):
            hashes[place, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    truth = {(a, b) for a, b in zip(*np.nonzero(distance <= most), strict=True) if a < b}
    found = {
        (min(p), max(p))
        for a, b in near_pairs(hashes, most)
        for p in zip(a.tolist(), b.tolist(), strict=True)
    }
    assert found <= truth
    assert len(truth) > 10
    assert _components(found, 300) == _components(truth, 300)  # equal hashes are chained, not all paired


def _components(pairs, n):
    parent = list(range(n))

    def root(x):
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in sorted(pairs):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(x) for x in range(n)]


def test_a_digest_depends_on_the_pixels_only(photos):
    photo = photos[0].convert("RGB")
    file = io.BytesIO()
    photo.save(file, "PNG", pnginfo=None, compress_level=1)
    again = Image.open(file)
    other = photo.copy()
    other.putpixel((0, 0), (1, 2, 3) if photo.getpixel((0, 0)) != (1, 2, 3) else (3, 2, 1))
    digest = lambda image: hash_image(image)[0].tolist()  # noqa: E731
    assert digest(photo) == digest(again) != digest(other)
    assert digest(photo) != digest(photo.rotate(90, expand=True))


def test_unreadable_images_are_named_and_the_rest_is_hashed(photos):
    class Source:
        classes = ()

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise ValueError("cut short")
            return photos[index], -1

        def name(self, index):
            return f"photo {index}"

    table, errors = hash_images(Source(), range(3))
    assert table["valid"].tolist() == [True, False, True]
    assert table["pixels"].tolist() == [160 * 160, 0, 160 * 160]
    assert errors == ["photo 1: cut short"]


def test_duplicates_in_the_pool_are_one_group_even_if_a_test_image_has_their_hash_too():
    for seed in range(20):  # digests come in any order
        rng = np.random.default_rng(seed)
        table = np.zeros(5, RECORD)
        table["valid"], table["pixels"] = True, [1, 2, 3, 4, 5]
        table["digest"] = rng.integers(0, 1 << 60, (5, 2))
        table["hash"] = rng.integers(1, 1 << 60, (1, 4))
        table["hash"][2] ^= np.uint64(3)  # bits that differ: 8 of 12
        table["hash"][3] = rng.integers(1, 1 << 60, 4)
        status, of, pairs = find_duplicates(table, 4, 12, largest=True)  # the last is a test image
        assert of.tolist() == [2, 2, 2, 3]
        assert status.tolist() == [Status.NEAR, Status.NEAR, Status.CLEAN, Status.CLEAN]
        assert set(pairs[:, 1]) == {4}
        assert 3 not in pairs[:, 0]
