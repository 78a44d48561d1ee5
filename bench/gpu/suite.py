"""The tests of the CUDA path, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from bench.gpu.bench import Bench
from bench.server import ROOT

TESTS = ("tests/cuda", "tests/model/network/test_kernels.py", "tests/model/diffusion/test_machine_triton.py")
WORKERS = 4  # processes that share the card: most of their time is the compiler's
ENDS = ("passed", "failed", "errors", "skipped")


def measure(bench: Bench, found: dict[str, Any]) -> None:
    """How many pass, fail and are skipped; without a card they are only collected."""
    on_card = bench.device.type == "cuda"
    how = ["-n", str(WORKERS)] if on_card else ["--collect-only"]
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "not slow", "-p", "no:cacheprovider", *how]
    output = bench.folder / "tests.txt"
    found["command"] = " ".join(["python", *command[1:]])
    with output.open("w") as file:
        try:
            run = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
            found["status"] = run.returncode
        finally:
            found["tail"] = output.read_text(errors="replace").splitlines()[-25:]
    if on_card:
        found |= counts(found["tail"][-1] if found["tail"] else "")
    else:
        found["left_out"] = "needs a card; collected only"


def counts(line: str) -> dict[str, int]:
    """Of pytest's last line, such as ``2 failed, 12 passed, 1 skipped, 1 error in 3.21s``."""
    words = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", line)}
    return {end: words.get(end.rstrip("s"), 0) for end in ENDS}
