"""Files to pixels: each against the pixels it was made of; and what must be refused before it costs anything."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, WebPImagePlugin

from model.images import ImageError, TooManyPixels, decode
from tests.fuzz_uploads import adam7, chunk, png, saved

RNG = np.random.default_rng(0)
GREY, RGB, RGBA = (RNG.integers(0, 256, (6, 9, *channels), np.uint8) for channels in ((), (3,), (4,)))
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:80:5, 90:170:5], np.int64(90)), -1).astype(np.uint8)
BACKGROUND = (200, 100, 50)
IMAGE = Image.fromarray(RGB)
PNG, GIF = saved(IMAGE, "PNG"), saved(IMAGE.quantize(), "GIF")
JPEG, PROGRESSIVE = (saved(IMAGE, "JPEG", progressive=progressive) for progressive in (False, True))
VP8, VP8L = (saved(IMAGE, "WEBP", lossless=lossless) for lossless in (False, True))
VP8X = saved(Image.fromarray(RGBA), "WEBP")
KINDS = {"png": PNG, "jpeg": JPEG, "progressive": PROGRESSIVE, "vp8": VP8, "vp8l": VP8L, "vp8x": VP8X, "gif": GIF}
each_kind = pytest.mark.parametrize("content", KINDS.values(), ids=KINDS)


def over(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return pixels * share + np.array(BACKGROUND) * (1 - share)


def luma(pixels: np.ndarray) -> np.ndarray:
    return pixels @ (0.299, 0.587, 0.114)


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == np.uint8
    return float(np.abs(found.astype(float) - wanted).max())


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize("content", [PNG, VP8L], ids=["png", "webp"])
def test_what_is_lossless_comes_back_to_the_bit(content):
    assert off(decode(content, 3), RGB) == 0
    assert off(decode(content, 1)[..., 0], luma(RGB)) <= 1


@pytest.mark.parametrize(
    "content",
    [saved(Image.fromarray(GREY), "PNG"), adam7(GREY), saved(Image.fromarray(GREY), "GIF")],
    ids=["png", "interlaced png", "gif"],
)
def test_grey_is_grey_in_one_channel_and_in_three(content):
    assert off(decode(content, 1)[..., 0], GREY) == 0
    assert off(decode(content, 3), np.stack([GREY] * 3, -1)) == 0


@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
def test_a_palette_is_looked_up(interlaced):
    palette = IMAGE.quantize(16)
    wanted = np.asarray(palette.convert("RGB"))
    assert off(decode(saved(palette, "PNG"), 3), wanted) == 0
    assert off(decode(saved(palette, "GIF", interlace=interlaced), 3), wanted) == 0


@pytest.mark.parametrize(
    ("form", "options", "most"),
    [("JPEG", {}, 6), ("JPEG", {"progressive": True}, 6), ("WEBP", {}, 10)],
    ids=["jpeg", "progressive", "webp"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_what_is_lossy_comes_near(form, options, most, mode):
    if form == "WEBP" and mode == "CMYK":
        pytest.skip("WebP has no CMYK")
    smooth = Image.fromarray(SMOOTH).convert(mode)
    wanted = np.asarray(smooth.convert("RGB"))
    assert off(decode(saved(smooth, form, quality=95, **options), 3), wanted) <= most


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_shows_the_background(form):
    alpha = RGBA[..., 3]
    alpha[0, :3] = 0, 128, 255
    content = saved(Image.fromarray(RGBA), form, lossless=True, exact=True)
    assert off(decode(content, 3, BACKGROUND), over(RGBA[..., :3], alpha)) <= 1
    assert off(decode(content, 1, BACKGROUND)[..., 0], luma(over(RGBA[..., :3], alpha))) <= 2


def test_grey_with_transparency_shows_the_background():
    pixels = np.stack([GREY, RGBA[..., 3]], -1)
    content = saved(Image.fromarray(pixels, "LA"), "PNG")
    assert off(decode(content, 3, BACKGROUND), over(np.stack([GREY] * 3, -1), RGBA[..., 3])) <= 1


def test_a_palette_with_transparency_shows_the_background():
    palette = IMAGE.quantize(16)
    alpha = np.arange(0, 256, 17, np.uint8)
    indices, pixels = np.asarray(palette), np.asarray(palette.convert("RGB"))
    found = decode(saved(palette, "PNG", transparency=alpha.tobytes()), 3, BACKGROUND)
    assert off(found, over(pixels, alpha[indices])) <= 1
    found = decode(saved(palette, "GIF", transparency=3), 3, BACKGROUND)
    assert off(found, np.where((indices == 3)[..., None], BACKGROUND, pixels)) == 0


def test_one_colour_can_be_what_is_transparent():
    content = saved(IMAGE, "PNG", transparency=tuple(map(int, RGB[2, 3])))
    wanted = RGB.copy()
    wanted[2, 3] = BACKGROUND
    assert off(decode(content, 3, BACKGROUND), wanted) == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_of_grey_span_the_whole_range(bits):
    levels = np.arange(8) % (1 << bits)
    row = int("".join(f"{level:0{bits}b}" for level in levels), 2).to_bytes(bits, "big")
    assert off(decode(png((8, 1), bits, 0, b"\0" + row), 1)[0, :, 0], levels * 255 // ((1 << bits) - 1)) == 0


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_of_grey_are_scaled_not_cut_off(orientation):
    values = RNG.integers(0, 65536, (6, 9), np.uint16)
    values[0] = 0, 1, 128, 129, 255, 256, 257, 65534, 65535
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(saved(Image.fromarray(values), "PNG", exif=exif), 1)[..., 0]
    assert off(found, np.rot90(np.rint(values * (255 / 65535)), 0 if orientation == 1 else -1)) == 0


@pytest.mark.parametrize("clear", [0, 514, 0x1234, 65535])
def test_sixteen_bits_of_grey_can_be_transparent(clear):
    """Only where all 16 bits agree, not where the upper 8 do."""
    values = np.array([[0, 1, 514, 515, 0x1234, 0x12FF, 65534, 65535]], ">u2")
    content = png((8, 1), 16, 0, b"\0" + values.tobytes(), chunk(b"tRNS", struct.pack(">H", clear)))
    levels = np.rint(values * (255 / 65535))[..., None]
    assert off(decode(content, 3, BACKGROUND), np.where((values == clear)[..., None], BACKGROUND, levels)) == 0


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_of_an_animation_the_first_frame_counts(form):
    palette = IMAGE.quantize(16)
    first = IMAGE if form != "GIF" else palette
    others = [first.transpose(Image.Transpose.ROTATE_180), Image.new(first.mode, first.size)]
    content = saved(first, form, save_all=True, append_images=others, duration=40, lossless=True)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert off(decode(content, 3), np.asarray(first.convert("RGB"))) == 0


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
    0: lambda a: a,
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_an_image_is_turned_as_its_exif_says(form, orientation):
    stored = IMAGE if form != "JPEG" else Image.fromarray(SMOOTH[:8])
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(saved(stored, form, exif=exif, lossless=True, quality=95), 3)
    assert off(found, TURNS[orientation](np.asarray(stored))) <= 6 * (form == "JPEG")


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"rubbish",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 2, 1 << 30, 1 << 30),  # a text of a gigabyte
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 12, 1, 1 << 30),
        b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x0112, 4, 1, 0xFFFFFFFF),
    ],
    ids=["empty", "rubbish", "short", "far", "cut", "huge text", "far double", "unknown"],
)
def test_broken_exif_is_ignored(exif):
    in_jpeg = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + JPEG[2:]
    assert off(decode(in_jpeg, 3), decode(JPEG, 3)) == 0
    assert off(decode(PNG[:33] + chunk(b"eXIf", exif) + PNG[33:], 3), RGB) == 0


def test_broken_exif_writes_nothing_to_the_log():
    """Found by tests.fuzz_uploads: Pillow warns of each entry, and Python keeps each of these texts."""
    entries = b"".join(struct.pack("<HHII", tag, 2, 1 << 20, 8) for tag in range(0x0110, 0x0120))
    content = PNG[:33] + chunk(b"eXIf", b"II*\0\x08\0\0\0\x10\0" + entries) + PNG[33:]
    code = "import sys; from model.images import decode; decode(sys.stdin.buffer.read(), 3)"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], input=content, capture_output=True, check=True)
    assert b"EXIF" not in done.stderr
    assert b"tag" not in done.stderr


SOF = JPEG.index(b"\xff\xc0")
FRAME = GIF.index(b"\x2c\0\0\0\0")
BOMBS = {
    "png": png((60000, 60000), 8, 0, b"\0"),
    "png, thin": png((1, 1 << 30), 8, 0, b"\0"),
    "png, beyond Pillow's own limit": png((0x7FFFFFFF, 0x7FFFFFFF), 8, 6, b"\0"),
    "jpeg": patched(JPEG, SOF + 5, struct.pack(">HH", 60000, 60000)),
    "vp8": patched(VP8, 26, struct.pack("<HH", 16383, 16383)),
    "vp8l": patched(VP8L, 21, struct.pack("<I", 16382 | 16382 << 14)),
    "vp8x": patched(VP8X, 24, b"\xff\xff\0" * 2),
    "gif": patched(GIF, 6, struct.pack("<HH", 60000, 60000)),
    "gif, by its frame": patched(GIF, FRAME + 5, struct.pack("<HH", 60000, 60000)),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_by_their_header(content, monkeypatch):
    def decoded(*_):
        pytest.fail("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "_open", decoded)
    with pytest.raises(TooManyPixels):
        decode(content, 1, max_pixels=1 << 24)


@each_kind
def test_the_limit_itself_is_allowed(content):
    assert decode(content, 3, max_pixels=54).shape == (6, 9, 3)
    with pytest.raises(TooManyPixels, match="9x6 pixels, at most 53"):
        decode(content, 3, max_pixels=53)


def test_a_jpeg_of_many_scans_is_refused():
    many = PROGRESSIVE[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 100 + b"\xff\xd9"
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(many, 3)


def test_scans_behind_the_end_of_a_jpeg_do_not_count():
    """Cameras put a second JPEG there, a film, or data of their own."""
    for trailer in (b"\xff\xda" * 200, PROGRESSIVE * 30, b"\0" * 9 + b"\xff\xd8\xff\xda" * 300):
        for content in (JPEG, PROGRESSIVE):
            assert np.array_equal(decode(content + trailer, 3), decode(content, 3))


def test_scans_in_what_stands_before_the_image_do_not_count():
    """A preview in EXIF is a JPEG of its own."""
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    assert np.array_equal(decode(JPEG[:2] + comment * 3 + JPEG[2:], 3), decode(JPEG, 3))


@pytest.mark.parametrize("between", [b"\xff\xd9", b"\xff\xfe\0\2", b"\xff\xfe\0\1", b"\xff\xd0", b"\xff\x01", b"\xff"])
def test_scans_cannot_hide(between):
    """libjpeg takes the first end that it sees; what it takes for no end must not be one here."""
    scan = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0"
    many = PROGRESSIVE[:-2] + between + scan * 100 + b"\xff\xd9"
    if between == b"\xff\xd9":
        assert np.array_equal(decode(many, 3), decode(PROGRESSIVE, 3))
    else:
        with pytest.raises(ImageError, match="more than 100 scans"):
            decode(many, 3)


def test_a_jpeg_of_many_segments_is_refused_at_once():
    began = time.perf_counter()
    with pytest.raises(ImageError, match="more than 16384 segments"):
        decode(JPEG[:2] + b"\xff\xfe\0\2" * 2_000_000 + JPEG[2:], 3)
    assert time.perf_counter() - began < 1


def test_a_png_of_many_chunks_is_refused_at_once():
    """Found by tests.fuzz_uploads' author: eight megabytes of empty chunks took seconds."""
    many = PNG[:33] + chunk(b"noNe") * 400_000 + PNG[33:]
    began = time.perf_counter()
    with pytest.raises(ImageError, match="more than 16384 chunks"):
        decode(many, 3)
    assert time.perf_counter() - began < 1
    assert off(decode(PNG[:33] + chunk(b"noNe") * 10_000 + PNG[33:], 3), RGB) == 0


def test_a_png_text_that_unpacks_to_a_gigabyte_is_not_unpacked():
    bomb = zlib.compress(bytes(1 << 24))
    content = PNG[:33] + chunk(b"zTXt", b"a\0\0" + bomb) * 64 + PNG[33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError):
        decode(content, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@each_kind
@pytest.mark.parametrize("eighths", [1, 2, 4, 6, 7])
def test_truncated_files_are_refused(content, eighths):
    with pytest.raises(ImageError):
        decode(content[: len(content) * eighths // 8], 3)


@each_kind
def test_what_is_an_archive_too_is_refused(content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hello")
    for tail in (archive.getvalue(), archive.getvalue() + b"a comment"):
        with pytest.raises(ImageError):
            decode(content + tail, 3)


@each_kind
@pytest.mark.parametrize(
    "archive",
    [b"Rar!\x1a\x07\0" + bytes(40), b"Rar!\x1a\x07\1\0" + bytes(40), b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40)],
    ids=["rar", "rar 5", "7z"],
)
def test_archives_of_other_kinds_are_refused_too(content, archive):
    for tail in (archive, bytes(70_000) + archive, archive + bytes(70_000)):
        with pytest.raises(ImageError):
            decode(content + tail, 3)
    with pytest.raises(ImageError, match="archive"):
        decode(JPEG + archive, 3)


def test_an_archive_of_several_disks_is_refused_too():
    """It made zipfile.is_zipfile raise BadZipFile, which nobody caught."""
    end = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 5) + b"PK\x05\x06" + bytes(18)
    with pytest.raises(ImageError, match="archive"):
        decode(JPEG + end, 3)


def test_nothing_follows_a_png_or_a_webp():
    for content in (PNG + b"x", PNG + PNG, VP8 + b"xx", VP8L + VP8L):
        with pytest.raises(ImageError, match="something else follow"):
            decode(content, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        saved(IMAGE, "TIFF"),
        saved(IMAGE, "BMP"),
        saved(IMAGE, "ICO"),
        saved(IMAGE, "PPM"),
        saved(IMAGE, "JPEG2000"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"RIFF\x04\0\0\0WEBP",
        b"RIFF\x0c\0\0\0WEBPJUNK\0\0\0\0",
    ],
    ids=lambda content: str(content[:12]),
)
def test_what_is_no_image_of_these_formats_is_refused(content):
    with pytest.raises(ImageError):
        decode(content, 3)
