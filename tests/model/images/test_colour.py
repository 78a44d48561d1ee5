"""ICC profiles: colours against the arithmetic of primaries and curves; what is broken is as if it were not there."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from model.images import decode
from tests.fuzz_uploads import saved

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LEVELS = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), -1).reshape(12, 18, 3)  # all 216 colours
# Columns of RGB to XYZ for D50 (Bradford), as the profiles of P3 and sRGB have them.
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
S = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A display profile of version 2.1 (ICC.1:2001-04): header, table of tags, tags."""
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + white + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))


def gamma(value: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(value * 256))


def rgb_profile(primaries: np.ndarray, exponent: float) -> bytes:
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249))}
    tags |= {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent)))


def encoded(linear: np.ndarray) -> np.ndarray:
    """By the curve of sRGB (IEC 61966-2-1), in 0..255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


WIDE = rgb_profile(P3, 2.2)
DARK = profile(b"GRAY", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"kTRC": gamma(1.0)})


def wide_to_srgb(pixels: np.ndarray) -> np.ndarray:
    return encoded((pixels / 255.0) ** 2.2 @ (np.linalg.inv(S) @ P3).T)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "HEIF"])
def test_wide_colours_become_srgb(form):
    """A red of P3 is no red of sRGB: more of it than there is."""
    image = Image.fromarray(LEVELS)
    plain, wide = (saved(image, form, lossless=True, icc_profile=profile) for profile in (b"", WIDE))
    before = decode(plain, 3)  # of the lossy ones, what they made of it
    assert np.abs(before - wide_to_srgb(before)).max() > 20
    assert np.abs(decode(wide, 3) - wide_to_srgb(before)).max() <= 2  # of the tables


def test_transparency_is_kept_apart_from_colours():
    alpha = np.arange(216, dtype=np.uint8).reshape(12, 18)
    content = saved(Image.fromarray(np.dstack([LEVELS, alpha])), "PNG", icc_profile=WIDE)
    share = alpha[..., None] / 255
    wanted = wide_to_srgb(LEVELS) * share + np.array((200, 100, 50)) * (1 - share)
    assert np.abs(decode(content, 3, (200, 100, 50)) - wanted).max() <= 2


def test_a_palette_is_looked_up_before_its_colours_are_converted():
    content = saved(Image.fromarray(LEVELS).quantize(216), "PNG", icc_profile=WIDE)
    plain = decode(saved(Image.fromarray(LEVELS).quantize(216), "PNG"), 3)
    assert np.abs(decode(content, 3) - wide_to_srgb(plain)).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_has_profiles_of_its_own(channels):
    """One of exponent 1 holds light as it is; what is shown is brighter than the numbers."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = encoded(grey / 255)[..., None]
    assert np.abs(decode(saved(Image.fromarray(grey), "PNG", icc_profile=DARK), channels) - wanted).max() <= 1
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.abs(decode(saved(deep, "PNG", icc_profile=DARK), channels) - wanted).max() <= 1


def cmyk_profile() -> bytes:
    """To Lab through a table of two points in each of four inks (lut8Type): no ink is white, any ink is black."""
    inks = [[i >> bit & 1 for bit in (3, 2, 1, 0)] for i in range(16)]
    table = bytes(value for ink in inks for value in ((255 if not any(ink) else 0), 128, 128))
    ramp = bytes(range(256))
    lut = b"mft1" + struct.pack(">IBBBx", 0, 4, 3, 2) + b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    made = profile(b"CMYK", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"A2B0": lut + ramp * 4 + table + ramp * 3})
    return made[:12] + b"prtr" + made[16:20] + b"Lab " + made[24:]


def test_inks_are_converted_by_their_profile():
    """This one's cyan is black; without a profile cyan is the absence of red."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[8:, :, 0] = 255
    image = Image.fromarray(inks, "CMYK")
    plain = decode(saved(image, "JPEG", quality=95), 3)
    assert np.abs(plain[12, 8].astype(int) - (0, 255, 255)).max() <= 5
    found = decode(saved(image, "JPEG", quality=95, icc_profile=cmyk_profile()), 3)
    assert found[2].min() >= 250
    assert found[12].max() <= 5


def test_srgb_is_left_alone_to_the_bit():
    assert np.array_equal(decode(saved(Image.fromarray(LEVELS), "PNG", icc_profile=SRGB), 3), LEVELS)
    grey = LEVELS[..., 0]
    assert np.array_equal(decode(saved(Image.fromarray(grey), "PNG", icc_profile=SRGB), 1)[..., 0], grey)


@pytest.mark.parametrize(
    "broken",
    [
        b"x",
        b"rubbish" * 100,
        WIDE[:200],
        WIDE[:128] + b"\xff\xff\xff\xff" + WIDE[132:],
        WIDE[:140] + b"\xff" * 8 + WIDE[148:],
        DARK,
        cmyk_profile(),
        bytes(5 << 20),
    ],
    ids=["one byte", "rubbish", "cut", "tags without end", "a tag far away", "of grey", "of inks", "5 MB"],
)
def test_a_profile_that_does_not_fit_is_ignored(broken):
    content = saved(Image.fromarray(LEVELS), "WEBP", lossless=True, icc_profile=broken)
    assert np.array_equal(decode(content, 3), LEVELS)


def test_a_profile_is_used_however_the_image_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(Image.fromarray(LEVELS), "PNG", icc_profile=WIDE, exif=exif)
    assert np.abs(decode(content, 3) - np.rot90(wide_to_srgb(LEVELS), -1)).max() <= 2


def test_pillow_reads_these_profiles_too():
    """The oracle's own files are well-formed."""
    for content, space in ((WIDE, "RGB "), (DARK, "GRAY"), (cmyk_profile(), "CMYK")):
        assert ImageCms.ImageCmsProfile(io.BytesIO(content)).profile.xcolor_space == space
