"""What the engine under load was to show, and whether it did: each claim with its bound, from what was measured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bench.peers.table import PEERS

LIKE = "litserve_loop"  # the one that batches by steps, too
SHORT, LONG = "10", "100"
Parts = dict[str, dict[str, Any]]


class Claim(NamedTuple):
    """One thing that was to be shown, and whether it was."""

    what: str
    asked: str
    measured: str
    met: bool


def claims(parts: Parts) -> Iterator[Claim]:
    """All that was to be shown, in order."""
    peers, saturation, alone = parts["peers"]["servers"], parts["saturation"], parts["alone"]
    share = saturation["share"]
    yield Claim(
        "rows a second over HTTP at saturation, beside the bare network in its widest forwards",
        "≥ 0.97",
        f"{saturation['total']:.3f} (quartiles of turns {share['q1']:.3f} to {share['q3']:.3f})",
        saturation["total"] >= 0.97,
    )
    yield _beside("requests all alike", parts["side"])
    yield _beside("requests unlike each other", parts["side-mixed"])
    for load, limit in (("0.6", 0.8), ("0.9", 0.5)):
        ours, theirs = (peers[name]["loads"][load]["slowdown"]["mean"] for name in ("unstir", LIKE))
        yield _ratio(f"mean slowdown at {percent(load)}, beside {PEERS[LIKE].title}", ours, theirs, limit)
    for load in peers["unstir"]["loads"]:
        ours = peers["unstir"]["loads"][load]["slowdown"]["p99"]
        theirs, name = _best(peers, load, lambda each: each["slowdown"]["p99"])
        yield _ratio(
            f"p99 slowdown at {percent(load)}, beside the best of the others ({PEERS[name].title})", ours, theirs, 1
        )
    short = peers["unstir"]["loads"]["0.6"]["latency"][SHORT]["p95"]
    theirs = peers[LIKE]["loads"]["0.6"]["latency"][SHORT]["p95"]
    yield _ratio(f"p95 of {SHORT} steps at 60 %, beside {PEERS[LIKE].title}", short, theirs, 0.6)
    whole = {name: each for name, each in peers.items() if not PEERS[name].step_level}
    theirs, name = _best(whole, "0.6", lambda each: each["latency"][SHORT]["p95"])
    yield _ratio(f"the same, beside the best that batches whole requests ({PEERS[name].title})", short, theirs, 0.15)
    theirs, name = _best(peers, "0.6", lambda each: each["latency"][LONG]["p95"])
    yield _ratio(
        f"p95 of {LONG} steps at 60 %, beside the best of the others ({PEERS[name].title})",
        peers["unstir"]["loads"]["0.6"]["latency"][LONG]["p95"],
        theirs,
        1.5,
    )
    ends = Counter[str]()
    for each in peers["unstir"]["loads"].values():
        ends.update(each["outcomes"])
    yield Claim(
        "requests of these loads that Unstir refused, failed or left unanswered",
        f"0 of {ends.total():,}",
        str(ends.total() - ends["ok"]),
        ends.total() == ends["ok"],
    )
    faster = alone["faster"]
    yield Claim(
        f"an image of {alone['steps']} steps alone, times faster than diffusers, float32",
        "≥ 1.3",
        "{median:.2f} (quartiles {q1:.2f} to {q3:.2f})".format(**faster["float32"]),
        faster["float32"]["median"] >= 1.3,
    )
    yield from _promises(parts)


def _beside(which: str, side: dict[str, Any]) -> Claim:
    servers = side["servers"]
    best = max((name for name in servers if name != "unstir"), key=lambda name: servers[name]["of_bare"])
    mine, theirs = servers["unstir"], servers[best]
    return Claim(
        f"the same, side by side, {which}, beside the best of the others ({PEERS[best].title})",
        "≥ 1",
        f"{mine['of_bare'] / theirs['of_bare']:.3f} ({of_bare(mine)} and {of_bare(theirs)} of the bare network)",
        mine["of_bare"] >= theirs["of_bare"],
    )


def of_bare(found: dict[str, Any]) -> str:
    """A share of the bare network's rows a second, with its standard error if there were several starts."""
    return f"{found['of_bare']:.3f}" + (f" ± {found['error']:.3f}" if found["error"] is not None else "")


def _promises(parts: Parts) -> Iterator[Claim]:
    promises, abandoned, chaos = parts["promises"], parts["abandoned"]["abandoned"], parts["chaos"]["chaos"]
    yield Claim(
        "refused requests that are let in when they come back as Retry-After says",
        "≥ 95 %",
        f"{promises['admitted']} of {promises['refused']}",
        promises["refused"] > 0 and promises["admitted"] >= 0.95 * promises["refused"],
    )
    limit = abandoned["idle_ms"] + abandoned["widest_forward_ms"]
    yield Claim(
        "10 steps after 24 clients have each abandoned 100, beside 10 steps when idle and one forward",
        f"≤ {limit:.1f} ms",
        f"{abandoned['after_ms']:.1f} ms ({abandoned['idle_ms']:.1f} when idle)",
        abandoned["after_ms"] <= limit,
    )
    same, control = parts["bytes"]["reproducible"], parts["bytes"]["control"]
    yield Claim(
        "unlike requests at saturation, with `reproducible`, whose bytes differ from their solo answers",
        f"0 of {same['requests']:,}",
        f"{same['differing']} (without `reproducible`: {control['differing']} of {control['requests']})",
        same["differing"] == 0 and same["answered"] == same["requests"] and control["differing"] > 0,
    )
    memory, left = chaos["memory_mb"], sum(chaos["gauges"].values())
    yield Claim(
        f"after {chaos['requests']:,} requests of every kind: wrong or missing answers, work still held, more memory",
        "none, none, ≤ 5 %",
        f"{len(chaos['wrong'])}, {left:g}, {100 * (statistics.mean(memory[-2:]) / memory[1] - 1):+.1f} %",
        chaos["held"] and not left,
    )


def _ratio(what: str, ours: float, theirs: float, limit: float) -> Claim:
    return Claim(what, f"≤ {limit:g}", f"{ours / theirs:.3g} ({ours:.2f} and {theirs:.2f})", ours <= limit * theirs)


def _best(servers: dict[str, Any], load: str, figure: Callable[[dict[str, Any]], float]) -> tuple[float, str]:
    """The least that any but Unstir reaches, and who does."""
    return min(
        (figure(each["loads"][load]), name)
        for name, each in servers.items()
        if name != "unstir" and load in each["loads"]
    )


def percent(load: str | float) -> str:
    """``0.6`` as people write it."""
    return f"{float(load):.0%}".replace("%", " %")
