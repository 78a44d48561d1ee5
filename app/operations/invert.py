"""From an image to the latent that leads back to it."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import torch
from torch import Tensor

from app.engine.jobs import Lane, Result
from app.engine.loading import LoadedModel
from app.errors import InvalidField
from app.operations import files
from app.operations.context import Phase, RequestContext, Usage, reserve
from app.operations.fields import Latent
from app.operations.files import FileReference
from app.operations.labels import resolve_label
from app.operations.latents import squeeze_slots
from app.operations.plans import check_evaluations
from app.operations.requests import InvertRequest, SampleRequest
from app.operations.resolve import (
    ResolvedRequest,
    compile_inversion,
    resolve,
    schedule_errors_as_fields,
    trajectory_steps,
)
from app.operations.sample import Samples
from app.operations.service import Service
from model import images
from model.diffusion.inversion.registry import INVERSIONS, Inversion
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS

# Held-out images of both shipped checkpoints: a residual of at most 0.014 in 50 steps and 0.041 in 20; a PSNR of about
# 54 dB or more in 50 steps, 45 in 20.
HIGH_RESIDUAL = 0.045
LOW_PSNR = 40.0
MANY_STEPS = 100  # from which on the norm hardly depends on their number


@dataclass(frozen=True)
class Reconstruction:
    """How near the decoded latent comes to the image, on [-1, 1].

    Attributes:
        samples: the response of /sample to the latent and ``decode``.
        psnr: dB.
        exact: share of the 8-bit values that are equal.
    """

    samples: Samples
    psnr: float
    mse: float
    max_error: float
    exact: float


@dataclass(frozen=True)
class Encoding:
    """A latent, how to decode it, and how good it is.

    Attributes:
        request: every default filled in; without the image.
        source: the file that the image came as.
        image: [C, H, W] in [-1, 1], at the network's size.
        decode: the fields that ``/sample`` needs beside the latent, and the plan that they compile to.
        slots: [1 or 2, C, H, W].
        residual: root mean square by which the plan misses the exact inverse; None where that is not known.
        norm: mean square of x_T.
        round_trip: None where it was not checked.
        trajectory: [k, C, H, W] or None.
        unlabelled: the network has classes, and none was asked for.
    """

    request: InvertRequest
    image: Tensor
    inversion: Inversion
    plan: Plan
    decode: ResolvedRequest[SampleRequest]
    slots: Tensor
    residual: float | None
    norm: float
    round_trip: Reconstruction | None
    trajectory: Tensor | None
    usage: Usage
    source: FileReference
    unlabelled: bool

    @property
    def latent(self) -> Tensor:
        """float32 [C, H, W], or [2, C, H, W] for a pair."""
        return squeeze_slots(self.slots)

    @property
    def warnings(self) -> list[str]:
        """What is unusual about this image for this network."""
        found = []
        low, high = self.inversion.ordinary
        if not low < self.norm < high:
            remedies = ["take more steps"] * (self.request.steps < MANY_STEPS)
            remedies += ["give the image's label"] * self.unlabelled
            advice = f"{', and '.join(remedies)}; if that does not help, " if remedies else ""
            found.append(
                f"norm = {self.norm:.2f}: ordinary images have {low} to {high} with {self.inversion.name}; {advice}"
                "this one is probably far from the training data, and blends with it may not look like images"
            )
        if self.residual is not None and self.residual > HIGH_RESIDUAL:
            found.append(
                f"residual = {self.residual:.3g}: the iteration did not converge; take more refinements, or more steps"
            )
        if self.round_trip is not None and self.round_trip.psnr < LOW_PSNR:
            remedy = "more refinements" if self.residual is not None else "method fixed_point"
            found.append(
                f"psnr = {self.round_trip.psnr:.1f}: the reconstruction is visibly another image; take more steps, "
                f"{remedy}, or obelm for every pixel"
            )
        return found


async def invert(service: Service, request: InvertRequest, context: RequestContext | None = None) -> Encoding:
    """Encode an image, and decode it again to measure the round trip.

    Raises:
        BadInput: a file that is no image, or a value that this checkpoint cannot take.
        Draining, Overloaded, TooLate, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    context, model = context or RequestContext(), service.model
    inversion = INVERSIONS[request.method]
    request, options = _resolve(model, request, inversion)
    label, name = resolve_label(model, request.label)
    nfe = inversion.nfe(request.steps, **options)
    shown = trajectory_steps(nfe, request.trajectory, request.trajectory_of)

    phases = [Phase(f"inverse {inversion.sampler}", nfe)]
    phases += [Phase(inversion.sampler, inversion.decode_nfe(request.steps))] * request.check
    with reserve(service, context, phases, exact=True) as reservation:
        image = await files.decode_image(service, "image", request.image, request.fit)
        source = await anyio.to_thread.run_sync(files.refer, "image", request.image)
        # Plans come last: they may take longer to compile than all that could be wrong with the request.
        decode = await resolve(service, _decode_request(request, inversion, name), paired=inversion.slots == 2)
        plan = await compile_inversion(service, inversion, request.steps, request.spacing, **options)
        lane = Lane(
            plan,
            0,
            label,
            request.reproducible,
            exact=True,
            initial_state=image[None],
            output_slots=plan.slots if inversion.residual else inversion.slots,
            snapshot_steps=frozenset(shown),
            snapshot_kind=request.trajectory_of,
        )
        results = [await reservation.run(context.add_previews([lane]))]
        slots = results[0].outputs[0][: inversion.slots]
        if request.check:
            results.append(await reservation.run([Lane(decode.plan, 0, label, reproducible=True, initial_state=slots)]))

    usage = Usage.measure(phases, results)
    return Encoding(
        request.model_copy(update={"label": name, "image": b""}),
        image,
        inversion,
        plan,
        decode,
        slots,
        float(inversion.residual(results[0].outputs[0][None])) if inversion.residual else None,
        float(slots[0].square().mean()),
        _compare(image, decode, slots, results[1], usage) if request.check else None,
        _trajectory(results[0], shown, plan),
        usage,
        source,
        label is not None and name is None,
    )


def _resolve(model: LoadedModel, request: InvertRequest, inversion: Inversion) -> tuple[InvertRequest, dict[str, int]]:
    """The request with its defaults filled in, and what the inversion takes beside steps and spacing."""
    options = {}
    if "refinements" in inversion.options:
        options["refinements"] = request.refinements or 3
    elif request.refinements is not None:
        others = ", ".join(other.name for other in INVERSIONS.values() if "refinements" in other.options)
        remedy = f"{inversion.name} takes none; leave it out, or use {others}"
        raise InvalidField("refinements", request.refinements, remedy)
    with schedule_errors_as_fields():
        defaults = model.defaults.options(SAMPLERS[inversion.sampler], request.steps, model.schedule.T)
    spacing = request.spacing or defaults["spacing"]
    field, value = ("refinements", options["refinements"]) if options else ("steps", request.steps)
    remedy = "ask for fewer steps or refinements" if options else "ask for fewer steps"
    check_evaluations(inversion.nfe(request.steps, **options), field, value, remedy)
    return request.model_copy(update={"spacing": spacing, "refinements": options.get("refinements")}), options


def _decode_request(request: InvertRequest, inversion: Inversion, label: str | None) -> SampleRequest:
    return SampleRequest(
        sampler=inversion.sampler,
        steps=request.steps,
        spacing=request.spacing,
        clip=False,
        label=label,
        reproducible=True,
        embed=request.embed,
    )


def _compare(
    image: Tensor, decode: ResolvedRequest[SampleRequest], slots: Tensor, result: Result, usage: Usage
) -> Reconstruction:
    latent = Latent(npy=files.to_npy(squeeze_slots(slots)))
    resolved = ResolvedRequest(decode.request.model_copy(update={"latent": latent}), decode.plan, decode.paired)
    samples = Samples(resolved, [], [slots], result, usage, [])
    x = samples.images[0]
    mse = float((x - image).double().square().mean())
    return Reconstruction(
        samples,
        psnr=float(10 * torch.log10(torch.tensor(4 / max(mse, 1e-20)))),  # pixels span -1..1, so the peak is 2
        mse=mse,
        max_error=float((x - image).abs().max()),
        exact=float((images.to_uint8(x) == images.to_uint8(image)).mean()),
    )


def _trajectory(result: Result, shown: list[int], plan: Plan) -> Tensor | None:
    """Its frames; the step after the last stands for the latent itself."""
    if not shown:
        return None
    frames, latent = result.snapshots[0], result.outputs[0][0]
    return torch.stack([latent if step == plan.nfe else frames[step] for step in shown])
