"""Files to pixels. Files are untrusted: format, size and pixel count are checked before anything is decoded.

    bytes -> *format and size by the header* -> *decode the first frame* -> *turn upright* -> *flatten* -> pixels

Pillow's decoders raise almost any exception on a corrupt file; all become :class:`ImageError`.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.images.quiet import ignore_pillow_warnings

Fit = Literal["exact", "resize", "crop", "pad"]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_SCANS = 100  # of a JPEG; a scan of ten bytes costs a pass over all pixels
MAX_CHUNKS = 1 << 14  # of a PNG; a chunk of twelve bytes costs Pillow some microseconds
Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)


class ImageError(ValueError):
    """Bytes that cannot be read as an image; the message says why."""


class TooManyPixels(ImageError):
    """An image larger than allowed; it was not decoded."""


def decode(content: bytes, channels: int, background: Colour = BLACK, max_pixels: int | None = None) -> np.ndarray:
    """The first frame of a PNG, JPEG, WebP or GIF, upright and without transparency, as uint8 [H, W, C].

    Args:
        channels: 1 makes it grey, 3 RGB.
        background: RGB behind transparent pixels.
        max_pixels: None leaves Pillow's own limit.

    Raises:
        TooManyPixels: by the header; nothing has been decoded.
        ImageError: not an image, of another format, or corrupt.
    """
    _check_container(content, max_pixels)
    try:
        with ignore_pillow_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(image.size, max_pixels)
            return _pixels(image, channels, background)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels("it has far more pixels than allowed; make it smaller") from error
    except UnidentifiedImageError as error:
        raise ImageError("it is corrupt or unsupported") from error
    except Exception as error:
        raise ImageError(f"it is corrupt: {error}") from error


def read(path: Path, channels: int, background: Colour = BLACK) -> np.ndarray:
    """A trusted file of any format that Pillow reads, as :func:`decode` returns it.

    Raises:
        ImageError: it cannot be read; the message names it.
    """
    try:
        with ignore_pillow_warnings(), Image.open(path) as image:
            return _pixels(image, channels, background)
    except Exception as error:
        raise ImageError(f"{path}: {error}") from error


def fit(pixels: np.ndarray, height: int, width: int, how: Fit, background: Colour = BLACK) -> np.ndarray:
    """Bring uint8 [H, W, C] to [height, width, C].

    Args:
        how: ``exact`` accepts no other size; ``resize`` changes the aspect ratio; ``crop`` keeps it and cuts off the
            edges; ``pad`` keeps all of the image, centred on the background, never enlarged.

    Raises:
        ImageError: it has another size, and ``how`` is ``exact``.
    """
    h, w = pixels.shape[:2]
    if (h, w) == (height, width):
        return pixels
    if how == "exact":
        raise ImageError(f"it is {w}x{h}, the network's images are {width}x{height}")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if how == "crop":  # before resizing: enlarging all of an image one pixel wide could take any amount of memory
        ratio = max(width / w, height / h)
        across, down = max(1, round(width / ratio)), max(1, round(height / ratio))
        left, top = (w - across) // 2, (h - down) // 2
        image = image.crop((left, top, left + across, top + down))
    if how != "pad":
        image = _resize(image, width, height)
    else:
        ratio = min(1.0, width / w, height / h)
        image = _resize(image, max(1, round(w * ratio)), max(1, round(h * ratio)))
        page = Image.new("RGB", (width, height), background).convert(image.mode)
        page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = page
    return np.asarray(image).reshape(height, width, pixels.shape[-1])


def text_of(content: bytes) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        ImageError: not a PNG.
    """
    try:
        with ignore_pillow_warnings(), Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.load()
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except Exception as error:
        raise ImageError(f"it is no PNG: {error}") from error


def _pixels(image: Image.Image, channels: int, background: Colour) -> np.ndarray:
    image.load()
    flat = _flatten(_turn_upright(image), background).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(flat)
    return pixels[..., None] if channels == 1 else pixels


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    shrinks = width <= image.width and height <= image.height
    return image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)


def _check_container(content: bytes, max_pixels: int | None) -> None:
    """Refuse by its bytes what Pillow should not even open."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(content)
    elif content.startswith(b"\xff\xd8\xff"):
        if content.count(b"\xff\xda") > MAX_SCANS:
            raise ImageError(f"this JPEG has more than {MAX_SCANS} scans")
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        _check_pixels(_webp_size(content), max_pixels)  # Pillow allocates all pixels when it opens one
    elif content[:6] not in (b"GIF87a", b"GIF89a"):
        raise ImageError("it is not a PNG, JPEG, WebP or GIF" if content else "it is empty")
    if b"PK\x05\x06" in content[-(1 << 16) - 22 :]:  # where a .zip has its end record, before a comment of 64 KiB
        raise ImageError("it is also an archive")


def _check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixels(f"it has {width}x{height} pixels, at most {max_pixels} are allowed; make it smaller")


def _check_png(content: bytes) -> None:
    """Its chunks must fill the file to its end."""
    at = 8
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(content):
            raise ImageError("it is truncated")
        (length,) = struct.unpack_from(">I", content, at)
        kind, at = content[at + 4 : at + 8], at + 12 + length
        if kind == b"IEND":
            if at != len(content):
                raise ImageError(f"{len(content) - at} bytes of something else follow its end")
            return
    raise ImageError(f"this PNG has more than {MAX_CHUNKS} chunks")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649, section 2.5 to 2.7)."""
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


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply EXIF's orientation; none where EXIF is corrupt."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _flatten(image: Image.Image, background: Colour) -> Image.Image:
    """To grey or RGB of 8 bits, without transparency."""
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")
    return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits of grey; Pillow's own conversion clips them at 255."""
    values = np.asarray(image)
    levels = values.clip(0, 65535).astype(np.uint32)
    levels *= 255  # in place: new arrays would take several times the image's memory
    levels += 32767
    levels //= 65535
    grey = Image.fromarray(levels.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray((values != clear) * np.uint8(255)))
    return grey
