"""The comparison: every server under the same load, turn by turn, several times over.

Each server is given the same requests at the same times, at rates that are fractions of what the bare network could do,
and once as many clients as keep it busy. Servers take turns within a repeat, each repeat begins with another one, and
what is reported is pooled over repeats, so that whatever else the machine is doing weighs on all. Slowdown is latency
over the time of as many forwards of one row in a bare loop: the same yardstick for everybody.

Results are written after every visit to a server; ``--resume`` continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from app.cli.loadtest import load
from app.cli.loadtest.load import LoadError, Record
from app.cli.loadtest.report import outcomes, spread
from app.cli.mix import MIX, Mix, poisson
from app.engine.calibration import bfloat16_is_native
from bench.peers import common
from bench.peers.bare import bare
from bench.peers.table import PEERS, Peer, Running, StartError, running

CALM = 0.6  # the load that every server is given; above it, those that batch whole requests take minutes to recover
DEEP = ("unstir", "litserve_loop", "mosec", "litserve_request", "bentoml")  # are given the others, too
PATIENCE = 60.0  # seconds after the last request, from when on its client waits no longer
CLIENTS, STEPS = 16, 50  # of the closed loop, which keeps every server busy
SERVER_SECONDS, BARE_SECONDS = 3.0, 1.5  # of each turn meanwhile
CAPACITY_SECONDS = 30.0  # before each repeat: a shared machine's pace changes within seconds, and within hours


@dataclass(frozen=True)
class Settings:
    """What a run does; a resumed one must do the same.

    Attributes:
        loads: as fractions of the bare network's capacity.
        seconds: of each load; more of the first, whose tails are compared class by class, and long requests are few.
        all_loads: give every server all of them.
        png: whether answers are PNGs, rather than numbers.
    """

    loads: tuple[float, ...] = (0.6, 0.9, 1.2)
    seconds: tuple[float, ...] = (120.0, 60.0, 60.0)
    mix: str = MIX
    saturated_seconds: float = 60.0
    all_loads: bool = False
    checkpoint: str = ""
    png: bool = False

    def loads_of(self, peer: Peer) -> list[float]:
        """Those that this server is given."""
        return [each for each in self.loads if each <= CALM or self.all_loads or peer.name in DEEP]


@dataclass
class RequestTask:
    """One server in one repeat; everything that is pooled later.

    Attributes:
        alone: seconds of a request of each class on the idle server.
        open: of each load: outcomes, latencies by class, and how late the client was.
        closed: steps a second of the busy server, and rows a second of the bare loop in its turns.
    """

    server: str
    repeat: int
    load_average: float
    start_seconds: float = 0.0
    alone: dict[str, float] = field(default_factory=dict)
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    closed: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def visit(peer: Peer, repeat: int, settings: Settings, capacity: float) -> RequestTask:
    """Everything that one server is put through in one repeat.

    After a load that left requests unanswered it is started afresh: it may still be at work on them.
    """
    found = RequestTask(peer.name, repeat, round(os.getloadavg()[0], 2))
    todo: list[float | None] = [*settings.loads_of(peer), None]
    try:
        while todo:
            began = time.monotonic()
            with running(peer) as server:
                found.start_seconds = round(time.monotonic() - began, 1)
                asyncio.run(_put_through(server, todo, found, settings, capacity))
    except (StartError, LoadError) as error:
        found.failure = str(error)
    return found


async def _put_through(
    server: Running, todo: list[float | None], found: RequestTask, settings: Settings, capacity: float
) -> None:
    """Take loads off ``todo``, None standing for the closed loop, until there are none or one left requests behind."""
    mix = Mix.parse(settings.mix)
    async with load.connected(server.target) as client:
        if not found.alone:
            alone = await load.alone(client, mix.steps)
            found.alone = {str(steps): round(seconds, 4) for steps, seconds in alone.items()}
        while todo:
            each = todo.pop(0)
            if each is None:
                found.closed = await _saturated(server, client, settings)
                continue
            seconds = dict(zip(settings.loads, settings.seconds, strict=True))[each]
            arrivals = poisson(mix, each * capacity, seconds, 1000 * found.repeat + round(100 * each))
            records = (await load.open_loop(client, arrivals, patience=PATIENCE)).records
            found.open[str(each)] = _facts(records)
            if any(record.unanswered for record in records):
                return


async def _saturated(server: Running, client: load.Client, settings: Settings) -> dict[str, Any]:
    """The busy server, stopped now and then for a turn of the bare loop, while its clients wait."""
    bare_rows: list[float] = []
    stopped = 0.0
    with bare() as alone:
        busy = asyncio.create_task(load.closed_loop(client, Mix({STEPS: 1.0}), CLIENTS, settings.saturated_seconds))
        while not (await asyncio.wait({busy}, timeout=SERVER_SECONDS))[0]:
            began = time.monotonic()
            server.stop()
            bare_rows.append(await asyncio.to_thread(alone.rows_per_second, BARE_SECONDS))
            server.go_on()
            stopped += time.monotonic() - began
    run = busy.result()
    done = sum(record.steps for record in run.records if record.ok)
    return {
        "row_steps_per_second": round(done / (run.seconds - stopped), 2),
        "bare_rows_per_second": [round(each, 2) for each in bare_rows],
        "outcomes": outcomes(run.records),
    }


def _facts(records: Sequence[Record]) -> dict[str, Any]:
    waited = [record for record in records if record.ok or record.unanswered]
    classes = sorted({record.steps for record in waited})
    return {
        "outcomes": outcomes(records),
        "latest_send": round(max((record.start - record.arrival for record in records), default=0.0), 4),
        "latencies": {
            str(steps): [round(record.latency, 4) for record in waited if record.steps == steps] for steps in classes
        },
    }


def pooled(visits: Sequence[RequestTask], forward_seconds: float) -> dict[str, Any]:
    """What all visits to each server come to, by load.

    Args:
        forward_seconds: of one row, in a bare loop through all widths.
    """
    servers: dict[str, Any] = {}
    for name in dict.fromkeys(visit.server for visit in visits):
        mine = [visit for visit in visits if visit.server == name]
        loads = sorted({each for visit in mine for each in visit.open}, key=float)
        closed = [visit.closed for visit in mine if visit.closed]
        shares = [each["row_steps_per_second"] / statistics.mean(each["bare_rows_per_second"]) for each in closed]
        servers[name] = {
            "alone": _medians([visit.alone for visit in mine if visit.alone]),
            "loads": {
                each: _pooled_load([visit.open[each] for visit in mine if each in visit.open], forward_seconds)
                for each in loads
            },
            "saturated": {
                "row_steps_per_second": statistics.median(each["row_steps_per_second"] for each in closed),
                "of_bare": round(statistics.mean(shares), 4),
                "error": round(math.sqrt(sum(_error(each) ** 2 for each in closed)) / len(closed), 4),
            }
            if closed
            else {},
            "failures": [visit.failure for visit in mine if visit.failure],
        }
    return servers


def _error(closed: dict[str, Any]) -> float:
    """About the standard error of a share: what the turns of the bare loop, and of the server beside them, vary by."""
    turns: list[float] = closed["bare_rows_per_second"]
    own = statistics.stdev(turns) / statistics.mean(turns) / math.sqrt(len(turns))
    return own * math.sqrt(1 + BARE_SECONDS / SERVER_SECONDS)


def _pooled_load(runs: Sequence[dict[str, Any]], forward_seconds: float) -> dict[str, Any]:
    classes = sorted({steps for run in runs for steps in run["latencies"]}, key=int)
    latencies = {steps: [each for run in runs for each in run["latencies"].get(steps, [])] for steps in classes}
    means = [
        statistics.mean(_slowdowns(run["latencies"], forward_seconds)) for run in runs if any(run["latencies"].values())
    ]
    return {
        "outcomes": {name: sum(run["outcomes"][name] for run in runs) for name in runs[0]["outcomes"]},
        "slowdown": _rounded(spread(_slowdowns(latencies, forward_seconds))),
        "mean_slowdown_by_repeat": [round(mean, 3) for mean in means],
        "latency": {steps: _rounded(spread(each)) for steps, each in latencies.items()},
    }


def _slowdowns(latencies: dict[str, list[float]], forward_seconds: float) -> list[float]:
    return [each / (int(steps) * forward_seconds) for steps, these in latencies.items() for each in these]


def _medians(several: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = several[0] if several else ()
    return {key: round(statistics.median(each[key] for each in several), 4) for key in keys}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """Of everything that matters to the result."""
    native = "with" if bfloat16_is_native() else "without"
    found = {"cpu": f"{torch.backends.cpu.get_cpu_capability()} {native} bfloat16", "python": platform.python_version()}
    for package in sorted({"torch", "numpy", "httpx", *(name for peer in peers for name in peer.packages)}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def table(facts: dict[str, Any]) -> str:
    """The results for people, in Markdown."""
    classes = Mix.parse(facts["settings"]["mix"]).steps
    p95 = " | ".join(f"p95, {steps} steps, s" for steps in classes)
    lines = [
        f"| server | load | slowdown: mean | p95 | p99 | {p95} | not answered |",
        "|---|---|" + "---|" * (4 + len(classes)),
    ]
    for name, server in facts["servers"].items():
        for each, found in server["loads"].items():
            slowdown = [f"{found['slowdown'].get(key, float('nan')):.2f}" for key in ("mean", "p95", "p99")]
            tails = [f"{found['latency'].get(str(steps), {}).get('p95', float('nan')):.2f}" for steps in classes]
            missed = ", ".join(f"{count} {key}" for key, count in found["outcomes"].items() if count and key != "ok")
            lines.append(f"| {name} | {each} | {' | '.join([*slowdown, *tails])} | {missed or '0'} |")
    lines += ["", "| server | steps a second, saturated | of the bare loop |", "|---|---|---|"]
    for name, server in facts["servers"].items():
        if saturated := server["saturated"]:
            lines.append(f"| {name} | {saturated['row_steps_per_second']:.1f} | {saturated['of_bare']:.2f} |")
    for name, server in facts["servers"].items():
        lines += [f"{name} failed: {failure.splitlines()[-1]}" for failure in server["failures"]]
    return "\n".join(lines)


def write(path: Path, facts: dict[str, Any], visits: Sequence[RequestTask]) -> None:
    """Replace the file in one go; each visit takes one line."""
    head = json.dumps(facts, indent=1)[:-2]
    runs = ",\n".join("  " + json.dumps(asdict(each)) for each in visits)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(f'{head},\n "visits": [\n{runs}\n ]\n}}\n', encoding="utf-8")
    beside.replace(path)


def compare(peers: Sequence[Peer], repeats: int, settings: Settings, out: Path, resume: bool) -> dict[str, Any]:
    """Measure everything that ``out`` does not hold yet; returns what it then holds, without the single visits.

    Raises:
        SystemExit: ``out`` was measured with other settings.
    """
    plain = json.loads(json.dumps(asdict(settings)))
    facts: dict[str, Any] = {}
    visits: list[RequestTask] = []
    if resume and out.exists():
        facts = json.loads(out.read_text(encoding="utf-8"))
        visits = [RequestTask(**each) for each in facts.pop("visits")]
        visits = [each for each in visits if not each.failure]
        if facts["settings"] != plain:
            raise SystemExit(f"{out} was measured with other settings: {facts['settings']}")
    else:
        with bare() as process:
            facts = {"settings": plain, "bare": process.line(), "requests_per_second": []}
    facts["versions"] = versions(peers)
    facts["cores"] = os.cpu_count()
    capacities: list[float] = facts["requests_per_second"]
    for repeat in range(repeats):
        if len(capacities) <= repeat:
            with bare() as process:
                capacities.append(process.rows_per_second(CAPACITY_SECONDS) / Mix.parse(settings.mix).mean)
        first = repeat % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            if any((each.server, each.repeat) == (peer.name, repeat) for each in visits):
                continue
            print(f"{peer.name}, repeat {repeat + 1} of {repeats} …", file=sys.stderr, flush=True)
            visits.append(visit(peer, repeat, settings, capacities[repeat]))
            write(out, facts, visits)
    facts["servers"] = pooled(visits, facts["bare"]["in_turn_seconds"]["1"])
    write(out, facts, visits)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", default=",".join(map(str, Settings.seconds)), help="of each load")
    parser.add_argument("--saturated-seconds", type=float, default=Settings.saturated_seconds)
    parser.add_argument(
        "--loads", default=",".join(map(str, Settings.loads)), help="fractions of the bare capacity; may be none"
    )
    parser.add_argument("--mix", default=MIX)
    parser.add_argument("--peers", default=",".join(PEERS), help="which, and in which order [all]")
    parser.add_argument("--all-loads", action="store_true", help=f"give loads above {CALM} to everybody")
    parser.add_argument("--png", action="store_true", help="let everybody answer with PNGs, rather than numbers")
    parser.add_argument("--out", type=Path, help="[docs/performance/peers.json; png.json with --png]")
    parser.add_argument("--resume", action="store_true", help="continue what --out holds")
    arguments = parser.parse_args()
    # Without a handler the process would be gone before it has stopped its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = arguments.peers.split(",")
    if unknown := sorted(set(names) - PEERS.keys()):
        parser.error(f"--peers: no {', '.join(unknown)}; there are {', '.join(PEERS)}")
    loads, seconds = (tuple(map(float, filter(None, each.split(",")))) for each in (arguments.loads, arguments.seconds))
    if len(loads) != len(seconds):
        parser.error("--seconds: as many as there are --loads")
    settings = Settings(
        loads,
        seconds,
        str(Mix.parse(arguments.mix)),
        arguments.saturated_seconds,
        arguments.all_loads,
        common.checkpoint().card.name,
        arguments.png,
    )
    if arguments.png:
        os.environ[common.FORM] = "png"  # for the servers that are started
    out = arguments.out or Path("docs/performance") / ("png.json" if arguments.png else "peers.json")
    facts = compare([PEERS[name] for name in names], arguments.repeats, settings, out, arguments.resume)
    print(table(facts))


if __name__ == "__main__":
    main()
