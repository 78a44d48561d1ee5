"""Every setting: its name, its default, and when to change it.

Each is read from the environment as ``UNSTIR_<NAME>``, and ``unstir serve`` takes each as ``--<name>``. A bad value
stops the start, never a request.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

SHIPPED = Path(__file__).resolve().parent.parent / "weights"


class Settings(BaseSettings):
    """The settings of one server process."""

    model_config = SettingsConfigDict(env_prefix="UNSTIR_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one and logs it.")
    checkpoint: Path = Field(SHIPPED / "avatars-32", description="Folder of the network, in diffusers layout.")
    device: str = Field(
        "auto",
        description="auto takes the CUDA device where there is one, else the CPU; or cpu, cuda, cuda:1.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="CPU threads of one forward, by default OMP_NUM_THREADS, else one per core, or half of them where "
        "that is faster; lower it where other processes need the cores: a thread that waits for a busy core delays all "
        "others.",
    )
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="Precision of ordinary forwards. auto uses bfloat16, then tf32, where supported, faster and within "
        "1 % error of each ε. `reproducible` requests, inversions, and sampling from an image or a .npy always use "
        "float32, and share forwards with the others only if these do, too.",
    )
    cache: str = Field(
        "~/.cache/unstir",
        description="Folder for the calibration measured at the first start; empty calibrates at every start.",
    )
    max_width: int | None = Field(
        None,
        ge=2,
        le=1024,
        description="Maximum rows of one forward, 2 to 1024; by default 16 on a CPU and 1024 on a card, or where "
        "throughput stops growing; lower it if memory is short.",
    )
    reproducible_width: int = Field(
        4,
        ge=2,
        le=1024,
        description="Width of the forwards of `reproducible` requests; widths with the same bits are used as well.",
    )
    max_images: int = Field(64, ge=1, description="Maximum images of one request (`n`).")
    max_queue_seconds: float = Field(
        300,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of accepted work above which requests get 429; lower it to refuse sooner.",
    )
    max_request_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Maximum duration of any request; X-Request-Timeout-Ms can only ask for less.",
    )
    job_seconds: float = Field(
        600,
        gt=0,
        allow_inf_nan=False,
        description="How long results of asynchronous jobs, and of requests with an Idempotency-Key, are kept.",
    )
    max_jobs: int = Field(
        1024, ge=1, description="Maximum stored jobs and idempotent results; the oldest finished are evicted first."
    )
    max_job_bytes: int = Field(
        64 << 20,
        ge=1 << 20,
        description="Maximum memory of stored results; the oldest are evicted first, the newest is always kept.",
    )
    max_lanes: int = Field(4096, ge=1, description="Maximum images being sampled at once; bounds their memory.")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="Largest request body; larger ones get 413.")
    max_pixels: int = Field(
        1 << 24,
        ge=1,
        description="Maximum pixels of an uploaded image, before it is resized; each takes up to 18 bytes while it is "
        "decoded, two images at once.",
    )
    drain_seconds: float = Field(
        30,
        ge=0,
        description="How long SIGTERM lets accepted work finish; keep it below the orchestrator's grace period.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least severe messages that are logged."
    )
    log_format: Literal["text", "json"] = Field("text", description="text, or json: one object a line.")

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        return name
