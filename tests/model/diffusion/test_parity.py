import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from model.diffusion import machine
from model.diffusion.levels import hops
from model.diffusion.plan import Clip
from model.diffusion.samplers import ddim, ddpm
from model.diffusion.samplers.ddim import ddim_on, ddpm_on
from model.diffusion.schedule import NoiseSchedule
from model.network.config import UNetConfig
from model.network.unet import UNet
from tests.diffusers_levels import diffusers_hops, diffusers_sample
from tests.fakes import MixtureEps, WithVariance

LINEAR = NoiseSchedule.from_config({})


def draws(seed, shape):
    """An endless stream of noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def float32_schedule(scheduler):
    """Our schedule with diffusers' float32 levels, so that only the arithmetic is compared."""
    return NoiseSchedule(scheduler.alphas_cumprod.double().numpy(), scheduler.config.prediction_type)


def against_diffusers(compile_, scheduler, steps, *, net=MixtureEps, step_options=None, **options):
    """max |ours - diffusers'| of the final sample, [4, 3, 4, 4] in float64."""
    schedule = float32_schedule(scheduler)
    seeds = (0, 1, 2, 2**63)
    x = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (7, 8, 9, 10)]).double()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise():
        return torch.stack([torch.randn(3, 4, 4, generator=g, dtype=torch.float64) for g in generators])

    plan = compile_(schedule, diffusers_hops(scheduler, steps), **options)
    ours = machine.run(net(schedule), plan, x, noise=noise)
    theirs = diffusers_sample(scheduler, steps, net(schedule), x, seeds, **(step_options or {}))
    assert theirs.dtype == torch.float64
    return float((ours - theirs).abs().max())


# diffusers keeps its coefficients in float32 whatever the state is: that alone was measured to make up to 1.6e-5.
PARITY, PARITY_V = 5e-5, 2e-5


@pytest.mark.parametrize("steps", [30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_ddpm_is_diffusers(variance_type, beta_schedule, spacing, steps):
    scheduler = DDPMScheduler(variance_type=variance_type, beta_schedule=beta_schedule, timestep_spacing=spacing)
    learned = variance_type == "learned_range"
    net = (lambda schedule: WithVariance(MixtureEps(schedule))) if learned else MixtureEps
    variance = variance_type.removesuffix("_log")
    assert against_diffusers(ddpm_on, scheduler, steps, net=net, clip=Clip(1.0), variance=variance) < PARITY


CLIPPING = {
    "free": ({"clip_sample": False}, None),
    "clip": ({"clip_sample": True}, Clip(1.0)),
    "clip-0.5": ({"clip_sample": True, "clip_sample_range": 0.5}, Clip(0.5)),
    "threshold-1": ({"thresholding": True, "clip_sample": False}, Clip(1.0, quantile=0.995)),
    "threshold-2": (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
        Clip(2.0, quantile=0.9),
    ),
}


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_of_every_prediction_type_is_diffusers(prediction, clipping):
    config, clip = CLIPPING[clipping]
    scheduler = DDPMScheduler(prediction_type=prediction, **config)
    tolerance = PARITY if prediction == "epsilon" else PARITY_V
    assert against_diffusers(ddpm_on, scheduler, 30, clip=clip) < tolerance


def test_ddpm_with_an_offset_adds_noise_on_the_last_step_as_diffusers():
    scheduler = DDPMScheduler(steps_offset=1, variance_type="fixed_large")
    assert diffusers_hops(scheduler, 50)[-1].noisy
    assert against_diffusers(ddpm_on, scheduler, 50, variance="fixed_large", clip=Clip(1.0)) < PARITY
    assert not hops(LINEAR, 50)[-1].noisy  # ours never does


@pytest.mark.parametrize("steps", [30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False], ids=["to-clean", "to-abar-0"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers(eta, set_alpha_to_one, spacing, steps):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=set_alpha_to_one, timestep_spacing=spacing)
    assert against_diffusers(ddim_on, scheduler, steps, step_options={"eta": eta}, eta=eta) < PARITY


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rederive", [False, True], ids=["raw", "rederive"])
def test_ddim_clipped_is_diffusers(rederive, prediction, clipping):
    config, clip = CLIPPING[clipping]
    scheduler = DDIMScheduler(prediction_type=prediction, **config)
    step_options = {"eta": 0.5, "use_clipped_model_output": rederive}
    difference = against_diffusers(
        ddim_on, scheduler, 30, step_options=step_options, eta=0.5, clip=clip, rederive=rederive
    )
    assert difference < (PARITY if prediction == "epsilon" else PARITY_V)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [30, 50])
def test_ddim_on_other_schedules_is_diffusers(steps, beta_schedule):
    scheduler = DDIMScheduler(beta_schedule=beta_schedule)
    assert against_diffusers(ddim_on, scheduler, steps, clip=Clip(1.0), rederive=False) < PARITY


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_from_pure_noise_is_diffusers(eta):
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    assert diffusers_hops(scheduler, 50)[0].abar == 0
    assert against_diffusers(ddim_on, scheduler, 50, step_options={"eta": eta}, eta=eta) < PARITY_V


@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize(
    ("sampler", "on_hops", "scheduler_class"),
    [(ddim, ddim_on, DDIMScheduler), (ddpm, ddpm_on, DDPMScheduler)],
    ids=["ddim", "ddpm"],
)
def test_our_own_hops_are_those_of_diffusers_where_steps_divide_T(sampler, on_hops, scheduler_class, steps):
    # What users get. Where N divides T and the spacing is leading, none of diffusers' quirks shows.
    scheduler = scheduler_class()
    schedule = float32_schedule(scheduler)
    ours, theirs = (
        sampler(schedule, steps, clip=Clip(1.0)),
        on_hops(schedule, diffusers_hops(scheduler, steps), clip=Clip(1.0)),
    )
    assert ours.digest == theirs.digest
    assert np.max(np.abs(np.nan_to_num(ours.table(1) - theirs.table(1)))) == 0
    # Our levels are float64 from the config, diffusers' float32: 4e-7 relative, times 1/α = 157 at most.
    precise = sampler(LINEAR, steps, clip=Clip(1.0))
    assert [step.t for step in precise.steps] == [step.t for step in theirs.steps]
    x = draws(11, (2, 1, 2, 2))()
    net = MixtureEps(LINEAR)
    ends = [machine.run(net, plan, x, noise=draws(12, x.shape)) for plan in (precise, theirs)]
    assert (ends[0] - ends[1]).abs().max() < PARITY


def test_the_hops_of_diffusers_differ_where_it_has_quirks():
    # Without these the parity tests above would prove little: the hops must really be others.
    linspace = DDIMScheduler(timestep_spacing="linspace")
    found = diffusers_hops(linspace, 30)
    assert found[0].abar_next == float(linspace.alphas_cumprod[999 - 33])
    assert found[1].t == 965  # and not 966, where the first hop ended
    assert diffusers_hops(DDIMScheduler(set_alpha_to_one=False), 50)[-1].abar_next < 1
    assert all(hop.noisy for hop in diffusers_hops(DDIMScheduler(), 50))


def tiny_unets():
    """Our UNet and diffusers', with the same weights."""
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    ours, theirs = UNet(config).eval(), UNet2DModel.from_config(config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@torch.inference_mode()
@pytest.mark.parametrize(
    ("plan", "scheduler", "options"),
    [
        (ddpm(LINEAR, 20, clip=Clip(1.0)), DDPMScheduler(), {}),
        (ddim(LINEAR, 20, eta=0.5, clip=Clip(1.0), rederive=False), DDIMScheduler(), {"eta": 0.5}),
    ],
    ids=["ddpm", "ddim"],
)
def test_a_seed_means_here_what_it_means_in_diffusers(plan, scheduler, options):
    ours, theirs = tiny_unets()
    seeds = [0, 41, 2**32 + 1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(theirs(x, t).sample, t, x, generator=generators, **options).prev_sample
    # float32 throughout: an x̂0 at the top is 157 times a rounding of 1e-7, and 20 steps add up. Other noise gives 1.
    assert (machine.sample(ours, plan, seeds, (1, 8, 8)) - x).abs().max() < 1e-4
