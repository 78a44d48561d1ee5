"""docs/performance.md and its image, from what was measured; every figure on it is read from docs/performance/."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from app.cli.mix import Mix
from bench.claims import Parts, claims, of_bare, percent
from bench.gpu import page as gpu
from bench.markdown import table
from bench.peers.table import PEERS
from bench.prediction import elsewhere, latencies, offered, predicted

OTHERS = {"20:1,50:1": "20 or 50 steps, half each", "50:1": "50 steps always"}
TEMPLATE = Path(__file__).with_name("performance.template.md")


def write(parts: Parts, docs: Path) -> None:
    """Write performance.md and performance.png into the folder."""
    (docs / "performance.md").write_text(text(parts), encoding="utf-8")
    draw(parts["peers"], docs / "performance.png")


def text(parts: Parts) -> str:
    """The page."""
    peers, engine, saturation, alone, promises = (
        parts[name] for name in ("peers", "engine", "saturation", "alone", "promises")
    )
    png, side, unlike = parts["png"], parts["side"], parts["side-mixed"]
    settings, loads = peers["settings"], [each["load_average"] for each in [*peers["visits"], *png["visits"]]]
    waits = promises["told_to_wait"]
    ends = parts["chaos"]["chaos"]["ends"]
    fields = {
        "cores": peers["cores"],
        "checkpoint": settings["checkpoint"],
        "mix": _mixed(settings["mix"]),
        "rate": _range([round(each, 2) for each in peers["requests_per_second"]]),
        "repeats": _range(Counter(each["server"] for each in peers["visits"]).values()),
        "seconds": ", ".join(
            f"{seconds:g} s at {percent(load)}"
            for load, seconds in zip(settings["loads"], settings["seconds"], strict=True)
        ),
        "offered": ", ".join(percent(round(offered(load, peers), 2)) for load in settings["loads"]),
        "elsewhere": _elsewhere(peers),
        "claims": table(
            ("what", "asked", "measured", ""),
            ((*claim[:3], "met" if claim.met else "**not met**") for claim in claims(parts)),
        ),
        "mixed": mixed_table(peers),
        "saturated": table(
            (
                "server",
                "steps a second",
                "of the bare network",
                "answers in PNG: steps a second",
                "of the bare network",
            ),
            (
                (PEERS[name].title, *_saturated(each), *_saturated(png["servers"][name]))
                for name, each in peers["servers"].items()
            ),
        ),
        "side": _side(parts["side"]),
        "side_mixed": _side(parts["side-mixed"]),
        "side_starts": f"{side['starts']} starts of all, {side['rounds']} turns of {side['turn_seconds']:g} s",
        "unlike_starts": f"{unlike['starts']}, of {unlike['rounds']} turns",
        "png_repeats": _range(Counter(each["server"] for each in png["visits"]).values()),
        "engine_checkpoint": engine["checkpoint"],
        "engine_dtype": engine["dtype"],
        "engine_steps": engine["steps"],
        "engine_image": f"{1e-3 * engine['image_ms']:.2f}",
        "engine_cost": _ratio(engine["cost"]),
        "engine_saving": _ratio(engine["saving"]),
        "engine_forwards": ", ".join(f"{ms:.1f}" for ms in engine["forward_ms"].values()),
        "engine_widths": ", ".join(engine["forward_ms"]),
        "turns": saturation["share"]["repeats"],
        "served_rows": f"{saturation['served_rows_per_second']:.1f}",
        "bare_rows": f"{saturation['bare_rows_per_second']:.1f}",
        "width": saturation["width"],
        "tick_rows": f"{saturation['rows_per_tick']:.2f}",
        "tick_ms": f"{saturation['tick_ms']:.2f}",
        "bare_ms": f"{saturation['bare_ms']:.2f}",
        "outside_ms": f"{saturation['outside_ticks_ms']:.2f}",
        "alone_steps": alone["steps"],
        "alone_repeats": alone["repeats"],
        "alone": _alone(alone),
        "promise_load": percent(promises["load"]),
        "room": f"{promises['room_seconds']:g}",
        "refused": promises["refused"],
        "promise_requests": promises["requests"],
        "admitted": promises["admitted"],
        **{name: f"{waits[name]:g}" for name in ("shortest", "median", "longest")},
        "chaos": table(
            ("kind", "requests", "answers"),
            (
                (kind, str(sum(found.values())), ", ".join(f"{count} × {end}" for end, count in found.items()))
                for kind, found in ends.items()
            ),
        ),
        "forward": ", ".join(f"{1e3 * each:.1f}" for each in peers["bare"]["in_turn_seconds"].values()),
        "load_low": f"{min(loads):.2f}",
        "load_high": f"{max(loads):.2f}",
        "load_median": f"{statistics.median(loads):.2f}",
        "load_others": ", ".join(
            f"{n} {part['load_average']:.2f}" for n, part in parts.items() if "load_average" in part
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in peers["versions"].items()),
        **gpu.fields(parts.get("gpu")),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields)


def mixed_table(peers: dict[str, Any]) -> str:
    """One line for each server at each load; measured and predicted."""
    classes = list(map(str, Mix.parse(peers["settings"]["mix"]).steps))
    rows = []
    for load in _loads(peers):
        for name, server in peers["servers"].items():
            if load not in server["loads"]:
                continue
            found, said = server["loads"][load], predicted(name, float(load), peers)
            cells = [_pair(found["slowdown"][key], said["slowdown"][key]) for key in ("mean", "p95", "p99")]
            cells += [_pair(found["latency"][steps]["p95"], said["latency"][steps]["p95"]) for steps in classes]
            each = " ".join(f"{mean:.2f}" for mean in found["mean_slowdown_by_repeat"])
            missed = [f"{count} {what}" for what, count in found["outcomes"].items() if count and what != "ok"]
            rows.append((percent(load), PEERS[name].title, *cells, each, ", ".join(missed) or "0"))
    tails = [f"p95, {steps} steps, s" for steps in classes]
    return table(("load", "server", "slowdown: mean", "p95", "p99", *tails, "mean of each turn", "not answered"), rows)


def draw(peers: dict[str, Any], path: Path) -> None:
    """The cumulative distribution of slowdown, measured and predicted, one field for each load."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second

    forward = peers["bare"]["in_turn_seconds"]["1"]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    fields = figure.subplots(1, len(_loads(peers)), sharey=True, squeeze=False)[0]
    for axes, load in zip(fields, _loads(peers), strict=True):
        for number, (name, server) in enumerate(peers["servers"].items()):
            if load not in server["loads"]:
                continue
            title, color = PEERS[name].title, f"C{number}"
            runs = [each["open"][load]["latencies"] for each in peers["visits"] if _asked(each, name, load)]
            measured = _slowdowns([pair for run in runs for pair in run.items()], forward)
            said = _slowdowns(latencies(name, float(load), peers).items(), forward)
            axes.step(*_cumulative(measured), where="post", color=color, linewidth=1.8, label=title)
            axes.step(*_cumulative(said), where="post", color=color, linewidth=0.9, linestyle="--")
        axes.set(xscale="log", xlabel="slowdown", ylim=(0, 1.01), title=f"{percent(load)} of capacity")
        axes.grid(alpha=0.3)
    fields[0].set_ylabel("share of requests")
    fields[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _loads(peers: dict[str, Any]) -> list[str]:
    return sorted({load for each in peers["servers"].values() for load in each["loads"]}, key=float)


def _asked(visit: dict[str, Any], name: str, load: str) -> bool:
    return visit["server"] == name and load in visit["open"]


def _slowdowns(found: Iterable[tuple[str, Sequence[float]]], forward: float) -> list[float]:
    return sorted(each / (int(steps) * forward) for steps, these in found for each in these)


def _cumulative(values: Sequence[float]) -> tuple[Sequence[float], list[float]]:
    return values, [(i + 1) / len(values) for i in range(len(values))]


def _elsewhere(peers: dict[str, Any]) -> str:
    parts = []
    for mix, title in OTHERS.items():
        pairs = {load: elsewhere(mix, load, peers) for load in (0.6, 0.9)}
        parts.append(f"{title}, " + " and ".join(f"{_pair(*pair)} at {percent(load)}" for load, pair in pairs.items()))
    return "; ".join(parts)


def _saturated(server: dict[str, Any]) -> tuple[str, str]:
    found = server["saturated"]
    if not found:
        return "failed", ""
    return f"{found['row_steps_per_second']:.1f}", f"{found['of_bare']:.2f} ± {found['error']:.2f}"


def _side(side: dict[str, Any]) -> str:
    rows = (
        (
            PEERS[name].title,
            f"{each['row_steps_per_second']:.1f}",
            of_bare(each),
            ", ".join(f"{share:.3f}" for share in each["of_bare_by_start"]),
        )
        for name, each in side["servers"].items()
    )
    return table(("server", "steps a second", "of the bare network", "after each start"), rows)


def _alone(alone: dict[str, Any]) -> str:
    dtypes = list(alone["faster"])
    rows = [
        (name, *(f"{1e3 * alone['seconds'][f'{who}, {dtype}']:.0f} ms" for dtype in dtypes))
        for who, name in (("unstir", "Unstir"), ("diffusers", "diffusers"))
    ]
    quotients = [f"{alone['faster'][dtype]['median']:.2f}" for dtype in dtypes]
    return table(("", *dtypes), [*rows, ("times faster", *quotients)])


def _ratio(found: dict[str, float]) -> str:
    return "{median:.2f} ({q1:.2f} to {q3:.2f})".format(**found)


def _range(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _mixed(mix: str) -> str:
    steps = [f"{each} ({percent(weight)})" for each, weight in Mix.parse(mix).weights.items()]
    return ", ".join(steps[:-1]) + " or " + steps[-1]


def _pair(measured: float, said: float) -> str:
    return f"{measured:.2f} ({said:.2f})"
