"""What a file's bytes say before any decoder sees them: its kind, its size, and whether something else is in it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Kind = Literal["PNG", "JPEG", "WEBP", "GIF", "HEIF"]
NAMES = "PNG, JPEG, WebP, GIF, HEIC or AVIF"  # of the formats that are read, for messages
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIGNATURES: tuple[tuple[bytes, Kind], ...] = (
    (PNG_SIGNATURE, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
)
MAX_SCANS = 100  # of a JPEG; a scan of ten bytes costs a pass over all pixels
MAX_CHUNKS = 1 << 14  # of a PNG or segments of a JPEG; one of a few bytes costs some microseconds
ZIP_END = b"PK\x05\x06"
ARCHIVES = (
    b"Rar!\x1a\x07",
    b"7z\xbc\xaf\x27\x1c",
)  # readers look for them anywhere, as in programs that unpack themselves
MARKER = re.compile(rb"\xff+([\x02-\xcf\xd8-\xfe])")  # of a JPEG, but for those that stand within data or alone
SCAN, END, START = 0xDA, 0xD9, 0xD8
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers SOF0 to SOF15
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


class ImageError(ValueError):
    """Bytes that cannot be read as an image; the message says why."""


class TooManyPixels(ImageError):
    """An image larger than allowed; it was not decoded."""


@dataclass(frozen=True)
class PNGHeader:
    """
    Attributes:
        bits: of a sample.
        colour: 0 is grey, 2 RGB, 3 a palette, 4 grey with alpha, 6 RGBA.
        transparency: content of the tRNS chunk before the pixels; empty if there is none.
        animated: an acTL chunk is before the pixels.
    """

    size: tuple[int, int]
    bits: int
    colour: int
    transparency: bytes
    animated: bool

    @property
    def transparent_sample(self) -> list[int] | None:
        """The grey, or red, green and blue, that is transparent; None if no colour is.

        Its lower bits count, as many as a sample has (PNG, third edition, section 11.3.1.1).
        """
        count = {0: 1, 2: 3}.get(self.colour, 0)
        if not count or len(self.transparency) < 2 * count:
            return None
        return [level & ((1 << self.bits) - 1) for level in struct.unpack_from(f">{count}H", self.transparency)]


@dataclass(frozen=True)
class JPEGHeader:
    """
    Attributes:
        samples: of all components; 3 times the pixels without subsampling.
        buffered: a decoder holds all coefficients, since they come in several scans.
    """

    size: tuple[int, int]
    samples: int
    scans: int
    buffered: bool


def kind_of(content: bytes) -> Kind:
    """The format, by the first bytes; HEIF stands for HEIC and AVIF, which share a container.

    Raises:
        ImageError: none of those that are read.
    """
    for signature, kind in SIGNATURES:
        if content.startswith(signature):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[4:8] == b"ftyp":
        return "HEIF"
    raise ImageError(f"it is not a {NAMES}" if content else "it is empty")


def is_image(content: bytes) -> bool:
    """Whether it begins as one of the formats that are read."""
    try:
        return bool(kind_of(content))
    except ImageError:
        return False


def check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixels(f"it has {width}x{height} pixels, at most {max_pixels} are allowed; make it smaller")


def check_no_archive(content: bytes) -> None:
    """Refuse what an unpacker would open, too.

    JPEG and GIF may have anything behind their end, and cameras put there what is no image. A .zip has its end record
    in the last 64 KiB.
    """
    if ZIP_END in content[-(1 << 16) - 22 :] or any(signature in content for signature in ARCHIVES):
        raise ImageError("it is also an archive")


def read_png(content: bytes) -> PNGHeader:
    """Its chunks must fill the file to its end."""
    width = height = bits = colour = 0
    transparency, animated, before_pixels = b"", False, True
    for number, (kind, data) in enumerate(chunks(content)):
        if number == 0:
            if kind != b"IHDR" or len(data) != 13:
                raise ImageError("this PNG does not begin with its header")
            width, height, bits, colour = struct.unpack_from(">IIBB", data)
        before_pixels &= kind != b"IDAT"
        if kind == b"tRNS" and before_pixels:
            transparency = bytes(data)
        animated |= kind == b"acTL" and before_pixels
    return PNGHeader((width, height), bits, colour, transparency, animated)


def chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Name and data of each chunk of a PNG.

    Raises:
        ImageError: they do not fill it, or are too many.
    """
    at, view = len(PNG_SIGNATURE), memoryview(content)
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(content):
            raise ImageError("it is truncated")
        (length,) = struct.unpack_from(">I", content, at)
        kind, data = content[at + 4 : at + 8], view[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"IEND":
            if at != len(content):
                raise ImageError(f"{len(content) - at} bytes of something else follow its end")
            return
        yield kind, data
    raise ImageError(f"this PNG has more than {MAX_CHUNKS} chunks")


def read_jpeg(content: bytes) -> JPEGHeader:
    """Its frame and scans, up to its end; what is behind that is not looked at.

    Markers are found as libjpeg finds them (jdmarker.c, next_marker), so that both see the same scans.
    """
    frame: bytes = b""
    scans, buffered, at = 0, False, 2
    for _ in range(MAX_CHUNKS):
        found = MARKER.search(content, at)
        if found is None or found[1][0] == END:
            break
        marker, at = found[1][0], found.end()
        if marker == START:
            continue
        length = int.from_bytes(content[at : at + 2], "big")
        segment, at = content[at + 2 : at + length], at + max(length, 2)
        if marker in FRAMES and not frame:
            frame, buffered = segment, marker in PROGRESSIVE
        elif marker == SCAN:
            scans += 1
            buffered |= frame[5:6] != segment[:1]  # fewer components than the frame has: others follow
            if scans > MAX_SCANS:
                raise ImageError(f"this JPEG has more than {MAX_SCANS} scans")
    else:
        raise ImageError(f"this JPEG has more than {MAX_CHUNKS} segments")
    if len(frame) < 9 or not scans:
        raise ImageError("it is truncated")
    height, width, count = struct.unpack_from(">HHB", frame, 1)
    shares = [(factors >> 4) * (factors & 15) for factors in frame[7 : 7 + 3 * count : 3]]
    across = max(factors >> 4 for factors in frame[7 : 7 + 3 * count : 3])
    down = max(factors & 15 for factors in frame[7 : 7 + 3 * count : 3])
    samples = Fraction(width * height * sum(shares), max(across * down, 1))
    return JPEGHeader((width, height), int(samples), scans, buffered)


def read_webp(content: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649, section 2.5 to 2.7)."""
    (length,) = struct.unpack_from("<I", content, 4)
    if not length <= len(content) - 8 <= length + 1:
        raise ImageError("it is truncated" if length > len(content) - 8 else "something else follows its end")
    head = content[12:30].ljust(18, b"\0")
    match head[:4]:
        case b"VP8X":
            return int.from_bytes(head[12:15], "little") + 1, int.from_bytes(head[15:18], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(head[9:13], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(head[14:16], "little") & 0x3FFF, int.from_bytes(head[16:18], "little") & 0x3FFF
    raise ImageError("this WebP begins with neither VP8, VP8L nor VP8X")


def check_boxes(content: bytes) -> None:
    """The boxes of a HEIC or AVIF (ISO/IEC 14496-12, section 4.2) must fill the file to its end."""
    at = 0
    for _ in range(MAX_CHUNKS):
        if at == len(content):
            return
        head = content[at : at + 16].ljust(16, b"\0")
        length, smallest = int.from_bytes(head[:4], "big"), 8
        if length == 1:
            length, smallest = int.from_bytes(head[8:], "big"), 16
        elif length == 0:  # to the end of the file
            length = len(content) - at
        if length < smallest or length > len(content) - at:
            raise ImageError("it is truncated, or something else follows its end")
        at += length
    raise ImageError(f"it has more than {MAX_CHUNKS} boxes")
