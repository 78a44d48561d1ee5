"""Noise in, images out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.errors import InvalidField
from app.operations import latents as ends
from app.operations.requests import MAX_SEED, SampleRequest
from app.operations.resolve import (
    RequestContext,
    ResolvedRequest,
    Usage,
    check_guidance,
    class_of,
    moments,
    placed,
    resolve,
    watched,
)
from app.operations.service import Service
from model.diffusion.noise import draw_noise, seeded_generator


@dataclass(frozen=True)
class Sampled:
    """Images, and the walk that they took.

    Attributes:
        seeds: of each image's noise; empty where none was drawn.
        starts: [1 or 2, C, H, W] of each image: where its walk began.
        moments: steps that the trajectory shows; its last frame is the image.
        encode_nfe: what encoding took, if an image came in.
    """

    walk: ResolvedRequest[SampleRequest]
    seeds: list[int]
    starts: list[Tensor]
    result: Result
    spent: Usage
    moments: list[int]
    encode_nfe: int | None = None

    @property
    def images(self) -> Tensor:
        """float32 [n, C, H, W] in about [-1, 1]."""
        return self.result.images

    @property
    def trajectory(self) -> Tensor | None:
        """float32 [n, k, C, H, W], ending in the images; None where none was asked for."""
        if not self.moments:
            return None
        kept = [[frames[at] for at in self.moments[:-1]] for frames in self.result.snapshots]
        rows = zip(kept, self.images, strict=True)
        return torch.stack([torch.stack([*frames, image]) for frames, image in rows])


async def sample(service: Service, request: SampleRequest, caller: RequestContext | None = None) -> Sampled:
    """Draw images.

    Raises:
        BadInput: a value that this checkpoint cannot take.
        Starting, Draining, Overloaded, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    caller = caller or RequestContext()
    limit = service.settings.max_images
    if request.n > limit:
        raise InvalidField("n", request.n, f"at most {limit} images per request; send several requests")
    given = [] if request.latent is None else [ends.read(service, "latent", request.latent, request.sampler)]
    images_in = sum(end.slots is None for end in given)
    paired = ends.paired(given, request.sampler)
    walk = resolve(service, request, paired=paired, returning=images_in > 0 or paired)
    label, name = class_of(service, request.label)
    check_guidance(service, request.guidance, [label])
    seeds = _seeds(walk)
    shown = moments(walk.plan, request.trajectory, request.trajectory_of)

    up = ends.way_up(service, walk) if images_in else None
    upward = images_in * up.nfe if up else 0
    exact = any(end.exact for end in given)
    in_all = request.n * walk.nfe + upward
    in_turn = walk.plan.nfe + (up.nfe if up else 0)
    exact = exact or request.reproducible
    with placed(service, caller, request.n, in_all, steps=in_turn, exact=exact) as ticket:
        given, encoding = await ends.encoded(service, ticket, walk, given, [label])
        start = given[0].slots if given else None
        lanes = [
            Lane(
                walk.plan,
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
        result = await ticket.run(watched(lanes, caller))

    changes = {"seed": seeds[0] if seeds else None, "label": name, "latent": given[0].settled if given else None}
    walk = ResolvedRequest(walk.request.model_copy(update=changes), walk.plan, paired)
    evaluations = {request.sampler: request.n * walk.nfe}
    if up and encoding:
        evaluations[f"inverse {request.sampler}"] = upward
    spent = Usage([encoding, result] if encoding else [result], evaluations)
    shape = service.checkpoint.shape
    starts = [draw_noise(seeded_generator(seed), shape)[None] if start is None else start for seed in seeds or [0]]
    return Sampled(walk, seeds, starts, result, spent, shown, up.nfe if up else None)


def _seeds(walk: ResolvedRequest[SampleRequest]) -> list[int]:
    """Of each image; none where a latent is given and nothing else is drawn."""
    request = walk.request
    if request.latent is not None and not walk.plan.stochastic:
        if request.n > 1:
            remedy = "one latent leads to one image, since this walk draws no noise; ask for 1"
            raise InvalidField("n", request.n, remedy)
        if request.seed is not None:
            raise InvalidField("seed", request.seed, "the latent takes its place; leave one of them out")
        return []
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidField("seed", seed, f"image i uses seed + i, which must not exceed {MAX_SEED}")
    return [seed + i for i in range(request.n)]
