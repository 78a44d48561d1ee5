"""HEIC and AVIF, decoded in a process of their own whose memory and time are bounded.

Their size in pixels stands in the container and again in the video stream, which may have another, and a decoder
allocates by the stream. So the bound is the operating system's. This file is also that process: it imports nothing of
ours, to start in a moment.

    file -> *standard input* -> child decodes -> *standard output* -> mode, size, orientation, profile, pixels
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

SECONDS = 20  # of processor time
BASE_BYTES = 256 << 20  # of address space: the interpreter, its libraries and a thread; of which some 40 MB are used
BYTES_PER_PIXEL = 24  # of address space; 12 bits with transparency take some 16
FORMATS = ("AVIF", "HEIF")


def decode_apart(content: bytes, max_pixels: int | None) -> tuple[dict[str, Any], bytes, bytearray]:
    """Facts, ICC profile (empty if there is none) and pixels of its first image.

    Returns:
        The facts are ``size`` and ``mode`` of Pillow and ``orientation`` of EXIF; or ``too_large``, the size alone, or
        ``error``, a reason.
    """
    most = BASE_BYTES + BYTES_PER_PIXEL * max_pixels if max_pixels else 0
    command = [sys.executable, "-I", __file__, json.dumps(sys.path), str(max_pixels or 0), str(most)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(content)
            child.stdin.close()
        except BrokenPipeError:
            pass  # it ended early; what it has to say, it has said
        facts = _read_facts(child.stdout)
        profile = child.stdout.read(facts.get("profile", 0))
        pixels = bytearray(facts.get("bytes", 0))
        if len(profile) < facts.get("profile", 0) or _fill(child.stdout, pixels) < len(pixels):
            facts = {"error": "it takes too much memory or time to decode"}
    return facts, profile, pixels


def _read_facts(file: IO[bytes]) -> dict[str, Any]:
    line = file.readline()
    return dict(json.loads(line)) if line.endswith(b"\n") else {"error": "it takes too much memory or time to decode"}


def _fill(file: IO[bytes], buffer: bytearray) -> int:
    """How much of the buffer could be filled."""
    view, filled = memoryview(buffer), 0
    while filled < len(buffer) and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    return filled


def _limit(most_bytes: int) -> None:
    """Bound time and memory of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if most_bytes:
        with contextlib.suppress(ValueError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def _child(max_pixels: int, most_bytes: int) -> None:
    _limit(most_bytes)
    import io  # noqa: PLC0415 - only the process needs them, and within its limits

    import pi_heif  # noqa: PLC0415
    from PIL import AvifImagePlugin, Image  # noqa: PLC0415

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each takes a stack, and frames of its own
    pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    Image.MAX_IMAGE_PIXELS = None  # it is checked here, with a message
    with Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=FORMATS) as image:
        if max_pixels and image.width * image.height > max_pixels:
            return _answer({"too_large": image.size})
        image.load()
        if max_pixels and image.width * image.height > max_pixels:  # libheif goes by the stream
            return _answer({"too_large": image.size})
        orientation = _orientation(image)
        profile = image.info.get("icc_profile") or b""
        facts = {"size": image.size, "mode": image.mode, "orientation": orientation, "profile": len(profile)}
        pixels = image.tobytes()
        return _answer(facts | {"bytes": len(pixels)}, profile, pixels)


def _orientation(image: Any) -> int | None:
    try:
        found = image.getexif().get(0x0112)
    except Exception:
        return None
    return found if isinstance(found, int) else None


def _answer(facts: dict[str, Any], *parts: bytes) -> None:
    sys.stdout.buffer.write(json.dumps(facts).encode() + b"\n")
    for part in parts:
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


def main(arguments: Sequence[str]) -> None:
    """Decode standard input to standard output."""
    sys.path[:] = json.loads(arguments[0])
    try:
        _child(*map(int, arguments[1:]))
    except BaseException as error:
        reason = "it is corrupt or unsupported" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        _answer({"error": f"it is corrupt: {reason}" if reason == str(error) else reason})
    os._exit(0)  # decoders' threads and destructors are not waited for


if __name__ == "__main__":
    main(sys.argv[1:])
