"""What tests of plans share: two schedules, every sampler in every variant, reproducible noise, and guidance."""

from __future__ import annotations

from functools import partial

import torch

from model.diffusion import machine
from model.diffusion.guidance import Guidance
from model.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, pndm, unipc
from model.diffusion.schedule import NoiseSchedule
from tests.fakes import MixtureEps

LINEAR = NoiseSchedule.from_config({})
COSINE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
# Every sampler in every variant that has other coefficients.
VARIANTS = {
    **{name: sampler.compile for name, sampler in SAMPLERS.items()},
    "ddim-eta": partial(ddim, eta=0.6),
    "ddpm-large": partial(ddpm, variance="fixed_large"),
    "dpmpp_2m-1": partial(dpmpp_2m, order=1),
    "dpmpp_2m-3": partial(dpmpp_2m, order=3),
    "dpmpp_2m_sde-1": partial(dpmpp_2m_sde, order=1),
    "unipc-1": partial(unipc, order=1),
    "unipc-3": partial(unipc, order=3),
    "pndm-warmup": partial(pndm, warmup=True),
}


def pixels(values, dtype=torch.float64):
    """[B, 1, 1, 1]: one trajectory per value."""
    return torch.as_tensor(values, dtype=dtype).reshape(-1, 1, 1, 1)


def draws(seed, shape, dtype=torch.float64):
    """An endless stream of noise."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


def sample_each(*plans, seed=2):
    """The results of several plans from the same noise."""
    x = draws(seed, (4, 1, 2, 2))()
    return [machine.run(MixtureEps(LINEAR), plan, x, noise=draws(3, x.shape)) for plan in plans]


def guide(net, scale, null):
    """The network with :class:`Guidance`, in one forward, as the engine has it; ``null`` is a class, or its weights."""
    guidance = Guidance(scale, torch.device("cpu"))

    def forward(u, t, y):
        classes = guidance.append_copies(y)
        classes[len(y) :] = null
        output = net(guidance.append_copies(u), guidance.append_copies(t), classes)
        return guidance.combine(output, u.shape[1])

    return forward
