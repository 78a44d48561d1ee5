"""Requests and replies as clients see them: plain words, ranges, examples."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from model.samplers import SAMPLERS
from model.schedule import SPACINGS, Spacing

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact


def _known_sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"choose one of {', '.join(SAMPLERS)}")
    return name


SamplerName = Annotated[str, AfterValidator(_known_sampler), Field(json_schema_extra={"enum": list(SAMPLERS)})]


class SampleRequest(BaseModel):
    """What to draw. Every field may be left out."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,  # "2" is no number and true no label; silent coercion hides mistakes
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"label": "Ankle boot", "seed": 7}, {"sampler": "ddpm", "n": 4, "seed": 1}]},
    )

    sampler: SamplerName = Field("ddim", description="How to walk from noise to picture; `GET /model` describes each.")
    steps: int | None = Field(
        None,
        ge=1,
        description="Network evaluations, up to the T that the network was trained on; default 50, for ddpm T.",
    )
    eta: float | None = Field(
        None, ge=0, le=1, description="ddim only: 0 (default) is deterministic, 1 as noisy as ddpm."
    )
    spacing: Spacing | None = Field(
        None,
        description="Which timesteps are visited; by default the checkpoint's, "
        "or trailing where so few steps would not reach the noise.",
    )
    clip: bool | None = Field(
        None, description="Keep the predicted picture within range; default: as the checkpoint says."
    )
    n: int = Field(1, ge=1, description="How many pictures.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Picture i is drawn from seed + i; left out, a seed is drawn and reported."
    )
    label: int | str | None = Field(None, description="Class, by name or index; left out, any.")
    reproducible: bool = Field(
        False, description="The same bytes at any load, at the price of forwards that are padded to one width."
    )


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    queue_ms: float
    device_ms: float
    encode_ms: float


class SampleReply(BaseModel):
    """The JSON form of an answer."""

    images: list[str] = Field(description="PNG, base64.")
    seeds: list[int]
    latents: list[str] = Field(description="x_T of each picture: base64 of a .npy, float32 [C, H, W].")
    sampler: str
    steps: int
    eta: float | None = None
    spacing: str
    clip: bool
    label: str | None = None
    reproducible: bool
    nfe: int = Field(description="Network evaluations of each picture.")
    plan: str = Field(description="Digest of the compiled walk.")
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
    summary: str
    default_steps: int


class ModelReply(BaseModel):
    """What is being served."""

    name: str
    description: str
    licence: str
    sha256: str
    classes: list[str]
    shape: list[int] = Field(description="[C, H, W] of a picture.")
    timesteps: int = Field(description="T, the most steps that a walk can have.")
    schedule: dict[str, Any] = Field(description="The scheduler config of the checkpoint.")
    prediction: str
    parameters: int
    samplers: list[SamplerInfo]
    spacings: list[str] = list(SPACINGS)
    device: str
    dtype: str
    forward_ms: dict[int, float] = Field(description="Measured at the start: width of a forward, milliseconds.")
    reproducible_width: int
    limits: dict[str, int | float]
    version: str


class Status(BaseModel):
    """Alive, or ready."""

    status: str
