"""Every measurement of docs/performance.md, one after another, and the page itself.

What each prints as its last line is kept in docs/performance/. ``--resume`` leaves out what is there already,
``--only`` measures some parts, ``--render`` none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from app.cli.mix import MIX
from bench import page
from bench.server import ROOT

COMPARISONS = ("peers", "png")
GPU = "gpu"  # measured by `make gpu-check`, on a machine with a card
FOLDER = ROOT / "docs" / "performance"
PARTS = {
    "peers": "bench.peers.run",
    "png": "bench.peers.run --png --loads= --seconds= --saturated-seconds=30 --repeats=1",
    "side": "bench.peers.side_by_side",
    "side-mixed": f"bench.peers.side_by_side --mix {MIX} --starts 1 --rounds 100",
    "engine": "bench.engine",
    "saturation": "bench.saturation",
    "alone": "bench.alone",
    "promises": "bench.promises",
    "abandoned": "bench.endings --abandoned --repeats 21",
    "bytes": "bench.same_bytes",
    "chaos": "bench.endings --chaos 10000",
}


def measure(name: str, *, resume: bool) -> None:
    """Run one part; comparisons write their own files as they go, and can be resumed within."""
    module, *options = PARTS[name].split()
    path = FOLDER / f"{name}.json"
    if resume and path.exists() and name not in COMPARISONS:
        return
    if name in COMPARISONS and resume:
        options.append("--resume")
    print(f"{name}: python -m {' '.join([module, *options])} …", file=sys.stderr, flush=True)
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", module, *options], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True
    )
    print(run.stdout, flush=True)
    if name in COMPARISONS:
        run.check_returncode()
    else:
        facts: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        facts["command"] = " ".join(["python", "-m", module, *options])
        facts["took_seconds"] = round(time.monotonic() - began)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read() -> dict[str, dict[str, Any]]:
    """All that was measured, by part; with what :mod:`bench.gpu` found, where it had a card."""
    names = [*PARTS, *([GPU] if (FOLDER / f"{GPU}.json").exists() else [])]
    return {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def render() -> None:
    """Write the page anew, without its image, which shows nothing of a card."""
    (FOLDER.parent / "performance.md").write_text(page.text(read()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, with commas between them [all]")
    parser.add_argument("--resume", action="store_true", help="go on with what was stopped")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in [] if arguments.render else names:
        measure(name, resume=arguments.resume)
    page.write(read(), FOLDER.parent)


if __name__ == "__main__":
    main()
