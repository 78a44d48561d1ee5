"""``unstir simulate``: which policy serves given traffic best, on given times of a forward."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from app.cli.simulation.policies import POLICIES
from app.cli.simulation.report import Summary, as_json, summarise, table
from app.cli.simulation.simulate import simulate
from app.cli.simulation.traffic import Mix, Request, SimulationError, capacity, pairs_of, read_trace, stretched
from app.engine.widths import Widths


def add_command(commands: Any) -> None:
    """Add ``simulate`` to a parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate", help="compare scheduling policies on simulated traffic"
    )
    traffic = parser.add_mutually_exclusive_group()
    traffic.add_argument(
        "--trace", type=Path, help="JSON lines of requests: at (seconds), steps; n, priority, timeout_ms if wanted"
    )
    traffic.add_argument(
        "--mix", default="10:0.6,20:0.3,100:0.1", help="steps:weight of Poisson arrivals [10:0.6,20:0.3,100:0.1]"
    )
    parser.add_argument(
        "--load", help="shares of what the device can do at full width [0.6,0.9,1.2; of a trace: as recorded]"
    )
    parser.add_argument("--requests", type=int, default=2000, help="drawn from the mix for each run [2000]")
    parser.add_argument("--seed", type=int, default=1, help="of the first repeat's arrivals [1]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the mix, each with the next seed [3]")
    parser.add_argument(
        "--forward",
        default="1:10.4,2:15,4:26,8:48",
        help="width:milliseconds of one forward [1:10.4,2:15,4:26,8:48]",
    )
    parser.add_argument("--policy", default=",".join(POLICIES), help=f"of {', '.join(POLICIES)} [all]")
    parser.set_defaults(run=run)


def run(arguments: dict[str, Any]) -> int:
    """Simulate as the parsed arguments say and print the report; returns the exit status."""
    try:
        print(_report(arguments))
    except SimulationError as error:
        print(f"unstir: {error}", file=sys.stderr)
        return 2
    return 0


def _report(arguments: dict[str, Any]) -> str:
    widths = _widths(arguments["forward"])
    names = arguments["policy"].split(",")
    for name in names:
        if name not in POLICIES:
            raise SimulationError(f"--policy = {name}: choose of {', '.join(POLICIES)}")
    for option in ("requests", "repeats"):
        if arguments[option] < 1:
            raise SimulationError(f"--{option} = {arguments[option]}: at least 1")
    summaries: list[Summary] = []
    for load, repeats in _traffic(arguments, widths):
        summaries += [
            summarise(name, load, [simulate(requests, POLICIES[name](), widths) for requests in repeats])
            for name in names
        ]
    facts = {name: arguments[name] for name in ("mix", "requests", "seed", "repeats")}
    if arguments["trace"] is not None:
        facts = {"trace": arguments["trace"].name}
    return table(summaries) + "\n" + as_json(summaries, widths, **facts)


def _traffic(arguments: dict[str, Any], widths: Widths) -> list[tuple[float, list[list[Request]]]]:
    """For each load, the requests of each repeat."""
    if arguments["trace"] is not None:
        recorded = read_trace(arguments["trace"])
        if arguments["load"] is None:
            work, lasts = sum(request.work for request in recorded), recorded[-1].at
            offered = work * widths.seconds_per_row / lasts if lasts else 0.0
            return [(offered, [recorded])]
        return [(load, [stretched(recorded, load, widths)]) for load in _loads(arguments["load"])]
    mix = Mix.parse(arguments["mix"])
    seeds = range(arguments["seed"], arguments["seed"] + arguments["repeats"])
    return [
        (load, [mix.requests(arguments["requests"], load * capacity(widths, mix.mean), seed) for seed in seeds])
        for load in _loads(arguments["load"] or "0.6,0.9,1.2")
    ]


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        raise SimulationError(f"--load = {text}: write numbers, with commas between them") from None
    if not all(0 < load <= 100 for load in loads):
        raise SimulationError(f"--load = {text}: above 0 and at most 100 times what the device can do")
    return loads


def _widths(text: str) -> Widths:
    pairs = sorted(pairs_of(text, "--forward"))
    if any(size != int(size) or size < 1 for size, _ in pairs):
        raise SimulationError(f"--forward = {text}: widths are whole numbers from 1")
    sizes = tuple(int(size) for size, _ in pairs)
    seconds = tuple(time / 1000 for _, time in pairs)
    return Widths(sizes, seconds)
