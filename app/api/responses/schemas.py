"""JSON responses as clients see them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.operations.fields import SamplerName
from model.diffusion.schedule import Spacing


def _leave_out_null(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Fields that are None are not sent: what is null by default may be missing and is never null; all else is there.

    Of fields that are null by default, the type loses its null; ``required`` are all others.
    """
    fields, properties = model.model_fields, schema["properties"]
    optional = {name for name in properties if not fields[name].is_required() and fields[name].default is None}
    for found in properties.values():
        found.pop("default", None)
    for name in optional:
        found = properties[name]
        members = [member for member in found.pop("anyOf", []) if member.get("type") != "null"]
        found |= members[0] if len(members) == 1 else {"anyOf": members} if members else {}
    schema["required"] = [name for name in properties if name not in optional]


class Answer(BaseModel):
    """A JSON response, or a part of one, sent without the fields that are None."""

    model_config = ConfigDict(json_schema_extra=_leave_out_null)


# Files in base64, as generators of OpenAPI 3.0 (format) and of 3.1 (contentEncoding) know them.
_BASE64 = {"format": "byte", "contentEncoding": "base64"}
EncodedImage = Annotated[str, Field(json_schema_extra={**_BASE64, "contentMediaType": "image/png"})]
EncodedArray = Annotated[str, Field(json_schema_extra={**_BASE64, "contentMediaType": "application/x-npy"})]
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]


class Timing(BaseModel):
    """Durations in milliseconds."""

    queue_ms: float = Field(description="Until its first step.")
    device_ms: float = Field(description="From its first step to its last.")
    encode_ms: float = Field(description="To make the response.")


class SamplingResponse(Answer):
    """What `/sample` and `/interpolate` report in common: the request with every default filled in, and its cost."""

    sampler: SamplerName
    steps: int
    eta: float | None = None
    order: int | None = None
    warmup: bool | None = None
    spacing: Spacing
    clip: bool
    guidance: float
    reproducible: bool
    nfe: int = Field(description="Network evaluations of each image.")
    encode_nfe: int | None = Field(None, description="Network evaluations of each image that was encoded first.")
    plan: str = Field(description="Digest of the compiled plan.")
    model: str = Field(description="Name of the checkpoint.")
    sha256: str = Field(description="Of the weights.")
    timing: Timing


class FieldProblem(Answer):
    """One invalid field."""

    field: str = Field(description="Its name; of a nested field with a dot, of an item with its index.")
    value: Any = Field(None, description="What was sent; left out where it is null, missing or not echoed.")
    given: str | None = Field(None, description="Of what is not echoed, what it is: 300 bytes, an array.")
    remedy: str = Field(description="What to send instead.")


class Problem(Answer):
    """RFC 9457 problem details: the shape of all errors."""

    type: str = Field(description="urn:unstir:problem: and the code.")
    title: str = Field(description="The problem in a few words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong, its value and the remedy.")
    code: str = Field(description="Stable name of the problem, for programs.")
    request_id: str = Field(description="The X-Request-Id, which is in the log, too.")
    errors: list[FieldProblem] | None = Field(None, description="For invalid fields, each of them.")


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
    sampler: SamplerName = Field(description="The one that leads back.")


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
    samplers: list[SamplerInfo] = Field(description="What `/sample` and `/interpolate` can sample with.")
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


class JobStatus(Answer):
    """The state of an asynchronous job."""

    id: str = Field(description="For /jobs/{id}.")
    operation: str = Field(description="The path of the request.")
    state: JobState = Field(description="The result is there once it is done.")
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

    status: str = Field(description="alive; ready, or the reason why not.")
