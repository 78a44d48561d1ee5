"""Files to pixels. Nothing about a file is trusted: formats, sizes and pixels are counted before anything is decoded.

    bytes -> *format and size by the header* -> *decode the first frame* -> *turn upright* -> *flatten* -> pixels

Any error of Pillow's becomes a :class:`ImageError`; its decoders raise nearly anything on a broken file.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

Fit = Literal["exact", "resize", "crop", "pad"]
FITS: tuple[Fit, ...] = ("exact", "resize", "crop", "pad")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_SCANS = 100  # of a JPEG; each costs a pass over all its pixels, and can be had for ten bytes
MOST_CHUNKS = 1 << 14  # of a PNG; Pillow takes some microseconds for each, and twelve bytes make one
Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)


# Pillow warns of each broken EXIF entry, with numbers out of the file: that would be a line of the log for each of
# thousands of entries, and Python remembers every such text for ever. What is wrong with a file, the answer says.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """Bytes that cannot be had as an image; the message says why."""


class TooManyPixels(ImageError):
    """An image that is larger than allowed; it was not decoded."""


def decode(content: bytes, channels: int, background: Colour = BLACK, max_pixels: int | None = None) -> np.ndarray:
    """The first frame of a PNG, JPEG, WebP or GIF, upright and without transparency, as uint8 [H, W, C].

    Args:
        channels: 1 makes it grey, 3 RGB.
        background: RGB behind what is transparent.
        max_pixels: None sets no limit of ours.

    Raises:
        TooManyPixels: by the header; nothing has been decoded.
        ImageError: anything else.
    """
    _check_container(content, max_pixels)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(image.size, max_pixels)
            return _pixels(image, channels, background)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels("it has far more pixels than are taken; make it smaller") from error
    except UnidentifiedImageError as error:
        raise ImageError("it begins as an image, but is none") from error
    except Exception as error:
        raise ImageError(f"it is broken: {error}") from error


def read(path: Path, channels: int, background: Colour = BLACK) -> np.ndarray:
    """A file of our own, of any kind that Pillow knows, in the form that :func:`decode` gives.

    Raises:
        ImageError: it cannot be read; the message names it.
    """
    try:
        with Image.open(path) as image:
            return _pixels(image, channels, background)
    except Exception as error:
        raise ImageError(f"{path}: {error}") from error


def fit(pixels: np.ndarray, height: int, width: int, how: Fit, background: Colour = BLACK) -> np.ndarray:
    """Bring uint8 [H, W, C] to [height, width, C].

    Args:
        how: ``exact`` takes no other size; ``resize`` stretches; ``crop`` fills the frame and cuts off what stands out;
            ``pad`` shows all of the image in the middle of the background, never enlarged.

    Raises:
        ImageError: it has another size, and ``how`` is ``exact``.
    """
    h, w = pixels.shape[:2]
    if (h, w) == (height, width):
        return pixels
    if how == "exact":
        raise ImageError(f"it is {w}x{h}, the network's images are {width}x{height}")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if how == "crop":  # cut before it is resized: of an image one pixel wide, whole and enlarged, there is no end
        ratio = max(width / w, height / h)
        across, down = max(1, round(width / ratio)), max(1, round(height / ratio))
        left, top = (w - across) // 2, (h - down) // 2
        image = image.crop((left, top, left + across, top + down))
    if how != "pad":
        image = _resized(image, width, height)
    else:
        ratio = min(1.0, width / w, height / h)
        image = _resized(image, max(1, round(w * ratio)), max(1, round(h * ratio)))
        page = Image.new("RGB", (width, height), background).convert(image.mode)
        page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = page
    return np.asarray(image).reshape(height, width, pixels.shape[-1])


def text_of(content: bytes) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        ImageError: it is none.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.load()
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except Exception as error:
        raise ImageError(f"it is no PNG: {error}") from error


def _pixels(image: Image.Image, channels: int, background: Colour) -> np.ndarray:
    image.load()
    flat = _flat(_upright(image), background).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(flat)
    return pixels[..., None] if channels == 1 else pixels


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    shrinks = width <= image.width and height <= image.height
    return image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)


def _check_container(content: bytes, max_pixels: int | None) -> None:
    """Refuse, by a look at the bytes alone, what Pillow should not even open."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(content)
    elif content.startswith(b"\xff\xd8\xff"):
        if content.count(b"\xff\xda") > MOST_SCANS:
            raise ImageError(f"this JPEG has more than {MOST_SCANS} scans")
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        _check_pixels(_webp_size(content), max_pixels)  # Pillow makes room for all pixels as it opens one
    elif content[:6] not in (b"GIF87a", b"GIF89a"):
        raise ImageError("it does not begin as an image does" if content else "it is empty")
    if b"PK\x05\x06" in content[-(1 << 16) - 22 :]:  # where a .zip has its end record, before a comment of 64 KiB
        raise ImageError("it is an archive, too")


def _check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixels(f"it has {width}x{height} pixels, at most {max_pixels} are taken; make it smaller")


def _check_png(content: bytes) -> None:
    """Its chunks must follow each other to the very end of the file."""
    at = 8
    for _ in range(MOST_CHUNKS):
        if at + 12 > len(content):
            raise ImageError("it is truncated")
        (length,) = struct.unpack_from(">I", content, at)
        kind, at = content[at + 4 : at + 8], at + 12 + length
        if kind == b"IEND":
            if at != len(content):
                raise ImageError(f"{len(content) - at} bytes of something else follow its end")
            return
    raise ImageError(f"this PNG has more than {MOST_CHUNKS} chunks")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Of the canvas (RFC 9649, section 2.5 to 2.7)."""
    (length,) = struct.unpack_from("<I", content, 4)
    if not length <= len(content) - 8 <= length + 1:
        raise ImageError("it is truncated" if length > len(content) - 8 else "something else follows its end")
    head = content[12:30].ljust(18, b"\0")
    match head[:4]:
        case b"VP8X":
            return int.from_bytes(head[12:15], "little") + 1, int.from_bytes(head[15:18], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(head[9:13], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(head[14:16], "little") & 0x3FFF, int.from_bytes(head[16:18], "little") & 0x3FFF
    raise ImageError("this WebP begins with neither VP8, VP8L nor VP8X")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; where EXIF is broken, as it lies."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _flat(image: Image.Image, background: Colour) -> Image.Image:
    """Without transparency, grey or RGB of 8 bits."""
    if image.mode.startswith("I"):
        image = _of_eight_bits(image)
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB")


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, scaled; Pillow's own conversion would cut them off at 255."""
    values = np.asarray(image)
    levels = values.clip(0, 65535).astype(np.uint32)
    levels *= 255  # in place: an array for each step would be several times the image
    levels += 32767
    levels //= 65535
    grey = Image.fromarray(levels.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray((values != clear) * np.uint8(255)))
    return grey
