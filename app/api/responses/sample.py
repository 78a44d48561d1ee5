"""The result of /sample: images, or the trajectories that lead to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from app.api.responses.results import (
    NO_TRAJECTORY,
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
from app.operations.latents import squeeze_slots
from app.operations.requests import SampleRequest
from app.operations.sample import Samples
from model.checkpoint import Card
from model.diffusion.samplers import SAMPLERS
from model.images import png, sheet, to_uint8


class SampleResponse(SamplingResponse):
    """The JSON response of `/sample`."""

    images: list[EncodedImage] = Field(description="PNG, base64.")
    seeds: list[int] = Field(description="Of each image; empty where a latent was given and no noise drawn.")
    latents: list[EncodedArray] = Field(description="x_T of each image: base64 of a .npy, float32 [C, H, W].")
    label: str | None = Field(None, description="Name of the class; left out where none was asked for.")
    trajectory: list[list[EncodedImage]] | None = Field(None, description="Of each image, its frames: PNG, base64.")


def no_animation(request: SampleRequest) -> str | None:
    """Why the response cannot be an animation; None if it can."""
    return NO_TRAJECTORY if request.trajectory is None else None


def is_repeatable(request: SampleRequest) -> bool:
    """Whether the same request always has the same response."""
    drawn = request.latent is None or SAMPLERS[request.sampler].stochastic or bool(request.eta)
    return request.reproducible and (request.seed is not None or not drawn)


@dataclass(frozen=True)
class SampleResult(OperationResult):
    """Images, or the trajectories that lead to them."""

    samples: Samples
    card: Card

    @property
    def usage(self) -> Usage:
        return self.samples.usage

    @property
    def image_count(self) -> int:
        return len(self.samples.result.outputs)

    @property
    def nbytes(self) -> int:
        result = self.samples.result
        frames = [frame for frames in result.snapshots for frame in frames.values()]
        return sum(x.nbytes for x in [*result.outputs, *frames, *self.samples.latents])

    @property
    def headers(self) -> dict[str, str]:
        seeds = self.samples.seeds
        return {"X-NFE": str(self.samples.resolved.nfe)} | ({"X-Seed": str(seeds[0])} if seeds else {})

    @property
    def name(self) -> str:
        request, seeds = self.samples.resolved.request, self.samples.seeds
        kind = "trajectory" if self.samples.shown else None
        return join_name("sample", kind, request.label, request.sampler, request.steps, *seeds[:1])

    def still(self) -> tuple[np.ndarray, int | None]:
        trajectory = self.samples.trajectory
        if trajectory is None:
            return to_uint8(self.samples.images), None
        return to_uint8(trajectory.flatten(0, 1)), trajectory.shape[1]

    def animation(self) -> np.ndarray:
        trajectory = self.samples.trajectory
        if trajectory is None:
            raise NotAcceptable(NO_TRAJECTORY)
        return np.stack([sheet(frame) for frame in to_uint8(trajectory.transpose(0, 1))])

    @property
    def array(self) -> Tensor:
        trajectory = self.samples.trajectory
        return self.samples.images if trajectory is None else trajectory

    def metadata(self) -> dict[str, str]:
        return self._metadata(self.samples.resolved.request)

    def body(self, timing: Timing) -> SampleResponse:
        samples, request = self.samples, self.samples.resolved.request
        left_out = {"n", "seed", "latent", "fit", "trajectory", "trajectory_of", "embed"}
        return SampleResponse(
            images=[to_base64(image) for image in self.encode_images()],
            seeds=samples.seeds,
            latents=[to_base64(to_npy(squeeze_slots(latent))) for latent in samples.latents],
            trajectory=[[to_base64(frame) for frame in frames] for frames in self._frames()] or None,
            encode_nfe=samples.encode_nfe,
            timing=timing,
            **request.model_dump(exclude=left_out),
            **describe_plan(samples.resolved, self.card),
        )

    def files(self) -> dict[str, bytes]:
        named = {f"{i:03d}.png": image for i, image in enumerate(self.encode_images())}
        for i, frames in enumerate(self._frames()):
            named |= {f"{i:03d}-trajectory-{k:03d}.png": frame for k, frame in enumerate(frames)}
        return named | request_file("/sample", self.samples.resolved.request, self.samples.sources)

    def encode_images(self) -> list[bytes]:
        """Each image as a PNG, with the request that gives it alone."""
        samples, encoded = self.samples, []
        for i, image in enumerate(to_uint8(samples.images)):
            alone: dict[str, Any] = {"n": 1, "trajectory": None, "trajectory_of": "x_0"}
            if samples.seeds:
                alone["seed"] = samples.seeds[i]
            encoded.append(png(image, self._metadata(samples.resolved.request.model_copy(update=alone))))
        return encoded

    def _frames(self) -> list[list[bytes]]:
        trajectory = self.samples.trajectory
        return [] if trajectory is None else [[png(frame) for frame in frames] for frames in to_uint8(trajectory)]

    def _metadata(self, request: SampleRequest) -> dict[str, str]:
        samples = self.samples
        return embed_request(
            "/sample", request, samples.resolved.nfe, samples.resolved.plan, self.card, samples.sources
        )
