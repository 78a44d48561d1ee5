"""Plans are compiled in threads, bounded in evaluations, and kept while they are small: a plan may take megabytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import anyio

from app.errors import InvalidField
from app.operations.threads import run_limited
from model.diffusion.plan import Plan
from model.diffusion.schedule import NoiseSchedule

MAX_EVALUATIONS = 10_000  # of one image without guidance: every sampler at 4,000 steps, 10 for each of 1,000 steps
MAX_BYTES = 32 << 20  # of the plans that are kept
COMPILERS = 2  # at once; each takes the interpreter from the event loop and the device thread for a part of its time


def check_evaluations(count: int, field: str, value: int, remedy: str) -> None:
    """Refuse a plan before it is compiled.

    Raises:
        InvalidField: it has too many evaluations.
    """
    if count > MAX_EVALUATIONS:
        raise InvalidField(field, value, f"{count} evaluations for one image, at most {MAX_EVALUATIONS}; {remedy}")


class Plans:
    """The plans that are kept, the latest used last; its methods are called on the event loop."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Plan] = OrderedDict()
        self._limiter = anyio.CapacityLimiter(COMPILERS)

    @property
    def nbytes(self) -> int:
        """About the memory that they take."""
        return sum(plan.nbytes for plan in self._kept.values())

    async def compile(self, function: Callable[..., Plan], schedule: NoiseSchedule, steps: int, **options: Any) -> Plan:
        """``function(schedule, steps, **options)``, unless it is kept.

        Raises:
            ScheduleError: as the function does.
        """
        key = (function, schedule, steps, tuple(sorted(options.items())))
        if key not in self._kept:
            compiling = partial(function, schedule, steps, **options)
            return self._keep(key, await run_limited(self._limiter, self._find_or_compile, key, compiling))
        self._kept.move_to_end(key)
        return self._kept[key]

    def _find_or_compile(self, key: Hashable, compiling: Callable[[], Plan]) -> Plan:
        """On a thread: while this one waited, another request may have compiled the plan."""
        return self._kept.get(key) or compiling()

    def _keep(self, key: Hashable, plan: Plan) -> Plan:
        self._kept[key] = plan
        total = self.nbytes
        while total > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.nbytes
        return plan
