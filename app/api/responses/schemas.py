"""JSON responses as clients see them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    queue_ms: float
    device_ms: float
    encode_ms: float


class SamplingResponse(BaseModel):
    """What `/sample` and `/interpolate` report in common: the request with every default filled in, and its cost."""

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
    plan: str = Field(description="Digest of the compiled plan.")
    model: str
    sha256: str = Field(description="Of the weights.")
    timing: Timing


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
    stochastic: bool = Field(description="Whether it draws noise at each step, with default options.")
    evaluations: str = Field(description="What N steps cost.")
    good_steps: str
    default_steps: int
    options: list[str] = Field(description="Fields of the request that only some samplers take.")
    spacings: list[str] = Field(
        description="What `spacing` can be; the first is taken by default, trailing where so few steps would not reach "
        "the noise."
    )


class InversionInfo(BaseModel):
    """An inversion, in plain words."""

    name: str
    what: str
    when: str
    evaluations: str = Field(description="What N steps cost.")
    sampler: str = Field(description="The one that leads back.")


class ModelInfo(BaseModel):
    """What is being served."""

    name: str
    description: str
    licence: str
    sha256: str
    classes: list[str]
    shape: list[int] = Field(description="[C, H, W] of an image.")
    background: str = Field(description="Behind images that are transparent or too small.")
    timesteps: int = Field(description="T, the most steps that a request can ask for.")
    schedule: dict[str, Any] = Field(description="The scheduler config of the checkpoint.")
    prediction: str
    parameters: int
    samplers: list[SamplerInfo]
    methods: list[InversionInfo] = Field(description="What `/invert` can do.")
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
    cost_ratio: float = Field(description="What forwards take of late, over what they took at the start.")
    reproducible_width: int
    reproducible_widths: list[int] = Field(description="Widths of exact forwards that give the same bits.")
    guidance: bool = Field(description="Whether `guidance` can be asked for: that takes a null class.")
    limits: dict[str, int | float]
    version: str


class JobStatus(BaseModel):
    """The state of an asynchronous job."""

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
