"""Pixels of any size to the network's: by means, by cutting and by padding."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest

from model.images import ImageError, fit
from tests.model.images.test_decode import BACKGROUND, RGB, RNG, luma, off


def test_the_right_size_is_left_alone():
    for how in ("exact", "resize", "crop", "pad"):
        assert fit(RGB, 6, 9, how) is RGB


def test_exact_takes_no_other_size():
    with pytest.raises(ImageError, match="it is 9x6, the network's images are 8x8"):
        fit(RGB, 8, 8, "exact")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["resize", "crop", "pad"])
def test_halving_takes_the_mean_of_four(channels, how):
    pixels = RNG.integers(0, 256, (16, 16, channels), np.uint8)
    assert off(fit(pixels, 8, 8, how), pixels.reshape(8, 2, 8, 2, channels).mean((1, 3))) <= 1


def test_resize_stretches():
    wide = RNG.integers(0, 256, (8, 16, 3), np.uint8)
    assert off(fit(wide, 8, 8, "resize"), wide.reshape(8, 8, 2, 3).mean(2)) <= 1
    assert off(fit(np.full((3, 5, 1), 77, np.uint8), 8, 8, "resize"), np.full((8, 8, 1), 77)) == 0


@pytest.mark.parametrize(("shape", "middle"), [((8, 16), np.s_[:, 4:12]), ((16, 8), np.s_[4:12])], ids=["wide", "tall"])
def test_crop_keeps_the_middle(shape, middle):
    pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
    assert off(fit(pixels, 8, 8, "crop"), pixels[middle]) == 0
    double = pixels.repeat(2, 0).repeat(2, 1)
    assert off(fit(double, 8, 8, "crop"), pixels[middle]) == 0


@pytest.mark.parametrize("axis", [0, 1], ids=["tall", "wide"])
def test_a_thin_image_is_cropped_without_being_enlarged_first(axis):
    """A million pixels in a row, a PNG of 18 kB, took six gigabytes and half a minute."""
    thin = np.expand_dims(np.zeros((1 << 20, 3), np.uint8), 1 - axis)
    thin[((1 << 19) - 1) * (axis == 0), ((1 << 19) - 1) * (axis == 1)] = 1, 2, 3
    thin[(1 << 19) * (axis == 0), (1 << 19) * (axis == 1)] = 1, 2, 3
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert off(fit(thin, 32, 32, "crop"), np.broadcast_to([1, 2, 3], (32, 32, 3))) == 0
    assert time.perf_counter() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("how", ["resize", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 1000), (1000, 3)], ids=str)
def test_every_size_comes_to_size(how, size):
    assert fit(np.full((*size, 1), 9, np.uint8), 8, 8, how, (9, 9, 9)).tolist() == np.full((8, 8, 1), 9).tolist()


def test_pad_shows_all_of_it_in_the_middle_of_the_background():
    small = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    found = fit(small, 8, 8, "pad", BACKGROUND).copy()
    assert off(found[2:6, 1:7], small) == 0  # never enlarged
    found[2:6, 1:7] = BACKGROUND
    assert off(found, np.broadcast_to(BACKGROUND, (8, 8, 3))) == 0


def test_pad_shrinks_what_is_larger():
    wide = RNG.integers(0, 256, (8, 16, 1), np.uint8)
    found = fit(wide, 8, 8, "pad", BACKGROUND)
    assert off(found[2:6], wide.reshape(4, 2, 8, 2, 1).mean((1, 3))) <= 1
    assert off(found[[0, 1, 6, 7]][..., 0], np.full((4, 8), luma(np.array(BACKGROUND)))) <= 1
