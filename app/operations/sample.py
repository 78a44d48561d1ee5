"""From noise, or a latent, to images."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.errors import InvalidField
from app.operations.context import RequestContext, Usage, reserve
from app.operations.fields import MAX_SEED
from app.operations.files import FileReference
from app.operations.labels import check_guidance, resolve_label
from app.operations.latents import check_pairs, encode_images, encoding_phases, read_latent, sources_of
from app.operations.requests import SampleRequest
from app.operations.resolve import ResolvedRequest, resolve, trajectory_steps
from app.operations.service import Service
from model.diffusion.noise import draw_noise, seeded_generator


@dataclass(frozen=True)
class Samples:
    """Images, and how they were sampled.

    Attributes:
        seeds: of each image's noise; empty where none was drawn.
        latents: [1 or 2, C, H, W] of each image: where its trajectory starts.
        shown: steps that the trajectory shows; its last frame is the image.
        encode_nfe: network evaluations of encoding, if an image was given.
        sources: the file that the latent came as, by its field.
    """

    resolved: ResolvedRequest[SampleRequest]
    seeds: list[int]
    latents: list[Tensor]
    result: Result
    usage: Usage
    shown: list[int]
    encode_nfe: int | None = None
    sources: Mapping[str, FileReference] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        """float32 [n, C, H, W] in about [-1, 1]."""
        return self.result.images

    @property
    def trajectory(self) -> Tensor | None:
        """float32 [n, k, C, H, W], ending in the images; None where none was asked for."""
        if not self.shown:
            return None
        kept = [[frames[step] for step in self.shown[:-1]] for frames in self.result.snapshots]
        rows = zip(kept, self.images, strict=True)
        return torch.stack([torch.stack([*frames, image]) for frames, image in rows])


async def sample(service: Service, request: SampleRequest, context: RequestContext | None = None) -> Samples:
    """Sample ``n`` images.

    Raises:
        BadInput: a value that this checkpoint cannot take.
        Draining, Overloaded, TooLate, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    context, model = context or RequestContext(), service.model
    limit = service.settings.max_images
    if request.n > limit:
        raise InvalidField(
            "n", request.n, f"at most {limit} images per request (UNSTIR_MAX_IMAGES); send several requests"
        )
    given = [] if request.latent is None else [read_latent(model, "latent", request.latent, request.sampler)]
    paired = check_pairs(given, request.sampler)
    returning = paired or any(each.slots is None for each in given)
    resolved = await resolve(service, request, paired=paired, returning=returning)
    label, name = resolve_label(model, request.label)
    check_guidance(model, request.guidance, [label])
    seeds = _seeds(resolved)
    shown = trajectory_steps(resolved.plan.nfe, request.trajectory, request.trajectory_of)
    exact = request.reproducible or any(each.exact for each in given)

    encoding = encoding_phases(resolved, given)
    phases = [*encoding, resolved.phase(request.n)]
    with reserve(service, context, phases, exact=exact) as reservation:
        given, results = await encode_images(service, reservation, resolved, encoding, given, [label])
        start = given[0].slots if given else None
        lanes = [
            Lane(
                resolved.plan,
                seed,
                label,
                request.reproducible,
                exact,
                request.guidance,
                start,
                snapshot_steps=frozenset(shown[:-1]),
                snapshot_kind=request.trajectory_of,
            )
            for seed in seeds or [0]
        ]
        result = await reservation.run(context.add_previews(lanes))

    latent = given[0].replayable if given else None
    changes = {"seed": seeds[0] if seeds else None, "label": name, "latent": latent}
    shape = model.checkpoint.shape
    latents = [draw_noise(seeded_generator(seed), shape)[None] if start is None else start for seed in seeds or [0]]
    return Samples(
        ResolvedRequest(resolved.request.model_copy(update=changes), resolved.plan, paired),
        seeds,
        latents,
        result,
        Usage.measure(phases, [*results, result]),
        shown,
        encoding[0].nfe if encoding else None,
        sources_of(given),
    )


def _seeds(resolved: ResolvedRequest[SampleRequest]) -> list[int]:
    """Of each image; none where a latent is given and no noise is drawn."""
    request = resolved.request
    if request.latent is not None and not resolved.plan.stochastic:
        if request.n > 1:
            remedy = "one latent leads to one image, since this sampler draws no noise; ask for 1"
            raise InvalidField("n", request.n, remedy)
        if request.seed is not None:
            raise InvalidField("seed", request.seed, "the latent takes its place; leave one of them out")
        return []
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidField("seed", seed, f"image i uses seed + i, which must not exceed {MAX_SEED}")
    return [seed + i for i in range(request.n)]
