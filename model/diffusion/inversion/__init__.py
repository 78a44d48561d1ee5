"""Inversions: each a function (schedule, steps, options) to a Plan, and a row of the table in ``registry``."""

from model.diffusion.inversion.methods import ascending_levels, ddim, fixed_point, obelm, residual
from model.diffusion.inversion.registry import INVERSIONS, Inversion

__all__ = ["INVERSIONS", "Inversion", "ascending_levels", "ddim", "fixed_point", "obelm", "residual"]
