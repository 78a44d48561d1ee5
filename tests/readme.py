"""The README's tables, rendered from the one place where each thing is declared.

``python -m tests.readme`` rewrites them between their markers; a test fails when they are stale.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from app.errors import catalogue
from app.settings import SHIPPED, Settings
from app.telemetry.metrics import GAUGES, LABELS, Metrics
from bench.peers.table import PEERS
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS

README = Path(__file__).resolve().parents[1] / "README.md"


def settings_table() -> str:
    rows = ["| setting | default | when to change it |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "unset" if field.default is None else str(field.default).replace(str(SHIPPED), "weights")
        rows.append(f"| `UNSTIR_{name.upper()}` | `{default}` | {field.description} |")
    return "\n".join(rows)


def errors_table() -> str:
    rows = ["| code | status | what it means |", "|---|---|---|"]
    rows += [f"| `{kind.code}` | {kind.status} | {kind.meaning} |" for kind in catalogue()]
    return "\n".join(rows)


def metrics_table() -> str:
    rows = ["| metric | labels | what it tells |", "|---|---|---|"]
    rows += [f"| `{name}` | {', '.join(LABELS.get(name, ()))} | {text} |" for name, text in GAUGES.items()]
    for collector in vars(Metrics()).values():
        if hasattr(collector, "_documentation"):
            name = collector._name + ("_total" if collector._type == "counter" else "")
            rows.append(f"| `{name}` | {', '.join(collector._labelnames)} | {collector._documentation} |")
    return "\n".join(rows)


def samplers_table() -> str:
    rows = ["| sampler | what it is, and when to use it | noise | evaluations for N steps | good with | default |"]
    rows.append("|---|---|---|---|---|---|")
    for s in SAMPLERS.values():
        noise = "fresh" if s.stochastic else "none"
        rows.append(
            f"| `{s.name}` | {s.what} {s.when} | {noise} | {s.nfe} | {s.good_steps} | {s.default_steps or 'T'} |"
        )
    return "\n".join(rows)


def methods_table() -> str:
    rows = ["| method | what it is, and when to use it | evaluations for N steps | leads back |", "|---|---|---|---|"]
    rows += [f"| `{m.name}` | {m.what} {m.when} | {m.evaluations} | `{m.sampler}` |" for m in INVERSIONS.values()]
    return "\n".join(rows)


QUALITY = README.parent / "docs" / "quality.json"
SHOWN = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun", "pndm")


def quality_table() -> str:
    found = json.loads(QUALITY.read_text())["samplers"]
    budgets = sorted({row["budget"] for row in found["walks"] if row["walk"] in SHOWN})
    cells = {(row["walk"], row["budget"]): row for row in found["walks"]}
    rows = ["| within … evaluations | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
    for walk in SHOWN:
        row = [cells.get((walk, budget)) for budget in budgets]
        shown = [f"{c['frechet']['classifier']:.2f} ({100 * c['accuracy']:.0f} %)" if c else "" for c in row]
        rows.append(f"| `{walk}` | " + " | ".join(shown) + " |")
    floor = found["floor"]["classifier"]
    rows.append("")
    rows.append(
        f"{found['images']} images each, from the same seeds, beside {found['reference']} held-out ones. As many "
        f"real training images come to {floor['mean']:.2f}, with draws differing by up to {floor['spread']:.2f}."
    )
    return "\n".join(rows)


def inversion_table() -> str:
    rows = ["| method | steps | evaluations | median PSNR | every pixel exact |", "|---|---|---|---|---|"]
    for row in json.loads(QUALITY.read_text())["inversion"]:
        if row["steps"] in (20, 50):
            rows.append(
                f"| {row['method']} | {row['steps']} | {row['nfe']} | {row['psnr']['median']:.1f} dB "
                f"| {100 * row['exact']:.0f} % |"
            )
    return "\n".join(rows)


PERFORMANCE = README.parent / "docs" / "performance"


def performance_table() -> str:
    peers, alike, unlike = (
        json.loads((PERFORMANCE / f"{name}.json").read_text())["servers"] for name in ("peers", "side", "side-mixed")
    )
    head = [
        "server",
        "mean slowdown at 60 %",
        "at 90 %",
        "p95, 10 steps at 60 %",
        "p95, 100 steps at 60 %",
        "saturated, alike",
        "unlike",
    ]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in peers.items():
        loads = found["loads"]
        slowdowns = [f"{loads[load]['slowdown']['mean']:.1f}" if load in loads else "" for load in ("0.6", "0.9")]
        tails = [f"{loads['0.6']['latency'][steps]['p95']:.2f} s" for steps in ("10", "100")]
        shares = [f"{side[name]['of_bare']:.2f}" if name in side else "" for side in (alike, unlike)]
        rows.append(f"| {' | '.join([PEERS[name].title, *slowdowns, *tails, *shares])} |")
    return "\n".join(rows)


TABLES = {
    "performance": performance_table,
    "quality": quality_table,
    "inversion": inversion_table,
    "samplers": samplers_table,
    "methods": methods_table,
    "settings": settings_table,
    "errors": errors_table,
    "metrics": metrics_table,
}


def rendered(text: str) -> str:
    """The README with fresh tables."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md must have the markers of the table {name} once, not {count} times")
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
