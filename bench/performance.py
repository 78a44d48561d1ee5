"""Run every measurement of docs/performance.md, one after another, and render the page.

The last line that each prints is kept in docs/performance/. ``--resume`` leaves out what is there already, ``--only``
measures some, ``--render`` none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from app.cli.mix import MIX
from bench import report
from bench.server import ROOT
from model.output import write_atomically

FOLDER = ROOT / "docs" / "performance"
PEERS, GPU = "peers", "gpu"  # the first writes its own file as it goes, the other is measured by `make gpu-check`
PARTS = {
    PEERS: "bench.peers.run",
    "side": "bench.peers.side_by_side",
    "side-mixed": f"bench.peers.side_by_side --mix {MIX} --starts 1 --rounds 100",
    "engine": "bench.engine",
    "saturation": "bench.saturation",
    "alone": "bench.alone",
}


def measure(name: str, *, resume: bool) -> None:
    module, *options = PARTS[name].split()
    path = FOLDER / f"{name}.json"
    if resume and path.exists() and name != PEERS:
        return
    options += ["--resume"] * (resume and name == PEERS)
    print(f"{name}: python -m {' '.join([module, *options])} …", file=sys.stderr, flush=True)
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-m", module, *options], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    if name != PEERS:
        facts: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        facts["command"] = " ".join(["python", "-m", module, *options])
        facts["took_seconds"] = round(time.monotonic() - began)
        write_atomically(path, json.dumps(facts, indent=1) + "\n")


def read() -> report.Parts:
    """All figures by part, and those of a card if there are any."""
    names = [*PARTS, *([GPU] if (FOLDER / f"{GPU}.json").exists() else [])]
    return {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def render() -> None:
    """Write the page, without its image, which shows nothing of a card."""
    write_atomically(FOLDER.parent / "performance.md", report.page(read()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, with commas between them [all]")
    parser.add_argument("--resume", action="store_true", help="continue what was stopped")
    parser.add_argument("--render", action="store_true", help="only render the page")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in [] if arguments.render else names:
        measure(name, resume=arguments.resume)
    render()
    report.draw(read()[PEERS], FOLDER.parent / "performance.png")


if __name__ == "__main__":
    main()
