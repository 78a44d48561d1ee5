"""Uploaded files: each is checked by its header before it is read, and refused by the name of its field."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from app.errors import ImageTooLarge, InvalidField
from app.errors.wording import Unquoted, word_fault
from app.operations.service import Service
from app.operations.threads import run_limited
from model import images
from model.checkpoint import Checkpoint
from model.images import Fit, ImageError, TooManyPixels

NPY_MAGIC = b"\x93NUMPY"
MAX_VALUE = 1e6  # of a latent's values; those of x_T rarely exceed 5


def is_file(content: bytes) -> bool:
    """Whether its first bytes are those of an image that is read, or of a .npy."""
    return content.startswith(NPY_MAGIC) or images.is_image(content)


@dataclass(frozen=True)
class FileReference:
    """A file that came with a request, by what tells it from others.

    Attributes:
        kind: the form of a latent that it is.
        size: bytes.
    """

    kind: Literal["image", "npy"]
    sha256: str
    size: int

    def as_json(self) -> dict[str, str | int]:
        return {"sha256": self.sha256, "bytes": self.size}


def refer(kind: Literal["image", "npy"], content: bytes) -> FileReference:
    """8 MB take some 20 ms, so call it off the event loop."""
    return FileReference(kind, hashlib.sha256(content).hexdigest(), len(content))


async def decode_image(service: Service, field: str, content: bytes, fit: Fit) -> Tensor:
    """An uploaded image at the network's size, float32 [C, H, W] in [-1, 1]; few are decoded at once.

    Raises:
        InvalidField: it is no image, or has another size.
        ImageTooLarge: it has too many pixels.
    """
    arguments = (service.model.checkpoint, service.settings.max_pixels, field, content, fit)
    return await run_limited(service.decoders, read_image, *arguments)


def read_image(checkpoint: Checkpoint, max_pixels: int, field: str, content: bytes, fit: Fit) -> Tensor:
    """:func:`decode_image` on the calling thread."""
    channels, height, width = checkpoint.shape
    size = Unquoted(f"{len(content)} bytes")
    try:
        smallest = None if fit == "exact" else max(height, width)
        pixels = images.decode(content, channels, checkpoint.background, max_pixels, smallest)
    except TooManyPixels as error:
        remedy = f"{error} (UNSTIR_MAX_PIXELS; the network sees {width}x{height})"
        raise ImageTooLarge(word_fault(field, size, remedy)) from error
    except ImageError as error:
        named = images.NAMES in str(error)
        raise InvalidField(field, size, f"{error}; send {'one of these' if named else f'a {images.NAMES}'}") from error
    try:
        pixels = images.fit(pixels, height, width, fit, checkpoint.background)
    except ImageError as error:
        raise InvalidField(field, size, f"{error}; send that size, or ask for fit resize, crop or pad") from error
    return images.from_uint8(pixels.copy())


def read_latent(shape: tuple[int, int, int], field: str, content: bytes) -> Tensor:
    """float32 [1 or 2, C, H, W] from a .npy, whose header is checked before a number is read.

    Raises:
        InvalidField: its shape, dtype, length or values do not fit.
    """
    wanted = f"a .npy of float32 {list(shape)}, or [2, {', '.join(map(str, shape))}] for the pair of obelm"
    size = Unquoted(f"{len(content)} bytes")
    try:
        found, fortran, dtype, offset = _npy_header(content)
    except Exception as error:  # numpy parses the header as Python, and raises whatever that raises
        raise InvalidField(field, size, f"its header cannot be read; send {wanted}") from error
    shown = Unquoted(f"{dtype} {list(found)}"[:80])
    if any(type(length) is not int for length in found):  # numpy takes True for 1, and reshapes to neither
        raise InvalidField(field, shown, f"its shape is not of integers; send {wanted}")
    if dtype.kind != "f" or found not in (shape, (1, *shape), (2, *shape)):
        raise InvalidField(field, shown, f"send {wanted}")
    if len(content) - offset != math.prod(found) * dtype.itemsize:
        raise InvalidField(field, size, f"its length is not what its header says; send {wanted}")
    numbers = np.frombuffer(content, dtype, offset=offset).reshape(found, order="F" if fortran else "C")
    with np.errstate(all="ignore"):  # values beyond float32 become infinite, and are refused as such
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all() or np.abs(numbers).max() > MAX_VALUE:
        raise InvalidField(
            field, size, f"it holds numbers that are not finite, or beyond ±{MAX_VALUE:g}; send {wanted}"
        )
    return torch.from_numpy(numbers.reshape(-1, *shape))


def _npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype, and where the numbers begin."""
    file = io.BytesIO(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
    return shape, fortran, dtype, file.tell()


def to_npy(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x.numpy())
    return buffer.getvalue()
