"""The table of inversions: what a user should know of each. `/model`, `/docs` and the README all show these entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from model.diffusion.inversion import methods as inversion
from model.diffusion.plan import Plan


@dataclass(frozen=True)
class Inversion:
    """What a user should know of an inversion, and the function behind it.

    Attributes:
        what: it is, in one plain sentence.
        when: to use it, in another.
        compile: (schedule, steps, spacing=, and the options) to a Plan that ends in the latent.
        sampler: the one that leads back, with the same steps and spacing, and without clipping.
        evaluations: what N steps cost, as a formula.
        slots: how many states the latent has; 2 are a pair of shape [2, C, H, W].
        options: names of the request fields that only some methods take and this one does.
        back: what the sampler's ``compile`` is told, too.
        residual: from all slots of the walk's end, [B, R, C, H, W], by how much each misses the exact one; None if that
            is not known.
        ordinary: range of x_T's mean square for held-out images and both shipped checkpoints, from 20 steps on.
    """

    name: str
    what: str
    when: str
    compile: Callable[..., Plan]
    sampler: str
    evaluations: str = "N"
    slots: int = 1
    options: frozenset[str] = frozenset()
    back: dict[str, Any] = field(default_factory=dict)
    residual: Callable[[Tensor], Tensor] | None = None
    ordinary: tuple[float, float] = (0.6, 1.15)

    @property
    def summary(self) -> str:
        """The entry in one line."""
        return f"{self.what} {self.when} ({self.evaluations} evaluations for N steps)"


_TABLE = (
    Inversion(
        "fixed_point",
        "Solves each step of ddim backwards, by iteration.",
        "The one to start with: an ordinary x_T, from which ddim returns nearly to the last bit of a pixel.",
        inversion.fixed_point,
        "ddim",
        evaluations="N(K + 1)",
        options=frozenset({"refinements"}),
        residual=inversion.residual,
    ),
    Inversion(
        "ddim",
        "Walks ddim backwards, taking the noise of each step from where it stands.",
        "For a quick code that need not return to the image exactly, and for comparison with others.",
        inversion.ddim,
        "ddim",
        ordinary=(0.2, 1.15),
    ),
    Inversion(
        "obelm",
        "Walks a two-step scheme backwards that can be undone exactly; its latent is a pair of states.",
        "To get every pixel back; as a code for editing the pair is less like noise than fixed_point's x_T.",
        inversion.obelm,
        "obelm",
        slots=2,
        back={"paired": True},
        ordinary=(0.6, 4.0),
    ),
)
INVERSIONS: dict[str, Inversion] = {method.name: method for method in _TABLE}
