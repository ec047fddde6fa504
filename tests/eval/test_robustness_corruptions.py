"""Corrupted pictures of eval.robustness: the library's own, always alike for a seed, in whatever order and process."""

import random
import sys

import imagecorruptions
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eval.image_classification.data import ArrayPictures
from eval.robustness.corruptions import corrupt, describe, parse_corruptions, parse_severities, picture_seed
from eval.robustness.pictures import Corrupted
from eval.robustness.scores import CORRUPTIONS

RANDOM = np.random.default_rng(0)
# Smooth pictures, as blurs and contrast leave noise of one value in many places.
IMAGES = np.clip(
    np.cumsum(RANDOM.normal(0, 9, (6, 40, 36, 3)), axis=1) + RANDOM.integers(60, 200, (6, 1, 1, 3)), 0, 255
).astype(np.uint8)
SOURCE = ArrayPictures(IMAGES, np.arange(6), None, "made")


def by_the_library(pixels, name, severity, seed):
    """Call the library as its own documentation says, everything that can be seeded with the seed."""
    np.random.seed(seed)
    extra = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
    return imagecorruptions.corrupt(pixels, severity=severity, corruption_name=name, **extra)


def test_the_fifteen_are_the_library_s_common_ones():
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names("common")


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_every_corruption_is_the_library_s_output_for_the_seed(name, severity):
    for index, image in enumerate(IMAGES[:2]):
        seed = picture_seed(7, index, name, severity)
        expected = by_the_library(image, name, severity, seed)
        assert np.array_equal(corrupt(image, name, severity, seed), expected) and expected.shape == image.shape
        assert not np.array_equal(expected, image)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_repeats_itself_and_leaves_the_generators_alone(name):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    before = IMAGES[0].copy()
    first = corrupt(IMAGES[0], name, 3, 11)
    assert np.array_equal(IMAGES[0], before) and first.dtype == np.uint8
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    np.random.seed(5)
    assert np.array_equal(corrupt(IMAGES[0], name, 3, 11), first)


def test_another_seed_picture_corruption_or_severity_draws_anew():
    numbers = [(0, 0, "fog", 1), (1, 0, "fog", 1), (0, 1, "fog", 1), (0, 0, "snow", 1), (0, 0, "fog", 2)]
    seeds = [picture_seed(*each) for each in numbers]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [picture_seed(*each) for each in numbers]
    noisy = [corrupt(IMAGES[0], "gaussian_noise", 1, seed) for seed in seeds[:2]]
    assert not np.array_equal(*noisy)


def whole(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_order_nor_batches_nor_processes_change_a_picture(workers):
    for name in CORRUPTIONS if workers == 0 else ("shot_noise", "glass_blur"):
        data = Corrupted(SOURCE, whole, name, 5, 3, "input")
        order = RANDOM.permutation(6).tolist()
        loader = DataLoader(data, 4, sampler=order, num_workers=workers)
        found = torch.cat([images for images, _ in loader])
        for image, index in zip(found, order, strict=True):
            expected = by_the_library(IMAGES[index], name, 5, picture_seed(3, index, name, 5))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), (name, index)


def test_pictures_are_corrupted_after_or_before_they_are_resized():
    def half(image):
        return whole(image.resize((32, 32)))

    seed = picture_seed(0, 4, "fog", 2)
    after, label = Corrupted(SOURCE, half, "fog", 2, 0, "input")[4]
    before, _ = Corrupted(SOURCE, half, "fog", 2, 0, "picture")[4]
    small = half(SOURCE.open(4)).permute(1, 2, 0).numpy()
    assert label == 4 and np.array_equal(after.permute(1, 2, 0), by_the_library(small, "fog", 2, seed))
    large = ArrayPictures(by_the_library(IMAGES[4], "fog", 2, seed)[None], np.zeros(1, int))
    assert torch.equal(before, half(large.open(0))) and not torch.equal(before, after)


def test_a_grey_picture_is_corrupted_as_the_first_channel_of_three():
    grey = IMAGES[0, ..., 0]
    expected = by_the_library(np.stack([grey] * 3, axis=2), "gaussian_noise", 2, 9)
    assert np.array_equal(corrupt(grey, "gaussian_noise", 2, 9), expected[..., 0])
    source = ArrayPictures(IMAGES[..., 0], np.arange(6))
    source.mode = "L"
    data = Corrupted(source, lambda image: torch.from_numpy(np.array(image))[None], "gaussian_noise", 2, 0, "input")
    assert data[0][0].shape == (1, 40, 36)


def test_small_pictures_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="32 x 32 or more, got 16 x 40"):
        corrupt(IMAGES[0][:, :16], "fog", 1, 0)
    with pytest.raises(ValueError, match=r"no corruption 'rain'; there are gaussian_noise, .*jpeg_compression"):
        corrupt(IMAGES[0], "rain", 1, 0)
    with pytest.raises(ValueError, match="no severity 6"):
        corrupt(IMAGES[0], "fog", 6, 0)
    small = ArrayPictures(IMAGES[:, :20], np.arange(6), None, "made")
    with pytest.raises(ValueError, match="picture 2 of made is too small: corruptions need 32 x 32"):
        Corrupted(small, None, "fog", 1, 0, "picture")[2]


def test_names_and_severities_are_read_and_put_in_order():
    assert parse_corruptions("all") == list(CORRUPTIONS) and parse_corruptions("none") == []
    assert parse_corruptions("snow,shot_noise,snow") == ["shot_noise", "snow"]
    assert parse_severities("5,1") == [1, 5]
    for text in ("1,x", "0", ""):
        with pytest.raises(ValueError, match="no severity"):
            parse_severities(text)


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ModuleNotFoundError, match=r'imagecorruptions-imaug: pip install "vltok\[robustness\]"'):
        describe("fog", 1, 0, "input")
