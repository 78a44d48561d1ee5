"""What clients send as files: each is measured before it is read, and refused by the name of its field."""

from __future__ import annotations

import asyncio
import io
import math

import anyio
import numpy as np
import torch
from torch import Tensor

from app.errors import ImageTooLarge, InvalidField
from app.operations.service import Service
from model import images
from model.images import Fit, ImageError, TooManyPixels

NPY_MAGIC = b"\x93NUMPY"
LARGEST = 1e6  # of a latent's values; those of x_T rarely exceed 5


async def image(service: Service, name: str, content: bytes, fit: Fit) -> Tensor:
    """An image of the network's size, float32 [C, H, W] in [-1, 1].

    Few are decoded at once, whoever sends them: each may take some 300 MB while it lasts.

    Raises:
        InvalidField: it is none, or has another size.
        ImageTooLarge: it has too many pixels.
    """
    place = object()
    await service.decoders.acquire_on_behalf_of(place)
    decoding = asyncio.ensure_future(anyio.to_thread.run_sync(read_image, service, name, content, fit))

    def leave(done: asyncio.Future[Tensor]) -> None:
        service.decoders.release_on_behalf_of(place)
        _ = done.cancelled() or done.exception()  # whoever asked may be gone

    decoding.add_done_callback(leave)
    # A thread cannot be stopped: if the client goes, the place is taken until it is done.
    return await asyncio.shield(decoding)


def read_image(service: Service, name: str, content: bytes, fit: Fit) -> Tensor:
    """:func:`image`, on the thread that calls it."""
    channels, height, width = service.checkpoint.shape
    background = service.checkpoint.background
    told = f"{len(content)} bytes"
    try:
        pixels = images.decode(content, channels, background, service.settings.max_pixels)
    except TooManyPixels as error:
        raise ImageTooLarge(f"{name} = {told}: {error}") from error
    except ImageError as error:
        raise InvalidField(name, told, f"{error}; send a PNG, JPEG, WebP or GIF") from error
    try:
        pixels = images.fit(pixels, height, width, fit, background)
    except ImageError as error:
        raise InvalidField(name, told, f"{error}; send that size, or ask for fit resize, crop or pad") from error
    return images.from_uint8(pixels.copy())


def latent(service: Service, name: str, content: bytes) -> Tensor:
    """float32 [1 or 2, C, H, W] out of a .npy, whose header must promise just that before a number is read.

    Raises:
        InvalidField: it does not, or its numbers are none.
    """
    shape = service.checkpoint.shape
    wanted = f"a .npy of float32 {list(shape)}, or [2, {', '.join(map(str, shape))}] for the pair of obelm"
    told = f"{len(content)} bytes"
    try:
        found, fortran, dtype, offset = _npy_header(content)
    except Exception as error:  # numpy parses the header as Python, and raises whatever comes of it
        raise InvalidField(name, told, f"its header cannot be read; send {wanted}") from error
    if dtype.kind != "f" or found not in (shape, (1, *shape), (2, *shape)):
        raise InvalidField(name, f"{dtype} {list(found)}", f"send {wanted}")
    if len(content) - offset != math.prod(found) * dtype.itemsize:
        raise InvalidField(name, told, f"its length is not what its header says; send {wanted}")
    numbers = np.frombuffer(content, dtype, offset=offset).reshape(found, order="F" if fortran else "C")
    with np.errstate(all="ignore"):  # what is beyond float32 becomes infinite, and is refused as that
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all() or np.abs(numbers).max() > LARGEST:
        raise InvalidField(name, told, f"it holds numbers that are not finite, or beyond ±{LARGEST:g}; send {wanted}")
    return torch.from_numpy(numbers.reshape(-1, *shape))


def _npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype, and where the numbers begin."""
    file = io.BytesIO(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
    return shape, fortran, dtype, file.tell()


def npy(x: Tensor) -> bytes:
    """The tensor as a .npy."""
    buffer = io.BytesIO()
    np.save(buffer, x.numpy())
    return buffer.getvalue()
