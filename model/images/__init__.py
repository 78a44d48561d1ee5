"""Images, tensors and files: the one home of Pillow."""

from model.images.container import NAMES, ImageError, TooManyPixels, is_image
from model.images.convert import from_uint8, sheet, to_uint8
from model.images.decode import Fit, decode, fit, frames, is_animated, read, text_of
from model.images.encode import ANIMATIONS, animation, jpeg, png, webp

__all__ = [
    "ANIMATIONS",
    "NAMES",
    "Fit",
    "ImageError",
    "TooManyPixels",
    "animation",
    "decode",
    "fit",
    "frames",
    "from_uint8",
    "is_animated",
    "is_image",
    "jpeg",
    "png",
    "read",
    "sheet",
    "text_of",
    "to_uint8",
    "webp",
]
