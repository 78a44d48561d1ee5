"""Two or more latents in, the images between them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anyio
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.errors import InvalidField
from app.operations import latents as ends
from app.operations.latents import End, whole
from app.operations.requests import InterpolateRequest
from app.operations.resolve import (
    RequestContext,
    ResolvedRequest,
    Usage,
    check_guidance,
    class_of,
    placed,
    resolve,
    watched,
)
from app.operations.service import Service
from model.diffusion import interpolation
from model.diffusion.interpolation import DegenerateBlend, Frame

DEFAULT_FRAMES = 8


@dataclass(frozen=True)
class Interpolated:
    """The images between.

    Attributes:
        frames: of each image, its latent [1 or 2, C, H, W] and how much of each end it has.
        labels: names of the ends' classes.
        encode_nfe: what encoding took for each image that came in.
    """

    walk: ResolvedRequest[InterpolateRequest]
    frames: list[Frame]
    labels: list[str | None]
    result: Result
    spent: Usage
    warnings: list[str]
    encode_nfe: int | None = None

    @property
    def images(self) -> Tensor:
        """float32 [n, C, H, W] in about [-1, 1]."""
        return self.result.images

    @property
    def columns(self) -> int:
        """Of the strip or grid that they make."""
        grid = self.walk.request.grid
        return grid[1] if grid else len(self.frames)


async def interpolate(
    service: Service, request: InterpolateRequest, caller: RequestContext | None = None
) -> Interpolated:
    """ResolvedRequest from each of several latents between the ones that are given.

    Raises:
        BadInput: a value that this checkpoint cannot take.
        Starting, Draining, Overloaded, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    caller = caller or RequestContext()
    request, count = _shaped(request, service.settings.max_images)
    given = _ends(service, request)
    images_in = sum(end.slots is None for end in given)
    paired = ends.paired(given, request.sampler)
    walk = resolve(service, request, paired=paired, returning=images_in > 0 or paired)
    if walk.plan.stochastic:
        field, value = ("eta", request.eta) if request.eta else ("sampler", request.sampler)
        remedy = "fresh noise on the way would tear the frames apart; use a deterministic sampler, as ddim with eta 0"
        raise InvalidField(field, value, remedy)
    indices, names = _classes(service, request, len(given))
    check_guidance(service, request.guidance, indices)

    up = ends.way_up(service, walk) if images_in else None
    upward = images_in * up.nfe if up else 0
    exact = any(end.exact for end in given)
    in_all, at_once = count * walk.nfe + upward, max(count, images_in)
    in_turn = walk.plan.nfe + (up.nfe if up else 0)
    exact = exact or request.reproducible
    with placed(service, caller, at_once, in_all, steps=in_turn, exact=exact) as ticket:
        given, encoding = await ends.encoded(service, ticket, walk, given, indices)
        frames = await anyio.to_thread.run_sync(
            _between, request, [whole(end.slots) for end in given if end.slots is not None]
        )
        lanes = [
            Lane(
                walk.plan,
                0,
                _mixed(service, indices, frame.weights),
                request.reproducible,
                exact,
                request.guidance,
                frame.latent if paired else frame.latent[None],
            )
            for frame in frames
        ]
        result = await ticket.run(watched(lanes, caller))

    evaluations = {request.sampler: count * walk.nfe} | ({f"inverse {request.sampler}": upward} if upward else {})
    return Interpolated(
        _settled(walk, given, names),
        frames,
        names,
        result,
        Usage([encoding, result] if encoding else [result], evaluations),
        _warnings(request, given),
        up.nfe if up else None,
    )


def _shaped(request: InterpolateRequest, limit: int) -> tuple[InterpolateRequest, int]:
    """The request with its number of frames, and that of images; or what is contradictory about it."""
    if request.latents is None:
        request = _as_path(request)
        count = request.frames or 0
    elif request.a or request.b:
        raise InvalidField("a" if request.a else "b", "a latent", "there are latents already; give a and b, or latents")
    elif request.frames is not None:
        raise InvalidField("frames", request.frames, "it goes with a and b; a grid says how many in [rows, columns]")
    elif (request.weights is None) == (request.grid is None):
        raise InvalidField("weights", request.weights, "give latents either weights, or as four corners a grid")
    else:
        count = _of_many(request, len(request.latents))
    if count > limit:
        name = "frames" if request.grid is None else "grid"
        raise InvalidField(name, getattr(request, name), f"at most {limit} images per request")
    return request, count


def _as_path(request: InterpolateRequest) -> InterpolateRequest:
    for name in ("a", "b"):
        if getattr(request, name) is None:
            raise InvalidField(name, None, "give a and b; or latents, with weights or as corners of a grid")
    for name in ("weights", "grid"):
        if getattr(request, name) is not None:
            raise InvalidField(name, getattr(request, name), "it goes with latents; leave it out, or a and b")
    return request.model_copy(update={"frames": request.frames or DEFAULT_FRAMES})


def _of_many(request: InterpolateRequest, ends_in: int) -> int:
    if request.grid is not None:
        if ends_in != 4:
            raise InvalidField("grid", request.grid, f"it has four corners, latents has {ends_in}")
        if min(request.grid) < 2:
            raise InvalidField("grid", request.grid, "2 or more rows and columns")
        return request.grid[0] * request.grid[1]
    weights = request.weights or []
    if len(weights) != ends_in:
        raise InvalidField("weights", weights, f"one for each of the {ends_in} latents")
    if min(weights) < 0 or sum(weights) <= 0 or max(weights) > 1e6:
        raise InvalidField("weights", weights, "each from 0 to 1e6, and not all zero")
    return 1


def _ends(service: Service, request: InterpolateRequest) -> list[End]:
    if request.latents is None:
        named = {"a": request.a, "b": request.b}
    else:
        named = {f"latents.{i}": latent for i, latent in enumerate(request.latents)}
    return [ends.read(service, name, latent, request.sampler) for name, latent in named.items() if latent is not None]


def _classes(service: Service, request: InterpolateRequest, count: int) -> tuple[list[int | None], list[str | None]]:
    """Index and name of each end's class."""
    if request.labels is None:
        index, name = class_of(service, request.label)
        return [index] * count, [name] * count
    if request.label is not None:
        raise InvalidField("label", request.label, "there are labels already; leave one of them out")
    if len(request.labels) != count:
        raise InvalidField("labels", len(request.labels), f"one for each of the {count} ends")
    found = [class_of(service, label, f"labels.{i}") for i, label in enumerate(request.labels)]
    return [index for index, _ in found], [name for _, name in found]


def _between(request: InterpolateRequest, latents: Sequence[Tensor]) -> list[Frame]:
    if request.grid is not None:
        return interpolation.corners(latents, request.grid[0], request.grid[1], request.method)
    if request.weights is not None:
        try:
            return [interpolation.blend(latents, request.weights, request.method)]
        except DegenerateBlend as error:
            raise InvalidField("weights", request.weights, f"{error}; change them") from error
    return interpolation.path(latents[0], latents[1], request.frames or DEFAULT_FRAMES, request.method)


def _mixed(service: Service, indices: Sequence[int | None], weights: Sequence[float]) -> int | tuple[float, ...] | None:
    """The class of a frame: an index where its ends agree, else how much of each class embedding."""
    wanted = {index for index, weight in zip(indices, weights, strict=True) if weight > 0}
    if len(wanted) == 1:
        return wanted.pop()
    shares = [0.0] * (service.checkpoint.net.config.num_class_embeds or 0)
    for index, weight in zip(indices, weights, strict=True):
        shares[index or 0] += weight
    return tuple(shares)


def _settled(
    walk: ResolvedRequest[InterpolateRequest], given: Sequence[End], names: Sequence[str | None]
) -> ResolvedRequest[InterpolateRequest]:
    """As it can be sent again: images as what they were encoded to, classes by name."""
    request, latents = walk.request, [end.settled for end in given]
    changes: dict[str, object] = {"label": names[0]} if request.labels is None else {"labels": list(names)}
    changes |= {"latents": latents} if request.latents is not None else {"a": latents[0], "b": latents[1]}
    return ResolvedRequest(request.model_copy(update=changes), walk.plan, walk.paired)


def _warnings(request: InterpolateRequest, given: Sequence[End]) -> list[str]:
    if request.method == "lerp" or request.weights is not None:
        return []
    latents = [whole(end.slots) for end in given if end.slots is not None]
    edges = [(0, 1)] if request.grid is None else [(0, 1), (2, 3)]
    return [
        f"{given[i].name} and {given[j].name} point in opposite directions, so no arc between them is distinguished; "
        "this one leads through a fixed direction orthogonal to both"
        for i, j in edges
        if interpolation.antipodal(latents[i], latents[j])
    ]
