"""The GPU's part of docs/performance.md, from docs/performance/gpu.json, or from nothing but the networks' shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu import floor
from bench.gpu.claims import MAIN, NOT_YET, Parts, bandwidth_share, claims, rate_share, spread, work
from bench.gpu.floor import Work
from bench.gpu.networks import Network, measured, parameters
from bench.markdown import table

WHO = {"unstir": "Unstir", "diffusers": "diffusers", "compiled": "with torch.compile"}


def fields(gpu: dict[str, Any] | None) -> dict[str, str]:
    """What the template asks for under names that begin with ``gpu_``."""
    parts: Parts | None = None if gpu is None else gpu["parts"]
    known = parts or {}
    return {
        "gpu_card": _card(gpu),
        "gpu_claims": table(
            ("what", "asked", "measured", ""),
            (
                (each.what, each.asked, each.measured, "" if parts is None else "met" if each.met else "**not met**")
                for each in claims(parts)
            ),
        ),
        "gpu_forwards": table(
            (
                "network", "rows", "operations, G", "bytes, MB", "floor, ms", "forward, ms",
                "of the matmul rate", "of the bandwidth",
            ),
            (row for each in measured() for row in _forwards(each, known)),
        ),
        "gpu_images": table(
            ("network", "DDIM-50", "rows", "floor", *WHO.values()),
            (row for each in measured() for row in _images(each, known)),
        ),
        "gpu_more": "".join(f"\n\n{each}" for each in _more(known)),
    }  # fmt: skip


def _card(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return (
            f"**{NOT_YET.capitalize()}**: the figures below are what is asked for, and what can be said without a card."
        )
    found = gpu["circumstances"]
    names = ("driver", "cuda", "cudnn", "torch", "triton", "diffusers", "python")
    versions = ", ".join(f"{name} {found[name]}" for name in names if found.get(name))
    head = f"{found.get('card', 'No card: a ' + found['device'])}, {versions}."
    if "ceilings" in gpu["parts"] and "copy" in gpu["parts"]["ceilings"]:
        rate, bandwidth = _ceilings(gpu["parts"])
        head += f" Measured ceilings: {rate / 1e12:.0f}e12 operations a second of a bfloat16 product,"
        head += f" {bandwidth / 1e12:.2f}e12 bytes a second of a copy, read and written."
    return head + ("" if not gpu["tiny"] else " **Tiny networks: these figures mean nothing.**")


def _ceilings(parts: Parts) -> tuple[float, float]:
    found = parts["ceilings"]
    return found["matmul"]["operations_per_second"]["median"], found["copy"]["bytes_per_second"]["median"]


def _known(network: Network, parts: Parts) -> tuple[dict[str, Any], Work]:
    """What was found of it, and its work, which is known in any case."""
    found = parts.get(network.name, {})
    return found, work(found) if "row_operations" in found else floor.work(network.config)


def _floor(least: Work, width: int, parts: Parts) -> float | None:
    try:
        return least.seconds(width, *_ceilings(parts))
    except KeyError:
        return None


def _title(network: Network, found: dict[str, Any]) -> str:
    return f"{network.title}, {found.get('parameters', parameters(network.config)) / 1e6:.1f}M"


def _forwards(network: Network, parts: Parts) -> Iterable[Sequence[str]]:
    found, least = _known(network, parts)
    widths = [int(width) for width in found.get("forward", {})] or [1, network.max_width]
    for width in [width for width in widths if width.bit_count() == 1 or width == widths[-1]]:
        cells = [_title(network, found), str(width), f"{least.operations(width) / 1e9:,.1f}"]
        cells += [f"{least.bytes(width) / 1e6:,.1f}", _number(limit := _floor(least, width, parts), 1e3)]
        took = found.get("forward", {}).get(str(width), {}).get("median")
        of = (rate_share, bandwidth_share) if took and limit else ()
        shares = [_percent(share(found, width, parts["ceilings"])) for share in of] or [NOT_YET, NOT_YET]
        yield [*cells, _number(took, 1e3), *shares]


def _images(network: Network, parts: Parts) -> Iterable[Sequence[str]]:
    found, least = _known(network, parts)
    steps, widest = found.get("steps", 50), found.get("width", network.max_width)
    out = found.get("left_out", {})
    for kind, width, unit in (("latency", 1, "one, ms"), ("saturated", widest, "many, images a second")):
        seconds = found.get(kind, {}).get("seconds", {})
        limit = _floor(least, width, parts)
        cells = []
        for took in (limit and limit * steps, *(seconds.get(who, {}).get("median") for who in WHO)):
            cells.append(_number(took, 1e3) if kind == "latency" else _number(width / took if took else None, 1, 1))
        told = [
            cell if who not in out else f"left out: {out[who]}" for who, cell in zip(("", *WHO), cells, strict=True)
        ]
        yield [_title(network, found), unit, str(width), *told]


def _more(parts: Parts) -> Iterable[str]:
    """What else was found, where it was."""
    ticks = [(name, tick) for name, part in parts.items() for tick in part.get("tick", {}).values()]
    if ticks:
        yield "Ticks of the engine, of lanes that walk unlike numbers of steps, in turns with as many bare forwards:"
        rows = (
            (name, str(tick["width"]), *(spread(tick[what], 1e6, 0) for what in ("tick", "forward", "overhead")))
            for name, tick in ticks
        )
        yield table(("network", "rows", "tick, µs", "forward, µs", "beyond it, µs"), rows)
    if "numbers" in parts and "inversions" in parts["numbers"]:
        found = {**parts["numbers"]["samplers"]}
        found |= {f"{name} inverted": each for name, each in parts["numbers"]["inversions"].items()}
        yield "Largest difference of a number from the walk in float64 on the CPU, and how large rounding lets it be:"
        rows = ((n, str(f["steps"]), f"{f['error']:.2e}", f"{f['bound']:.2e}") for n, f in found.items())
        yield table(("walk, in float32", "steps", "difference", "bound"), rows)
    load = parts.get("served", {})
    if "share" in load:
        yield (
            f"Over HTTP {load['clients']} clients asked again as soon as they were answered, each for "
            f"{load['images_of_a_request']} images of as many steps as the mix has it (`{load['mix']}`); forwards "
            f"and rows were counted by the server for {load['seconds']:.0f} s in the midst of that."
        )
    price = parts.get("bits", {}).get("determinism")
    if price:
        yield (
            f"What the same bits cost: forwards in float32 of {price['width']} rows of {MAIN} take "
            f"{spread(price['price'])} times as long by deterministic algorithms as by whichever are fastest."
        )
    yield from _compiled(parts.get("inductor", {}))
    kernels = parts.get("kernels", {})
    if "kernels" in kernels:
        kinds = ", ".join(f"{name} {_percent(share)}" for name, share in kernels["kinds"].items())
        busy = _percent(kernels["busy_share"])
        yield f"Of a forward of {kernels['width']} rows of {MAIN}, {busy} is spent in kernels: {kinds}."
        rows = (
            (f"`{each['name'][:80]}`", f"{each['calls']:g}", _number(each["seconds"], 1e3), _percent(each["share"]))
            for each in kernels["kernels"][:12]
        )
        yield table(("kernel", "calls", "ms", "of the forward"), rows)
    for name, part in parts.items():
        for what in ("error", "left_out"):
            if isinstance(part.get(what), str):
                yield f"{name}: {part[what]}"


def _compiled(found: dict[str, Any]) -> Iterable[str]:
    each = {width: made for width, made in found.items() if isinstance(made, dict)}
    if each:
        yield f"A forward of {MAIN} as torch.compile makes it of torch's own operations, beside ours, both graphs:"
        rows = (
            (
                width,
                *(_number(made[who]["median"], 1e3) for who in ("compiled", "by_hand")),
                spread(made["times_as_long"]),
            )
            for width, made in each.items()
        )
        yield table(("rows", "torch.compile, ms", "by hand, ms", "times as long"), rows)


def _number(value: float | None, scale: float, digits: int = 3) -> str:
    return NOT_YET if value is None else f"{scale * value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return NOT_YET if share is None else f"{100 * share:.1f} %"
