"""JPEGs beyond the limit, decoded to a half, a quarter or an eighth of their sides: near the means, within memory."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from model.images import TooManyPixels, decode, fit
from tests.fuzz_uploads import saved

SIDE = 256
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:SIDE, 0:SIDE], np.int64(90)), -1).astype(np.uint8)
JPEG = saved(Image.fromarray(SMOOTH), "JPEG", quality=95)


@pytest.mark.parametrize(
    ("limit", "side"), [(1 << 16, 256), (65535, 128), (1 << 14, 128), (1 << 12, 64), (1 << 10, 32)]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_the_largest_fraction_within_the_limit(limit, side, options):
    content = saved(Image.fromarray(SMOOTH), "JPEG", quality=95, subsampling=0, **options)
    if options and limit <= (1 << 14):  # all coefficients are held, at any fraction: 6 bytes a pixel
        with pytest.raises(
            TooManyPixels, match="256x256 pixels in several scans, too much memory; save it as baseline"
        ):
            decode(content, 3, max_pixels=limit, smallest=8)
        return
    found = decode(content, 3, max_pixels=limit, smallest=8)
    assert found.shape == (side, side, 3)
    means = SMOOTH.reshape(side, SIDE // side, side, SIDE // side, 3).mean((1, 3))
    assert np.abs(found - means).max() <= 3


def test_no_side_falls_below_the_smallest():
    assert decode(JPEG, 3, max_pixels=1 << 12, smallest=64).shape == (64, 64, 3)
    with pytest.raises(TooManyPixels, match="256x256 pixels, at most 4096"):
        decode(JPEG, 3, max_pixels=1 << 12, smallest=65)
    with pytest.raises(TooManyPixels, match="256x256 pixels, at most 1023"):
        decode(JPEG, 3, max_pixels=1023, smallest=1)
    wide = saved(Image.new("L", (4096, 40)), "JPEG")
    with pytest.raises(TooManyPixels):
        decode(wide, 3, max_pixels=1 << 14, smallest=32)


def test_only_whole_images_where_no_smallest_is_given():
    with pytest.raises(TooManyPixels, match="256x256 pixels, at most 4096"):
        decode(JPEG, 3, max_pixels=1 << 12)


def test_a_jpeg_within_the_limit_keeps_every_pixel():
    assert np.array_equal(decode(JPEG, 3, max_pixels=1 << 16, smallest=8), decode(JPEG, 3))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_fitted_of_a_fraction_is_near_what_is_fitted_of_all(channels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(SMOOTH[:, :200]), "JPEG", quality=95, exif=exif)
    for how in ("resize", "crop", "pad"):
        all_of_it, less = (fit(decode(content, channels, max_pixels=m, smallest=16), 16, 16, how) for m in (None, 4096))
        assert np.abs(all_of_it.astype(int) - less).max() <= 4


def test_fifty_megapixels_are_decoded_for_a_small_network():
    content = saved(Image.new("RGB", (8660, 5773), (200, 30, 30)), "JPEG")
    found = decode(content, 3, max_pixels=1 << 24, smallest=32)
    assert found.shape == (2887, 4330, 3)
    assert np.abs(found[::500, ::500].astype(int) - (200, 30, 30)).max() <= 2


def test_other_formats_have_no_fractions():
    for form in ("PNG", "WEBP", "GIF", "AVIF", "HEIF"):
        with pytest.raises(TooManyPixels):
            decode(saved(Image.fromarray(SMOOTH), form), 3, max_pixels=1 << 12, smallest=8)
