"""diffusers on the same weights: the loop of its DDIMPipeline, eager and with its network compiled.

In bfloat16 and channels_last, with the state in bfloat16 as the pipeline keeps it, and without conversion to 8 bits.
The pipeline itself knows no classes, so its loop is written out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.gpu.bench import Bench
from bench.gpu.engine import Loaded
from model.diffusion.noise import draw_noise, seeded_generator

LEAST_SECONDS = 25.0  # with less left, compiling is not tried
LARGEST_DIFFERENCE = 0.1  # between both ε of the same rows, rms over rms: bfloat16 makes 0.01 of it


class LeftOut(Exception):
    """This contestant cannot take part; the message says why."""


@dataclass(frozen=True)
class Pipeline:
    """diffusers' loop.

    Attributes:
        unet: UNet2DModel, as it is or compiled.
        scheduler: DDIMScheduler.
        classes: how many; None for an unconditional network.
    """

    unet: Callable[..., Any]
    scheduler: Any
    device: torch.device
    shape: tuple[int, int, int]
    classes: int | None

    @torch.no_grad()
    def sample(self, width: int, steps: int) -> Tensor:
        """So many images at once, from the first noise to float32 [width, C, H, W] on the CPU."""
        x = torch.stack([draw_noise(seeded_generator(seed), self.shape) for seed in range(width)])
        x = x.to(self.device, torch.bfloat16).contiguous(memory_format=torch.channels_last)
        y = None if self.classes is None else torch.arange(width, device=self.device).remainder(self.classes)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            eps = self.unet(x, t.to(self.device), y).sample
            x = self.scheduler.step(eps, t, x).prev_sample
        return x.float().cpu()


def eager(loaded: Loaded) -> Pipeline:
    """The pipeline as it is.

    Raises:
        LeftOut: diffusers is not installed, or its ε is another.
    """
    try:
        from diffusers import DDIMScheduler, UNet2DModel  # noqa: PLC0415 - may be missing, and takes seconds
    except ImportError as error:
        raise LeftOut(f"not installed: {error}") from error
    unet = UNet2DModel.from_pretrained(  # type: ignore[no-untyped-call]
        loaded.folder / "unet", torch_dtype=torch.bfloat16, low_cpu_mem_usage=False
    )
    unet = unet.to(loaded.runner.device, memory_format=torch.channels_last)
    unet.eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_config(loaded.checkpoint.scheduler_config)  # type: ignore[no-untyped-call]
    pipeline = Pipeline(unet, scheduler, loaded.runner.device, loaded.checkpoint.shape, loaded.classes)
    x, t, y = loaded.inputs(4)
    x, t = x.to(loaded.runner.device), t.to(loaded.runner.device)
    y = None if y is None else y.to(loaded.runner.device)
    with torch.inference_mode():
        ours = loaded.nets.exact(x, t, y)
        theirs = unet(x.to(torch.bfloat16, memory_format=torch.channels_last), t, y).sample.float()
    difference = float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())
    if not difference < LARGEST_DIFFERENCE:
        raise LeftOut(f"its ε is not that of the same weights: {difference:.3g} apart, rms over rms")
    return pipeline


def compiled(bench: Bench, plain: Pipeline, widths: Sequence[int], limit: float) -> tuple[Pipeline, dict[int, float]]:
    """The same with torch.compile, and the seconds that compiling took, for each width that was compiled in time.

    With CUDA graphs (``reduce-overhead``), one for each width; on a CPU only the tracing is tried.

    Raises:
        LeftOut: it failed, or took longer than the limit for the first width.
    """
    if limit < bench.pick(LEAST_SECONDS, 0.0):
        raise LeftOut(f"no time to compile in {limit:.0f} s")
    options: dict[str, Any] = {"mode": "reduce-overhead"} if bench.device.type == "cuda" else {"backend": "eager"}
    torch.compiler.reset()
    quick = replace(plain, unet=torch.compile(plain.unet, dynamic=False, **options))
    took: dict[int, float] = {}
    try:
        with timing.within(limit):
            for width in widths:
                began = time.monotonic()
                quick.sample(width, 4)  # CUDA graphs are recorded in the second and third call
                timing.synchronize(bench.device)
                took[width] = round(time.monotonic() - began, 2)
    except timing.Overrun:
        if not took:
            raise LeftOut(f"not compiled within {limit:.0f} s") from None
    except Exception as error:
        raise LeftOut(f"torch.compile failed: {type(error).__name__}: {error}"[:500]) from error
    return quick, took
