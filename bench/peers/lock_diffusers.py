"""FastAPI, a lock and a diffusers loop: the simplest server. One request at a time, no batching."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import torch
import uvicorn
from diffusers import DDIMScheduler, UNet2DModel
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from bench.peers import common
from model.diffusion.noise import draw_noise, seeded_generator

unet = UNet2DModel.from_pretrained(common.CHECKPOINT / "unet")  # type: ignore[no-untyped-call]
unet.eval().requires_grad_(False)
app = FastAPI()
lock = asyncio.Lock()


@app.post("/sample")
async def sample(request: dict[str, Any]) -> dict[str, str]:
    async with lock:
        return await run_in_threadpool(denoise, int(request["steps"]), int(request["seed"]))


@torch.inference_mode()
def denoise(steps: int, seed: int) -> dict[str, str]:
    scheduler = DDIMScheduler.from_config(common.checkpoint().scheduler_config)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(steps)
    x = draw_noise(seeded_generator(seed), common.checkpoint().shape)[None]
    for t in scheduler.timesteps:
        eps = unet(x.to(unet.dtype), t, common.null_class(1)).sample.float()
        x = scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
    return common.reply(x[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    unet.to(getattr(torch, parser.parse_known_args()[0].dtype))
    torch.set_num_threads(1)
    denoise(10, 0)
    uvicorn.run(app, host="127.0.0.1", port=common.port(), access_log=False)
