"""An image in, its latent out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.errors import InvalidField
from app.operations import files as uploads
from app.operations.latents import whole
from app.operations.requests import InvertRequest, Latent, SampleRequest
from app.operations.resolve import RequestContext, Usage, class_of, compile_upward, moments, placed, resolve, watched
from app.operations.sample import Sampled
from app.operations.service import Service
from model import images
from model.diffusion.inversion.registry import INVERSIONS, Inversion
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import ScheduleError

LARGE_RESIDUAL = 0.045  # held-out images of both shipped checkpoints: at most 0.014 in 50 steps, 0.041 in 20
LOW_PSNR = 40.0  # dB; about 54 or more in 50 steps, 45 in 20


@dataclass(frozen=True)
class RoundTrip:
    """How near the way back came to the image.

    Attributes:
        back: what /sample answers to the latent and its recipe.
        psnr: dB, of pixels in [-1, 1].
        exact: share of the 8-bit values that came back as they were.
    """

    back: Sampled
    psnr: float
    mse: float
    max_error: float
    exact: float


@dataclass(frozen=True)
class Inverted:
    """A latent, the way back from it, and how good it is.

    Attributes:
        request: every default filled in.
        image: [C, H, W] in [-1, 1], as it was brought to size.
        decode: the fields that ``/sample`` needs beside the latent.
        slots: [1 or 2, C, H, W].
        residual: by how much the walk misses the exact one; None for methods that have no measure of it.
        norm: mean square of x_T.
        trip: None if it was not checked.
        trajectory: [k, C, H, W] or None.
    """

    request: InvertRequest
    image: Tensor
    method: Inversion
    plan: Plan
    decode: SampleRequest
    decode_nfe: int
    slots: Tensor
    residual: float | None
    norm: float
    trip: RoundTrip | None
    trajectory: Tensor | None
    spent: Usage

    @property
    def latent(self) -> Tensor:
        """float32 [C, H, W], or [2, C, H, W] for a pair."""
        return whole(self.slots)

    @property
    def warnings(self) -> list[str]:
        """What is odd about this image for this network, in words."""
        found = []
        low, high = self.method.ordinary
        if not low < self.norm < high:
            found.append(
                f"norm = {self.norm:.2f}: ordinary images have {low} to {high} with {self.method.name}; this one is "
                "probably far from what the network has learned, or takes more steps, and blends with it will look odd"
            )
        if self.residual is not None and self.residual > LARGE_RESIDUAL:
            found.append(
                f"residual = {self.residual:.3g}: the iteration did not settle; take more refinements, or more steps"
            )
        if self.trip is not None and self.trip.psnr < LOW_PSNR:
            found.append(
                f"psnr = {self.trip.psnr:.1f}: what comes back is visibly another image; take more steps, "
                f"{'more refinements' if self.residual is not None else 'method fixed_point'}, or obelm for every pixel"
            )
        return found


async def invert(service: Service, request: InvertRequest, caller: RequestContext | None = None) -> Inverted:
    """Encode an image, and decode it again to see how near that comes.

    Raises:
        BadInput: a file that is no image, or a value that this checkpoint cannot take.
        Starting, Draining, Overloaded, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    caller = caller or RequestContext()
    method = INVERSIONS[request.method]
    plan, request = _resolved(service, request, method)
    label, name = class_of(service, request.label)
    shown = moments(plan, request.trajectory, request.trajectory_of)
    decode = SampleRequest(
        sampler=method.sampler, steps=request.steps, spacing=request.spacing, clip=False, label=name, reproducible=True
    )
    walk = resolve(service, decode, paired=method.slots == 2)

    in_all = plan.nfe + request.check * walk.nfe
    with placed(service, caller, 1, in_all, steps=in_all, exact=True) as ticket:
        image = await uploads.image(service, "image", request.image, request.fit)
        lane = Lane(
            plan,
            0,
            label,
            request.reproducible,
            exact=True,
            initial_state=image[None],
            output_slots=plan.slots if method.residual else method.slots,
            snapshot_steps=frozenset(shown),
            snapshot_kind=request.trajectory_of,
        )
        upward = await ticket.run(watched([lane], caller))
        slots = upward.outputs[0][: method.slots]
        back = None
        if request.check:
            way_back = Lane(walk.plan, 0, label, reproducible=True, initial_state=slots)
            back = await ticket.run([way_back])

    trip = None
    if back is not None:
        latent = Latent(npy=uploads.npy(whole(slots)))
        decoded = walk.request.model_copy(update={"latent": latent, "label": name})
        walk = type(walk)(decoded, walk.plan, walk.paired)
        trip = _compared(image, Sampled(walk, [], [slots], back, Usage([back]), []))
    evaluations = {f"inverse {method.sampler}": plan.nfe} | ({method.sampler: walk.nfe} if back else {})
    return Inverted(
        request.model_copy(update={"label": name}),
        image,
        method,
        plan,
        walk.request,
        walk.nfe,
        slots,
        float(method.residual(upward.outputs[0][None])) if method.residual else None,
        float(slots[0].square().mean()),
        trip,
        _trajectory(upward, shown, plan),
        Usage([upward, back] if back else [upward], evaluations),
    )


def _resolved(service: Service, request: InvertRequest, method: Inversion) -> tuple[Plan, InvertRequest]:
    T = service.schedule.T
    sampler = SAMPLERS[method.sampler]
    options = {}
    if "refinements" in method.options:
        options["refinements"] = request.refinements or 3
    elif request.refinements is not None:
        takers = ", ".join(other.name for other in INVERSIONS.values() if "refinements" in other.options)
        raise InvalidField(
            "refinements", request.refinements, f"{method.name} takes none; leave it out, or use {takers}"
        )
    try:
        spacing = request.spacing or service.habits.options(sampler, request.steps, T)["spacing"]
    except ScheduleError as error:
        raise InvalidField(error.field, error.value, error.remedy) from error
    plan = compile_upward(service, method.name, request.steps, spacing=spacing, **options)
    return plan, request.model_copy(update={"spacing": spacing, "refinements": options.get("refinements")})


def _compared(image: Tensor, back: Sampled) -> RoundTrip:
    found = back.images[0]
    mse = float((found - image).double().square().mean())
    same = images.to_uint8(found) == images.to_uint8(image)
    return RoundTrip(
        back,
        psnr=float(10 * torch.log10(torch.tensor(4 / max(mse, 1e-20)))),  # pixels span -1..1, so the peak is 2
        mse=mse,
        max_error=float((found - image).abs().max()),
        exact=float(same.mean()),
    )


def _trajectory(result: Result, shown: list[int], plan: Plan) -> Tensor | None:
    """Its frames; the step beyond the last stands for the latent itself."""
    if not shown:
        return None
    frames, end = result.snapshots[0], result.outputs[0][0]
    return torch.stack([end if at == plan.nfe else frames[at] for at in shown])
