"""Every setting, once: its name, its default, and when to change it.

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
        "that is faster; fewer where others need the cores, since threads that wait for a busy core cost far more than "
        "they give.",
    )
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="Of ordinary forwards; auto takes bfloat16, or else a card's tf32, where the device has it, it is "
        "faster, and each ε stays within 1 %. `reproducible` requests, inversions and what begins in an image or a "
        ".npy are float32 in any case, and share forwards with the others only if these are, too.",
    )
    cache: str = Field(
        "~/.cache/unstir", description="Folder that keeps what was measured at the start; empty measures at each start."
    )
    max_width: int | None = Field(
        None,
        ge=2,
        le=1024,
        description="Most rows of one forward, 2 to 1024; by default 16 on a CPU and, as far as it pays, 1024 on "
        "a card; lower it if memory is short.",
    )
    reproducible_width: int = Field(
        4,
        ge=2,
        le=1024,
        description="Rows of a forward that `reproducible` requests ride in, there or in widths of the same bits.",
    )
    max_images: int = Field(64, ge=1, description="Most images of one request (`n`).")
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
        description="Longest that any request may take; X-Request-Timeout-Ms can only ask for less.",
    )
    job_seconds: float = Field(
        600,
        gt=0,
        allow_inf_nan=False,
        description="How long results of asynchronous jobs, and answers under an Idempotency-Key, are kept.",
    )
    max_jobs: int = Field(1024, ge=1, description="Most of them that are kept; the oldest that are done go first.")
    max_job_bytes: int = Field(
        64 << 20, ge=1 << 20, description="Most memory that the results kept may take; the newest stays, however large."
    )
    max_lanes: int = Field(4096, ge=1, description="Most images in flight at once; bounds the memory that they take.")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="Largest request body; larger ones get 413.")
    max_pixels: int = Field(
        1 << 24,
        ge=1,
        description="Most pixels of an uploaded image, before it is brought to size; each takes up to 18 bytes while "
        "it is decoded, two images at once.",
    )
    drain_seconds: float = Field(
        30,
        ge=0,
        description="How long SIGTERM lets accepted work finish; keep it below the orchestrator's grace period.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")
    log_format: Literal["text", "json"] = Field("text", description="json for machines: an object a line.")

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        return name
