"""ICC profiles to sRGB, which networks are trained on and browsers show."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

Conversion = Callable[[Image.Image], Image.Image]
MAX_PROFILE = 1 << 22  # bytes; those of printers take up to some 3 MB, those of cameras and screens some kB
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the colour space that a profile says that it is for
SAME = 1  # levels; a profile that changes no colour by more is sRGB, which is left alone to the bit


def to_srgb(image: Image.Image) -> Conversion | None:
    """The conversion of the image's colours, by the profile in it.

    Returns:
        A function of a tile in the mode of :func:`colours`. None where there is nothing to do: no profile, that of
        sRGB, one for another kind of image, or a broken one.
    """
    profile, mode = image.info.get("icc_profile"), colours(image.mode)
    if not profile or mode is None or len(profile) > MAX_PROFILE:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if MODES.get(opened.profile.xcolor_space) != mode:
            return None
        return _conversion(opened, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _conversion(profile: ImageCms.ImageCmsProfile, mode: str) -> Conversion | None:
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # which is coarse where greys are dark
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)

    def convert(tile: Image.Image) -> Image.Image:
        return ImageCms.applyTransform(tile, transform) or tile

    if mode == "L":
        levels = np.arange(256, dtype=np.uint8)
        table = np.asarray(convert(Image.fromarray(levels[None])).convert("L"))[0]
        return None if _near(table, levels) else lambda tile: tile.point(table.tolist())
    if mode == "RGB":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        some = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        return None if _near(np.asarray(convert(Image.fromarray(some))), some) else convert
    return convert


def _near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return int(np.abs(found.astype(np.int16) - wanted).max()) <= SAME


def colours(mode: str) -> str | None:
    """What remains of a mode of Pillow without its transparency and above 8 bits: L, RGB or CMYK; None for others."""
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        return "L"
    if mode in ("RGB", "RGBA", "RGBX", "P", "PA"):
        return "RGB"
    return "CMYK" if mode == "CMYK" else None
