"""From what Pillow decoded to grey or RGB of 8 bits: 16 bits scaled, colours to sRGB, transparency over a background.

It is done a tile at a time, so that the memory beside the decoded image and the result does not depend on their size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageChops, ImageFile

from model.images.colour import Conversion, colours, to_srgb
from model.images.container import PNGHeader

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom
TILE = 1 << 16  # pixels


def flatten(
    image: Image.Image,
    channels: int,
    background: Colour,
    png: PNGHeader | None = None,
    lower: np.ndarray | None = None,
) -> np.ndarray:
    """A decoded image as uint8 [H, W, C], without transparency.

    Args:
        png: header of the file, where it is a PNG: Pillow loses bits of the colour that is to be transparent.
        lower: of :func:`opaque_by_lower_bytes`.
    """
    mask = _opacity(image, png, lower)
    convert = to_srgb(image)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for left, top, right, bottom in _tiles(*image.size):
        box = (left, top, right, bottom)
        tile = _flatten_tile(image.crop(box), mask and mask(box), convert, background)
        pixels[top:bottom, left:right] = np.asarray(tile.convert("L" if channels == 1 else "RGB")).reshape(
            bottom - top, right - left, channels
        )
    return pixels


def _tiles(width: int, height: int) -> Iterator[Box]:
    across = min(width, TILE)
    down = max(1, TILE // across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _flatten_tile(
    tile: Image.Image, alpha: Image.Image | None, convert: Conversion | None, background: Colour
) -> Image.Image:
    """L or RGB.

    Args:
        alpha: L, 0 where it is transparent, or None where the mode says what is.
    """
    if alpha is None and tile.has_transparency_data:
        tile = tile.convert("RGBA") if tile.mode not in ("LA", "RGBA") else tile
        alpha = tile.getchannel("A")
    if tile.mode.startswith("I"):
        tile = _to_eight_bits(tile)
    mode = colours(tile.mode) or "RGB"
    if tile.mode in ("LA", "RGBA"):
        bands = tile.split()[:-1]  # converting would do the same; of LA it would go by RGB
        tile = bands[0] if mode == "L" else Image.merge("RGB", bands)
    elif tile.mode != mode:
        tile.info.pop("transparency", None)
        tile = tile.convert(mode)
    if convert is not None:
        tile = convert(tile)
    elif mode == "CMYK":
        tile = tile.convert("RGB")
    if alpha is None:
        return tile
    return Image.composite(tile.convert("RGB"), Image.new("RGB", tile.size, background), alpha)


def _to_eight_bits(tile: Image.Image) -> Image.Image:
    """Scale 16 bits of grey; Pillow's own conversion clips them at 255."""
    levels = np.asarray(tile).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))


def _opacity(
    image: Image.Image, png: PNGHeader | None, lower: np.ndarray | None
) -> Callable[[Box], Image.Image] | None:
    """Of a tile: L, 0 where the image has the one colour that its file says is transparent, 255 elsewhere.

    A PNG names it in samples of its own depth. Pillow compares them to what it has scaled to 8 bits.
    """
    if png is None or png.colour not in (0, 2):
        return _opacity_by_key(image)
    image.info.pop("transparency", None)
    key = png.transparent_sample
    if key is None:
        return None
    if png.bits < 16:
        scaled = [level * 255 // ((1 << png.bits) - 1) for level in key]
        return lambda box: _differs(image.crop(box), scaled)
    if png.colour == 0:
        return lambda box: Image.fromarray((np.asarray(image.crop(box)) != key[0]) * np.uint8(255))
    upper = [level >> 8 for level in key]

    def differs(box: Box) -> Image.Image:
        found, (left, top, right, bottom) = _differs(image.crop(box), upper), box
        return found if lower is None else ImageChops.lighter(found, Image.fromarray(lower[top:bottom, left:right]))

    return differs


def _opacity_by_key(image: Image.Image) -> Callable[[Box], Image.Image] | None:
    """As Pillow has it of a GIF of greys, or of any file that is trusted."""
    key = image.info.get("transparency")
    if image.mode not in ("1", "L", "RGB") or isinstance(key, bytes) or key is None:
        return None
    del image.info["transparency"]
    levels = list(key) if isinstance(key, tuple) else [key]
    return lambda box: _differs(image.crop(box), levels)


def _differs(tile: Image.Image, levels: list[int]) -> Image.Image:
    """255 where any band of an image of 8 bits has another level than the given."""
    bands = tile.convert("L").split() if tile.mode == "1" else tile.split()
    first, *others = [
        band.point([255 * (i != level) for i in range(256)]) for band, level in zip(bands, levels, strict=True)
    ]
    for other in others:
        first = ImageChops.lighter(first, other)
    return first


def opaque_by_lower_bytes(png: PNGHeader, content: bytes) -> np.ndarray | None:
    """uint8 [H, W], 255 where the lower byte of any sample differs from that of the colour that is transparent.

    Pillow leaves these bytes of RGB of 16 bits out. Read as little-endian, they are the upper ones. It is a decoding
    of its own, to be done before the other, so that their memory is not needed at once.

    Returns:
        None where the file has no such bytes, or no transparency.
    """
    key = png.transparent_sample
    if png.bits != 16 or png.colour != 2 or key is None:
        return None
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        if not isinstance(image, ImageFile.ImageFile):
            raise TypeError("This is a bug: Pillow opened no file.")
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
        opaque, levels = np.empty((image.height, image.width), np.uint8), [level & 255 for level in key]
        for left, top, right, bottom in _tiles(*image.size):
            opaque[top:bottom, left:right] = np.asarray(_differs(image.crop((left, top, right, bottom)), levels))
    return opaque
