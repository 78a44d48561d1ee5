"""What fails alone: lanes of a tick that failed, found by repeating it in parts; jobs that are too wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from app.engine.jobs import Job, Lane
from app.errors import DeviceMemory

Owner = TypeVar("Owner")


def isolate(
    batch: Sequence[Lane], owners: Mapping[Lane, Owner], advance: Callable[[list[Lane]], None]
) -> dict[Owner, Exception]:
    """Advance a batch that cannot advance as a whole; returns why, of each owner one of whose lanes fails alone.

    It takes at most about 2 log2(lanes) forwards for each owner that fails, as its other lanes are not tried.

    Args:
        owners: of the lanes that are still wanted; others are left out.
        advance: one step of some of the lanes; if it raises, they are as they were.
    """
    errors: dict[Owner, Exception] = {}
    parts = [list(batch)]
    while parts:
        part = [lane for lane in parts.pop() if lane in owners and owners[lane] not in errors]
        if not part:
            continue
        try:
            advance(part)
        except Exception as error:
            if len(part) == 1:
                errors[owners[part[0]]] = error
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
    return errors


def no_room_for(job: Job) -> DeviceMemory:
    """The error of a job that needs wider forwards than the device has memory for."""
    if any(lane.reproducible for lane in job.lanes):
        detail, remedy = (
            "reproducible needs forwards of more rows",
            "ask without it, or lower UNSTIR_REPRODUCIBLE_WIDTH",
        )
    else:
        detail, remedy = "guidance needs 2 rows", "ask without it"
    return DeviceMemory(f"{detail}, and the device has no room for them; {remedy}")
