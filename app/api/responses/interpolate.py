"""The result of /interpolate: a strip, a grid or an animation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field
from torch import Tensor

from app.api.responses.results import (
    OperationResult,
    describe_plan,
    embed_request,
    join_name,
    request_file,
    to_base64,
)
from app.api.responses.schemas import EncodedArray, EncodedImage, SamplingResponse, Timing
from app.errors import NotAcceptable
from app.operations.context import Usage
from app.operations.files import to_npy
from app.operations.interpolate import Interpolation
from app.operations.requests import InterpolateRequest
from model.checkpoint import Card
from model.diffusion.interpolation import InterpolationMethod
from model.images import png, to_uint8


class InterpolateResponse(SamplingResponse):
    """The JSON response of `/interpolate`."""

    images: list[EncodedImage] = Field(description="PNG, base64; of a grid row by row.")
    latents: list[EncodedArray] = Field(description="x_T of each image: base64 of a .npy.")
    weights: list[list[float]] = Field(description="Of each image, the weight of each given latent.")
    method: InterpolationMethod
    grid: list[int] | None = None
    labels: list[str | None] = Field(description="Class of each given latent.")
    warnings: list[str] = Field([], description="What is unusual about these latents.")


def no_animation(request: InterpolateRequest) -> str | None:
    """Why the response cannot be an animation; None if it can."""
    if request.grid is not None:
        return "a grid has no order in time; ask for image/png"
    return "one image has no motion; ask for image/png" if request.weights is not None else None


@dataclass(frozen=True)
class InterpolateResult(OperationResult):
    """The strip, grid or animation of the images between."""

    interpolation: Interpolation
    card: Card

    @property
    def usage(self) -> Usage:
        return self.interpolation.usage

    @property
    def image_count(self) -> int:
        return len(self.interpolation.frames)

    @property
    def nbytes(self) -> int:
        latents = [frame.latent for frame in self.interpolation.frames]
        return sum(x.nbytes for x in [*self.interpolation.result.outputs, *latents])

    @property
    def headers(self) -> dict[str, str]:
        return {"X-NFE": str(self.interpolation.resolved.nfe)}

    @property
    def name(self) -> str:
        request = self.interpolation.resolved.request
        return join_name("interpolate", request.method, request.sampler, request.steps, len(self.interpolation.frames))

    def still(self) -> tuple[np.ndarray, int | None]:
        return to_uint8(self.array), self.interpolation.columns

    def animation(self) -> np.ndarray:
        if reason := no_animation(self.interpolation.resolved.request):
            raise NotAcceptable(reason)
        return to_uint8(self.array)

    @property
    def array(self) -> Tensor:
        return self.interpolation.images

    def metadata(self) -> dict[str, str]:
        resolved = self.interpolation.resolved
        sources = self.interpolation.sources
        return embed_request("/interpolate", resolved.request, resolved.nfe, resolved.plan, self.card, sources)

    def body(self, timing: Timing) -> InterpolateResponse:
        interpolation = self.interpolation
        left_out = {"a", "b", "latents", "weights", "frames", "label", "labels", "fit", "embed"}
        return InterpolateResponse(
            images=[to_base64(png(image)) for image in to_uint8(self.array)],
            latents=[to_base64(to_npy(frame.latent)) for frame in interpolation.frames],
            weights=[list(frame.weights) for frame in interpolation.frames],
            labels=interpolation.labels,
            warnings=interpolation.warnings,
            encode_nfe=interpolation.encode_nfe,
            timing=timing,
            **interpolation.resolved.request.model_dump(exclude=left_out),
            **describe_plan(interpolation.resolved, self.card),
        )

    def files(self) -> dict[str, bytes]:
        named = {f"{i:03d}.png": png(image) for i, image in enumerate(to_uint8(self.array))}
        interpolation = self.interpolation
        return named | request_file("/interpolate", interpolation.resolved.request, interpolation.sources)
