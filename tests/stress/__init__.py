"""Tests under heavy load against real servers: ``make stress``. They take a few minutes on two cores.

Environment variables set their sizes:

    variable            default  size
    STRESS_REQUESTS     2000     requests of the chaos run
    STRESS_COMPARED     100      requests whose bytes under load are compared with those of a solo answer
    STRESS_HANG_UPS     11       rounds of 24 clients that hang up
    STRESS_UPLOADS      60       uploads of the largest allowed size
    STRESS_SECONDS      20       seconds of overload, for Retry-After
    STRESS_SEED         1        seed of all random choices
"""

from __future__ import annotations

import os
import re

from app.settings import SHIPPED
from bench.server import Served

DEFAULTS = {"REQUESTS": 2000, "COMPARED": 100, "HANG_UPS": 11, "UPLOADS": 60, "SECONDS": 20, "SEED": 1}
# One thread leaves a core to the clients. No calibration is kept, so that other servers do not get one made under load.
SERVE = (
    *("--checkpoint", str(SHIPPED / "fashion-mnist-32"), "--device", "cpu", "--threads", "1"),
    *("--cache", "", "--log-level", "warning"),
)


def size(name: str) -> int:
    return int(os.environ.get(f"STRESS_{name}", DEFAULTS[name]))


def resident_mib(served: Served) -> float:
    """Resident memory of the server's process; Linux only."""
    with open(f"/proc/{served.process.pid}/status") as status:
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status.read())[0]) / 1024
