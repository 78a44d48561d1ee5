"""From two or more latents to the images between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import anyio
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.engine.loading import LoadedModel
from app.errors import InvalidField
from app.errors.wording import MISSING, Unquoted
from app.operations.context import RequestContext, Usage, reserve
from app.operations.files import FileReference
from app.operations.labels import check_guidance, mix_labels, resolve_labels
from app.operations.latents import (
    InitialLatent,
    check_pairs,
    encode_images,
    encoding_phases,
    read_latent,
    sources_of,
    squeeze_slots,
)
from app.operations.requests import InterpolateRequest
from app.operations.resolve import ResolvedRequest, resolve
from app.operations.service import Service
from model.diffusion import interpolation
from model.diffusion.interpolation import Blend, DegenerateBlend

DEFAULT_FRAMES = 8


@dataclass(frozen=True)
class Interpolation:
    """The images between given latents.

    Attributes:
        frames: of each image, its latent [1 or 2, C, H, W] and the weight of each given latent.
        labels: names of the given latents' classes.
        encode_nfe: network evaluations of encoding each given image.
        sources: the files that latents came as, by their fields.
    """

    resolved: ResolvedRequest[InterpolateRequest]
    frames: list[Blend]
    labels: list[str | None]
    result: Result
    usage: Usage
    warnings: list[str]
    encode_nfe: int | None = None
    sources: Mapping[str, FileReference] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        """float32 [n, C, H, W] in about [-1, 1]."""
        return self.result.images

    @property
    def columns(self) -> int:
        """Of the strip or grid that the images make."""
        grid = self.resolved.request.grid
        return grid[1] if grid else len(self.frames)


async def interpolate(
    service: Service, request: InterpolateRequest, context: RequestContext | None = None
) -> Interpolation:
    """Sample from each of several latents between the given ones.

    Raises:
        BadInput: a value that this checkpoint cannot take.
        Draining, Overloaded, TooLate, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    context, model = context or RequestContext(), service.model
    request, count = _check_shape(request, service.settings.max_images)
    given = _read_latents(model, request)
    paired = check_pairs(given, request.sampler)
    returning = paired or any(each.slots is None for each in given)
    resolved = await resolve(service, request, paired=paired, returning=returning)
    _check_deterministic(resolved)
    indices, names = resolve_labels(model, request.label, request.labels, len(given))
    check_guidance(model, request.guidance, indices)
    exact = request.reproducible or any(each.exact for each in given)

    encoding = encoding_phases(resolved, given)
    phases = [*encoding, resolved.phase(count)]
    with reserve(service, context, phases, exact=exact) as reservation:
        given, results = await encode_images(service, reservation, resolved, encoding, given, indices)
        ends = [squeeze_slots(each.slots) for each in given if each.slots is not None]
        frames = await anyio.to_thread.run_sync(_interpolate, request, ends)
        lanes = [
            Lane(
                resolved.plan,
                0,
                mix_labels(model, indices, frame.weights),
                request.reproducible,
                exact,
                request.guidance,
                frame.latent if paired else frame.latent[None],
            )
            for frame in frames
        ]
        result = await reservation.run(context.add_previews(lanes))

    return Interpolation(
        _replayable(resolved, given, names),
        frames,
        names,
        result,
        Usage.measure(phases, [*results, result]),
        _warn(request, given),
        encoding[0].nfe if encoding else None,
        sources_of(given),
    )


def _check_deterministic(resolved: ResolvedRequest[InterpolateRequest]) -> None:
    request = resolved.request
    if resolved.plan.stochastic:
        field, value = ("eta", request.eta) if request.eta else ("sampler", request.sampler)
        remedy = "fresh noise would tear the frames apart; use a deterministic sampler, as ddim with eta 0"
        raise InvalidField(field, value, remedy)


def _check_shape(request: InterpolateRequest, limit: int) -> tuple[InterpolateRequest, int]:
    """The request with its number of frames, and that of images; or the error of fields that contradict each other."""
    if request.latents is None:
        request = _check_path(request)
        count = request.frames or 0
    elif request.a or request.b:
        name = "a" if request.a else "b"
        raise InvalidField(name, Unquoted("a latent"), "latents are given already; give a and b, or latents")
    elif request.frames is not None:
        raise InvalidField("frames", request.frames, "it goes with a and b; a grid says how many in [rows, columns]")
    elif (request.weights is None) == (request.grid is None):
        remedy = "give latents either weights, or as four corners a grid"
        raise InvalidField("weights", MISSING if request.weights is None else request.weights, remedy)
    else:
        count = _count_images(request, len(request.latents))
    if count > limit:
        name = "frames" if request.grid is None else "grid"
        raise InvalidField(name, getattr(request, name), f"at most {limit} images per request (UNSTIR_MAX_IMAGES)")
    return request, count


def _check_path(request: InterpolateRequest) -> InterpolateRequest:
    for name in ("a", "b"):
        if getattr(request, name) is None:
            raise InvalidField(name, MISSING, "give a and b; or latents, with weights or as corners of a grid")
    for name in ("weights", "grid"):
        if getattr(request, name) is not None:
            raise InvalidField(name, getattr(request, name), "it goes with latents; leave it out, or a and b")
    return request.model_copy(update={"frames": request.frames or DEFAULT_FRAMES})


def _count_images(request: InterpolateRequest, count: int) -> int:
    if request.grid is not None:
        if count != 4:
            raise InvalidField("grid", request.grid, f"it has four corners, latents has {count}")
        if min(request.grid) < 2:
            raise InvalidField("grid", request.grid, "2 or more rows and columns")
        return request.grid[0] * request.grid[1]
    weights = request.weights or []
    if len(weights) != count:
        raise InvalidField("weights", weights, f"one for each of the {count} latents")
    if min(weights) < 0 or sum(weights) <= 0 or max(weights) > 1e6:
        raise InvalidField("weights", weights, "each from 0 to 1e6, and not all zero")
    return 1


def _read_latents(model: LoadedModel, request: InterpolateRequest) -> list[InitialLatent]:
    if request.latents is None:
        fields = {"a": request.a, "b": request.b}
    else:
        fields = {f"latents.{i}": latent for i, latent in enumerate(request.latents)}
    return [read_latent(model, field, each, request.sampler) for field, each in fields.items() if each is not None]


def _interpolate(request: InterpolateRequest, latents: Sequence[Tensor]) -> list[Blend]:
    if request.grid is not None:
        return interpolation.grid(latents, request.grid[0], request.grid[1], request.method)
    if request.weights is not None:
        try:
            return [interpolation.blend(latents, request.weights, request.method)]
        except DegenerateBlend as error:
            raise InvalidField("weights", request.weights, f"{error}; change them") from error
    return interpolation.path(latents[0], latents[1], request.frames or DEFAULT_FRAMES, request.method)


def _replayable(
    resolved: ResolvedRequest[InterpolateRequest], given: Sequence[InitialLatent], names: Sequence[str | None]
) -> ResolvedRequest[InterpolateRequest]:
    """As it can be sent again: images as what they were encoded to, classes by name."""
    request, latents = resolved.request, [each.replayable for each in given]
    changes: dict[str, object] = {"label": names[0]} if request.labels is None else {"labels": list(names)}
    changes |= {"latents": latents} if request.latents is not None else {"a": latents[0], "b": latents[1]}
    return ResolvedRequest(request.model_copy(update=changes), resolved.plan, resolved.paired)


def _warn(request: InterpolateRequest, given: Sequence[InitialLatent]) -> list[str]:
    if request.method == "lerp" or request.weights is not None:
        return []
    latents = [squeeze_slots(each.slots) for each in given if each.slots is not None]
    edges = [(0, 1)] if request.grid is None else [(0, 1), (2, 3)]
    return [
        f"{given[i].field} and {given[j].field} point in opposite directions, so that any arc between them is as good; "
        "this one leads through a fixed direction orthogonal to both"
        for i, j in edges
        if interpolation.antipodal(latents[i], latents[j])
    ]
