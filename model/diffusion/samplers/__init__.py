"""Samplers: each a function (schedule, steps, options) to a Plan, and a row of the table in ``registry``.

Where ``heun`` takes a number of steps, ``classical.heun_on`` takes the levels themselves; so for all of them.
"""

from model.diffusion.samplers.classical import heun, pndm
from model.diffusion.samplers.ddim import Variance, ddim, ddpm
from model.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s
from model.diffusion.samplers.obelm import obelm
from model.diffusion.samplers.registry import SAMPLERS, Sampler
from model.diffusion.samplers.unipc import unipc

__all__ = [
    "SAMPLERS",
    "Sampler",
    "Variance",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "heun",
    "obelm",
    "pndm",
    "unipc",
]
