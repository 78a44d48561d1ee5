"""diffusers on the same weights: the loop of its DDIMPipeline, as it comes and with its network compiled.

In bfloat16 and channels_last, with the state in bfloat16 as the pipeline keeps it, and without making images of
8 bits of the result. The pipeline itself knows no classes and lets nobody in between its steps, so its loop is written
out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu import clock
from bench.gpu.bench import Bench
from bench.gpu.engine import Served
from model.diffusion.noise import draw_noise, seeded_generator

LEAST_SECONDS = 25.0  # in which it makes sense to begin to compile
LARGEST_DIFFERENCE = 0.1  # of what both say of the same rows, rms over rms: bfloat16 makes 0.01 of it


class LeftOut(Exception):
    """This contestant cannot take part; the message says why."""


@dataclass(frozen=True)
class Pipeline:
    """One form of diffusers' loop.

    Attributes:
        unet: UNet2DModel, or what torch.compile made of it.
        scheduler: DDIMScheduler.
        kinds: classes that images may be of; None for a network without.
    """

    unet: Callable[..., Any]
    scheduler: Any
    device: torch.device
    shape: tuple[int, int, int]
    kinds: int | None

    def classes(self, width: int) -> Tensor | None:
        """Of so many images."""
        return None if self.kinds is None else torch.arange(width, device=self.device).remainder(self.kinds)

    @torch.no_grad()
    def walk(self, width: int, steps: int) -> Tensor:
        """So many images at once, from the first noise to float32 [width, C, H, W] on the CPU."""
        x = torch.stack([draw_noise(seeded_generator(seed), self.shape) for seed in range(width)])
        x = x.to(self.device, torch.bfloat16).contiguous(memory_format=torch.channels_last)
        y = self.classes(width)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            eps = self.unet(x, t.to(self.device), y).sample
            x = self.scheduler.step(eps, t, x).prev_sample
        return x.float().cpu()

    @torch.no_grad()
    def said(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """What the network says of rows, float32."""
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        y = None if y is None else y.to(self.device)
        found: Tensor = self.unet(x, t.to(self.device), y).sample.float()
        return found


def eager(served: Served) -> Pipeline:
    """The pipeline as it comes.

    Raises:
        LeftOut: diffusers is not installed, or its network says other things than ours.
    """
    try:
        from diffusers import DDIMScheduler, UNet2DModel  # noqa: PLC0415 - may be missing, and takes seconds
    except ImportError as error:
        raise LeftOut(f"not installed: {error}") from error
    unet = UNet2DModel.from_pretrained(  # type: ignore[no-untyped-call]
        served.folder / "unet", torch_dtype=torch.bfloat16, low_cpu_mem_usage=False
    )
    unet = unet.to(served.runner.device, memory_format=torch.channels_last)
    unet.eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_config(served.checkpoint.scheduler_config)  # type: ignore[no-untyped-call]
    pipeline = Pipeline(unet, scheduler, served.runner.device, served.checkpoint.shape, served.classes)
    rows = served.rows(served.wanted.reproducible_width)
    with torch.inference_mode():
        ours = served.networks.exact(*rows)
    apart = float((pipeline.said(*rows) - ours).square().mean().sqrt() / ours.square().mean().sqrt())
    if not apart < LARGEST_DIFFERENCE:
        raise LeftOut(f"its ε is not that of the same weights: {apart:.3g} apart, rms over rms")
    return pipeline


def compiled(bench: Bench, plain: Pipeline, widths: Sequence[int], limit: float) -> tuple[Pipeline, dict[int, float]]:
    """The same with torch.compile, and the seconds that this took for each width that it was done for.

    With CUDA graphs (``reduce-overhead``), and for each width by itself; on a CPU only the tracing is tried.

    Raises:
        LeftOut: it failed, took longer than the limit for even the first width, or would have.
    """
    if limit < bench.of(LEAST_SECONDS, 0.0):
        raise LeftOut(f"no time to compile in {limit:.0f} s")
    options: dict[str, Any] = {"mode": "reduce-overhead"} if bench.device.type == "cuda" else {"backend": "eager"}
    torch.compiler.reset()
    quick = replace(plain, unet=torch.compile(plain.unet, dynamic=False, **options))
    took: dict[int, float] = {}
    try:
        with clock.within(limit):
            for width in widths:
                began = time.monotonic()
                quick.walk(width, 4)  # CUDA graphs are recorded in the second and third call
                clock.synchronize(bench.device)
                took[width] = round(time.monotonic() - began, 2)
    except clock.Overrun:
        if not took:
            raise LeftOut(f"not compiled within {limit:.0f} s") from None
    except Exception as error:
        raise LeftOut(f"torch.compile failed: {type(error).__name__}: {error}"[:500]) from error
    return quick, took
