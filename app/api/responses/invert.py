"""The result of /invert: the latent; as an image its reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field
from torch import Tensor

from app.api.responses.results import NO_TRAJECTORY, OperationResult, embed_request, join_name, to_base64
from app.api.responses.sample import SampleResult
from app.api.responses.schemas import Answer, EncodedArray, EncodedImage, Timing
from app.errors import NotAcceptable
from app.operations.context import Usage
from app.operations.fields import MethodName, SamplerName
from app.operations.files import to_npy
from app.operations.invert import Encoding
from app.operations.requests import InvertRequest
from model.checkpoint import Card
from model.diffusion.schedule import Spacing
from model.images import png, to_uint8


class DecodeFields(Answer):
    """What `/sample` needs beside the latent to give the image back."""

    sampler: SamplerName
    steps: int
    spacing: Spacing
    clip: bool
    label: str | None = None
    reproducible: bool


class InvertResponse(Answer):
    """The JSON response of `/invert`. PSNR, MSE and the largest error are measured on [-1, 1], unrounded."""

    decode: DecodeFields = Field(description='Send these fields to /sample, with `latent` as {"npy": …}.')
    method: MethodName
    steps: int
    refinements: int | None = None
    spacing: Spacing
    label: str | None = None
    nfe: int = Field(description="Network evaluations of the inversion.")
    decode_nfe: int = Field(description="Network evaluations of decoding.")
    psnr: float | None = Field(None, description="Of the round trip, in dB; 58.9 is that of 8-bit rounding.")
    mse: float | None = Field(None, description="Mean squared error of the round trip.")
    max_error: float | None = Field(None, description="Largest difference of any pixel.")
    exact: float | None = Field(None, description="Share of the 8-bit values that are equal.")
    residual: float | None = Field(
        None, description="fixed_point only: root mean square by which the plan misses the exact inverse."
    )
    norm: float = Field(description="Mean square of x_T; about 1 for what the network knows well.")
    warnings: list[str] = Field([], description="What is unusual about this image for this network.")
    plan: str = Field(description="Digest of the compiled plan.")
    model: str = Field(description="Name of the checkpoint.")
    sha256: str = Field(description="Of the weights.")
    timing: Timing
    latent: EncodedArray = Field(
        description="base64 of a .npy: float32 [C, H, W], or [2, C, H, W] for the pair of obelm."
    )
    reconstruction: EncodedImage | None = Field(None, description="PNG, base64: the response of /sample to `decode`.")
    trajectory: list[EncodedImage] | None = Field(None, description="Frames of the trajectory: PNG, base64.")


def no_animation(request: InvertRequest) -> str | None:
    """Why the response cannot be an animation; None if it can."""
    return NO_TRAJECTORY if request.trajectory is None else None


def no_image(request: InvertRequest) -> str | None:
    """Why the response cannot be an image; None if it can."""
    if request.trajectory is None and not request.check:
        return "the image is the reconstruction, which check = false leaves out; ask for application/x-npy"
    return None


@dataclass(frozen=True)
class InvertResult(OperationResult):
    """The latent; as an image its reconstruction, which is the response of /sample to ``decode``."""

    encoding: Encoding
    card: Card

    @property
    def usage(self) -> Usage:
        return self.encoding.usage

    @property
    def image_count(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        encoding, reconstruction = self.encoding, self._reconstruction()
        tensors = [x for x in (encoding.image, encoding.slots, encoding.trajectory) if x is not None]
        return sum(x.nbytes for x in tensors) + (reconstruction.nbytes if reconstruction else 0)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-NFE": str(self.encoding.plan.nfe)}

    @property
    def name(self) -> str:
        request = self.encoding.request
        return join_name("invert", request.label, request.method, request.steps)

    def still(self) -> tuple[np.ndarray, int | None]:
        trajectory, reconstruction = self.encoding.trajectory, self._reconstruction()
        if trajectory is not None:
            return to_uint8(trajectory), len(trajectory)
        if reconstruction is None:
            raise NotAcceptable(no_image(self.encoding.request) or NO_TRAJECTORY)
        return reconstruction.still()

    def animation(self) -> np.ndarray:
        if self.encoding.trajectory is None:
            raise NotAcceptable(NO_TRAJECTORY)
        return to_uint8(self.encoding.trajectory)

    @property
    def array(self) -> Tensor:
        return self.encoding.latent

    def metadata(self) -> dict[str, str]:
        reconstruction = self._reconstruction()
        if self.encoding.request.embed != "request_and_files":
            return self._metadata(self.encoding.request)
        if reconstruction is not None and self.encoding.trajectory is None:
            return reconstruction.metadata()
        # With the image at the network's size; what was uploaded may have been far larger.
        image = png(to_uint8(self.encoding.image))
        return self._metadata(self.encoding.request.model_copy(update={"image": image, "fit": "exact"}))

    def _metadata(self, request: InvertRequest) -> dict[str, str]:
        encoding = self.encoding
        return embed_request(
            "/invert", request, encoding.plan.nfe, encoding.plan, self.card, {"image": encoding.source}
        )

    def body(self, timing: Timing) -> InvertResponse:
        encoding, reconstruction = self.encoding, self._reconstruction()
        frames = () if encoding.trajectory is None else to_uint8(encoding.trajectory)
        found = {"residual": encoding.residual, "norm": encoding.norm}
        if encoding.round_trip is not None:
            found |= {name: getattr(encoding.round_trip, name) for name in ("psnr", "mse", "max_error", "exact")}
        measured = {name: float(f"{value:.6g}") for name, value in found.items() if value is not None}
        return InvertResponse(
            latent=to_base64(to_npy(encoding.latent)),
            decode=DecodeFields(**encoding.decode.request.model_dump(include=set(DecodeFields.model_fields))),
            nfe=encoding.plan.nfe,
            decode_nfe=encoding.decode.nfe,
            **measured,
            reconstruction=to_base64(self._encode_reconstruction(reconstruction)) if reconstruction else None,
            warnings=encoding.warnings,
            trajectory=[to_base64(png(frame)) for frame in frames] or None,
            plan=encoding.plan.digest,
            model=self.card.name,
            sha256=self.card.sha256,
            timing=timing,
            **encoding.request.model_dump(include={"method", "steps", "refinements", "spacing", "label"}),
        )

    def _encode_reconstruction(self, reconstruction: SampleResult) -> bytes:
        request = self.encoding.request
        if request.embed == "request_and_files":
            return reconstruction.encode_images()[0]
        alone = request.model_copy(update={"trajectory": None, "trajectory_of": "x_0"})
        return png(reconstruction.still()[0][0], self._metadata(alone))

    def _reconstruction(self) -> SampleResult | None:
        trip = self.encoding.round_trip
        return None if trip is None else SampleResult(trip.samples, self.card)
