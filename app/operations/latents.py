"""Where walks begin: seeds, files of numbers, and images, which are encoded first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from app.engine.jobs import Lane, Result
from app.engine.reservation import Reservation
from app.errors import InvalidField
from app.operations import files as uploads
from app.operations.requests import Latent, Walking
from app.operations.resolve import ResolvedRequest, compile_upward, inversion_for
from app.operations.service import Service
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Plan


@dataclass(frozen=True)
class End:
    """A latent of a request.

    Attributes:
        name: of the field that it stands in.
        slots: [1 or 2, C, H, W]; None for an image that is still to be encoded.
    """

    name: str
    latent: Latent
    slots: Tensor | None = None

    @property
    def settled(self) -> Latent:
        """The same latent in a form that can be sent again: images as what they were encoded to."""
        if self.latent.seed is not None or self.slots is None:
            return self.latent
        return Latent(npy=uploads.npy(whole(self.slots)))

    @property
    def exact(self) -> bool:
        """Whether the walk from here should be exact: it leads back to somewhere."""
        return self.latent.seed is None


def whole(slots: Tensor) -> Tensor:
    """[C, H, W] of the usual one slot, [2, C, H, W] of a pair."""
    return slots[0] if len(slots) == 1 else slots


def read(service: Service, name: str, latent: Latent, sampler: str) -> End:
    """Draw or read it; an image is left for later.

    Raises:
        InvalidField: the file is none, or the sampler cannot begin with it.
    """
    if latent.seed is not None:
        shape = service.checkpoint.shape
        return End(name, latent, draw_noise(seeded_generator(latent.seed), shape)[None])
    if latent.npy is not None:
        slots = uploads.latent(service, f"{name}.npy", latent.npy)
        if len(slots) == 2 and sampler != "obelm":
            raise InvalidField("sampler", sampler, f"{name} is a pair of states, which only obelm can begin with")
        return End(name, latent, slots)
    if inversion_for(sampler) is None:
        raise InvalidField(
            "sampler", sampler, f"{name} is an image, which is encoded for ddim or obelm; use one of them"
        )
    return End(name, latent)


def paired(ends: Sequence[End], sampler: str) -> bool:
    """Whether these ends are pairs of states.

    Raises:
        InvalidField: some are and some are not.
    """
    kinds = {end.name: sampler == "obelm" if end.slots is None else len(end.slots) == 2 for end in ends}
    if len(set(kinds.values())) == 2:
        pairs = ", ".join(name for name, pair in kinds.items() if pair)
        raise InvalidField(
            "sampler", sampler, f"{pairs} would be a pair of states, the others are not; use ddim, or images only"
        )
    return any(kinds.values())


def way_up(service: Service, walk: ResolvedRequest[Walking]) -> Plan:
    """The plan that encodes images for this walk to return to."""
    method = inversion_for(walk.request.sampler)
    assert method is not None, "This is a bug: an image for a sampler without inversion."
    steps = walk.request.steps or 1
    return compile_upward(service, method.name, steps, spacing=walk.request.spacing)


async def encoded(
    service: Service,
    ticket: Reservation,
    walk: ResolvedRequest[Walking],
    ends: Sequence[End],
    labels: Sequence[int | None],
) -> tuple[list[End], Result | None]:
    """Encode those ends that are images, each as of its label, all at once; the others stay as they are.

    Raises:
        InvalidField, ImageTooLarge: a file is no image that fits.
    """
    missing = [i for i, end in enumerate(ends) if end.slots is None]
    if not missing:
        return list(ends), None
    up, request = way_up(service, walk), walk.request
    images = [
        await uploads.image(service, f"{ends[i].name}.image", ends[i].latent.image or b"", request.fit) for i in missing
    ]
    lanes = [
        Lane(
            up, 0, labels[i], request.reproducible, exact=True, initial_state=image[None], output_slots=1 + walk.paired
        )
        for i, image in zip(missing, images, strict=True)
    ]
    result = await ticket.run(lanes)
    found = dict(zip(missing, result.outputs, strict=True))
    return [replace(end, slots=found.get(i, end.slots)) for i, end in enumerate(ends)], result
