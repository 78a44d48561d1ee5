"""The traffic of a load test or a simulation: a mix of step counts, and Poisson arrivals."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator


class MixError(ValueError):
    """A mix that cannot be."""


@dataclass(frozen=True)
class Mix:
    """How many steps requests ask for.

    Attributes:
        weights: of each number of steps, ascending; they sum to 1.
    """

    weights: dict[int, float]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read ``10:0.6,20:0.3,100:0.1``; weights are scaled to sum to 1, and one left out is 1.

        Raises:
            MixError: a part is not ``steps:weight``, comes twice, or has less than one step or no positive weight.
        """
        weights: dict[int, float] = {}
        for part in text.split(","):
            name, _, share = part.partition(":")
            try:
                steps, weight = int(name), float(share or 1)
            except ValueError:
                raise MixError(f"{part!r} is not steps:weight, as in 10:0.6,20:0.3,100:0.1") from None
            if steps < 1 or not 0 < weight < float("inf"):
                raise MixError(f"{part!r} needs at least one step and a positive weight")
            if steps in weights:
                raise MixError(f"{steps} steps come twice")
            weights[steps] = weight
        total = sum(weights.values())
        return cls({steps: weights[steps] / total for steps in sorted(weights)})

    @property
    def steps(self) -> list[int]:
        """The classes, shortest first."""
        return list(self.weights)

    @property
    def mean(self) -> float:
        """Steps of a request on average."""
        return sum(steps * weight for steps, weight in self.weights.items())

    def draw(self, source: random.Random) -> int:
        return source.choices(self.steps, list(self.weights.values()))[0]

    def __str__(self) -> str:
        return ",".join(f"{steps}:{weight:.4g}" for steps, weight in self.weights.items())


def _check(text: str) -> str:
    Mix.parse(text)
    return text


MixText = Annotated[str, AfterValidator(_check)]  # of an option
MIX = "10:0.6,20:0.3,100:0.1"


@dataclass(frozen=True)
class Arrival:
    """One request to come, ``at`` seconds after the start."""

    at: float
    steps: int
    seed: int


def poisson(mix: Mix, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Independent arrivals in [0, ``seconds``), ``rate`` a second on average.

    The same arguments give the same arrivals. Another rate gives other times, but requests of the same steps in the
    same order, so that all loads of one seed ask for the same work.
    """
    times, works = random.Random(f"times {seed}"), random.Random(f"works {seed}")
    arrivals: list[Arrival] = []
    now = times.expovariate(rate)
    while now < seconds:
        arrivals.append(Arrival(now, mix.draw(works), len(arrivals)))
        now += times.expovariate(rate)
    return arrivals
