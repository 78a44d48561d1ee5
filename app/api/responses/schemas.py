"""JSON responses as clients see them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Timing(BaseModel):
    """Durations in milliseconds."""

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
    model: str = Field(description="Name of the checkpoint.")
    sha256: str = Field(description="Of the weights.")
    timing: Timing


class FieldProblem(BaseModel):
    """One invalid field."""

    field: str
    value: Any
    remedy: str


class Problem(BaseModel):
    """RFC 9457 problem details: the shape of all errors."""

    type: str = Field(description="urn:unstir:problem: and the code.")
    title: str = Field(description="The problem in a few words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong, its value and the remedy.")
    code: str = Field(description="Stable name of the problem, for programs.")
    request_id: str = Field(description="The X-Request-Id, which is in the log, too.")
    errors: list[FieldProblem] = Field([], description="For invalid fields, each of them.")


class SamplerInfo(BaseModel):
    """A sampler."""

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
    """An inversion."""

    name: str
    what: str
    when: str
    evaluations: str = Field(description="What N steps cost.")
    sampler: str = Field(description="The one that leads back.")


class ModelInfo(BaseModel):
    """The served network."""

    name: str = Field(description="Of the checkpoint.")
    description: str = Field(description="What its images show.")
    licence: str = Field(description="Of data and weights.")
    sha256: str = Field(description="Of the weights.")
    classes: list[str] = Field(description="Names of the labels, in the order of their indices.")
    shape: list[int] = Field(description="[C, H, W] of an image.")
    background: str = Field(description="Behind images that are transparent or too small.")
    timesteps: int = Field(description="T, the most steps that a request can ask for.")
    schedule: dict[str, Any] = Field(description="The scheduler config of the checkpoint.")
    prediction: str = Field(description="epsilon, v_prediction or sample.")
    parameters: int = Field(description="Of the network.")
    samplers: list[SamplerInfo]
    methods: list[InversionInfo] = Field(description="What `/invert` can do.")
    device: str = Field(description="cpu, or the CUDA device.")
    dtype: str = Field(description="Of ordinary forwards; exact ones are float32.")
    layout: str = Field(description="Of images and weights in memory; the fastest of those that give the same bits.")
    threads: int = Field(description="Of a forward on the CPU.")
    dtype_error: float | None = Field(
        description="Error of ε in the reduced precision, rms over rms; null if none was considered."
    )
    forward_ms: dict[int, float] = Field(description="Measured at the start: width of a forward, milliseconds.")
    exact_forward_ms: dict[int, float] = Field(
        description="In float32, for reproducible requests, inversions, and sampling from an image or a .npy."
    )
    cost_ratio: float = Field(description="Recent forward times over those measured at the start.")
    reproducible_width: int = Field(description="The setting.")
    reproducible_widths: list[int] = Field(description="Widths of exact forwards that give the same bits.")
    guidance: bool = Field(description="Whether the checkpoint supports `guidance`: it has a null class.")
    limits: dict[str, int | float] = Field(description="Settings that bound requests.")
    version: str = Field(description="Of Unstir.")


class JobStatus(BaseModel):
    """The state of an asynchronous job."""

    id: str = Field(description="For /jobs/{id}.")
    operation: str = Field(description="The path of the request.")
    state: str = Field(description="waiting, running, done, failed or cancelled.")
    position: int = Field(description="Estimated number of requests before it; 0 once it runs.")
    done: int = Field(description="Network evaluations that are done.")
    total: int = Field(description="Network evaluations of the whole job.")
    progress: float = Field(description="0 to 1.")
    seconds_left: float = Field(description="Estimated.")
    created: str = Field(description="When it was accepted, UTC.")
    request_id: str = Field(description="X-Request-Id of the request that started it.")
    result: str | None = Field(None, description="Where the result is, once it is done.")
    error: Problem | None = Field(None, description="Why it failed.")


class Status(BaseModel):
    """Alive, or ready."""

    status: str
