"""The table of samplers. `/model`, `/docs` and the documentation show these entries."""

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
    """A sampler and its description.

    Attributes:
        what: the sampler is, in one sentence.
        when: to use it, in one sentence.
        compile: (schedule, steps, spacing=, clip=, and the options) to a Plan.
        good_steps: recommended range; T is the number of timesteps in training.
        default_steps: None stands for T.
        evaluations: (a, b): a · steps + b network evaluations, with default options.
        stochastic: whether it draws noise after x_T, with default options.
        options: names of the request fields that it takes and not every sampler does.
        spacings: those that it supports.
        spacing: the default; None leaves it to the checkpoint.
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
    def nfe_formula(self) -> str:
        """Network evaluations for N steps."""
        a, b = self.evaluations
        return ("N" if a == 1 else f"{a}N") + (f" {'+' if b > 0 else '-'} {abs(b)}" if b else "")

    @property
    def summary(self) -> str:
        """What, when, and its cost, in one line."""
        kind = "stochastic" if self.stochastic else "deterministic"
        return (
            f"{self.what} {self.when} ({kind}; {self.nfe_formula} evaluations for N steps; good with {self.good_steps})"
        )


_TABLE = (
    Sampler(
        "ddim",
        "Follows the probability flow in first-order steps; eta > 0 adds fresh noise, up to ddpm's at 1.",
        "The one to start with, and the one whose latents can be edited and inverted.",
        ddim,
        good_steps="20-100",
        default_steps=50,
        options=frozenset({"eta"}),
    ),
    Sampler(
        "ddpm",
        "The original ancestral sampling, with fresh noise at every step.",
        "For the reference result, at all T steps; the others need fewer.",
        ddpm,
        good_steps="100-T",
        default_steps=None,
        stochastic=True,
        options=frozenset({"variance"}),
    ),
    Sampler(
        "dpmpp_2m",
        "DPM-Solver++, multistep: extrapolates the predicted image from earlier steps.",
        "For good images in the fewest evaluations, deterministically; order 3 seldom helps.",
        dpmpp_2m,
        good_steps="10-30",
        options=frozenset({"order"}),
        spacing="karras",
    ),
    Sampler(
        "dpmpp_2m_sde",
        "The same solver with fresh noise at every step.",
        "Where fresh noise should correct the network's errors, as in ddpm, with a tenth of its evaluations.",
        dpmpp_2m_sde,
        good_steps="10-100",
        stochastic=True,
        options=frozenset({"order"}),
        spacing="karras",
    ),
    Sampler(
        "dpmpp_2s",
        "DPM-Solver++, singlestep: steps in pairs, the second correcting both.",
        "For second order without a history; from twenty evaluations on close to dpmpp_2m.",
        dpmpp_2s,
        good_steps="20-50",
    ),
    Sampler(
        "unipc",
        "A multistep predictor whose every step is corrected after the fact, at no extra evaluation.",
        "As dpmpp_2m, of one order more: its error falls faster with the number of steps.",
        unipc,
        good_steps="8-30",
        options=frozenset({"order"}),
        spacing="karras",
    ),
    Sampler(
        "heun",
        "Heun's method: averages the slopes at both ends of each step.",
        "A robust second-order solver that keeps no history; two evaluations a step.",
        heun,
        good_steps="10-50",
        evaluations=(2, -1),
        spacing="trailing",  # leading would evaluate twice at t = 0, where there is hardly any noise to predict
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
        "A two-step scheme of second order with an exact inverse.",
        "To decode the latent pair that inversion by obelm gives.",
        obelm,
        good_steps="50-100",
        default_steps=50,
        options=frozenset({"paired"}),
    ),
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _TABLE}
