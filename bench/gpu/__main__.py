"""`make gpu-check`: test, compare and measure the CUDA path on this machine's card, within eight minutes.

What each part finds is in the file as soon as it is there; a part that would take longer than its share is cut short
and says so. With ``--device cpu --tiny`` the same is done with networks of some thousand numbers, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import performance
from bench.gpu import beside, bits, ceilings, clock, inductor, kernels, numbers, served, start, suite
from bench.gpu.bench import Bench, Part
from bench.gpu.claims import LEAST_PSNR, MAIN, SECONDS, claims
from bench.gpu.networks import measured

OUT = performance.FOLDER / "gpu.json"
# What part of the time each may take; what one leaves, the others have.
SHARES = {
    "tests": 120,
    "ceilings": 8,
    "cifar10-32": 165,  # most of it for torch.compile
    "numbers": 50,
    "bits": 20,
    "start": 50,
    "served": 40,
    "celebahq-256": 65,
    "avatars-32": 40,
    "kernels": 12,
    "inductor": 60,
}


def parts(*, tiny: bool) -> dict[str, Part]:
    """Every part by its name, what matters most first."""
    networks = {network.name: network for network in measured(tiny=tiny)}
    main = networks[MAIN]
    each: dict[str, Part] = {name: partial(beside.measure, network) for name, network in networks.items()}
    each |= {"tests": suite.measure, "ceilings": ceilings.measure, "numbers": numbers.measure}
    each |= {"bits": partial(bits.measure, main), "served": partial(served.measure, main)}
    each |= {"start": partial(start.measure, main)}
    each |= {"kernels": partial(kernels.measure, main), "inductor": partial(inductor.measure, main)}
    return {name: each[name] for name in SHARES}


class Report:
    """The file, and what is said on the way."""

    def __init__(self, path: Path, facts: dict[str, Any], *, merge: bool) -> None:
        """With ``merge``, parts that were found under the same circumstances stay until they are found anew."""
        self.path, self.facts = path, facts
        before = json.loads(path.read_text(encoding="utf-8")) if merge and path.exists() else {}
        same = all(before.get(name) == facts[name] for name in ("circumstances", "tiny"))
        self.facts["parts"] = before["parts"] if same else {}
        self._began = time.monotonic()

    def part(self, name: str) -> dict[str, Any]:
        """A fresh one, in its place among the others."""
        found: dict[str, Any] = {}
        self.facts["parts"][name] = found
        order = list(SHARES)
        self.facts["parts"] = dict(sorted(self.facts["parts"].items(), key=lambda item: order.index(item[0])))
        return found

    def tell(self, text: str) -> None:
        """Say it, and write the file."""
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", file=sys.stderr, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)


def take(measure: Part, found: dict[str, Any], bench: Bench) -> None:
    """Let a part run until its deadline; whatever goes wrong in it is its own affair, and told."""
    began = time.monotonic()
    try:
        with clock.within(bench.left()):
            measure(bench, found)
    except clock.Overrun:
        found["cut_short"] = True
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:1000]
    found["took_seconds"] = round(time.monotonic() - began, 2)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def run(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Take the parts one after another; returns all that is known."""
    deadline = time.monotonic() + arguments.seconds
    every, device = parts(tiny=arguments.tiny), torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    threads = torch.get_num_threads()
    facts = {"circumstances": ceilings.circumstances(device), "tiny": arguments.tiny, "seconds": arguments.seconds}
    report = Report(arguments.out, facts, merge=names != list(every))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for i, name in enumerate(names):
            left = deadline - time.monotonic()
            share = left * SHARES[name] / sum(SHARES[each] for each in names[i:])
            found = report.part(name)
            report.tell(f"{name}: at most {share:.0f} s")
            if share < 1:
                found |= {"cut_short": True, "took_seconds": 0.0}
                continue
            tell: Callable[[str], None] = partial(_say, report, name)
            take(every[name], found, Bench(device, arguments.tiny, Path(folder), time.monotonic() + share, tell))
            torch.set_num_threads(threads)
    report.tell("done")
    return report.facts


def _say(report: Report, name: str, doing: str) -> None:
    report.tell(f"{name}: {doing}")


def wrong(found: dict[str, dict[str, Any]]) -> list[str]:
    """The parts that failed, or that found numbers other than they must be; a slow card is not wrong."""
    bad = [name for name, part in found.items() if "error" in part]
    if found.get("tests", {}).get("status"):
        bad.append("tests")
    compared = found.get("numbers", {})
    walks = [*compared.get("samplers", {}).values(), *compared.get("inversions", {}).values()]
    if not all(each["within"] for each in walks):
        bad.append("numbers: float32")
    if compared.get("images", {}).get("fast", {}).get("least", LEAST_PSNR) < LEAST_PSNR:
        bad.append("numbers: images")
    if found.get("bits", {}).get("differing"):
        bad.append("bits")
    return bad


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
    found = run(arguments, [name for name in SHARES if name in names])
    if arguments.tiny:
        print("Tiny networks: the figures below mean nothing, only that they are there.")
    for claim in claims(found["parts"]):
        verdict = "" if arguments.tiny else "met      " if claim.met else "NOT MET  "
        print(f"{verdict}{claim.what}: {claim.measured} (asked: {claim.asked})")
    if arguments.out == OUT:
        performance.render()
    bad = wrong(found["parts"])
    if bad:
        sys.exit("wrong: " + ", ".join(bad))


if __name__ == "__main__":
    main()
