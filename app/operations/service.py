"""What every operation works with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

import anyio

from app.engine.engine import Engine
from app.engine.loading import LoadedModel
from app.operations.plans import Plans
from app.settings import Settings
from app.telemetry.metrics import Metrics

CONCURRENT_PARSES = 4  # large bodies; bounds the memory that parsing takes
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

    parsers: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(CONCURRENT_PARSES))

    @cached_property
    def fingerprint(self) -> str:
        """All that the bytes of a reproducible response depend on, beside its request."""
        loaded, settings = self.model, self.settings
        versions = [version(package) for package in ("torch", "numpy", "pillow", "pi-heif")]
        config = sorted(loaded.checkpoint.scheduler_config.items())
        facts = (loaded.checkpoint.card.sha256, config, str(loaded.device), loaded.calibration.threads, versions)
        limits = (settings.reproducible_width, settings.max_pixels)
        return hashlib.blake2b(repr((facts, limits)).encode(), digest_size=16).hexdigest()

    @property
    def engine(self) -> Engine:
        return self.model.engine
