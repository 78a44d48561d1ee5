"""`make gpu-check`: test and measure the CUDA path on this machine's card, within eight minutes.

What each part finds is written as soon as it is known; a part that would exceed its share of the time is cut short and
marked so. With ``--device cpu --tiny`` the script itself can be tried, with networks of some thousand parameters.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import performance, report, timing
from bench.gpu import beside, ceilings, served, suite
from bench.gpu.bench import Bench, Part
from bench.gpu.networks import MAIN, networks
from model.output import write_atomically

OUT = performance.FOLDER / "gpu.json"
SECONDS = 480
# The share of the time that each part may take; what one leaves, the others have. The most important come first.
SHARES = {
    "tests": 140,
    "ceilings": 8,
    "cifar10-32": 165,  # most of it for torch.compile
    "start": 50,
    "served": 40,
    "celebahq-256": 65,
    "avatars-32": 40,
}


def parts(*, tiny: bool) -> dict[str, Part]:
    every = networks(tiny=tiny)
    main = every[MAIN]
    return {
        **{name: partial(beside.measure, network) for name, network in every.items()},
        "tests": suite.measure,
        "ceilings": ceilings.measure,
        "start": partial(served.measure_start, main),
        "served": partial(served.measure_load, main),
    }


def take(measure: Part, found: dict[str, Any], bench: Bench) -> None:
    """Run a part until its deadline; an error in it is recorded and does not end the check."""
    began = time.monotonic()
    try:
        with timing.within(bench.left()):
            measure(bench, found)
    except timing.Overrun:
        found["cut_short"] = True
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:1000]
    found["took_seconds"] = round(time.monotonic() - began, 2)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def run(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Take the parts one after another; returns all facts, which are also in the file from part to part."""
    began = time.monotonic()
    deadline = began + arguments.seconds
    every, device = parts(tiny=arguments.tiny), torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    threads = torch.get_num_threads()
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    facts = {"circumstances": ceilings.circumstances(device), "tiny": arguments.tiny, "parts": found}

    def progress(part: str, text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {part}: {text}", file=sys.stderr, flush=True)
        write_atomically(arguments.out, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for i, name in enumerate(names):
            left = deadline - time.monotonic()
            share = left * SHARES[name] / sum(SHARES[each] for each in names[i:])
            progress(name, f"at most {share:.0f} s")
            if share < 1:
                found[name] |= {"cut_short": True, "took_seconds": 0.0}
                continue
            bench = Bench(device, arguments.tiny, Path(folder), time.monotonic() + share, partial(progress, name))
            take(every[name], found[name], bench)
            torch.set_num_threads(threads)
    progress("gpu-check", "done")
    return facts


def failed(found: dict[str, dict[str, Any]]) -> list[str]:
    """The parts that failed; a slow card does not."""
    return [name for name, part in found.items() if "error" in part or part.get("status")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="small networks, few repeats: try the script, not the card")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together [%(default)s]")
    parser.add_argument("--only", default=",".join(SHARES), help="which parts, with commas between them [all]")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON to write [docs/performance/gpu.json]")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - SHARES.keys()):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(SHARES)}")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        sys.exit(
            "gpu-check needs a machine with a CUDA device, and torch finds none here. The script itself can be tried "
            "without one:\n  .venv/bin/python -m bench.gpu --device cpu --tiny --out tiny.json"
        )
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("on a CPU only --tiny can be measured")
    if arguments.tiny and arguments.out == OUT:
        parser.error("the figures of --tiny mean nothing; name another file with --out")
    if len(names) < len(SHARES) and arguments.out == OUT:
        parser.error("docs/performance/gpu.json has all parts; name another file with --out")
    facts = run(arguments, [name for name in SHARES if name in names])
    if arguments.tiny:
        print("Tiny networks: the figures below mean nothing.")
    for what, measured in report.gpu_summary(facts["parts"]):
        print(f"{what}: {measured}")
    if arguments.out == OUT:
        performance.render()
    if bad := failed(facts["parts"]):
        sys.exit("failed: " + ", ".join(bad))


if __name__ == "__main__":
    main()
