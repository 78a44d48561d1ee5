"""HEIC and AVIF: against the pixels they were made of, and bounded whatever they claim."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from model.images import ImageError, TooManyPixels, apart, decode
from tests.fuzz_uploads import saved
from tests.model.images.test_decode import BACKGROUND, TURNS, luma, off, over

SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:240:5, 90:170:2], np.int64(90)), -1).astype(np.uint8)  # 48 x 40
ALPHA = np.broadcast_to(np.linspace(0, 255, 40).astype(np.uint8), (48, 40))
LOSSLESS = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "HEIF": {"quality": -1, "chroma": 444}}
each_form = pytest.mark.parametrize("form", LOSSLESS)


def file_of(pixels: np.ndarray, form: str, **options) -> bytes:
    return saved(Image.fromarray(pixels), form, **LOSSLESS[form], **options)


@each_form
def test_colours_come_back(form):
    content = file_of(SMOOTH, form)
    assert off(decode(content, 3), SMOOTH) <= 3  # of YCbCr in 8 bits
    assert off(decode(content, 1)[..., 0], luma(SMOOTH)) <= 3


@each_form
def test_grey_comes_back(form):
    assert off(decode(file_of(SMOOTH[..., 0], form), 1)[..., 0], SMOOTH[..., 0]) <= 2


@each_form
def test_transparency_shows_the_background(form):
    content = file_of(np.dstack([SMOOTH, ALPHA]), form)
    assert off(decode(content, 3, BACKGROUND), over(SMOOTH, ALPHA)) <= 4


@each_form
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_an_image_is_turned_once(form, orientation):
    """The container has a turn of its own beside that of EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert off(decode(file_of(SMOOTH, form, exif=exif.tobytes()), 3), TURNS[orientation](SMOOTH)) <= 3


def test_ten_bits_become_eight():
    deep = pillow_heif.from_bytes("RGB;16", (40, 48), (SMOOTH.astype(np.uint16) * 257).tobytes())
    content = io.BytesIO()
    deep.save(content, quality=-1, chroma=444)
    assert off(decode(content.getvalue(), 3), SMOOTH) <= 3


def test_of_several_images_the_primary_counts():
    file = pillow_heif.from_pillow(Image.new("RGB", (40, 48), (9, 9, 9)))
    file.add_from_pillow(Image.fromarray(SMOOTH))
    content = io.BytesIO()
    file.save(content, quality=-1, chroma=444, primary_index=1)
    assert off(decode(content.getvalue(), 3), SMOOTH) <= 3
    frames = [Image.new("RGB", (40, 48), (9, 9, 9))]
    moving = saved(Image.fromarray(SMOOTH), "AVIF", save_all=True, append_images=frames, **LOSSLESS["AVIF"])
    assert off(decode(moving, 3), SMOOTH) <= 3


@each_form
def test_too_many_pixels_are_refused_by_the_header(form):
    content = file_of(SMOOTH, form)
    assert decode(content, 3, max_pixels=1920).shape == (48, 40, 3)
    with pytest.raises(TooManyPixels, match="40x48 pixels, at most 1919"):
        decode(content, 3, max_pixels=1919)


def claiming(content: bytes, width: int, height: int) -> bytes:
    """The file with another size in its container, and none of it in the stream."""
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]


def test_a_stream_larger_than_its_container_says_takes_no_more_memory(monkeypatch):
    """libavif decodes all of it, and scales it; libheif refuses it. Here it would take 25 MB and more."""
    monkeypatch.setattr(apart, "BASE_BYTES", 60 << 20)
    assert decode(file_of(SMOOTH, "AVIF"), 3, max_pixels=1920).shape == (48, 40, 3)
    large = Image.new("RGB", (4096, 4096))
    with pytest.raises(ImageError):
        decode(claiming(saved(large, "AVIF", speed=10), 8, 8), 3, max_pixels=64)


def test_a_container_larger_than_its_stream():
    for form in LOSSLESS:
        with pytest.raises(ImageError):
            decode(claiming(file_of(SMOOTH, form), 60000, 60000), 3, max_pixels=1 << 24)


def test_time_is_bounded_by_the_system(monkeypatch, tmp_path):
    """The process that decodes is ended, and what it was given is refused."""
    source = Path(apart.__file__).read_text().replace("SECONDS = 20", "SECONDS = 1")
    endless = tmp_path / "apart.py"
    endless.write_text(source.replace("    _limit(most_bytes)\n", "    _limit(most_bytes)\n    while True: pass\n"))
    monkeypatch.setattr(apart, "__file__", str(endless))
    with pytest.raises(ImageError, match="too much memory or time"):
        decode(file_of(SMOOTH, "AVIF"), 3)


@each_form
def test_what_is_truncated_or_changed_is_refused(form):
    content = file_of(SMOOTH, form)
    for eighths in (1, 2, 4, 6, 7):
        with pytest.raises(ImageError):
            decode(content[: len(content) * eighths // 8], 3)
    for broken in (content + b"x", content[:60] + bytes(200) + content[260:], content[:8] + b"mp42" + content[12:32]):
        with pytest.raises(ImageError):
            decode(broken, 3)


@pytest.mark.parametrize("brand", [b"mp42", b"isom", b"qt  ", b"crx "])
def test_other_files_in_such_boxes_are_no_images(brand):
    film = struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, brand) + struct.pack(">I4s", 16, b"mdat") + bytes(8)
    with pytest.raises(ImageError, match="corrupt or unsupported"):
        decode(film, 3)


def test_it_starts_quickly():
    """Nothing of ours is loaded in the process that decodes; torch alone takes seconds."""
    content, began = file_of(SMOOTH, "AVIF"), time.perf_counter()
    for _ in range(3):
        decode(content, 3)
    assert time.perf_counter() - began < 6
