"""``scheduler_config.json``: which of diffusers' schedulers belong to networks that can be served, and their values.

Served are networks that predict ε, v or x_0 at the discrete timesteps of a variance-preserving process. Which solver
the class implements does not matter: requests choose their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from model.checkpoint.facts import CheckpointError, Facts
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.schedule import MAX_T, NoiseSchedule, Prediction, ScheduleError

_SOLVER = {"timestep_spacing": "linspace", "clip_sample": False}
_K_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, **_SOLVER}
# The class, and its defaults where they are not those of DDPMScheduler.
SERVED: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMInverseScheduler": {},
    "PNDMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverMultistepInverseScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": _SOLVER,
    "DPMSolverSDEScheduler": _K_DIFFUSION,
    "DEISMultistepScheduler": _SOLVER,
    "EulerDiscreteScheduler": _SOLVER,
    "EulerAncestralDiscreteScheduler": _SOLVER,
    "HeunDiscreteScheduler": _K_DIFFUSION,
    "KDPM2DiscreteScheduler": _K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _K_DIFFUSION,
    "LMSDiscreteScheduler": _SOLVER,
    "SASolverScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
}
# What others are, by the beginning of the name.
REFUSED = {
    "FlowM": "flow matching",
    "LTXEulerAncestralRF": "rectified flow",
    "Piflow": "flow matching",
    "Helios": "flow matching",
    "MiniMax": "flow matching",
    "SCM": "a consistency model on a trigonometric flow",
    "EDM": "EDM, whose network is conditioned on σ",
    "CosineDPMSolver": "EDM, whose network is conditioned on σ",
    "KarrasVe": "a variance-exploding process (VE), whose network is conditioned on σ",
    "ScoreSdeVe": "a variance-exploding SDE (VE), whose network is conditioned on σ",
    "ScoreSdeVp": "a continuous-time SDE",
    "CMStochasticIterative": "a consistency model",
    "ConsistencyDecoder": "a consistency model",
    "LCM": "a latent consistency model",
    "TCD": "a trajectory consistency model",
    "IPNDM": "a schedule of its own on continuous timesteps",
    "CogVideoX": "a latent video model",
    "DDPMWuerstchen": "a latent model on continuous timesteps",
    "UnCLIP": "a prior of image embeddings",
    "RePaint": "inpainting only; its network is an ordinary one: write DDPMScheduler if it is used without a mask",
    "VQDiffusion": "discrete diffusion of tokens",
    "DiscreteDDIM": "discrete diffusion of tokens",
    "Amused": "discrete diffusion of tokens",
    "BlockRefinement": "discrete diffusion of tokens",
    "EntropyBound": "discrete diffusion of tokens",
}
_SPACINGS = ("leading", "trailing", "linspace")
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its class, and without nulls, which stand for them."""
    given = {key: value for key, value in config.items() if value is not None}
    return SERVED.get(str(config.get("_class_name")), {}) | given


def read_scheduler(file: Path, channels: tuple[int, int]) -> dict[str, Any]:
    """The config as it is written, of a network with so many channels in and out.

    Raises:
        CheckpointError: a class whose networks are not served here, or a value that it does not have.
    """
    facts = Facts.read(file)
    _check_class(facts)
    _check_timesteps(facts)
    _check_network(facts, channels)
    _check_sampling(facts)
    config = complete(facts.content)
    try:
        NoiseSchedule.from_config(config)
        SamplingDefaults.from_config(config)
    except ScheduleError as error:
        raise CheckpointError(file, error.remedy, error.field, error.value) from error
    return facts.content


def _check_class(facts: Facts) -> None:
    name = facts.content.get("_class_name")
    if name is None:
        raise facts.fault("_class_name", f"is missing; name the scheduler, such as {next(iter(SERVED))}")
    if reason := judge_class(name):
        raise facts.fault("_class_name", reason)
    if facts.content.get("predict_epsilon", True) is not True:
        raise facts.fault("predict_epsilon", "is of 2022; set prediction_type to sample instead")
    if facts.content.get("beta_schedule", "linear") is None and not facts.given("trained_betas"):
        raise facts.fault("beta_schedule", "must be the name of a schedule, such as linear")


def judge_class(name: object) -> str | None:
    """Why networks of a scheduler's class are not served; None if they are."""
    if isinstance(name, str) and name in SERVED:
        return None
    what = next((what for start, what in REFUSED.items() if str(name).startswith(start)), "unknown here")
    kinds = "DDPM, DDIM, PNDM, DPM-Solver, DEIS, UniPC, SA-Solver, Euler, Heun, KDPM2 and LMS"
    return f"is {what}; served are networks of diffusers' {kinds} schedulers"


def _check_timesteps(facts: Facts) -> None:
    T = facts.integer("num_train_timesteps", facts.integer("timesteps", 1000, 1, MAX_T, null=True), 1, MAX_T)
    betas = facts.content.get("trained_betas")
    if betas is not None:
        numbers = isinstance(betas, list) and all(type(beta) in (int, float) and 0 < beta < 1 for beta in betas)
        if not numbers or not 1 <= len(betas) <= MAX_T:
            raise facts.fault("trained_betas", f"must be null or a list of 1 to {MAX_T} numbers between 0 and 1")
        if facts.given("num_train_timesteps") and len(betas) != T:
            raise facts.fault("num_train_timesteps", f"there are {len(betas)} trained_betas; both must be as many")
        T = len(betas)
    for key, default in (("beta_start", 1e-4), ("beta_end", 0.02)):
        if not 0 < facts.number(key, default, 0, 1) < 1:
            raise facts.fault(key, "must be a number between 0 and 1")
    facts.flag("rescale_betas_zero_snr", False)
    facts.integer("steps_offset", 0, 0, T - 1)
    facts.flag("set_alpha_to_one", True)


def _check_network(facts: Facts, channels: tuple[int, int]) -> None:
    """What the network predicts, and of what process."""
    if facts.flag("use_flow_sigmas", False):
        raise facts.fault("use_flow_sigmas", f"{_FLOW}; only false is served")
    if facts.flag("use_dynamic_shifting", False):
        raise facts.fault("use_dynamic_shifting", f"{_FLOW}; only false is served")
    if facts.content.get("prediction_type") == "flow_prediction":
        raise facts.fault("prediction_type", f"{_FLOW}; choose one of {', '.join(get_args(Prediction))}")
    facts.choice("prediction_type", "epsilon", get_args(Prediction))
    if facts.choice("timestep_type", "discrete", ("discrete", "continuous")) == "continuous":
        raise facts.fault("timestep_type", "the network is conditioned on σ, as in EDM; only discrete is served")
    if facts.choice("variance_type", "fixed_small", _VARIANCES, null=True) == "learned_range":
        inputs, outputs = channels
        if outputs != 2 * inputs:
            remedy = f"the network has no variance: out_channels is {outputs}, not {2 * inputs}; choose fixed_small"
            raise facts.fault("variance_type", remedy)


def _check_sampling(facts: Facts) -> None:
    """What samplers take from the config."""
    facts.choice("timestep_spacing", "leading", _SPACINGS)
    clips = facts.flag("clip_sample", complete(facts.content).get("clip_sample", True))
    thresholds = facts.flag("thresholding", False)
    if clips or facts.given("clip_sample_range"):
        facts.number("clip_sample_range", 1.0, 0, 1000, above=True)
    if thresholds or facts.given("dynamic_thresholding_ratio"):
        facts.number("dynamic_thresholding_ratio", 0.995, 0, 1, above=True)
    if thresholds or facts.given("sample_max_value"):
        facts.number("sample_max_value", 1.0, 1 if thresholds else 0, 1000, above=not thresholds)


_FLOW = "the network is one of flow matching, which is not served"
