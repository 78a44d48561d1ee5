"""Noise in, pictures out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.lane import Lane, Result
from app.errors import InvalidField
from app.operations import ends
from app.operations.walks import Caller, Spent, Walk, check_guidance, class_of, moments, placed, resolve, watched
from app.schemas.requests import MAX_SEED, SampleRequest
from app.service import Service
from model import latents


@dataclass(frozen=True)
class Sampled:
    """Pictures, and the walk that they took.

    Attributes:
        seeds: of each picture's noise; empty where none was drawn.
        starts: [1 or 2, C, H, W] of each picture: where its walk began.
        moments: steps that the trajectory shows; its last frame is the picture.
        encode_nfe: what encoding took, if a picture came in.
    """

    walk: Walk[SampleRequest]
    seeds: list[int]
    starts: list[Tensor]
    result: Result
    spent: Spent
    moments: list[int]
    encode_nfe: int | None = None

    @property
    def pictures(self) -> Tensor:
        """float32 [n, C, H, W] in about [-1, 1]."""
        return self.result.pictures

    @property
    def trajectory(self) -> Tensor | None:
        """float32 [n, k, C, H, W], ending in the pictures; None where none was asked for."""
        if not self.moments:
            return None
        kept = [[frames[at] for at in self.moments[:-1]] for frames in self.result.frames]
        rows = zip(kept, self.pictures, strict=True)
        return torch.stack([torch.stack([*frames, picture]) for frames, picture in rows])


async def sample(service: Service, request: SampleRequest, caller: Caller | None = None) -> Sampled:
    """Draw pictures.

    Raises:
        BadInput: a value that this checkpoint cannot take.
        Starting, Draining, Overloaded, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    caller = caller or Caller()
    limit = service.settings.max_pictures
    if request.n > limit:
        raise InvalidField("n", request.n, f"at most {limit} pictures per request; send several requests")
    given = [] if request.latent is None else [ends.read(service, "latent", request.latent, request.sampler)]
    pictures_in = sum(end.slots is None for end in given)
    paired = ends.paired(given, request.sampler)
    walk = resolve(service, request, paired=paired, returning=pictures_in > 0 or paired)
    label, name = class_of(service, request.label)
    check_guidance(service, request.guidance, [label])
    seeds = _seeds(walk)
    shown = moments(walk.plan, request.trajectory, request.trajectory_of)

    up = ends.way_up(service, walk) if pictures_in else None
    upward = pictures_in * up.nfe if up else 0
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
                keep=frozenset(shown[:-1]),
                look=request.trajectory_of,
            )
            for seed in seeds or [0]
        ]
        result = await ticket.run(watched(lanes, caller))

    changes = {"seed": seeds[0] if seeds else None, "label": name, "latent": given[0].settled if given else None}
    walk = Walk(walk.request.model_copy(update=changes), walk.plan, paired)
    evaluations = {request.sampler: request.n * walk.nfe}
    if up and encoding:
        evaluations[f"inverse {request.sampler}"] = upward
    spent = Spent([encoding, result] if encoding else [result], evaluations)
    shape = service.checkpoint.shape
    starts = [latents.draw(latents.generator(seed), shape)[None] if start is None else start for seed in seeds or [0]]
    return Sampled(walk, seeds, starts, result, spent, shown, up.nfe if up else None)


def _seeds(walk: Walk[SampleRequest]) -> list[int]:
    """Of each picture; none where a latent is given and nothing else is drawn."""
    request = walk.request
    if request.latent is not None and not walk.plan.stochastic:
        if request.n > 1:
            remedy = "one latent leads to one picture, since this walk draws no noise; ask for 1"
            raise InvalidField("n", request.n, remedy)
        if request.seed is not None:
            raise InvalidField("seed", request.seed, "the latent takes its place; leave one of them out")
        return []
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidField("seed", seed, f"picture i uses seed + i, which must not exceed {MAX_SEED}")
    return [seed + i for i in range(request.n)]
