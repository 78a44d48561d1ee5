"""Every setting: its name, its default, and when to change it.

Each is read from the environment as ``UNSTIR_<NAME>``, and ``unstir serve`` takes each as ``--<name>``. A bad value
stops the start, never a request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

SHIPPED = Path(__file__).resolve().parent.parent / "weights"


def is_origin(text: str) -> bool:
    """Whether a browser's Origin can be named in ``cors_origins``; extensions have schemes of their own."""
    return re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@,\s]+", text, re.IGNORECASE) is not None


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
    max_upload_bytes: int = Field(
        128 << 20,
        ge=1 << 20,
        description="Maximum bytes of request bodies in memory, all requests together; further ones wait unread.",
    )
    max_connections: int = Field(
        4096,
        ge=8,
        description="Maximum open connections, fewer where the limit of open files is lower; then idle ones "
        "are closed, and where none is idle, a new one gets 503.",
    )
    header_seconds: float = Field(
        20, gt=0, allow_inf_nan=False, description="How long a client may take to send the headers of a request."
    )
    body_seconds: float = Field(
        60,
        gt=0,
        allow_inf_nan=False,
        description="How long a client may take to send a body, and how long a body waits for UNSTIR_MAX_UPLOAD_BYTES.",
    )
    write_seconds: float = Field(
        60,
        gt=0,
        allow_inf_nan=False,
        description="How long a client may read nothing of its response before it is disconnected.",
    )
    root_path: str = Field(
        "", description="Prefix under which a proxy serves this; links and /docs begin with it: /unstir."
    )
    cors_origins: str = Field(
        "",
        description="Sites whose pages may use the service from a browser, as https://a.org,https://b.org; * is any, "
        "files included. Others are refused.",
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, as "
        "10.0.0.1,10.1.0.0/16; * is any.",
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

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """An empty variable is as if it were not set, but for the cache; nor is a Kubernetes link a port."""
        linked = str(values.get("port", "")).startswith("tcp://")
        return {
            name: value
            for name, value in values.items()
            if (value != "" or name == "cache") and not (name == "port" and linked)
        }

    @field_validator("log_level", "log_format", "device", "dtype", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("checkpoint")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, path: str) -> str:
        if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
            raise ValueError("send a path that begins with a slash and ends without one, as /unstir")
        return path

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: str) -> str:
        for origin in filter(None, re.split(r"[,\s]+", origins)):
            if origin.lower() == "null":
                raise ValueError(
                    "null is every page without a site, as of a file; serve it over http, or allow all with *"
                )
            if origin != "*" and not is_origin(origin):
                raise ValueError("name each as https://example.org, without a path, or all with *")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, proxies: str) -> str:
        for proxy in filter(None, re.split(r"[,\s]+", proxies)):
            if proxy != "*":
                ip_network(proxy)  # says what is wrong
        return proxies

    @property
    def origins(self) -> tuple[str, ...]:
        """``cors_origins``, one by one."""
        return tuple(filter(None, re.split(r"[,\s]+", self.cors_origins.lower())))

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        return name


LINK = re.compile(r"UNSTIR_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP)(_\w+)?)")  # of Kubernetes, for a service


def review_environment(environment: Mapping[str, str]) -> list[str]:
    """Lines for the log about variables that look like settings and are none."""
    known = {f"UNSTIR_{name.upper()}" for name in Settings.model_fields}
    lines = []
    for name, value in environment.items():
        if name.startswith("UNSTIR_") and name not in known and not LINK.fullmatch(name):
            similar = get_close_matches(name, known, 1)
            remedy = f"did you mean {similar[0]}?" if similar else "unstir serve --help lists them"
            lines.append(f"{name} is no setting and is ignored; {remedy}")
        if name == "UNSTIR_PORT" and value.startswith("tcp://"):
            remedy = "set enableServiceLinks: false, or --port"
            lines.append(f"UNSTIR_PORT = {value} comes from a Kubernetes service and is ignored; {remedy}")
    return lines
