"""The README's tables, rendered from the one place where each thing is declared.

``python -m tests.readme`` rewrites them between their markers; a test fails when they are stale.
"""

from __future__ import annotations

import re
from pathlib import Path

from app.errors import catalogue
from app.metrics import GAUGES, Metrics
from app.settings import SHIPPED, Settings
from model.samplers import SAMPLERS

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
    rows += [f"| `{name}` | | {text} |" for name, text in GAUGES.items()]
    for collector in vars(Metrics()).values():
        if hasattr(collector, "_documentation"):
            name = collector._name + ("_total" if collector._type == "counter" else "")
            rows.append(f"| `{name}` | {', '.join(collector._labelnames)} | {collector._documentation} |")
    return "\n".join(rows)


def samplers_table() -> str:
    rows = ["| sampler | default steps | when to use it |", "|---|---|---|"]
    rows += [f"| `{s.name}` | {s.default_steps or 'T'} | {s.summary} |" for s in SAMPLERS.values()]
    return "\n".join(rows)


TABLES = {
    "samplers": samplers_table,
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
