"""Images, tensors and files: the one home of Pillow."""

from model.images.container import NAMES, ImageError, TooManyPixels, is_image
from model.images.convert import from_uint8, sheet, to_uint8
from model.images.decode import Fit, decode, fit, read, text_of
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
    "from_uint8",
    "is_image",
    "jpeg",
    "png",
    "read",
    "sheet",
    "text_of",
    "to_uint8",
    "webp",
]
