"""The table of samplers: what a user should know of each. `/model`, `/docs` and the README all show these entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.diffusion.plan import Plan
from model.diffusion.samplers.classical import heun, pndm
from model.diffusion.samplers.ddim import ddim, ddpm
from model.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s
from model.diffusion.samplers.obelm import obelm
from model.diffusion.samplers.unipc import unipc
from model.diffusion.schedule import SPACINGS, Spacing


@dataclass(frozen=True)
class Sampler:
    """What a user should know of a sampler, and the function behind it.

    Attributes:
        what: it is, in one plain sentence.
        when: to use it, in another.
        compile: (schedule, steps, spacing=, clip=, and the options) to a Plan.
        good_steps: the range worth trying; T is the whole chain.
        default_steps: None stands for T.
        evaluations: (a, b): the walk takes a · steps + b network evaluations, with default options.
        stochastic: whether it draws noise on the way, with default options.
        options: names of the request fields that only some samplers take and this one does.
        spacings: the grids that it can walk on.
        spacing: the one that it takes by default; None leaves that to the checkpoint.
    """

    name: str
    what: str
    when: str
    compile: Callable[..., Plan]
    good_steps: str
    default_steps: int | None = 20
    evaluations: tuple[int, int] = (1, 0)
    stochastic: bool = False
    options: frozenset[str] = frozenset()
    spacings: tuple[Spacing, ...] = SPACINGS
    spacing: Spacing | None = None

    @property
    def nfe(self) -> str:
        """What N steps cost, as a formula."""
        a, b = self.evaluations
        return ("N" if a == 1 else f"{a}N") + (f" {'+' if b > 0 else '-'} {abs(b)}" if b else "")

    @property
    def summary(self) -> str:
        """The entry in one line."""
        kind = "stochastic" if self.stochastic else "deterministic"
        return f"{self.what} {self.when} ({kind}; {self.nfe} evaluations for N steps; good with {self.good_steps})"


_TABLE = (
    Sampler(
        "ddim",
        "Glides along the probability flow in straight steps; eta > 0 mixes in fresh noise, up to ddpm at 1.",
        "The one to start with, and the one whose latents can be edited and inverted.",
        ddim,
        good_steps="20-100",
        default_steps=50,
        options=frozenset({"eta"}),
    ),
    Sampler(
        "ddpm",
        "The original ancestral walk, with fresh noise at every step.",
        "For the reference result, at all T steps; others get there sooner.",
        ddpm,
        good_steps="100-T",
        default_steps=None,
        stochastic=True,
        options=frozenset({"variance"}),
    ),
    Sampler(
        "dpmpp_2m",
        "DPM-Solver++, multistep: extrapolates the predicted image from the steps before.",
        "For good images in the fewest evaluations, without noise; order 3 seldom pays.",
        dpmpp_2m,
        good_steps="10-30",
        options=frozenset({"order"}),
        spacing="karras",
    ),
    Sampler(
        "dpmpp_2m_sde",
        "The same solver with fresh noise at every step.",
        "Where fresh noise should correct the network's errors, as ddpm's does, in a tenth of its evaluations.",
        dpmpp_2m_sde,
        good_steps="10-100",
        stochastic=True,
        options=frozenset({"order"}),
        spacing="karras",
    ),
    Sampler(
        "dpmpp_2s",
        "DPM-Solver++, singlestep: steps in pairs, the second correcting both.",
        "For second order without a history; from twenty evaluations on much like dpmpp_2m.",
        dpmpp_2s,
        good_steps="20-50",
    ),
    Sampler(
        "unipc",
        "A multistep predictor whose every step is corrected after the fact, at no extra evaluation.",
        "As dpmpp_2m, of one order more: its error falls faster as steps are added.",
        unipc,
        good_steps="8-30",
        options=frozenset({"order"}),
        spacing="karras",
    ),
    Sampler(
        "heun",
        "Heun's method: looks where a straight step would lead, and averages both slopes.",
        "A robust solver of second order that keeps no history; two evaluations a step.",
        heun,
        good_steps="10-50",
        evaluations=(2, -1),
        spacing="trailing",  # its second look at t = 0, where the network sees hardly any noise, would spoil the rest
    ),
    Sampler(
        "pndm",
        "Adams-Bashforth: extrapolates the predicted noise from up to four steps; warmup begins with Runge-Kutta.",
        "Smooth and accurate from some thirty steps on; only on evenly spaced levels.",
        pndm,
        good_steps="30-100",
        default_steps=50,
        evaluations=(1, 1),
        options=frozenset({"warmup"}),
        spacings=("leading", "trailing", "linspace"),
    ),
    Sampler(
        "obelm",
        "A two-step scheme of second order that can be walked backwards exactly.",
        "To return from the latent pair that inversion by obelm gives.",
        obelm,
        good_steps="50-100",
        default_steps=50,
        options=frozenset({"paired"}),
    ),
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _TABLE}
