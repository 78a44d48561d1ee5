"""Latents that a request brings: seeds, files of numbers, and images, which are encoded first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.engine.loading import LoadedModel
from app.engine.reservation import Reservation
from app.errors import InvalidField
from app.operations import files
from app.operations.context import Phase
from app.operations.fields import Latent
from app.operations.files import FileReference
from app.operations.plans import check_evaluations
from app.operations.requests import SamplingRequest
from app.operations.resolve import ResolvedRequest, compile_inversion, inversion_for
from app.operations.service import Service
from model.diffusion.noise import draw_noise, seeded_generator


@dataclass(frozen=True)
class InitialLatent:
    """Where a trajectory starts.

    Attributes:
        field: of the request, that it was given in.
        slots: [1 or 2, C, H, W]; None for an image that is still to be encoded.
        source: the file that it came as; None for a seed.
    """

    field: str
    latent: Latent
    slots: Tensor | None = None
    source: FileReference | None = None

    @property
    def exact(self) -> bool:
        """Whether float32 is needed, since the trajectory leads back to a given image."""
        return self.latent.seed is None

    @property
    def replayable(self) -> Latent:
        """The same latent in a form that can be sent again: an image as what it was encoded to."""
        if self.latent.seed is not None or self.slots is None:
            return self.latent
        return Latent(npy=files.to_npy(squeeze_slots(self.slots)))


def sources_of(latents: Sequence[InitialLatent]) -> dict[str, FileReference]:
    """The files that latents came as, by the field that each was given in."""
    return {each.field: each.source for each in latents if each.source is not None}


def squeeze_slots(slots: Tensor) -> Tensor:
    """[C, H, W] of one slot, [2, C, H, W] of a pair."""
    return slots[0] if len(slots) == 1 else slots


def read_latent(model: LoadedModel, field: str, latent: Latent, sampler: str) -> InitialLatent:
    """Draw or read it; an image is left for :func:`encode_images`.

    Raises:
        InvalidField: the file is no latent, or the sampler cannot start from it.
    """
    if latent.seed is not None:
        noise = draw_noise(seeded_generator(latent.seed), model.checkpoint.shape)
        return InitialLatent(field, latent, noise[None])
    if latent.npy is not None:
        slots = files.read_latent(model.checkpoint.shape, f"{field}.npy", latent.npy)
        if len(slots) == 2 and sampler != "obelm":
            raise InvalidField("sampler", sampler, f"{field} is a pair of states, which only obelm can start from")
        return InitialLatent(field, latent, slots, files.refer("npy", latent.npy))  # whose size its shape has bounded
    if inversion_for(sampler) is None:
        remedy = f"{field} is an image, which is encoded for ddim or obelm; use one of them"
        raise InvalidField("sampler", sampler, remedy)
    return InitialLatent(field, latent)


def check_pairs(latents: Sequence[InitialLatent], sampler: str) -> bool:
    """Whether these latents are pairs of states.

    Raises:
        InvalidField: some are and some are not.
    """
    pairs = {each.field: sampler == "obelm" if each.slots is None else len(each.slots) == 2 for each in latents}
    if len(set(pairs.values())) == 2:
        named = ", ".join(field for field, pair in pairs.items() if pair)
        remedy = f"{named} would be a pair of states, the others are not; use ddim, or images only"
        raise InvalidField("sampler", sampler, remedy)
    return any(pairs.values())


def encoding_phases(resolved: ResolvedRequest[SamplingRequest], latents: Sequence[InitialLatent]) -> list[Phase]:
    """What encoding those latents that are images costs: one phase, or none.

    Raises:
        InvalidField: too many evaluations.
    """
    images = sum(each.slots is None for each in latents)
    inversion = inversion_for(resolved.request.sampler)
    if not images or inversion is None:
        return []
    request, steps = resolved.request, resolved.request.steps or 1
    check_evaluations(inversion.nfe(steps), "steps", steps, "ask for fewer steps, as images are encoded first")
    return [Phase(f"inverse {request.sampler}", inversion.nfe(steps), images)]


async def encode_images(
    service: Service,
    reservation: Reservation,
    resolved: ResolvedRequest[SamplingRequest],
    phases: Sequence[Phase],
    latents: Sequence[InitialLatent],
    labels: Sequence[int | None],
) -> tuple[list[InitialLatent], list[Result]]:
    """Encode those latents that are images, each with its label, in one job; the others stay as they are.

    Args:
        phases: of :func:`encoding_phases`.

    Raises:
        InvalidField, ImageTooLarge: a file is no image that fits.
    """
    if not phases:
        return list(latents), []
    request, inversion = resolved.request, inversion_for(resolved.request.sampler)
    assert inversion is not None, "This is a bug: images to encode for a sampler without an inversion."
    missing = [i for i, each in enumerate(latents) if each.slots is None]
    contents = [(f"{latents[i].field}.image", latents[i].latent.image or b"") for i in missing]
    images = [await files.decode_image(service, field, content, request.fit) for field, content in contents]
    sources = [await anyio.to_thread.run_sync(files.refer, "image", content) for _, content in contents]
    plan = await compile_inversion(service, inversion, request.steps or 1, request.spacing)
    lanes = [
        Lane(
            plan,
            0,
            labels[i],
            request.reproducible,
            exact=True,
            initial_state=x[None],
            output_slots=1 + resolved.paired,
        )
        for i, x in zip(missing, images, strict=True)
    ]
    result = await reservation.run(lanes)
    encoded = list(latents)
    for i, slots, source in zip(missing, result.outputs, sources, strict=True):
        encoded[i] = replace(latents[i], slots=slots, source=source)
    return encoded, [result]
