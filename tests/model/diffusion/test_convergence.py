"""How fast solvers approach the exact flow of data whose flow is known; whether the noisy ones draw from such data."""

import math

import numpy as np
import pytest
import torch

from model.diffusion import machine
from model.diffusion.levels import noise_levels
from model.diffusion.samplers import SAMPLERS, dpmpp_2m_sde
from model.diffusion.samplers.classical import heun_on
from model.diffusion.samplers.ddim import ddim_on
from model.diffusion.samplers.dpmpp import dpmpp_2m_on, dpmpp_2s_on
from model.diffusion.samplers.obelm import obelm_on
from model.diffusion.samplers.unipc import unipc_on
from tests.fakes import GaussianEps, MixtureEps
from tests.oracles import even_in_lambda, hops_between, mixture_cdf, mixture_flow, rising
from tests.plans import LINEAR, draws, pixels

# Order of convergence: levels evenly spaced in λ from t = 999 to t = 0, no step to the clean image, where λ = ∞, and
# the same order in all steps but the first ones, which have no history.


def even(compile_):
    """A plan of a sampler without a history, by its number of steps."""
    return lambda n: compile_(LINEAR, even_in_lambda(LINEAR, n))


def dpmpp_2m(order):
    return lambda n: dpmpp_2m_on(LINEAR, even_in_lambda(LINEAR, n), rising(order, n), slots=order)


def unipc(order):
    return lambda n: unipc_on(LINEAR, even_in_lambda(LINEAR, n), rising(order, n), history=order)


# From a separate computation in float64: the slope of the error, and the error at 80 steps where it is printed.
ORDERS = {
    "ddim": (lambda n: ddim_on(LINEAR, hops_between(even_in_lambda(LINEAR, n))), 0.99, 1.93e-2),
    "dpmpp_2m-1": (dpmpp_2m(1), 0.99, 1.93e-2),
    "dpmpp_2m": (dpmpp_2m(2), 2.00, 5.9e-4),
    "dpmpp_2s": (even(dpmpp_2s_on), 2.00, None),
    "unipc-1": (unipc(1), 2.00, None),
    "unipc": (unipc(2), 3.00, 9.5e-5),
    "unipc-3": (unipc(3), 3.90, None),
    "heun": (even(heun_on), 2.01, 1.2e-3),
    "obelm": (even(obelm_on), 2.00, 1.2e-3),
}


def gaussian_error(plan, mu=0.3, s=0.5, x_T=1.3):
    """Against the exact flow of Gaussian data, which keeps x's distance from the mean in standard deviations."""
    abar_T, abar = LINEAR.alphas_cumprod[[-1, 0]]
    v_T, v = (a * s**2 + 1 - a for a in (abar_T, abar))
    exact = math.sqrt(abar) * mu + math.sqrt(v / v_T) * (x_T - math.sqrt(abar_T) * mu)
    return abs(float(machine.run(GaussianEps(LINEAR, mu, s), plan, pixels([x_T]))) - exact)


def slope(coarse, fine):
    """-d ln(error) / d ln(steps), between 80 and 320 of them."""
    return math.log(coarse / fine) / math.log(4)


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    compile_, order, at_80 = ORDERS[name]
    coarse, fine = gaussian_error(compile_(80)), gaussian_error(compile_(320))
    assert abs(slope(coarse, fine) - order) < 0.15
    if at_80 is not None:
        assert coarse == pytest.approx(at_80, rel=0.04)  # printed with two digits


def test_order_3_of_dpmpp_2m_gains_without_being_of_third_order():
    # The authors' code gives the second difference half the weight of a parabola's: slope 2 remains, the error shrinks.
    third, second = ([gaussian_error(dpmpp_2m(order)(n)) for n in (80, 320)] for order in (3, 2))
    assert slope(*third) > 1.85
    assert third[0] < second[0] / 2
    assert third[1] < second[1] / 2


X_T = (-2, -1, -0.3, 0.1, 0.4, 1.2, 2.1)


def mixture_error(plan):
    end = machine.run(MixtureEps(LINEAR), plan, pixels(X_T)).flatten().tolist()
    abar_T, abar = LINEAR.alphas_cumprod[[-1, 0]]
    return max(abs(x - mixture_flow(x_T, abar_T, abar)) for x, x_T in zip(end, X_T, strict=True))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1.00), ("dpmpp_2m", 1.97), ("unipc", 3.1)])
def test_order_of_convergence_on_a_mixture(name, order):
    compile_, *_ = ORDERS[name]
    assert abs(slope(mixture_error(compile_(80)), mixture_error(compile_(320))) - order) < 0.15


def test_the_exact_flow_is_the_printed_one():
    printed = (-0.768982, -0.647482, -0.527942, 0.218863, 0.401443, 0.647763, 0.860589)
    found = [mixture_flow(x, LINEAR.alphas_cumprod[999]) for x in X_T]
    assert max(abs(a - b) for a, b in zip(found, printed, strict=True)) < 6e-7


# Each must beat ddim, whose largest errors are .046 at 50 steps and .024 at 100.
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s", "unipc", "heun", "pndm", "obelm"])
def test_solvers_approach_the_exact_flow(name):
    errors = []
    for steps in (25, 50, 100):
        plan = SAMPLERS[name].compile(LINEAR, steps, spacing=SAMPLERS[name].spacing)
        abar = noise_levels(LINEAR, steps, SAMPLERS[name].spacing)[0].abar
        end = machine.run(MixtureEps(LINEAR), plan, pixels(X_T)).flatten().tolist()
        errors.append(max(abs(x - mixture_flow(x_T, abar)) for x, x_T in zip(end, X_T, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.046
    assert errors[2] < 0.024


def kolmogorov_smirnov(samples):
    """The largest distance between the samples' distribution and the mixture's own."""
    x = np.sort(np.asarray(samples))
    exact = np.array([mixture_cdf(value, 1.0) for value in x])
    steps = np.arange(len(x) + 1) / len(x)
    return max(np.max(steps[1:] - exact), np.max(exact - steps[:-1]))


def test_dpmpp_2m_sde_draws_from_the_mixture():
    distances = {}
    for steps in (10, 50):
        noise = draws(1, (20_000, 1, 1, 1), torch.float32)
        plan = dpmpp_2m_sde(LINEAR, steps, spacing="karras")
        x = machine.run(MixtureEps(LINEAR), plan, noise(), noise=noise).flatten().double()
        distances[steps] = kolmogorov_smirnov(x)
    # For 50 steps .08 would do; this solver reaches .008, and chance alone 1.36 / √20000 = .0096.
    assert distances[50] < 0.02
    assert distances[10] > 2 * distances[50]
    # Of the last x: mean -.05 and variance .3275, each with 4 standard errors and some bias of 50 steps.
    assert abs(float(x.mean()) + 0.05) < 4 * math.sqrt(0.3275 / 20_000)
    assert abs(float(x.var()) - 0.3275) < 0.01
    assert abs(float((x < 0).double().mean()) - 0.5031) < 4 * 0.5 / math.sqrt(20_000)
