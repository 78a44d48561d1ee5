"""Thousands of broken files into what reads uploads: ``python -m tests.fuzz_uploads --files 20000 --seed 0``.

Small good files of every kind are mutated and read. Each must be read or refused as an :class:`UnstirError`, within two
seconds, without a warning and without memory that grows. Whatever else happens is a finding, which is kept under
``--out`` under the name of what happened. The same seed makes the same files.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pi_heif
import pillow_heif
from PIL import Image, ImageCms

from app.errors import UnstirError
from app.operations import files
from model.images import Fit

CHECKPOINT: Any = SimpleNamespace(shape=(1, 8, 8), background=(255, 0, 0))
MAX_PIXELS = 1 << 20
SECONDS, MEGABYTES = 2.0, 200
HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 60000, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """The array as a .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """One of a PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colour: int, rows: bytes, *between: bytes, interlaced: bool = False) -> bytes:
    """A PNG by hand: what the header says, what stands between it and the pixels, and the rows before compression."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, interlaced))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + body


def adam7(grey: np.ndarray) -> bytes:
    """An interlaced PNG of uint8 [H, W]."""
    passes = [grey[y::down, x::across] for x, y, across, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    return png(grey.shape[::-1], 8, 0, rows, interlaced=True)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
pillow_heif.register_heif_opener()  # which can write HEIC; what reads it is registered again
pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
APART: dict[str, dict[str, Any]] = {"AVIF": {"speed": 10}, "HEIF": {"chroma": 444}}  # decoded in a process of their own


def corpus() -> list[bytes]:
    """Good files, one of each kind, and two that are refused."""
    rng = np.random.default_rng(0)
    grey, rgb, rgba = (Image.fromarray(rng.integers(0, 256, (8, 8, *c), np.uint8)) for c in ((), (3,), (4,)))
    palette = rgb.quantize(16)
    deep = Image.fromarray(rng.integers(0, 65536, (8, 8), np.uint16))
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)], "duration": 50}
    turned = Image.Exif()
    turned[0x0112] = 6
    numbers = rng.standard_normal((2, 1, 8, 8))
    archive = io.BytesIO()
    np.savez(archive, numbers)
    return [
        *(saved(image, "PNG") for image in (grey, rgb, rgba, deep, grey.convert("1"), rgba.convert("LA"))),
        saved(palette, "PNG", transparency=bytes(range(16))),
        saved(rgb, "PNG", exif=turned),
        saved(rgb, "PNG", **frames),
        adam7(np.asarray(grey)),
        png((8, 8), 16, 0, bytes(17 * 8), chunk(b"tRNS", b"\0\0"), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 99))),
        *(saved(image, "JPEG") for image in (grey, rgb, rgb.convert("CMYK"))),
        saved(rgb, "JPEG", progressive=True),
        saved(rgb, "JPEG", exif=turned),
        *(saved(image, "WEBP", lossless=lossless) for image in (rgb, rgba) for lossless in (False, True)),
        saved(rgb, "WEBP", exif=turned),
        saved(rgba, "WEBP", **frames),
        saved(palette, "GIF"),
        saved(palette, "GIF", transparency=3),
        saved(rgb, "GIF", **frames),
        png((8, 8), 16, 2, rng.bytes(49 * 8), chunk(b"tRNS", bytes(6))),
        png((8, 8), 2, 0, b"\0\x1b\xe4" * 8, chunk(b"tRNS", b"\0\1")),
        *(saved(rgb, form, icc_profile=SRGB) for form in ("PNG", "JPEG", "WEBP")),
        saved(rgb.convert("CMYK"), "JPEG", icc_profile=SRGB.replace(b"RGB ", b"CMYK", 1)),
        saved(rgb, "JPEG") + saved(grey, "JPEG"),
        saved(rgb.resize((1040, 1040)), "JPEG", quality=5),
        *(saved(image, form, **options) for image in (grey, rgb, rgba) for form, options in APART.items()),
        saved(rgb, "AVIF", **frames),
        saved(rgb, "HEIF", exif=turned.tobytes(), icc_profile=SRGB),
        *(npy(numbers[0].astype(kind)) for kind in ("f2", "<f4", ">f4", "f8", "g")),
        npy(numbers.astype("f4")),
        npy(np.asfortranarray(numbers)),
        npy(np.array([{"a": 1}], object)),
        archive.getvalue(),
    ]


def mutant(rng: random.Random, files: list[bytes]) -> bytes:
    """One of the files, changed in up to four ways."""
    content = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of the changes fall on what comes first: sizes, types, tables.
        end = len(content) if rng.random() < 0.5 else min(len(content), 64)
        at, length = rng.randrange(end + 1), rng.choice((1, 2, 4, 8, 16, 64))
        size = rng.choice((2, 4, 8))
        huge = (rng.choice(HUGE) % (1 << 8 * size)).to_bytes(size, rng.choice(("big", "little")))
        match rng.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + length] = rng.randbytes(length)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 100))
            case 5:
                other = rng.choice(files)
                begin = rng.randrange(len(other))
                content[at : at + rng.choice((0, length))] = other[begin : begin + length * rng.choice((1, 4, 100))]
            case 6:
                content[at:at] = huge
            case _:
                content[at : at + len(huge)] = huge
    if content.startswith(b"\x89PNG") and rng.random() < 0.8:
        return summed(bytes(content))
    return bytes(content)


def summed(content: bytes) -> bytes:
    """The PNG with right checksums, without which nearly all that is changed would be refused for them alone."""
    at, parts = 8, [content[:8]]
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if at + 12 + length > len(content):
            break
        parts.append(chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts) + content[at:]


def megabytes() -> int:
    """The most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def tried(content: bytes, as_latent: bool, fit: Any) -> tuple[bool, str]:
    """Whether it was accepted, and what was wrong with how it was read, in a word: "" if nothing."""
    before, began, accepted = megabytes(), time.perf_counter(), False
    # Recorded, not raised: as an error it would be caught as one of Pillow's many. What is silenced stays silent.
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", append=True)
        try:
            files.read_latent(CHECKPOINT.shape, "a", content) if as_latent else files.read_image(
                CHECKPOINT, MAX_PIXELS, "a", content, fit
            )
            accepted = True
        except UnstirError:
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return False, type(error).__name__
    if time.perf_counter() - began > SECONDS:
        return accepted, "slow"
    if megabytes() - before > MEGABYTES:
        return accepted, "memory"
    return accepted, warned[0].category.__name__ if warned else ""


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("findings"))
    asked = parser.parse_args()
    good, rng = corpus(), random.Random(asked.seed)
    for content in good:
        tried(content, content.startswith(files.NPY_MAGIC), "resize")
    accepted = findings = 0
    baseline, began = megabytes(), time.perf_counter()
    for i in range(asked.files):
        content = mutant(rng, good)
        as_latent = content.startswith(files.NPY_MAGIC) ^ (rng.random() < 0.02)
        fine, wrong = tried(content, as_latent, rng.choice(get_args(Fit)))
        if not wrong and megabytes() - baseline > MEGABYTES:
            wrong, baseline = "growth", megabytes()
        accepted += fine
        if wrong:
            findings += 1
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / f"{asked.seed}-{i}-{wrong}").write_bytes(content)
    seconds = time.perf_counter() - began
    print(
        f"{asked.files} files: {asked.files - accepted} refused, {accepted} accepted, {findings} findings; "
        f"{seconds:.1f} s, {asked.files / seconds:.0f} files/s"
    )
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
