"""What clients ask for, and when: a mix of short and long walks, and the times at which strangers ask."""

from __future__ import annotations

import random
from dataclasses import dataclass


class MixError(ValueError):
    """A mix that cannot be; the message says what is wrong with it."""


@dataclass(frozen=True)
class Mix:
    """How long the walks are that clients ask for.

    Attributes:
        weights: of each number of steps, rising; they add up to 1.
    """

    weights: dict[int, float]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read ``10:0.6,20:0.3,100:0.1``; weights are scaled to add up to 1, and one left out is 1.

        Raises:
            MixError: a part is no ``steps:weight``, comes twice, or asks for less than one step or no positive weight.
        """
        weights: dict[int, float] = {}
        for part in text.split(","):
            name, _, share = part.partition(":")
            try:
                steps, weight = int(name), float(share or 1)
            except ValueError:
                raise MixError(f"mix = {text!r}: {part!r} is not steps:weight, as in 10:0.6,20:0.3,100:0.1") from None
            if steps < 1 or not 0 < weight < float("inf"):
                raise MixError(f"mix = {text!r}: {part!r} needs at least one step and a positive weight")
            if steps in weights:
                raise MixError(f"mix = {text!r}: {steps} steps come twice")
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
        """The steps of one request."""
        return source.choices(self.steps, list(self.weights.values()))[0]

    def __str__(self) -> str:
        return ",".join(f"{steps}:{weight:.4g}" for steps, weight in self.weights.items())


@dataclass(frozen=True)
class Arrival:
    """One request to come.

    Attributes:
        at: seconds after the start.
    """

    at: float
    steps: int
    seed: int


def poisson(mix: Mix, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Requests of strangers who know nothing of each other: ``rate`` a second on average, in [0, ``seconds``).

    The same arguments give the same arrivals. Another rate gives other ones, but requests of the same steps in the same
    order, so that all loads of one seed ask for the same work.
    """
    times, works = random.Random(f"times {seed}"), random.Random(f"works {seed}")
    arrivals: list[Arrival] = []
    now = times.expovariate(rate)
    while now < seconds:
        arrivals.append(Arrival(now, mix.draw(works), len(arrivals)))
        now += times.expovariate(rate)
    return arrivals
