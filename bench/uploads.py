"""Memory under uploads: the largest images that are allowed, in a row, and what the server's process holds of them.

``python -m bench.uploads`` starts a server of its own and prints its resident memory as it goes; it must not grow.
Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from app.settings import Settings
from bench.server import Served, server

EVERY = 20


def main() -> int:
    parser = argparse.ArgumentParser(description="Upload the largest allowed images in a row.")
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    settings = Settings()
    files = largest(settings.max_pixels, settings.max_body_bytes)
    for kind, content in files.items():
        print(f"{kind}: {len(content) / 2**20:.1f} MiB of {settings.max_pixels / 2**20:.0f} Mi pixels")
    with server("--log-level", "warning") as served:
        return measure(served, files, count)


def measure(served: Served, files: dict[str, bytes], count: int) -> int:
    held: dict[int, float] = {}
    with httpx.Client(base_url=served.base, timeout=600) as client:
        query = {"fit": "resize", "method": "ddim", "steps": "2", "check": "false"}
        for i in range(1, count + 1):
            kind = list(files)[i % len(files)]
            answer = client.post("/invert", params=query, content=files[kind], headers={"content-type": kind})
            answer.raise_for_status()
            if i % EVERY == 0:
                held[i] = resident(served.pid)
                print(f"after {i:4d} uploads: {held[i]:.0f} MiB", flush=True)
    growth = held[max(held)] / held[EVERY] - 1
    print(f"growth from {EVERY} to {max(held)} uploads: {100 * growth:+.1f} %")
    return 0 if growth <= 0.05 else 1


def largest(pixels: int, most_bytes: int) -> dict[str, bytes]:
    """Square images of every format, of all the pixels allowed and as many bytes as that format makes of them."""
    side = math.isqrt(pixels)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    opaque = Image.fromarray(noise // 64 * 64)
    clear = Image.fromarray(np.where(np.arange(side)[:, None, None] % 8, np.uint8(200), noise))
    clear.putalpha(Image.fromarray(noise[..., 0] // 128 * 128).resize((side, side)))
    options = {
        "image/jpeg": (opaque, [{"quality": quality} for quality in (60, 40, 20, 10, 5, 1)]),
        "image/png": (clear.quantize(16).convert("RGBA"), [{"compress_level": 6}]),
        "image/webp": (opaque.resize((side // 8, side // 8)).resize((side, side)), [{"quality": q} for q in (80, 20)]),
    }
    files = {}
    for kind, (image, tries) in options.items():
        for option in tries:
            buffer = io.BytesIO()
            image.save(buffer, kind.partition("/")[2].upper(), **option)
            if len(buffer.getvalue()) <= most_bytes:
                files[kind] = buffer.getvalue()
                break
    return files


def resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
