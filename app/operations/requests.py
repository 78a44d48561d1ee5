"""Requests as clients see them: plain words, ranges, examples."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from app.operations.fields import (
    MAX_SEED,
    STRICT,
    Content,
    EmbedField,
    FitField,
    Label,
    Latent,
    LookField,
    MethodName,
    SamplerName,
)
from app.settings import Settings
from model.diffusion.interpolation import InterpolationMethod
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import Spacing

MAX_TRAJECTORY = 100
MAX_ENDS = 8
TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR42mP8dY4hSgQACO4COJWJARAAAAAASUVORK5CYII="  # 2 × 2
MAX_IMAGES = f"`UNSTIR_MAX_IMAGES` ({Settings.model_fields['max_images'].default})"
SAMPLER_LINES = "\n".join(f"- `{sampler.name}`: {sampler.summary}" for sampler in SAMPLERS.values())
INVERSION_LINES = "\n".join(f"- `{method.name}`: {method.summary}" for method in INVERSIONS.values())


class SamplingRequest(BaseModel):
    """What `/sample` and `/interpolate` have in common: how to sample."""

    model_config = STRICT

    sampler: SamplerName = Field("ddim", description=f"The sampler.\n\n{SAMPLER_LINES}")
    steps: int | None = Field(
        None,
        ge=1,
        description="Steps of the sampler, up to the T of the network's training; by default the sampler's.",
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
        description="Spacing of the noise levels; by default the sampler's, else the checkpoint's, or trailing where "
        "so few steps would not reach the noise.",
    )
    clip: bool | None = Field(
        None,
        description="Clip the predicted image to [-1, 1] at each step; by default as the checkpoint says, and off "
        "where the latent is an encoded image, which clipping would not lead back to.",
    )
    guidance: float = Field(
        1.0,
        ge=0,
        le=20,
        description="Weight of classifier-free guidance: 1 is none, 1.5 to 4 follow the label more closely at the "
        "price of variety, above that images suffer, below 1 they follow it less; doubles the evaluations.",
    )
    reproducible: bool = Field(
        False, description="The same bytes at any load; forwards are padded to one width for it."
    )
    fit: FitField = "exact"
    embed: EmbedField = "request"


class SampleRequest(SamplingRequest):
    """What to sample. Every field may be left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"label": "lorelei", "seed": 7}, {"sampler": "dpmpp_2m", "steps": 10, "n": 4, "seed": 1}]
        }
    )

    n: int = Field(1, ge=1, description=f"How many images, up to {MAX_IMAGES}.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Image i uses seed + i; left out, a seed is drawn and reported."
    )
    latent: Latent | None = Field(
        None,
        description="Where sampling starts, instead of an x_T drawn from `seed`: a seed, a .npy, or an image, which is "
        "encoded first. Of a stochastic sampler, `seed` still decides the noise.",
    )
    label: Label = Field(None, description="Class, by name (in any case) or index; left out, any class.")
    trajectory: int | None = Field(
        None,
        ge=2,
        le=MAX_TRAJECTORY,
        description="Frames of the trajectory, up to its number of evaluations; shown as a strip or an animation.",
    )
    trajectory_of: LookField = "x_0"


class InvertRequest(BaseModel):
    """An image to encode."""

    model_config = ConfigDict(
        **STRICT, json_schema_extra={"examples": [{"image": TINY_PNG, "fit": "resize", "steps": 20}]}
    )

    image: Content = Field(description="PNG, JPEG, WebP, GIF, HEIC or AVIF (its first frame).")
    method: MethodName = Field("fixed_point", description=f"The inversion.\n\n{INVERSION_LINES}")
    steps: int = Field(50, ge=1, description="Steps of the inversion, and of the sampler that decodes it; up to T.")
    refinements: int | None = Field(
        None,
        ge=1,
        le=50,
        description="fixed_point only: K, iterations after the first guess of each step; default 3.",
    )
    spacing: Spacing | None = Field(
        None, description="Spacing of the noise levels; by default that of sampling with as many steps."
    )
    label: Label = Field(
        None, description="Class of the image, by name or index; left out, any. Decoding needs the same."
    )
    fit: FitField = "exact"
    check: bool = Field(True, description="Decode the latent again, and report its distance from the image.")
    reproducible: bool = Field(False, description="The same latent at any load. Decoding is reproducible in any case.")
    trajectory: int | None = Field(
        None,
        ge=2,
        le=MAX_TRAJECTORY,
        description="Frames of the trajectory from image to noise, up to its number of evaluations.",
    )
    trajectory_of: LookField = "x_0"
    embed: EmbedField = "request"


class InterpolateRequest(SamplingRequest):
    """What to interpolate: `a` and `b`; or `latents` with `weights`; or four of them as the corners of a `grid`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"a": {"seed": 7}, "b": {"seed": 8}, "frames": 8, "label": "lorelei"},
                {"latents": [1, 2, 3, 4], "grid": [5, 5]},
                {"latents": [1, 2, 3], "weights": [0.5, 0.25, 0.25]},
            ]
        }
    )

    a: Latent | None = Field(None, description="The first latent: a seed, a .npy, or an image, which is encoded first.")
    b: Latent | None = Field(None, description="The last latent.")
    latents: list[Latent] | None = Field(
        None, min_length=2, max_length=MAX_ENDS, description="2 to 8 with `weights`, or 4 with `grid`."
    )
    weights: list[float] | None = Field(
        None, description="One for each of `latents`, 0 or more; only their ratios matter. Gives one image."
    )
    grid: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="[rows, columns] between four corners: top left, top right, bottom left, bottom right.",
    )
    frames: int | None = Field(
        None, ge=2, description=f"Images from a to b, both included; default 8, up to {MAX_IMAGES}."
    )
    method: InterpolationMethod = Field(
        "slerp",
        description="slerp follows the sphere that latents lie on; lerp cuts across it, and washes images out.",
    )
    label: Label = Field(None, description="Class of all images, by name or index; left out, any.")
    labels: list[Label] | None = Field(
        None,
        description="Instead of `label`, a class for each latent; between them the network's class embedding is mixed.",
    )


def latent_fields(model: type[BaseModel]) -> set[str]:
    """Fields that hold a latent; in a form a seed or a file."""
    return {name for name, field in model.model_fields.items() if _mentions(field.annotation, Latent)}


def file_fields(model: type[BaseModel]) -> set[str]:
    """Fields that a form may send as a file."""
    return latent_fields(model) | {name for name, field in model.model_fields.items() if field.annotation is bytes}


def list_fields(model: type[BaseModel]) -> set[str]:
    """Fields that a form may send several times."""
    return {name for name, field in model.model_fields.items() if _mentions(field.annotation, list)}


def _mentions(annotation: Any, kind: type) -> bool:
    return annotation is kind or get_origin(annotation) is kind or any(_mentions(a, kind) for a in get_args(annotation))
