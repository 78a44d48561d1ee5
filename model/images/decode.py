"""Files to pixels. Files are untrusted: format, size and pixel count are checked before anything is decoded.

    bytes -> *format and size by the header* -> *decode the first frame* -> *to sRGB, flatten* -> *turn* -> pixels

Pillow's decoders raise almost any exception on a corrupt file; all become :class:`ImageError`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pi_heif
from PIL import Image, ImageSequence, UnidentifiedImageError

from model.images import container
from model.images.apart import decode_apart
from model.images.container import ImageError, JPEGHeader, PNGHeader, TooManyPixels, check_pixels
from model.images.flatten import Colour, flatten, opaque_by_lower_bytes
from model.images.quiet import ignore_pillow_warnings

Fit = Literal["exact", "resize", "crop", "pad"]
BLACK: Colour = (0, 0, 0)
FRACTIONS = (1, 2, 4, 8)  # of which a JPEG can be decoded to one
BYTES_PER_PIXEL = 18  # of max_pixels, at most, that decoding takes
DECODED_BYTES = 7  # per pixel: four of Pillow's, three of the result
COEFFICIENT_BYTES = 2  # per sample of a JPEG of several scans, at whatever fraction it is decoded
MAX_SIDE = 1 << 16  # pixels, of what is resized in one go, since that takes a weight for each pixel of a side
ORIENTATION = 0x0112  # of EXIF
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # of [H, W, C], by orientation
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}

pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)  # for trusted files


def decode(
    content: bytes,
    channels: int,
    background: Colour = BLACK,
    max_pixels: int | None = None,
    smallest: int | None = None,
) -> np.ndarray:
    """The first frame of a PNG, JPEG, WebP, GIF, HEIC or AVIF, upright, in sRGB, without transparency: uint8 [H, W, C].

    Args:
        channels: 1 makes it grey, 3 RGB.
        background: RGB behind transparent pixels.
        max_pixels: None leaves Pillow's own limit.
        smallest: a JPEG beyond ``max_pixels`` is decoded to a half, a quarter or an eighth of its width and height,
            by its coefficients, where that is within the limit and no side falls below so many pixels. None decodes
            whole images only.

    Raises:
        TooManyPixels: by the header; nothing has been decoded.
        ImageError: not an image, of another format, or corrupt.
    """
    try:
        with ignore_pillow_warnings():
            return _decode(content, channels, background, max_pixels, smallest)
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
        content = path.read_bytes()
        png = container.read_png(content) if content.startswith(container.PNG_SIGNATURE) else None
        with ignore_pillow_warnings(), Image.open(io.BytesIO(content)) as image:
            return _pixels(image, channels, background, png, content)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: it is no image") from error
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


def is_animated(content: bytes) -> bool:
    """Whether a PNG is an animation.

    Raises:
        ImageError: not a PNG, or of bytes that its chunks do not account for.
    """
    return container.read_png(content).animated


def frames(content: bytes) -> list[np.ndarray]:
    """Each frame of a trusted PNG, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def _decode(
    content: bytes, channels: int, background: Colour, max_pixels: int | None, smallest: int | None
) -> np.ndarray:
    kind = container.kind_of(content)
    if kind == "HEIF":
        container.check_boxes(content)
        container.check_no_archive(content)
        return _decode_heif(content, channels, background, max_pixels)
    if kind == "WEBP":
        check_pixels(container.read_webp(content), max_pixels)  # Pillow allocates all pixels when it opens one
    png = container.read_png(content) if kind == "PNG" else None
    jpeg = container.read_jpeg(content) if kind == "JPEG" else None
    container.check_no_archive(content)
    with Image.open(io.BytesIO(content), formats=(kind,)) as image:
        if jpeg is not None:
            _choose_fraction(image, jpeg, max_pixels, smallest)
        check_pixels(image.size, max_pixels)
        return _pixels(image, channels, background, png, content)


def _choose_fraction(image: Image.Image, header: JPEGHeader, max_pixels: int | None, smallest: int | None) -> None:
    """Let Pillow decode to the largest fraction that stays within memory.

    Raises:
        TooManyPixels: there is none.
    """
    if max_pixels is None:
        return
    (width, height), held = image.size, COEFFICIENT_BYTES * header.samples * header.buffered
    few_enough = False
    for fraction in FRACTIONS if smallest else FRACTIONS[:1]:
        across, down = -(-width // fraction), -(-height // fraction)
        if fraction > 1 and min(across, down) < (smallest or 1):
            break
        few_enough = across * down <= max_pixels
        if few_enough and held + DECODED_BYTES * across * down <= BYTES_PER_PIXEL * max_pixels:
            if fraction > 1:
                image.draft("", (width // fraction, height // fraction))
            return
    if few_enough:
        raise TooManyPixels(
            f"it has {width}x{height} pixels in several scans, too much memory; save it as baseline JPEG"
        )
    check_pixels((width, height), max_pixels)


def _decode_heif(content: bytes, channels: int, background: Colour, max_pixels: int | None) -> np.ndarray:
    facts, profile, buffer = decode_apart(content, max_pixels)
    if "too_large" in facts:
        check_pixels(facts["too_large"], max_pixels)
    if "error" in facts:
        raise ImageError(facts["error"])
    mode = facts["mode"]
    image = Image.frombuffer(mode, tuple(facts["size"]), buffer, "raw", mode, 0, 1)
    image.info["icc_profile"] = profile
    return _turn_upright(flatten(image, channels, background), facts["orientation"])


def _pixels(image: Image.Image, channels: int, background: Colour, png: PNGHeader | None, content: bytes) -> np.ndarray:
    lower = opaque_by_lower_bytes(png, content) if png else None
    image.load()
    return _turn_upright(flatten(image, channels, background, png, lower), _orientation(image))


def _orientation(image: Image.Image) -> Any:
    """By EXIF; None where that is corrupt."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:
        return None


def _turn_upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """A view of [H, W, C], turned as EXIF says; as it is where it says nothing that is known."""
    return TURNS[orientation](pixels) if orientation in TURNS else pixels


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    shrinks = width <= image.width and height <= image.height
    if max(image.size) > MAX_SIDE:
        image = image.reduce((-(-image.width // MAX_SIDE), -(-image.height // MAX_SIDE)))
    return image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
