"""Pictures, tensors and files: the one home of Pillow."""

from model.pictures.convert import from_uint8, sheet, to_uint8
from model.pictures.decode import FITS, Fit, PictureError, TooManyPixels, decode, fit, read, text_of
from model.pictures.encode import ANIMATIONS, animation, jpeg, png, webp

__all__ = [
    "ANIMATIONS",
    "FITS",
    "Fit",
    "PictureError",
    "TooManyPixels",
    "animation",
    "decode",
    "fit",
    "from_uint8",
    "jpeg",
    "png",
    "read",
    "sheet",
    "text_of",
    "to_uint8",
    "webp",
]
