"""ICC profiles to sRGB, which networks are trained on and browsers show."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 1 << 22  # bytes; those of printers take up to some 3 MB, those of cameras and screens some kB
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the colour space that a profile says that it is for
SAME = 1  # levels; a profile that changes no colour by more is sRGB, which is left alone to the bit


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The conversion of the image's colours, as :func:`colours` has them, by the profile in it.

    Returns:
        None where there is nothing to do: no profile, that of sRGB, one for another kind of image, or a broken one.
    """
    profile, mode = image.info.get("icc_profile"), colours(image.mode)
    if not profile or mode is None or len(profile) > MAX_PROFILE:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if MODES.get(opened.profile.xcolor_space) != mode:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        return transform if _changes(transform, mode) else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def colours(mode: str) -> str | None:
    """What remains of a mode of Pillow without its transparency and above 8 bits: L, RGB or CMYK; None for others."""
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        return "L"
    if mode in ("RGB", "RGBA", "RGBX", "P", "PA"):
        return "RGB"
    return "CMYK" if mode == "CMYK" else None


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether any of some colours moves."""
    if mode == "CMYK":
        return True
    levels = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype=np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    found = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform))  # [1, n, 3]
    wanted = probe if mode == "RGB" else probe[..., None]
    return int(np.abs(found.astype(np.int16) - wanted).max()) > SAME
