"""The table of inversions. `/model`, `/docs` and the documentation show these entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from model.diffusion.inversion import methods
from model.diffusion.plan import Plan


@dataclass(frozen=True)
class Inversion:
    """An inversion and its description.

    Attributes:
        what: the inversion does, in one sentence.
        when: to use it, in one sentence.
        compile: (schedule, steps, spacing=, and the options) to a Plan that ends in the latent.
        sampler: that decodes the latent, with the same steps and spacing, and without clipping.
        nfe_formula: network evaluations for N steps.
        slots: number of states in the latent; 2 are a pair of shape [2, C, H, W].
        options: names of the request fields that it takes and not every inversion does.
        residual: from the final slots [B, R, C, H, W] to the error of each inversion; None if it cannot be known.
        ordinary: range of x_T's mean square for held-out images and both shipped checkpoints, from 20 steps on;
            a pair of states needs about 50.
    """

    name: str
    what: str
    when: str
    compile: Callable[..., Plan]
    sampler: str
    nfe_formula: str = "N"
    slots: int = 1
    options: frozenset[str] = frozenset()
    residual: Callable[[Tensor], Tensor] | None = None
    ordinary: tuple[float, float] = (0.6, 1.15)

    def nfe(self, steps: int, refinements: int = 3) -> int:
        """Network evaluations of its plan, before that is compiled."""
        return steps * (1 + refinements) if "refinements" in self.options else steps

    def decode_nfe(self, steps: int) -> int:
        """The same of decoding: a pair of states saves the first evaluation."""
        return steps - (self.slots - 1)

    @property
    def summary(self) -> str:
        """What, when, and its cost, in one line."""
        return f"{self.what} {self.when} ({self.nfe_formula} evaluations for N steps)"


_TABLE = (
    Inversion(
        "fixed_point",
        "Inverts each step of ddim by fixed-point iteration.",
        "The one to start with: an ordinary x_T, which ddim decodes to nearly every bit of every pixel.",
        methods.fixed_point,
        "ddim",
        nfe_formula="N(K + 1)",
        options=frozenset({"refinements"}),
        residual=methods.residual,
    ),
    Inversion(
        "ddim",
        "Runs ddim backwards, with the ε of each step taken at its start.",
        "For a fast latent that need not decode to the image exactly, and for comparison.",
        methods.ddim,
        "ddim",
        ordinary=(0.2, 1.15),
    ),
    Inversion(
        "obelm",
        "Runs the two-step scheme of sampler obelm backwards, which is exact; its latent is a pair of states.",
        "To get every pixel back; for editing, the pair is less like noise than fixed_point's x_T.",
        methods.obelm,
        "obelm",
        slots=2,
        ordinary=(0.6, 4.0),
    ),
)
INVERSIONS: dict[str, Inversion] = {method.name: method for method in _TABLE}
