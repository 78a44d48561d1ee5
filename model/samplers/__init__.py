"""Samplers: each a function from (schedule, steps, options) to a Plan, and a line of the table in ``registry``."""

from model.samplers.ancestral import Variance, ddim, ddpm
from model.samplers.belm import obelm
from model.samplers.classical import heun, pndm
from model.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s
from model.samplers.registry import SAMPLERS, Sampler
from model.samplers.unipc import unipc

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
