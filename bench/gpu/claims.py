"""What the card was to show, and whether it did: each claim with its bound, from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bench.claims import Claim
from bench.gpu.floor import Work
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS

Parts = dict[str, dict[str, Any]]
NOT_YET = "not yet measured"
MAIN = "cifar10-32"  # the network of 35.7M parameters
NEEDED = ("tests", "ceilings", MAIN, "numbers", "bits", "start", "served")  # parts that claims are about
SECONDS = 480
LEAST_PSNR = 35.0  # dB


class Asked(NamedTuple):
    """One thing that is to be shown.

    Attributes:
        found: from what was measured, in words, and whether it is enough; raises KeyError where that is missing.
    """

    what: str
    asked: str
    found: Callable[[Parts], tuple[str, bool]]


def claims(parts: Parts | None) -> Iterator[Claim]:
    """All that is to be shown, in order; without figures, what is asked for."""
    for each in ASKED:
        if parts is None:
            yield Claim(each.what, each.asked, NOT_YET, False)
            continue
        try:
            yield Claim(each.what, each.asked, *each.found(parts))
        except KeyError:
            yield Claim(each.what, each.asked, "not measured", False)


def bandwidth_share(network: dict[str, Any], width: int, ceilings: dict[str, Any]) -> float:
    """Bytes a second of a forward, the fewest that it can move, over those of the copy."""
    bandwidth: float = ceilings["copy"]["bytes_per_second"]["median"]
    seconds: float = network["forward"][str(width)]["median"]
    return work(network).bytes(width) / seconds / bandwidth


def rate_share(network: dict[str, Any], width: int, ceilings: dict[str, Any]) -> float:
    """Operations a second of a forward, over those of the matrix product."""
    rate: float = ceilings["matmul"]["operations_per_second"]["median"]
    seconds: float = network["forward"][str(width)]["median"]
    return work(network).operations(width) / seconds / rate


def work(network: dict[str, Any]) -> Work:
    """Of the network that was measured."""
    return Work(network["row_operations"], network["row_bytes"], network["weight_bytes"])


def spread(found: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """Median and quartiles."""
    middle, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{middle} (quartiles {low} to {high})"


def _tests(parts: Parts) -> tuple[str, bool]:
    found = parts["tests"]
    bad = found["failed"] + found["errors"]
    return f"{bad} of {found['passed'] + bad} ({found['skipped']} skipped)", bad == 0 < found["passed"]


def _float32(parts: Parts) -> tuple[str, bool]:
    samplers, inversions = (parts["numbers"][kind] for kind in ("samplers", "inversions"))
    each = {name: samplers[name] for name in SAMPLERS}
    each |= {f"{name} inverted": inversions[name] for name in INVERSIONS}
    far = [name for name, found in each.items() if not found["within"]]
    worst = max(found["error"] / found["bound"] for found in each.values())
    return f"{', '.join(far) or 'none'} of {len(each)}; at most {worst:.2f} of the bound", not far


def _bfloat16(parts: Parts) -> tuple[str, bool]:
    found = parts["numbers"]["images"]
    least = found["fast"]["least"]
    return (
        f"{least:.1f} dB in {found['dtype']} (float32: {found['exact']['least']:.1f} dB)",
        least >= LEAST_PSNR and found["dtype"] == "bfloat16",
    )


def _bits(parts: Parts) -> tuple[str, bool]:
    found = parts["bits"]
    differing, compared = found["differing"], found["compared"]
    also = "" if found["control"] else "; which proves nothing, since no width changed any bits of fast forwards"
    return f"{len(differing)} of {compared}{also}", not differing and compared > 1 and found["control"]


def _faster(which: str, contestant: str, least: float) -> Callable[[Parts], tuple[str, bool]]:
    def found(parts: Parts) -> tuple[str, bool]:
        times = parts[MAIN][which]["times_faster"][contestant]
        return spread(times), times["median"] > least if least == 1 else times["median"] >= least

    return found


def _rate(parts: Parts) -> tuple[str, bool]:
    width = parts[MAIN]["width"]
    share = rate_share(parts[MAIN], width, parts["ceilings"])
    return f"{100 * share:.1f} % at width {width}", share >= 0.45


def _overhead(parts: Parts) -> tuple[str, bool]:
    tick = parts[MAIN]["tick"][str(parts[MAIN]["width"])]
    return f"{spread(tick['share'], 100)} % at width {tick['width']}", tick["share"]["median"] < 0.05


def _overhead_of_one(parts: Parts) -> tuple[str, bool]:
    tick = parts[MAIN]["tick"]["1"]
    return f"{spread(tick['overhead'], 1e6, 0)} µs", tick["overhead"]["median"] < 150e-6


def _served(parts: Parts) -> tuple[str, bool]:
    found = parts["served"]
    share, missing = found["share"], found["requests"] - found["answered"]
    return (
        f"{100 * share:.1f} % ({found['images_per_second']:.0f} and {found['bare_images_per_second']:.0f}"
        f" images a second; {missing} of {found['requests']} requests not answered)",
        share >= 0.9 and missing == 0,
    )


def _start(parts: Parts) -> tuple[str, bool]:
    found = parts["start"]
    first = found["first_seconds"]
    return f"{first:.0f} s ({found['again_seconds']:.0f} s the second time)", first < 60


def _in_time(parts: Parts) -> tuple[str, bool]:
    took = sum(part["took_seconds"] for part in ({name: parts[name] for name in NEEDED} | parts).values())
    short = [name for name, part in parts.items() if part.get("cut_short")]
    return f"{took:.0f} s" + (f"; cut short: {', '.join(short)}" if short else ""), took <= SECONDS and not short


ASKED = (
    Asked("tests of the CUDA path that fail", "0", _tests),
    Asked(
        "samplers and inversions in float32 that end farther from float64 on the CPU than rounding explains",
        "none",
        _float32,
    ),
    Asked(
        "PSNR of DDIM-50 images beside the CPU's in float32, the least of 16, shipped checkpoint",
        "≥ 35 dB",
        _bfloat16,
    ),
    Asked("the same reproducible walk in other company, slots and widths: results that differ in a bit", "0", _bits),
    Asked("DDIM-50, one image, 35.7M: times faster than diffusers", "≥ 5", _faster("latency", "diffusers", 5)),
    Asked("the same, than diffusers with torch.compile", "> 1", _faster("latency", "compiled", 1)),
    Asked("DDIM-50, as many as fit, 35.7M: times faster than diffusers", "≥ 2", _faster("saturated", "diffusers", 2)),
    Asked(
        "of the measured rate of bfloat16 matrix products, 35.7M, the widest forward",
        "≥ 45 %, or an account of the rest, by kernel",
        _rate,
    ),
    Asked("a tick beyond its forward, 35.7M, the widest, of the forward", "< 5 %", _overhead),
    Asked("a tick beyond its forward, 35.7M, one row", "< 150 µs", _overhead_of_one),
    Asked("mixed load over HTTP, 35.7M: of the bare loop's images a second at the same widths", "≥ 90 %", _served),
    Asked("from the command to a server that is ready, nothing kept from before, 35.7M", "< 60 s", _start),
    Asked("the whole check, nothing cut short", f"≤ {SECONDS} s", _in_time),
)
