"""Requests and replies as clients see them: plain words, ranges, examples."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from model.samplers import SAMPLERS
from model.schedule import Spacing

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact


def _known_sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"choose one of {', '.join(SAMPLERS)}")
    return name


SamplerName = Annotated[str, AfterValidator(_known_sampler), Field(json_schema_extra={"enum": list(SAMPLERS)})]
ENTRIES = "\n".join(f"- `{sampler.name}`: {sampler.summary}" for sampler in SAMPLERS.values())


class SampleRequest(BaseModel):
    """What to draw. Every field may be left out."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,  # "2" is no number and true no label; silent coercion hides mistakes
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"label": "lorelei", "seed": 7}, {"sampler": "ddpm", "n": 4, "seed": 1}]},
    )

    sampler: SamplerName = Field("ddim", description=f"How to walk from noise to picture.\n\n{ENTRIES}")
    steps: int | None = Field(
        None,
        ge=1,
        description="Steps of the walk, up to the T of the network's training (`timesteps` of `/model`); "
        "by default the sampler's.",
    )
    eta: float | None = Field(
        None, ge=0, le=1, description="ddim only: 0 (default) is deterministic, 1 as noisy as ddpm."
    )
    order: int | None = Field(
        None,
        ge=1,
        le=3,
        description="dpmpp_2m, unipc and (up to 2) dpmpp_2m_sde only: how many past steps they learn from; default 2.",
    )
    warmup: bool | None = Field(
        None, description="pndm only: take the first three steps by Runge-Kutta, for eight evaluations more."
    )
    spacing: Spacing | None = Field(
        None,
        description="Which noise levels are visited; by default those that suit the sampler, else the checkpoint's, "
        "or trailing where so few steps would not reach the noise.",
    )
    clip: bool | None = Field(
        None, description="Keep the predicted picture within range on the way; default: as the checkpoint says."
    )
    n: int = Field(1, ge=1, description="How many pictures, up to `max_pictures` of `/model`.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Picture i is drawn from seed + i; left out, a seed is drawn and reported."
    )
    label: int | str | None = Field(
        None, description="Class, by name (in any case) or index; left out, the network draws of any class."
    )
    guidance: float = Field(
        1.0,
        ge=0,
        le=20,
        description="Weight of classifier-free guidance: 1 is none, 1.5 to 4 follow the label more closely at the "
        "price of variety, above that pictures suffer, below 1 they heed the label less; doubles the evaluations.",
    )
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
    order: int | None = None
    warmup: bool | None = None
    spacing: str
    clip: bool
    label: str | None = Field(None, description="Name of the class; null where none was asked for.")
    guidance: float
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
    device: str
    dtype: str
    forward_ms: dict[int, float] = Field(description="Measured at the start: width of a forward, milliseconds.")
    reproducible_width: int
    guidance: bool = Field(description="Whether `guidance` can be asked for: that takes a null class.")
    limits: dict[str, int | float]
    version: str


class Status(BaseModel):
    """Alive, or ready."""

    status: str
