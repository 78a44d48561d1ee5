"""SamplingDefaults: the options of samplers that a checkpoint's scheduler config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.diffusion.plan import Clip
from model.diffusion.samplers import Sampler, Variance
from model.diffusion.schedule import ScheduleError, Spacing, covering_spacing


@dataclass(frozen=True)
class SamplingDefaults:
    """Clipping, spacing and variance that a checkpoint's scheduler config asks for.

    Attributes:
        clip: what is done to x̂0.
        clip_limit: ``clip_sample_range``, for requests that ask for clipping themselves.
        spacing: of samplers that prefer none.
        variance: of samplers that have the option.
    """

    clip: Clip | None = None
    clip_limit: float = 1.0
    spacing: Spacing = "leading"
    variance: Variance = "fixed_small"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Read a diffusers ``scheduler_config.json``.

        Raises:
            ScheduleError: unknown ``variance_type``.
        """
        limit = float(config.get("clip_sample_range", 1.0))
        clip = Clip(limit) if config.get("clip_sample", True) else None
        if config.get("thresholding"):
            clip = Clip(
                float(config.get("sample_max_value", 1.0)), float(config.get("dynamic_thresholding_ratio", 0.995))
            )
        variance = str(config.get("variance_type", "fixed_small")).removesuffix("_log")
        if variance not in ("fixed_small", "fixed_large", "learned_range"):
            raise ScheduleError("variance_type", variance, "choose fixed_small, fixed_large or learned_range")
        return cls(clip, limit, config.get("timestep_spacing", "leading"), variance)  # type: ignore[arg-type]

    def variance_for(self, steps: int, T: int) -> Variance:
        """The trained variance; but ``fixed_large`` is unusable with fewer than T steps (DDIM, table 1, σ̂)."""
        return "fixed_small" if self.variance == "fixed_large" and steps < T else self.variance

    def options(self, sampler: Sampler, steps: int, T: int) -> dict[str, Any]:
        """Options of ``sampler.compile`` that a request leaves open: spacing, clip and variance."""
        preferred = sampler.spacing or self.spacing
        if preferred not in sampler.spacings:
            preferred = "leading"
        options: dict[str, Any] = {"spacing": covering_spacing(T, steps, preferred), "clip": self.clip}
        if "variance" in sampler.options:
            options["variance"] = self.variance_for(steps, T)
        return options
