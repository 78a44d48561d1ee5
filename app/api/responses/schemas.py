"""Answers as clients see them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    queue_ms: float
    device_ms: float
    encode_ms: float


class Walked(BaseModel):
    """How a walk was taken, with every default filled in, and what it cost."""

    sampler: str
    steps: int
    eta: float | None = None
    order: int | None = None
    warmup: bool | None = None
    spacing: str
    clip: bool
    guidance: float
    reproducible: bool
    nfe: int = Field(description="Network evaluations of each image.")
    encode_nfe: int | None = Field(None, description="Network evaluations of each image that was encoded first.")
    plan: str = Field(description="Digest of the compiled walk.")
    model: str
    sha256: str = Field(description="Of the weights.")
    timing: Timing


class SampleReply(Walked):
    """The JSON form of what `/sample` answers."""

    images: list[str] = Field(description="PNG, base64.")
    seeds: list[int] = Field(description="Of each image; empty where a latent was given and no noise drawn.")
    latents: list[str] = Field(description="x_T of each image: base64 of a .npy, float32 [C, H, W].")
    label: str | None = Field(None, description="Name of the class; left out where none was asked for.")
    trajectory: list[list[str]] | None = Field(None, description="Of each image, its frames: PNG, base64.")


class Decode(BaseModel):
    """What `/sample` needs beside the latent to give the image back."""

    sampler: str
    steps: int
    spacing: str
    clip: bool
    label: str | None = None
    reproducible: bool


class InvertReply(BaseModel):
    """The JSON form of what `/invert` answers. PSNR, MSE and the largest error are measured on [-1, 1], unrounded."""

    latent: str = Field(description="base64 of a .npy: float32 [C, H, W], or [2, C, H, W] for the pair of obelm.")
    decode: Decode = Field(description='Send these fields to /sample, with `latent` as {"npy": …}.')
    method: str
    steps: int
    refinements: int | None = None
    spacing: str
    label: str | None = None
    nfe: int = Field(description="Network evaluations of the way up.")
    decode_nfe: int = Field(description="Network evaluations of the way back.")
    psnr: float | None = Field(None, description="Of the way there and back, in dB; 58.9 is that of 8-bit rounding.")
    mse: float | None = None
    max_error: float | None = Field(None, description="Largest difference of any pixel.")
    exact: float | None = Field(None, description="Share of the 8-bit values that came back as they were.")
    residual: float | None = Field(
        None, description="fixed_point only: by how much the walk misses the exact one (root mean square)."
    )
    norm: float = Field(description="Mean square of x_T; about 1 for what the network knows well.")
    reconstruction: str | None = Field(None, description="PNG, base64: what /sample answers to `decode`.")
    warnings: list[str] = Field([], description="What is odd about this image for this network, in words.")
    trajectory: list[str] | None = Field(None, description="Frames along the way up: PNG, base64.")
    plan: str = Field(description="Digest of the compiled walk.")
    model: str
    sha256: str = Field(description="Of the weights.")
    timing: Timing


class InterpolateReply(Walked):
    """The JSON form of what `/interpolate` answers."""

    images: list[str] = Field(description="PNG, base64; of a grid row by row.")
    latents: list[str] = Field(description="x_T of each image: base64 of a .npy.")
    weights: list[list[float]] = Field(description="Of each image, how much of each end.")
    method: str
    grid: list[int] | None = None
    labels: list[str | None] = Field(description="Class of each end.")
    warnings: list[str] = []


class FieldProblem(BaseModel):
    """One field that cannot be as it was sent."""

    field: str
    value: Any
    remedy: str


class Problem(BaseModel):
    """RFC 9457 problem details: the one shape of all errors."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What is wrong, with its value and the remedy.")
    code: str = Field(description="Stable name of the problem, for programs.")
    request_id: str
    errors: list[FieldProblem] = Field([], description="For invalid fields, each of them.")


class SamplerInfo(BaseModel):
    """A sampler, in plain words."""

    name: str
    what: str
    when: str
    stochastic: bool = Field(description="Whether it draws fresh noise on the way, with default options.")
    evaluations: str = Field(description="What N steps cost.")
    good_steps: str
    default_steps: int
    options: list[str] = Field(description="Fields of the request that only some samplers take.")
    spacings: list[str] = Field(
        description="What `spacing` can be; the first is taken by default, trailing where so few steps would not reach "
        "the noise."
    )


class MethodInfo(BaseModel):
    """An inversion, in plain words."""

    name: str
    what: str
    when: str
    evaluations: str = Field(description="What N steps cost.")
    sampler: str = Field(description="The one that leads back.")


class ModelReply(BaseModel):
    """What is being served."""

    name: str
    description: str
    licence: str
    sha256: str
    classes: list[str]
    shape: list[int] = Field(description="[C, H, W] of an image.")
    background: str = Field(description="Behind images that are transparent or too small.")
    timesteps: int = Field(description="T, the most steps that a walk can have.")
    schedule: dict[str, Any] = Field(description="The scheduler config of the checkpoint.")
    prediction: str
    parameters: int
    samplers: list[SamplerInfo]
    methods: list[MethodInfo] = Field(description="What `/invert` can do.")
    device: str
    dtype: str = Field(description="Of ordinary forwards; exact ones are float32.")
    layout: str = Field(description="Of images and weights in memory; the fastest of those that give the same bits.")
    threads: int = Field(description="Of a forward on the CPU.")
    dtype_error: float | None = Field(
        description="What bfloat16 makes of ε, rms of the difference over rms; none if it was not considered."
    )
    forward_ms: dict[int, float] = Field(description="Measured at the start: width of a forward, milliseconds.")
    exact_forward_ms: dict[int, float] = Field(
        description="In float32, for reproducible requests, inversions, and what begins in an image or a .npy."
    )
    pace: float = Field(description="What forwards take of late, over what they took at the start.")
    reproducible_width: int
    reproducible_widths: list[int] = Field(description="Widths of exact forwards that give the same bits.")
    guidance: bool = Field(description="Whether `guidance` can be asked for: that takes a null class.")
    limits: dict[str, int | float]
    version: str


class JobReply(BaseModel):
    """How an asynchronous job fares."""

    id: str
    operation: str
    state: str = Field(description="waiting, running, done, failed or cancelled.")
    position: int = Field(description="Requests that will probably go first; 0 once it runs.")
    done: int = Field(description="Rows of forwards that are done.")
    total: int
    progress: float = Field(description="0 to 1.")
    seconds_left: float = Field(description="Estimated.")
    created: str = Field(description="When it was accepted, UTC.")
    request_id: str
    result: str | None = Field(None, description="Where the result is, once it is done.")
    error: Problem | None = Field(None, description="Why it failed.")


class Status(BaseModel):
    """Alive, or ready."""

    status: str
