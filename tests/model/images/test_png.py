"""Transparency of PNG: every colour type, depth and layout, against the arithmetic of its specification.

Files are written here, byte by byte, and what they should look like is computed from the samples alone: sections 4.5
(interlacing), 7.2 (packing), 9 (filters), 11.3.1.1 (tRNS) and 13.12 (scaling) of PNG, third edition.
"""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from model.images import ImageError, decode
from tests.fuzz_uploads import ADAM7, chunk, png

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
CASES = [(colour, bits) for colour, depths in DEPTHS.items() for bits in depths]
BACKGROUND = np.array((200, 100, 50))
H, W = 11, 13  # not a multiple of eight, so that rows end within a byte, and all seven passes have pixels


def rows(samples: np.ndarray, bits: int, filters: tuple[int, ...]) -> bytes:
    """Samples [H, W, n] as filtered rows; row i has the filter i of the given, again and again."""
    if not samples.size:
        return b""
    digits = samples.reshape(len(samples), -1)
    if bits == 16:
        raw = digits.astype(">u2").view(np.uint8)
    else:
        each = (digits[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(digits), -1)
        raw = np.packbits(each.astype(np.uint8), axis=1)
    step = max(1, samples.shape[2] * bits // 8)
    before, content = np.zeros(raw.shape[1], np.int64), b""
    for i, row in enumerate(raw.astype(np.int64)):
        left, corner = (np.concatenate([np.zeros(step, np.int64), line[:-step]])[: len(row)] for line in (row, before))
        kind = filters[i % len(filters)]
        nearest = np.stack([left, before, corner])
        distance = np.abs(left + before - corner - nearest)
        paeth = np.take_along_axis(nearest, distance.argmin(0)[None], 0)[0]  # of equals, the first
        content += (
            bytes([kind])
            + ((row - (0, left, before, (left + before) // 2, paeth)[kind]) % 256).astype(np.uint8).tobytes()
        )
        before = row
    return content


def file_of(samples, colour, bits, *between, interlaced=False, filters=(0,)) -> bytes:
    if not interlaced:
        return png((W, H), bits, colour, rows(samples, bits, filters), *between)
    passes = [samples[y::down, x::across] for x, y, across, down in ADAM7]
    content = b"".join(rows(part, bits, filters) for part in passes)
    return png((W, H), bits, colour, content, *between, interlaced=True)


def to_levels(samples: np.ndarray, colour: int, bits: int) -> np.ndarray:
    """In 0..255; of 16 bits but grey the upper byte, as section 13.12 allows."""
    if bits == 16 and colour != GREY:
        return (samples >> 8).astype(float)
    return samples * 255.0 / ((1 << bits) - 1)


def over_background(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[H, W, 3] in 0..255 over the background; alpha [H, W] in 0..1."""
    return colours * alpha[..., None] + BACKGROUND * (1 - alpha[..., None])


def drawn(colour: int, bits: int) -> np.ndarray:
    rng = np.random.default_rng(bits)
    samples = rng.integers(0, 1 << bits, (H, W, SAMPLES[colour]))
    if bits == 16:  # neighbours of one colour, in the upper byte and in the lower
        samples[0] = samples[0, 0]
        samples[0, 1:4, 0] += np.array([1, 256, 257])
        samples %= 1 << 16
    if colour in (GREY_ALPHA, RGB_ALPHA):
        samples[1, :3, -1] = 0, (1 << bits) // 2, (1 << bits) - 1
    return samples


def found(content: bytes) -> np.ndarray:
    return decode(content, 3, tuple(map(int, BACKGROUND))).astype(float)


@pytest.mark.parametrize("filters", [(0,), (1, 2, 3, 4)], ids=["unfiltered", "filtered"])
@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "transparent"])
@pytest.mark.parametrize(("colour", "bits"), CASES)
def test_every_kind_of_png_is_what_its_samples_say(colour, bits, transparent, interlaced, filters):
    samples, between = drawn(colour, bits), []
    alpha, levels = np.ones((H, W)), to_levels(samples, colour, bits)
    if colour == PALETTE:
        palette = np.random.default_rng(0).integers(0, 256, (1 << bits, 3))
        between.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
        levels = palette[samples[..., 0]].astype(float)
    if colour in (GREY_ALPHA, RGB_ALPHA):
        alpha, levels = levels[..., -1] / 255, levels[..., :-1]
    elif transparent and colour == PALETTE:  # fewer than there are colours: the rest is opaque
        table = np.random.default_rng(1).integers(0, 256, max(1, (1 << bits) * 3 // 4))
        between.append(chunk(b"tRNS", table.astype(np.uint8).tobytes()))
        alpha = np.concatenate([table, np.full(256, 255)])[samples[..., 0]] / 255
    elif transparent:
        key = samples[0, 0]
        between.append(chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
        alpha = (samples != key).any(-1).astype(float)
        assert 0 < alpha.sum() < alpha.size
    wanted = over_background(np.broadcast_to(levels, (H, W, 3)), alpha)
    difference = found(file_of(samples, colour, bits, *between, interlaced=interlaced, filters=filters)) - wanted
    assert np.abs(difference).max() <= 0.5 + 1e-9  # by rounding alone


def test_grey_of_four_bits_with_one_level_transparent_is_background():
    """As optimisers make them out of RGBA."""
    content = png((32, 32), 4, 0, (b"\0" + b"\x77" * 16) * 32, chunk(b"tRNS", b"\0\7"))
    assert np.array_equal(found(content), np.broadcast_to(BACKGROUND, (32, 32, 3)))
    content = png((32, 32), 4, 0, (b"\0" + b"\x77" * 16) * 32, chunk(b"tRNS", b"\0\6"))
    assert np.array_equal(found(content), np.full((32, 32, 3), 0x77))


def test_colours_of_sixteen_bits_are_transparent_only_where_all_bits_agree():
    """Pillow compared the lower bytes of the one to the upper bytes of the other: a black image turned white."""
    samples = np.array([[[0, 0, 0], [255, 255, 255], [0x1234, 0, 0], [0x1235, 0, 0], [0x1334, 0, 0]]])
    raw = b"\0" + samples.astype(">u2").tobytes()
    for key, clear in (((0, 0, 0), 0), ((0x1234, 0, 0), 2), ((0x00FF, 0x00FF, 0x00FF), 1), ((0xFF00, 0, 0), None)):
        seen = found(png((5, 1), 16, 2, raw, chunk(b"tRNS", struct.pack(">3H", *key))))
        wanted = (samples >> 8).astype(float)
        if clear is not None:
            wanted[0, clear] = BACKGROUND
        assert np.array_equal(seen, wanted)


@pytest.mark.parametrize(("colour", "bits"), [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (RGB, 8)])
def test_of_the_transparent_colour_the_bits_of_a_sample_count(colour, bits):
    """The others should be 0, and are to be ignored where they are not."""
    samples = drawn(colour, bits)
    plain, dirty = (
        chunk(b"tRNS", struct.pack(f">{SAMPLES[colour]}H", *(samples[0, 0] | high))) for high in (0, 0x5A00)
    )
    assert np.array_equal(found(file_of(samples, colour, bits, plain)), found(file_of(samples, colour, bits, dirty)))


@pytest.mark.parametrize("colour", [GREY_ALPHA, RGB_ALPHA])
def test_what_has_an_alpha_of_its_own_has_no_other(colour):
    samples = drawn(colour, 8)
    content = file_of(samples, colour, 8, chunk(b"tRNS", bytes(6)))
    assert np.array_equal(found(content), found(file_of(samples, colour, 8)))


@pytest.mark.parametrize(("colour", "bits"), CASES)
def test_in_one_channel_it_is_the_luminance_of_three(colour, bits):
    between = [chunk(b"PLTE", bytes(range(3 * min(1 << bits, 85))))] if colour == PALETTE else []
    samples = drawn(colour, bits) % 85 if colour == PALETTE else drawn(colour, bits)
    content = file_of(samples, colour, bits, *between)
    one, three = decode(content, 1, tuple(map(int, BACKGROUND))), found(content)
    assert np.abs(one[..., 0] - three @ (0.299, 0.587, 0.114)).max() <= 1


@pytest.mark.parametrize(("colour", "length"), list(itertools.product((GREY, RGB), (0, 1))))
def test_a_transparent_colour_cut_short_is_refused(colour, length):
    with pytest.raises(ImageError):
        decode(file_of(drawn(colour, 8), colour, 8, chunk(b"tRNS", bytes(length))), 3)
