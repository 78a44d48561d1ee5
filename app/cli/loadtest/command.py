"""The command line: which server, which load, and where the numbers go."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from app.cli.loadtest import load, report
from app.cli.loadtest.load import Client, LoadError, Run, Target
from app.cli.mix import Mix, MixError, poisson

MIX = "10:0.6,20:0.3,100:0.1"
CLIENTS_AT_CAPACITY = 16


class UsageError(Exception):
    """Options that make no sense."""


def add_command(commands: Any) -> None:
    """Add ``bench`` to the parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser("bench", help="measure a running server under load")
    parser.add_argument("--url", default="http://localhost:8000/sample", help="what to ask [%(default)s]")
    parser.add_argument("--mix", default=MIX, help="steps and their share of the requests [%(default)s]")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rate", type=float, help="requests a second, at random times (Poisson)")
    how.add_argument(
        "--load", type=float, help="the same, as a fraction of the capacity, which is measured first [0.6]"
    )
    how.add_argument("--clients", type=int, help="instead, so many clients who ask again once they are answered")
    parser.add_argument("--seconds", type=float, default=30, help="how long requests are sent [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the times and of the mix [%(default)s]")
    parser.add_argument("--accept", default="application/x-npy", help="media type of the answers [%(default)s]")
    parser.add_argument("--body", default='{"sampler": "ddim"}', help="more fields of each request [%(default)s]")
    parser.add_argument("--field", default="steps", help="the field that takes the steps [%(default)s]")
    parser.add_argument("--plot", type=Path, help="PNG to write: which share was answered by when")
    parser.add_argument("--retry", action="store_true", help="do as Retry-After says, once, when refused")
    parser.set_defaults(run=run)


def run(arguments: dict[str, Any]) -> int:
    """Measure, and print a table and one line of JSON; returns the exit status."""
    try:
        mix, target = Mix.parse(arguments["mix"]), _target(arguments)
        _check(arguments)
        facts, result, alone = asyncio.run(_measure(arguments, mix, target))
        summary = report.summarize(result.records, result.seconds, alone)
        print(report.table(summary))
        if arguments["plot"]:
            _plot(arguments["plot"], result, facts)
    except (MixError, LoadError, UsageError) as error:
        print(f"unstir: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({**facts, **summary}))
    return 0


def _target(arguments: dict[str, Any]) -> Target:
    try:
        extra = json.loads(arguments["body"])
    except ValueError as error:
        raise UsageError(f"--body = {arguments['body']!r}: {error}") from error
    if not isinstance(extra, dict):
        raise UsageError(f"--body = {arguments['body']!r}: a JSON object is needed")
    name = arguments["field"]
    return Target(arguments["url"], lambda steps, seed: {name: steps, "seed": seed, **extra}, arguments["accept"])


def _check(arguments: dict[str, Any]) -> None:
    for name in ("rate", "load", "clients", "seconds"):
        value = arguments[name]
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name} = {value}: it must be positive")
    plot: Path | None = arguments["plot"]
    if plot and not plot.absolute().parent.is_dir():
        raise UsageError(f"--plot = {plot}: no such folder")


async def _measure(arguments: dict[str, Any], mix: Mix, target: Target) -> tuple[dict[str, Any], Run, dict[int, float]]:
    """What was done, what came of it, and seconds of each class alone."""
    seconds, seed = arguments["seconds"], arguments["seed"]
    facts: dict[str, Any] = {"url": target.url, "mix": str(mix), "seed": seed}
    async with load.connected(target) as client:
        _say("alone")
        alone = await load.alone(client, mix.steps)
        if arguments["clients"]:
            facts["clients"] = arguments["clients"]
            _say(f"{arguments['clients']} clients for {seconds:g} s")
            result = await load.closed_loop(client, mix, arguments["clients"], seconds, seed, retry=arguments["retry"])
            return facts, result, alone
        rate = arguments["rate"]
        if not rate:
            facts["load"] = arguments["load"] or 0.6
            facts["capacity"] = await _capacity(client, mix, max(5.0, seconds / 3), seed)
            rate = facts["load"] * facts["capacity"]
        facts["rate"] = rate
        arrivals = poisson(mix, rate, seconds, seed)
        if not arrivals:
            raise UsageError(f"at {rate:.3g} requests/s none came within {seconds:g} s; take more --seconds")
        _say(f"{len(arrivals)} requests in {seconds:g} s, {rate:.3g} a second on average")
        return facts, await load.open_loop(client, arrivals, retry=arguments["retry"]), alone


async def _capacity(client: Client, mix: Mix, seconds: float, seed: int) -> float:
    """Requests a second of the saturated server."""
    _say(f"capacity: {CLIENTS_AT_CAPACITY} clients for {seconds:g} s")
    busy = await load.closed_loop(client, mix, CLIENTS_AT_CAPACITY, seconds, seed, retry=True)
    # In steps rather than requests: a few long walks more or less would otherwise decide.
    done = sum(record.steps for record in busy.records if record.ok)
    if not done:
        raise LoadError(
            f"{client.target.url} answered none of {len(busy.records)} requests of {CLIENTS_AT_CAPACITY} clients"
        )
    return done / busy.seconds / mix.mean


def _plot(path: Path, result: Run, facts: dict[str, Any]) -> None:
    from app.cli.loadtest import plots  # noqa: PLC0415 - matplotlib may be missing

    title = f"{facts['clients']} clients" if "clients" in facts else f"{facts['rate']:.3g} requests/s"
    try:
        plots.latencies(path, result.records, title)
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot = {path}: {error}") from error


def _say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)
