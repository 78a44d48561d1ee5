from functools import partial

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from model.diffusion import inversion, machine
from model.diffusion.levels import noise_levels
from model.diffusion.plan import Clip
from model.diffusion.samplers.classical import heun_on, pndm_on
from model.diffusion.samplers.dpmpp import dpmpp_2m_on, dpmpp_2m_sde_on, dpmpp_2s_on, step_orders
from model.diffusion.samplers.unipc import unipc_on
from model.diffusion.schedule import NoiseSchedule
from tests.diffusers_levels import diffusers_levels, diffusers_pndm_levels, diffusers_sample
from tests.fakes import GaussianEps, MixtureEps
from tests.oracles import rising

# It makes arrays of tensors in a way that numpy 2 will give up.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# diffusers keeps its coefficients in float32 whatever the state is. Measured beforehand: 2.3e-6 for DPM++,
# 6e-7 for UniPC on the linear schedule and 1.5e-4 on the cosine, whose σ/α reaches 2e4, 8e-8 for Heun and 5e-8 for the
# inverse of DDIM. PNDM gets 1.1e-5 here, in 10 steps from t = 999, where ε counts 157 times.
PARITY, PARITY_COSINE, PARITY_PNDM, PARITY_HEUN, PARITY_INVERSE = 1e-5, 5e-4, 2e-5, 1e-6, 1e-6
SEEDS = (0, 1, 2, 2**63)


def start():
    latents = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8, 9, 10)]
    return torch.stack(latents).double()


def float32_schedule(scheduler):
    """Our schedule with diffusers' float32 levels, so that only the arithmetic is compared."""
    return NoiseSchedule(scheduler.alphas_cumprod.double().numpy(), scheduler.config.prediction_type)


def dpmpp_2m(schedule, levels, order=2, **options):
    return dpmpp_2m_on(schedule, levels, step_orders(levels, order), slots=order, **options)


def dpmpp_2m_sde(schedule, levels, order=2, **options):
    return dpmpp_2m_sde_on(schedule, levels, step_orders(levels, order), slots=order, **options)


def unipc(schedule, levels, order=2, **options):
    return unipc_on(schedule, levels, step_orders(levels, order, few=len(levels)), history=order, **options)


def against_diffusers(compile_, scheduler, steps, *, net=MixtureEps, levels=diffusers_levels, schedule=None):
    """max |ours - diffusers'| of the final sample, [4, 3, 4, 4] in float64."""
    schedule, x = schedule or float32_schedule(scheduler), start()
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def noise():
        return torch.stack([torch.randn(3, 4, 4, generator=g) for g in generators]).double()  # DPM++ draws float32

    plan = compile_(schedule, levels(scheduler, steps))
    ours = machine.run(net(schedule), plan, x, noise=noise)
    theirs = diffusers_sample(scheduler, steps, net(schedule), x, SEEDS if plan.stochastic else None)
    assert theirs.dtype == torch.float64
    return float((ours - theirs).abs().max())


KARRAS = {"use_karras_sigmas": True}
LEADING, TRAILING, LINSPACE = ({"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace"))
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
DDPM_BETAS = {"beta_start": 1e-4, "beta_end": 0.02}  # HeunDiscreteScheduler has others by default
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
GRIDS = [LEADING, TRAILING, LINSPACE, KARRAS]
ENDS_ABOVE_CLEAN = [LEADING | SIGMA_MIN, TRAILING | SIGMA_MIN, LINSPACE | SIGMA_MIN]  # karras does so already


def named(config):
    return "-".join(map(str, config.values())) if isinstance(config, dict) else None


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("config", GRIDS + ENDS_ABOVE_CLEAN, ids=named)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_2m_is_diffusers(order, config, steps):
    scheduler = DPMSolverMultistepScheduler(solver_order=order, **config)
    assert against_diffusers(partial(dpmpp_2m, order=order), scheduler, steps) < PARITY


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("config", [LEADING, LINSPACE, KARRAS, LINSPACE | SIGMA_MIN], ids=named)
@pytest.mark.parametrize("order", [1, 2])
def test_dpmpp_2m_sde_is_diffusers(order, config, steps):
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=order, **config)
    assert against_diffusers(partial(dpmpp_2m_sde, order=order), scheduler, steps) < PARITY


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize(
    ("compile_", "algorithm"), [(dpmpp_2m, "dpmsolver++"), (dpmpp_2m_sde, "sde-dpmsolver++")], ids=["2m", "sde"]
)
def test_dpmpp_with_clipped_lambda_is_diffusers(compile_, algorithm, steps):
    scheduler = DPMSolverMultistepScheduler(lambda_min_clipped=-5.1, algorithm_type=algorithm, **COSINE)
    assert diffusers_levels(scheduler, steps)[0].t == 995  # the clip left four timesteps out
    assert against_diffusers(compile_, scheduler, steps) < PARITY


def test_dpmpp_that_keeps_its_order_to_the_end_is_diffusers():
    scheduler = DPMSolverMultistepScheduler(solver_order=3, lower_order_final=False, **SIGMA_MIN)

    def keeping(schedule, levels):
        return dpmpp_2m_on(schedule, levels, rising(3, 10), slots=3)

    assert against_diffusers(keeping, scheduler, 10) < PARITY
    assert against_diffusers(partial(dpmpp_2m, order=3), scheduler, 10) > 100 * PARITY


@pytest.mark.parametrize("steps", [10, 11, 20, 21])
@pytest.mark.parametrize("config", [{}, KARRAS, COSINE | {"lambda_min_clipped": -5.1}], ids=named)
def test_dpmpp_2s_is_diffusers(config, steps):
    scheduler = DPMSolverSinglestepScheduler(lower_order_final=True, **config)
    assert against_diffusers(dpmpp_2s_on, scheduler, steps) < PARITY


def test_dpmpp_2s_that_ends_above_the_clean_image_is_diffusers():
    scheduler = DPMSolverSinglestepScheduler(lower_order_final=False, **SIGMA_MIN)
    assert against_diffusers(dpmpp_2s_on, scheduler, 20) < PARITY


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("config", GRIDS + ENDS_ABOVE_CLEAN + [LINSPACE | COSINE], ids=named)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers(order, config, steps):
    scheduler = UniPCMultistepScheduler(solver_order=order, **config)
    tolerance = PARITY_COSINE if "beta_schedule" in config else PARITY
    assert against_diffusers(partial(unipc, order=order), scheduler, steps) < tolerance


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("config", GRIDS, ids=named)
def test_heun_is_diffusers(config, steps):
    assert against_diffusers(heun_on, HeunDiscreteScheduler(**DDPM_BETAS, **config), steps) < PARITY_HEUN


def test_heun_clipped_is_diffusers():
    scheduler = HeunDiscreteScheduler(clip_sample=True, clip_sample_range=0.5)
    assert against_diffusers(partial(heun_on, clip=Clip(0.5)), scheduler, 20) < PARITY_HEUN
    assert against_diffusers(heun_on, scheduler, 20) > 0.05


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_clean", [True, False], ids=["to-clean", "to-abar-0"])
@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "plms"])
def test_pndm_is_diffusers(warmup, to_clean, spacing, steps):
    # T // N is even: of an odd one diffusers takes the half rounded down, and we the middle of t rounded down.
    scheduler = PNDMScheduler(skip_prk_steps=not warmup, set_alpha_to_one=to_clean, timestep_spacing=spacing)
    compile_ = partial(pndm_on, warmup=warmup)
    assert against_diffusers(compile_, scheduler, steps, levels=diffusers_pndm_levels) < PARITY_PNDM
    assert len(scheduler.timesteps) == steps + (9 if warmup else 1)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    ("compile_", "scheduler_class", "config"),
    [
        (dpmpp_2m, DPMSolverMultistepScheduler, {}),
        (dpmpp_2m_sde, DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (dpmpp_2s_on, DPMSolverSinglestepScheduler, {"lower_order_final": True}),
        (unipc, UniPCMultistepScheduler, {}),
        (heun_on, HeunDiscreteScheduler, {}),
    ],
    ids=["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "heun"],
)
def test_other_prediction_types_are_diffusers(compile_, scheduler_class, config, prediction):
    scheduler = scheduler_class(prediction_type=prediction, **config)
    assert against_diffusers(compile_, scheduler, 20) < PARITY


@pytest.mark.parametrize(
    ("compile_", "scheduler_class", "config"),
    [
        (dpmpp_2m, DPMSolverMultistepScheduler, {}),
        (dpmpp_2m_sde, DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (dpmpp_2s_on, DPMSolverSinglestepScheduler, {"lower_order_final": True}),
        (unipc, UniPCMultistepScheduler, {}),
    ],
    ids=["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc"],
)
def test_thresholding_is_diffusers(compile_, scheduler_class, config):
    scheduler = scheduler_class(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5, **config)

    def wide(schedule):
        return GaussianEps(schedule, 0.4, 1.5)  # whose x̂0 is mostly outside [-1, 1]

    thresholded = partial(compile_, clip=Clip(1.5, quantile=0.9))
    assert against_diffusers(thresholded, scheduler, 20, net=wide) < PARITY
    assert against_diffusers(compile_, scheduler, 20, net=wide) > 0.1


@pytest.mark.parametrize("compile_", [dpmpp_2m, unipc])
def test_from_pure_noise_is_diffusers(compile_):
    # Both replace ᾱ = 0 by 2^-24; so do we in the levels that we make ourselves.
    scheduler_class = DPMSolverMultistepScheduler if compile_ is dpmpp_2m else UniPCMultistepScheduler
    scheduler = scheduler_class(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert (
        abs(diffusers_levels(scheduler, 20)[0].abar / noise_levels(ours, 20, "trailing")[0].abar - 1) < 1e-6
    )  # float32
    assert against_diffusers(compile_, scheduler, 20, schedule=ours) < PARITY


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_by_ddim_is_diffusers(spacing, steps):
    scheduler = DDIMInverseScheduler(clip_sample=False, timestep_spacing=spacing)

    def inverse(time):
        return lambda schedule, _: inversion.ddim(schedule, steps, time=time, spacing=spacing)

    assert against_diffusers(inverse("target"), scheduler, steps, levels=lambda *_: None) < PARITY_INVERSE
    assert against_diffusers(inverse("source"), scheduler, steps, levels=lambda *_: None) > 1e-3


@pytest.mark.parametrize(
    ("spacing", "steps", "scheduler_class", "config"),
    [
        ("trailing", 20, DPMSolverMultistepScheduler, TRAILING),
        ("trailing", 30, DPMSolverMultistepScheduler, TRAILING),
        ("trailing", 20, UniPCMultistepScheduler, TRAILING),
        ("leading", 20, HeunDiscreteScheduler, LEADING | DDPM_BETAS),
        ("trailing", 30, HeunDiscreteScheduler, TRAILING | DDPM_BETAS),
        ("karras", 20, HeunDiscreteScheduler, KARRAS | DDPM_BETAS),
    ],
)
def test_our_own_levels_are_those_of_diffusers(spacing, steps, scheduler_class, config):
    # What users get. linspace and leading differ for DPM++ and UniPC, whose grids are of N + 1 steps less one.
    theirs, ours = (
        diffusers_levels(scheduler_class(**config), steps),
        noise_levels(NoiseSchedule.from_config({}), steps, spacing),
    )
    assert len(ours) == len(theirs) == steps + 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.t == pytest.approx(other.t, abs=1e-2)  # karras interpolates t in float32 levels
        assert 1 - mine.abar == pytest.approx(1 - other.abar, rel=1e-3)  # 1 - ᾱ is 1e-4 at t = 0, from float32 ᾱ
        assert mine.abar == pytest.approx(other.abar, rel=1e-4)  # karras spreads that error over all levels
