"""What every operation works with."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from app.engine.engine import Engine
from app.engine.loading import LoadedModel
from app.operations.plans import Plans
from app.settings import Settings
from app.telemetry.metrics import Metrics

CONCURRENT_ENCODES = 4  # responses; a large animation takes a core for seconds
CONCURRENT_DECODES = 2  # uploaded images, however many are sent: each may take some 300 MB meanwhile


@dataclass(frozen=True, eq=False)
class Service:
    """The served network; it exists once the network is loaded."""

    settings: Settings
    metrics: Metrics
    model: LoadedModel
    plans: Plans = field(default_factory=Plans)
    decoders: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(CONCURRENT_DECODES))
    encoders: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(CONCURRENT_ENCODES))

    @property
    def engine(self) -> Engine:
        return self.model.engine
