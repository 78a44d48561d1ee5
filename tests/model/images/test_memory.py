"""What decoding takes: at most 18 bytes of memory for each pixel that is allowed, of whatever shape and kind."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from model.images.decode import BYTES_PER_PIXEL
from tests.fuzz_uploads import chunk, png, saved

PIXELS = 1 << 19
BASE = (
    6 << 20
)  # bytes: what does not grow with the image; copies of a tile of 2^16 pixels, at 12 bytes where it is thin
SIZES = {"square": (1024, 512), "row": (PIXELS, 1), "column": (1, PIXELS)}
SAMPLES = {(1, 0): 1, (16, 0): 1, (8, 2): 3, (16, 2): 3, (8, 3): 1, (16, 6): 4}
MEASURE = """
import pickle, sys, types
sys.modules["torch"] = types.ModuleType("torch")  # which takes seconds to load, and has no part in this
sys.modules["torch"].Tensor = object
from model.images.decode import decode, fit

def highest():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def measure(content, pixels):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the mark begins again at what is held now
    before = highest()
    found = decode(content, 3, max_pixels=pixels, smallest=32)
    for how in ("resize", "crop", "pad"):
        fit(found, 32, 32, how)
    return (highest() - before) * 1024

first, *files = pickle.load(sys.stdin.buffer)
pixels = int(sys.argv[1])
measure(first, pixels)
print(*(measure(content, pixels) for content in files))
"""


def of_one_colour(size: tuple[int, int], bits: int, colour: int) -> bytes:
    row = bytes(1 + (size[0] * bits * SAMPLES[bits, colour] + 7) // 8)
    between = [chunk(b"PLTE", bytes(768))] if colour == 3 else []
    if colour in (0, 2, 3):
        between.append(chunk(b"tRNS", bytes(6 if colour == 2 else 2)))
    return png(size, bits, colour, row * size[1], *between)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Bytes that it takes at most to decode and to fit each file, above what the process had before."""
    files = {
        f"png of {bits} bits, type {colour}, {shape}": of_one_colour(SIZES[shape], bits, colour)
        for bits, colour in SAMPLES
        for shape in (SIZES if (bits, colour) == (16, 2) else ["column"])
    }
    rgb, rgba = (Image.new(mode, SIZES["square"], (200, 30, 30)) for mode in ("RGB", "RGBA"))
    files |= {
        "jpeg": saved(rgb, "JPEG"),
        "progressive jpeg": saved(rgb, "JPEG", progressive=True, subsampling=0),
        "jpeg of inks": saved(rgb.convert("CMYK"), "JPEG", progressive=True, subsampling=0),
        "jpeg at a fraction": saved(rgb.resize((2800, 2800)), "JPEG"),
        "progressive jpeg at a fraction": saved(rgb.resize((1000, 1000)), "JPEG", progressive=True, subsampling=0),
        "webp": saved(rgb, "WEBP"),
        "webp with transparency": saved(rgba, "WEBP", lossless=True),
        "gif": saved(rgb.convert("P"), "GIF"),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(PIXELS)],
        input=pickle.dumps([of_one_colour((8, 8), 8, 2), *files.values()]),
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},  # so that what is freed is given back at once
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(files, map(int, done.stdout.split()), strict=True))


def test_no_image_takes_more_than_is_promised(peaks):
    """One pixel wide and 16,777,216 high took 42 to 58 bytes of each."""
    over = {name: round(peak / PIXELS, 1) for name, peak in peaks.items() if peak > BYTES_PER_PIXEL * PIXELS + BASE}
    assert not over


def test_memory_is_measured(peaks):
    """Three bytes of the result and four of Pillow's are there at least."""
    assert all(peak > 4 * PIXELS for peak in peaks.values()), peaks
