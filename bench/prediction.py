"""What the simulator says of the very requests that a comparison sent: each server's policy, on the bare forward times.

It knows queues and forwards only. What a server adds of its own, between forwards and between processes, is what the
measured figure has on top of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from app.cli.loadtest.report import spread
from app.cli.mix import Mix, poisson
from app.cli.simulation.policies import FirstCome, RequestLevel, Unstir
from app.cli.simulation.simulate import Policy, SimulatedLane, simulate
from app.cli.simulation.traffic import SimulatedRequest, capacity, draw_requests
from app.engine.widths import Widths
from bench.peers.table import PEERS


class AnsweredTogether(RequestLevel):
    """Batches of whoever waits, of which nobody is answered before all are done; it remembers them."""

    def __init__(self) -> None:
        super().__init__(mixed=True)
        self.batches: list[set[int]] = []

    def choose(self, lanes: Sequence[SimulatedLane], widths: Widths, now: float) -> tuple[list[SimulatedLane], int]:
        riders, width = super().choose(lanes, widths, now)
        numbers = {lane.job.number for lane in riders}
        if not self.batches or not numbers <= self.batches[-1]:
            self.batches.append(numbers)
        return riders, width


def arrivals(settings: dict[str, Any], load: float, repeat: int, requests_per_second: float) -> list[SimulatedRequest]:
    """Those of :func:`bench.peers.run.visit`."""
    seed = 1000 * repeat + round(100 * load)
    seconds = dict(zip(settings["loads"], settings["seconds"], strict=True))[load]
    found = poisson(Mix.parse(settings["mix"]), load * requests_per_second, seconds, seed)
    return [SimulatedRequest(arrival.at, arrival.steps) for arrival in found]


def offered(load: float, facts: dict[str, Any]) -> float:
    """What those requests come to, as a share of the capacity: with so few of them it is a little more or less."""
    settings, capacities = facts["settings"], facts["requests_per_second"]
    seconds = dict(zip(settings["loads"], settings["seconds"], strict=True))[load]
    found = [arrivals(settings, load, repeat, each) for repeat, each in enumerate(capacities)]
    steps = sum(request.steps for requests in found for request in requests)
    share: float = steps / (seconds * sum(capacities) * Mix.parse(settings["mix"]).mean)
    return share


def elsewhere(mix: str, load: float, facts: dict[str, Any], requests: int = 1000) -> tuple[float, float]:
    """Mean slowdown on another mix, in simulation: of Unstir's policy, and of first come, first served."""
    seconds = {int(width): each for width, each in facts["bare"]["in_turn_seconds"].items()}
    widths = Widths(tuple(seconds), tuple(seconds.values()))
    wanted = Mix.parse(mix)
    traffic = draw_requests(wanted, requests, load * capacity(widths, wanted.mean), seed=1)
    policies: tuple[Policy, Policy] = (Unstir(), FirstCome())
    ours, theirs = (fmean(each.slowdown for each in simulate(traffic, policy, widths).records) for policy in policies)
    return ours, theirs


def latencies(name: str, load: float, facts: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds, by class, over the repeats that ``facts`` hold of this server at this load."""
    seconds = {int(width): each for width, each in facts["bare"]["in_turn_seconds"].items()}
    if name == "lock_diffusers":  # has a network of its own, whose time is that of its longest request alone
        steps, alone = max((int(steps), alone) for steps, alone in facts["servers"][name]["alone"].items())
        seconds = {1: alone / steps}
    found: dict[str, list[float]] = {}
    repeats = {each["repeat"] for each in facts["visits"] if each["server"] == name and str(load) in each["open"]}
    for repeat in sorted(repeats):
        requests = arrivals(facts["settings"], load, repeat, facts["requests_per_second"][repeat])
        for request, ended in zip(requests, _ends(name, requests, seconds), strict=True):
            found.setdefault(str(request.steps), []).append(ended - request.at)
    return found


def _ends(name: str, requests: list[SimulatedRequest], seconds: dict[int, float]) -> list[float]:
    """When each request is answered."""
    policy: Policy
    if name == "unstir":
        policy, widths = Unstir(), [width for width in seconds if width & (width - 1) == 0]
    elif name == "lock_diffusers":
        policy, widths = FirstCome(), [1]
    elif PEERS[name].step_level:
        policy, widths = FirstCome(), list(seconds)
    else:
        policy, widths = AnsweredTogether(), list(seconds)
    run = simulate(requests, policy, Widths(tuple(widths), tuple(seconds[width] for width in widths)))
    ends = [record.ended for record in run.records]
    if isinstance(policy, AnsweredTogether):
        for batch in policy.batches:
            last = max(ends[number] for number in batch)
            for number in batch:
                ends[number] = last
    return ends


def predicted(name: str, load: float, facts: dict[str, Any]) -> dict[str, Any]:
    """As :func:`bench.peers.run.pooled` has it of what was measured: ``slowdown``, and ``latency`` by class."""
    forward = facts["bare"]["in_turn_seconds"]["1"]
    found = latencies(name, load, facts)
    slowdowns = [each / (int(steps) * forward) for steps, these in found.items() for each in these]
    return {"slowdown": spread(slowdowns), "latency": {steps: spread(each) for steps, each in found.items()}}
