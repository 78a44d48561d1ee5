"""What each operation has to show."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel

from app import __version__
from app.api.responses.formats import Outcome, base64_of
from app.api.responses.schemas import Decode, InterpolateReply, InvertReply, SampleReply, Timing
from app.operations import Interpolated, Inverted, Sampled
from app.operations import files as uploads
from app.operations.latents import whole
from app.operations.requests import Walking
from app.operations.resolve import ResolvedRequest
from app.operations.service import Service
from model import images
from model.diffusion.plan import Plan

NO_TRAJECTORY = "that shows a walk; ask for a trajectory of some frames, or for image/png"


def sampled(service: Service, answer: Sampled) -> Outcome:
    """Images, or how they came to be."""
    walk, request = answer.walk, answer.walk.request
    final, way = answer.images, answer.trajectory
    n = len(final)
    body = request.model_dump(exclude={"n", "seed", "latent", "fit", "trajectory", "trajectory_of"})

    def each(image: int) -> bytes:
        """One of the images by itself, with the request that draws it alone."""
        seed = {"seed": answer.seeds[image]} if answer.seeds else {}
        alone = request.model_copy(update={"n": 1, "trajectory": None, "trajectory_of": "x_0", **seed})
        text = _provenance(service, "/sample", alone, walk.nfe, walk.plan)
        return images.png(images.to_uint8(final[image]), text)

    def frames() -> list[list[bytes]]:
        return [] if way is None else [[images.png(frame) for frame in row] for row in images.to_uint8(way)]

    def files() -> dict[str, bytes]:
        named = {f"{i:03d}.png": each(i) for i in range(n)}
        for i, row in enumerate(frames()):
            named |= {f"{i:03d}-trajectory-{k:03d}.png": frame for k, frame in enumerate(row)}
        return named | {"request.json": _replayable("/sample", request)}

    def reply(timing: Timing) -> SampleReply:
        shown = [[base64_of(frame) for frame in row] for row in frames()]
        return SampleReply(
            images=[base64_of(each(i)) for i in range(n)],
            seeds=answer.seeds,
            latents=[base64_of(uploads.npy(whole(start))) for start in answer.starts],
            trajectory=shown or None,
            encode_nfe=answer.encode_nfe,
            timing=timing,
            **body,
            **_facts(service, walk),
        )

    still: np.ndarray = images.to_uint8(final)
    moving: np.ndarray | str = NO_TRAJECTORY
    if way is not None:
        still = images.to_uint8(way.flatten(0, 1))
        moving = np.stack([images.sheet(frame) for frame in images.to_uint8(way.transpose(0, 1))])
    headers = {"X-NFE": str(walk.nfe)} | ({"X-Seed": str(answer.seeds[0])} if answer.seeds else {})
    return Outcome(
        still=still,
        columns=None if way is None else way.shape[1],
        moving=moving,
        array=final if way is None else way,
        body=reply,
        provenance=_provenance(service, "/sample", request, walk.nfe, walk.plan),
        spent=answer.spent,
        headers=headers,
        files=files,
        images=n,
    )


def inverted(service: Service, answer: Inverted) -> Outcome:
    """The latent; as an image its reconstruction, which is just what /sample answers to ``decode``."""
    trip, way = answer.trip, answer.trajectory
    back = sampled(service, trip.back) if trip else None
    provenance = back.provenance if back and way is None else _replaying(service, answer)
    request = answer.request.model_copy(update={"image": b""})
    answer = replace(answer, request=request)  # or what is kept of a job would hold the file that came with it

    def reconstruction() -> str | None:
        if back is None or isinstance(back.still, str):
            return None
        return base64_of(images.png(back.still[0], back.provenance))

    def reply(timing: Timing) -> InvertReply:
        frames = [] if way is None else [base64_of(images.png(frame)) for frame in images.to_uint8(way)]
        found = {"residual": answer.residual, "norm": answer.norm}
        if trip is not None:
            found |= {name: getattr(trip, name) for name in ("psnr", "mse", "max_error", "exact")}
        measured = {name: float(f"{value:.6g}") for name, value in found.items() if value is not None}
        return InvertReply(
            latent=base64_of(uploads.npy(answer.latent)),
            decode=Decode(**answer.decode.model_dump(include=set(Decode.model_fields))),
            nfe=answer.plan.nfe,
            decode_nfe=answer.decode_nfe,
            **measured,
            reconstruction=reconstruction(),
            warnings=answer.warnings,
            trajectory=frames or None,
            plan=answer.plan.digest,
            model=service.checkpoint.card.name,
            sha256=service.checkpoint.card.sha256,
            timing=timing,
            **request.model_dump(include={"method", "steps", "refinements", "spacing", "label"}),
        )

    unchecked = "the image is the reconstruction, which check = false leaves out; ask for application/x-npy"
    way_8bit = None if way is None else images.to_uint8(way)
    still: np.ndarray | str = unchecked if back is None else back.still
    return Outcome(
        still=still if way_8bit is None else way_8bit,
        columns=None if way_8bit is None else len(way_8bit),
        moving=NO_TRAJECTORY if way_8bit is None else way_8bit,
        array=answer.latent,
        body=reply,
        provenance=provenance,
        spent=answer.spent,
        headers={"X-NFE": str(answer.plan.nfe)},
    )


def interpolated(service: Service, answer: Interpolated) -> Outcome:
    """The strip, grid or animation of the images between."""
    walk, request = answer.walk, answer.walk.request
    final = images.to_uint8(answer.images)
    left_out = {"a", "b", "latents", "weights", "frames", "label", "labels", "fit"}
    provenance = _provenance(service, "/interpolate", request, walk.nfe, walk.plan)

    def files() -> dict[str, bytes]:
        named = {f"{i:03d}.png": images.png(frame) for i, frame in enumerate(final)}
        return named | {"request.json": _replayable("/interpolate", request)}

    def reply(timing: Timing) -> InterpolateReply:
        return InterpolateReply(
            images=[base64_of(images.png(frame)) for frame in final],
            latents=[base64_of(uploads.npy(frame.latent)) for frame in answer.frames],
            weights=[list(frame.weights) for frame in answer.frames],
            labels=answer.labels,
            warnings=answer.warnings,
            encode_nfe=answer.encode_nfe,
            timing=timing,
            **request.model_dump(exclude=left_out),
            **_facts(service, walk),
        )

    moving: np.ndarray | str = final
    if request.grid is not None:
        moving = "a grid has no order in time; ask for image/png"
    elif request.weights is not None:
        moving = "one image does not move; ask for image/png"
    return Outcome(
        still=final,
        columns=answer.columns,
        moving=moving,
        array=answer.images,
        body=reply,
        provenance=provenance,
        spent=answer.spent,
        headers={"X-NFE": str(walk.nfe)},
        files=files,
        images=len(final),
    )


def _facts(service: Service, walk: ResolvedRequest[Any]) -> dict[str, Any]:
    card = service.checkpoint.card
    return {"nfe": walk.nfe, "plan": walk.plan.digest, "model": card.name, "sha256": card.sha256}


def _replaying(service: Service, answer: Inverted) -> dict[str, str]:
    """The request with the image as it was brought to size, which may have been far larger."""
    content = images.png(images.to_uint8(answer.image))
    request = answer.request.model_copy(update={"image": content, "fit": "exact"})
    return _provenance(service, "/invert", request, answer.plan.nfe, answer.plan)


def _provenance(service: Service, operation: str, request: BaseModel, nfe: int, plan: Plan) -> dict[str, str]:
    """What an image must carry so that it can be made again: the request, and the network that answered it."""
    facts = {
        "operation": operation,
        "request": request.model_dump(mode="json", exclude_none=True),
        "nfe": nfe,
        "plan": plan.digest,
        "model": service.checkpoint.card.name,
        "sha256": service.checkpoint.card.sha256,
        "version": __version__,
    }
    return {"unstir": json.dumps(facts, ensure_ascii=False)}


def _replayable(operation: str, request: Walking) -> bytes:
    content = {"operation": operation, "request": request.model_dump(mode="json", exclude_none=True)}
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
