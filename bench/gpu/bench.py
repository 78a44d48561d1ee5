"""What every part of the check gets."""

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
        tiny: small networks and few repeats, to try the script on a CPU.
        folder: for checkpoints of random weights and for calibrations, during the check.
        deadline: when the part is cut short, on the monotonic clock.
        progress: prints what comes next, and writes what was found so far.
    """

    device: torch.device
    tiny: bool
    folder: Path
    deadline: float
    progress: Callable[[str], None]

    def pick(self, whole: T, tiny: T) -> T:
        return tiny if self.tiny else whole

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())


# Writes what it finds into the dictionary, as soon as it is known.
Part = Callable[[Bench, dict[str, Any]], None]
