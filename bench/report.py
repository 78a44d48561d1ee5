"""docs/performance.md and its image, rendered from the raw figures in docs/performance/."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from string import Template
from typing import Any

from app.cli.mix import Mix
from bench.gpu.floor import Work
from bench.peers.run import pool
from bench.peers.servers import PEERS
from model.evaluation.markdown import table

Parts = dict[str, dict[str, Any]]  # raw figures by the file that has them
TEMPLATE = Path(__file__).with_name("performance.template.md")
WHO = {"unstir": "Unstir", "diffusers": "diffusers", "compiled": "diffusers, torch.compile"}


def page(parts: Parts) -> str:
    peers, side, mixed, engine = parts["peers"], parts["side"], parts["side-mixed"], parts["engine"]
    loads = [each["load_average"] for each in peers["runs"]]
    repeats = 1 + max(run["repeat"] for run in peers["runs"])
    fields = {
        "cores": peers["cores"],
        "checkpoint": peers["checkpoint"],
        "mix": ", ".join(f"{steps} ({_percent(share)})" for steps, share in Mix.parse(peers["mix"]).weights.items()),
        "rate": _range(round(each, 2) for each in peers["requests_per_second"]),
        "seconds": ", ".join(f"{seconds:g} s at {_percent(load)}" for load, seconds in peers["seconds"].items()),
        "repeats": repeats,
        "mixed": _mixed(peers),
        **{name: side[name] for name in ("starts", "rounds")},
        "turn_seconds": f"{side['turn_seconds']:g}",
        "side": _side(side),
        "mix_text": mixed["mix"],
        "mixed_starts": mixed["starts"],
        "mixed_rounds": mixed["rounds"],
        "side_mixed": _side(mixed),
        "turns": parts["saturation"]["share"]["repeats"],
        "saturation": _saturation(parts["saturation"]),
        "alone_steps": parts["alone"]["steps"],
        "alone_repeats": parts["alone"]["repeats"],
        "alone": _alone(parts["alone"]),
        **{f"engine_{name}": engine[name] for name in ("checkpoint", "dtype", "threads")},
        "engine": _engine(engine),
        "gpu": gpu_section(parts.get("gpu")),
        "versions": ", ".join(f"{name} {version}" for name, version in peers["versions"].items()),
        "load_low": f"{min(loads):.2f}",
        "load_high": f"{max(loads):.2f}",
        "load_median": f"{statistics.median(loads):.2f}",
        "load_others": ", ".join(f"{n} {p['load_average']:.2f}" for n, p in parts.items() if "load_average" in p),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields)


def draw(peers: dict[str, Any], path: Path) -> None:
    """The cumulative distribution of slowdown, one panel for each load."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second

    servers = pool(peers)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, len(peers["seconds"]), sharey=True, squeeze=False)[0]
    for axes, load in zip(panels, peers["seconds"], strict=True):
        for i, (name, loads) in enumerate(servers.items()):
            if load in loads:
                values = loads[load]["slowdowns"]
                shares = [(k + 1) / len(values) for k in range(len(values))]
                axes.step(values, shares, where="post", color=f"C{i}", linewidth=1.8, label=PEERS[name].title)
        axes.set(xscale="log", xlabel="slowdown", ylim=(0, 1.01), title=f"{_percent(load)} of capacity")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of requests")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _mixed(peers: dict[str, Any]) -> str:
    classes, servers = Mix.parse(peers["mix"]).steps, pool(peers)
    rows = []
    for load in peers["seconds"]:
        for name, found in ((name, loads[load]) for name, loads in servers.items() if load in loads):
            missed = [f"{count} {what}" for what, count in found["outcomes"].items() if count and what != "ok"]
            rows.append(
                (
                    _percent(load),
                    PEERS[name].title,
                    *(f"{found['slowdown'][key]:.2f}" for key in ("mean", "p95", "p99")),
                    *(f"{found['latency'][str(steps)]['p95']:.2f}" for steps in classes),
                    " ".join(f"{mean:.2f}" for mean in found["mean_slowdown_by_repeat"]),
                    found["outcomes"]["ok"],
                    ", ".join(missed) or 0,
                )
            )
    tails = [f"p95 latency, {steps} steps, s" for steps in classes]
    slowdown = ("slowdown: mean", "p95", "p99")
    return table(("load", "server", *slowdown, *tails, "mean of each repeat", "answered", "not answered"), rows)


def _side(side: dict[str, Any]) -> str:
    rows = (
        (
            PEERS[name].title,
            f"{each['row_steps_per_second']:.1f}",
            _of_bare(each),
            ", ".join(f"{share:.3f}" for share in each["of_bare_by_start"]),
        )
        for name, each in side["servers"].items()
    )
    return table(("server", "steps a second", "of the bare network", "after each start"), rows)


def _of_bare(found: dict[str, Any]) -> str:
    return f"{found['of_bare']:.3f}" + (f" ± {found['error']:.3f}" if found["error"] is not None else "")


def _saturation(found: dict[str, Any]) -> str:
    rows = [
        ("rows a second, served", f"{found['served_rows_per_second']:.1f}"),
        ("rows a second, bare network", f"{found['bare_rows_per_second']:.1f}"),
        ("served, of the bare network, in all", f"{found['total']:.3f}"),
        ("in single turns", spread(found["share"], digits=3)),
        (f"rows of a tick, of {found['width']}", f"{found['rows_per_tick']:.2f}"),
        ("a tick", f"{found['tick_ms']:.2f} ms"),
        (f"a bare forward of {found['width']} rows", f"{found['bare_ms']:.2f} ms"),
        ("between ticks: scheduling, submissions and results", f"{found['outside_ticks_ms']:.2f} ms"),
    ]
    return table(("figure", "measured"), rows)


def _alone(alone: dict[str, Any]) -> str:
    dtypes = list(alone["faster"])
    rows = [
        (title, *(f"{1e3 * alone['seconds'][f'{who}, {dtype}']:.0f} ms" for dtype in dtypes))
        for who, title in (("unstir", "Unstir"), ("diffusers", "diffusers"))
    ]
    return table(("", *dtypes), [*rows, ("ratio", *(spread(alone["faster"][dtype]) for dtype in dtypes))])


def _engine(engine: dict[str, Any]) -> str:
    steps = engine["steps"]
    rows = [
        (f"one image, DDIM, {steps} steps", f"{1e-3 * engine['image_ms']:.2f} s"),
        (f"the same, over {steps} bare forwards", spread(engine["cost"])),
        ("eight requests at once, over the same one after another", spread(engine["saving"])),
        *((f"forward of {width} rows", f"{ms:.1f} ms") for width, ms in engine["forward_ms"].items()),
    ]
    return table(("figure", "measured"), rows)


def gpu_summary(parts: Parts) -> Iterator[tuple[str, str]]:
    """(what, measured) of the card, for everything that was measured."""
    figures: dict[str, Callable[[], str]] = {
        "tests of the CUDA path": lambda: ", ".join(
            f"{parts['tests'][end]} {end}" for end in ("passed", "failed", "errors", "skipped")
        ),
        "operations a second of a bfloat16 product": lambda: f"{_rate(parts):.3g}",
        "bytes a second of a copy, read and written": lambda: f"{_bandwidth(parts):.3g}",
        "server ready, nothing kept": lambda: f"{parts['start']['first_seconds']:.0f} s",
        "server ready, again": lambda: f"{parts['start']['again_seconds']:.0f} s",
        "mixed load over HTTP": lambda: "{images_per_second:.0f} images a second, {clients} clients".format(
            **parts["served"]
        ),
        "the same, of bare forwards of the same widths": lambda: _percent(parts["served"]["share"]),
        "requests answered": lambda: "{answered} of {requests}".format(**parts["served"]),
        "seconds of the check": lambda: f"{sum(part['took_seconds'] for part in parts.values()):.0f}",
        "cut short": lambda: ", ".join(name for name, part in parts.items() if part.get("cut_short")) or "nothing",
    }
    for what, measured in figures.items():
        try:
            yield what, measured()
        except KeyError:
            continue


def gpu_section(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "Not measured on a card yet."
    found, parts = gpu["circumstances"], gpu["parts"]
    names = ("cuda", "cudnn", "torch", "triton", "diffusers", "python")
    card = ", ".join([found.get("card", found["device"]), *(f"{n} {found[n]}" for n in names if found.get(n))])
    networks = [part for part in parts.values() if "row_operations" in part]
    forwards = ("network", "rows", "floor, ms", "forward, ms", "of the product's rate", "of the copy's", "beyond, µs")
    sections = [
        f"{card}. Networks are in bfloat16, those of DDPM with random weights.",
        table(("figure", "measured"), gpu_summary(parts)),
        "*Floor*: operations over the measured rate of a product, or bytes over the measured bandwidth, whichever is "
        "longer; no forward is faster. *Beyond*: what a tick of the engine takes beyond its forward.",
        table(forwards, (row for part in networks for row in _forwards(part, parts))),
        "DDIM, from the first noise to float32 values on the host, beside diffusers' DDIMPipeline on the same weights.",
        table(("network", "images", *WHO.values()), (row for part in networks for row in _samples(part))),
    ]
    sections += [f"{name}: {part['error']}" for name, part in parts.items() if "error" in part]
    return "\n\n".join(sections)


def _forwards(part: dict[str, Any], parts: Parts) -> Iterator[tuple[str, ...]]:
    work = Work(part["row_operations"], part["row_bytes"], part["weight_bytes"])
    rate, bandwidth = _rate(parts), _bandwidth(parts)
    for width, found in part.get("forward", {}).items():
        rows, seconds = int(width), found["median"]
        tick = part.get("tick", {}).get(width)
        yield (
            _title(part),
            width,
            f"{1e3 * work.seconds(rows, rate, bandwidth):.3f}",
            f"{1e3 * seconds:.3f}",
            _percent(work.operations(rows) / seconds / rate),
            _percent(work.bytes(rows) / seconds / bandwidth),
            spread(tick["overhead"], 1e6, 0) if tick else "",
        )


def _samples(part: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for kind in ("latency", "saturated"):
        if found := part.get(kind):
            cells = []
            for who in WHO:
                if who not in found["seconds"]:
                    cells.append(part["left_out"].get(who, ""))
                    continue
                ratio = found["times_faster"].get(who)
                longer = f" ({ratio['median']:.2f} times as long)" if ratio else ""
                cells.append(f"{1e3 * found['seconds'][who]['median']:.1f} ms{longer}")
            yield _title(part), str(found["width"]), *cells


def _title(part: dict[str, Any]) -> str:
    return f"{part['title']}, {part['parameters'] / 1e6:.1f}M"


def _rate(parts: Parts) -> float:
    return float(parts["ceilings"]["operations_per_second"]["median"])


def _bandwidth(parts: Parts) -> float:
    return float(parts["ceilings"]["bytes_per_second"]["median"])


def spread(found: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """Median and quartiles."""
    middle, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{middle} ({low} to {high})"


def _range(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _percent(share: str | float) -> str:
    return f"{float(share):.0%}".replace("%", " %")
