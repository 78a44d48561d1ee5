"""What every part is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """The circumstances of a part.

    Attributes:
        tiny: small networks and few repeats, to try the script itself on a CPU.
        folder: where checkpoints of random weights and calibrations are kept meanwhile.
        deadline: when the part will be cut short, on the monotonic clock.
        tell: is told what comes next, and keeps what was found until then.
    """

    device: torch.device
    tiny: bool
    folder: Path
    deadline: float
    tell: Callable[[str], None]

    def of(self, whole: T, tiny: T) -> T:
        """The one of the two that is asked for."""
        return tiny if self.tiny else whole

    def left(self) -> float:
        """Seconds that the part still has."""
        return max(0.0, self.deadline - time.monotonic())


# Writes what it finds into the dictionary, as soon as it is known.
Part = Callable[[Bench, dict[str, Any]], None]
