"""The tables of README.md and docs/, rendered from the place where each thing is declared.

``python -m tests.readme`` rewrites them between their markers, ``<!-- name -->`` and ``<!-- /name -->``; a test fails
when they are stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter

from app.api.responses.interpolate import InterpolateResponse
from app.api.responses.invert import InvertResponse
from app.api.responses.sample import SampleResponse
from app.api.responses.schemas import JobStatus, ModelInfo, Problem, SamplingResponse
from app.api.routes.operations import OPERATIONS
from app.errors import catalogue
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest, SamplingRequest
from app.settings import SHIPPED, Settings
from app.telemetry.metrics import GAUGES, LABELS, Metrics
from bench.peers.run import pool
from bench.peers.servers import PEERS
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS
from model.evaluation.markdown import table
from model.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = (README, *sorted(DOCS.glob("*.md")))
MARKED = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


# Settings, metrics, errors.

FIRST_SETTINGS = ("host", "port", "checkpoint", "device", "threads", "max_queue_seconds")


def settings_table(names: Collection[str] = tuple(Settings.model_fields)) -> str:
    rows = []
    for name in names:
        field = Settings.model_fields[name]
        default = "" if field.default is None else f"`{field.default}`".replace(str(SHIPPED), "weights")
        rows.append((f"`UNSTIR_{name.upper()}`", default, field.description or ""))
    return table(("setting", "default", "meaning"), rows)


def metrics_table() -> str:
    rows = [(f"`{name}`", "gauge", ", ".join(LABELS.get(name, ())), text) for name, text in GAUGES.items()]
    for collector in vars(Metrics()).values():
        if hasattr(collector, "_documentation"):
            kind = collector._type
            name = collector._name + ("_total" if kind == "counter" else "")
            rows.append((f"`{name}`", kind, ", ".join(collector._labelnames), collector._documentation))
    return table(("metric", "type", "labels", "meaning"), rows)


def errors_table() -> str:
    rows = ((f"`{kind.code}`", str(kind.status), kind.meaning) for kind in catalogue())
    return table(("code", "status", "meaning"), rows)


# Fields of requests and responses.


def request_table(model: type[BaseModel], without: Collection[str] = ()) -> str:
    """The fields of a request; those that it has from another model come last."""
    own = [name for name in model.model_fields if name in model.__annotations__]
    rows = []
    for name in (*own, *(name for name in model.model_fields if name not in own)):
        if name not in without:
            field = model.model_fields[name]
            default = "" if field.is_required() or field.default is None else f"`{_shown(field.default)}`"
            kind = _kind(model.model_json_schema()["properties"][name])
            rows.append((f"`{name}`", kind, default, _first_paragraph(field.description)))
    return table(("field", "values", "default", "meaning"), rows)


def response_table(
    model: type[BaseModel], request: type[BaseModel] | None = None, without: Collection[str] = ()
) -> str:
    """The fields of a response; those that repeat the request share a line, and so do those without a description."""
    echoed, bare, rows = [], [], []
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        text = _first_paragraph(field.description or _docstring(field.annotation))
        if request is not None and name in request.model_fields and not text:
            echoed.append(f"`{name}`")
        elif not text:
            bare.append(f"`{name}`")
        elif name not in without:
            rows.append((f"`{name}`", _kind(properties[name]), text))
    if echoed:
        rows.insert(0, (", ".join(echoed), "", "The request, with defaults filled in."))
    if bare:
        rows.append((", ".join(bare), "", ""))
    return table(("field", "type", "meaning"), rows)


def _docstring(annotation: Any) -> str:
    """Of a model that is a field of another."""
    return annotation.__doc__ or "" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ""


def _shown(default: object) -> str:
    return default if isinstance(default, str) else json.dumps(default)


def _first_paragraph(text: str | None) -> str:
    return (text or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a word or two."""
    if "anyOf" in schema:
        kinds = (_kind(member) for member in schema["anyOf"] if member.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "[latent](#a-latent)" if name == "Latent" else "object"
    if schema.get("format") in ("byte", "binary") and "contentMediaType" not in schema:  # those are base64 in JSON
        return "file"
    kind = schema.get("type", "any value")
    if kind == "array":
        return f"list of {_plural(_kind(schema.get('items', {})))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        return f"{kind}, {low:g} to {_number(high)}" if high is not None else f"{kind} from {low:g}"
    return str(kind)


def _number(value: float) -> str:
    return "2^53 - 1" if value == 2**53 - 1 else f"{value:g}"


def _plural(kind: str) -> str:
    if kind.startswith(("list", "[")):
        return kind.replace("list", "lists", 1).replace("latent]", "latents]")
    return " or ".join(f"{part}s" for part in kind.split(" or "))


def formats_table() -> str:
    media_types = list(dict.fromkeys(media for operation in OPERATIONS for media in operation.formats))

    def cell(formats: tuple[str, ...], media: str) -> str:
        return "default" if media == formats[0] else "yes" if media in formats else ""

    rows = ((f"`{media}`", *(cell(each.formats, media) for each in OPERATIONS)) for media in media_types)
    return table(("`Accept`", *(f"`{operation.path}`" for operation in OPERATIONS)), rows)


# Samplers and inversions.


def samplers_table() -> str:
    head = ("sampler", "description", "noise", "NFE of N steps", "good with", "default")
    rows = (
        (
            f"`{each.name}`",
            f"{each.what} {each.when}",
            "yes" if each.stochastic else "no",
            each.nfe_formula,
            each.good_steps,
            str(each.default_steps or "T"),
        )
        for each in SAMPLERS.values()
    )
    return table(head, rows)


def inversions_table() -> str:
    rows = (
        (f"`{each.name}`", f"{each.what} {each.when}", each.nfe_formula, f"`{each.sampler}`")
        for each in INVERSIONS.values()
    )
    return table(("method", "description", "NFE of N steps", "decode with"), rows)


def recipe_table() -> str:
    """The options of `unstir train` that are a recipe's fields."""
    rows, hints = [], get_type_hints(Recipe)
    for field in fields(Recipe):
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shown = "" if default is None else f"`{default}`"
        values = _kind(TypeAdapter(hints[field.name]).json_schema())
        rows.append((f"`--{field.name.replace('_', '-')}`", values, shown, field.metadata["help"]))
    return table(("option", "values", "default", "meaning"), rows)


# Measurements: docs/quality.json and docs/performance/.

CHOICES = (  # what a request needs, the sampler for it, and its NFE
    ("a latent that can be edited, or decoded from `/invert`; the default", "ddim", 50),
    ("the fewest evaluations, without noise", "dpmpp_2m", 10),
    ("the best images for 10 to 100 evaluations, with fresh noise", "dpmpp_2m_sde", 20),
    ("the reference, as in the DDPM paper", "ddpm", 1000),
    ("every pixel of an inverted image back (`method=obelm`)", "obelm", 50),
)
SHOWN = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "heun", "pndm", "obelm")


def _quality() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "quality.json").read_text(encoding="utf-8"))
    return found


def choice_table() -> str:
    samplers = _quality()["samplers"]
    found = {(row["variant"], row["budget"]): row for row in samplers["cells"]}
    rows = []
    for need, sampler, budget in CHOICES:
        cell = found[sampler, budget]
        rows.append((need, f"`{sampler}`", str(budget), f"{cell['frechet']['classifier']:.2f}"))
    real = f"distance (real images: {samplers['floor']['classifier']['mean']:.2f})"
    return table(("for", "sampler", "NFE", real), rows)


def quality_table() -> str:
    """Distance and accuracy of each sampler with its default options."""

    def cell(row: dict[str, Any]) -> str:
        return f"{row['frechet']['classifier']:.2f} ({100 * row['accuracy']:.0f} %)"

    found = _quality()["samplers"]
    floor = found["floor"]["classifier"]
    real = f"{floor['mean']:.2f} (± {floor['spread']:.2f})"
    return f"{_by_budget(cell, SHOWN)}\n\n{found['images']} images each; as many real training images: {real}."


def distance_table(features: str) -> str:
    def cell(row: dict[str, Any]) -> str:
        return _three_digits(row["frechet"][features])

    floor = _quality()["samplers"]["floor"][features]
    real = f"{_three_digits(floor['mean'])} (± {_three_digits(floor['spread'])})"
    return f"{_by_budget(cell)}\n\nReal training images, as many: {real}."


def accuracy_table() -> str:
    def cell(row: dict[str, Any]) -> str:
        return f"{100 * row['accuracy']:.1f}"

    real = 100 * _quality()["samplers"]["training_accuracy"]
    return f"{_by_budget(cell)}\n\nReal training images: {real:.1f} %."


def _by_budget(cell: Callable[[dict[str, Any]], str], names: Collection[str] = ()) -> str:
    """A line for each sampler, or variant of one, a column for each number of evaluations."""
    found = _quality()["samplers"]["cells"]
    names = names or list(dict.fromkeys(row["variant"] for row in found))
    budgets = sorted({row["budget"] for row in found})
    cells = {(row["variant"], row["budget"]): cell(row) for row in found}
    rows = ((f"`{name}`", *(cells.get((name, budget), "") for budget in budgets)) for name in names)
    return table(("NFE", *map(str, budgets)), rows)


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def inversion_table(steps: Collection[int] = ()) -> str:
    head = ("method", "steps", "NFE", "NFE of decoding", "median PSNR", "5th percentile", "whole", "norm", "residual")
    rows = []
    for row in _quality()["inversion"]:
        if not steps or row["steps"] in steps:
            psnr, residual = row["psnr"], f"{row['residual']:.1g}" if "residual" in row else ""
            numbers = (row["steps"], row["nfe"], row["decode_nfe"])
            quality = (f"{psnr['median']:.1f} dB", f"{psnr['low']:.1f} dB", f"{100 * row['exact']:.0f} %")
            rows.append((row["method"], *map(str, numbers), *quality, f"{row['norm']:.2f}", residual))
    return table(head, rows)


def performance_table() -> str:
    peers, alike, unlike = (
        json.loads((DOCS / "performance" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("peers", "side", "side-mixed")
    )
    head = (
        "server",
        "mean slowdown at 60 %",
        "at 90 %",
        "p95, 10 steps at 60 %",
        "p95, 100 steps at 60 %",
        "saturated, equal steps",
        "mixed steps",
    )
    rows = []
    for name, loads in pool(peers).items():
        slowdowns = [f"{loads[load]['slowdown']['mean']:.1f}" if load in loads else "" for load in ("0.6", "0.9")]
        tails = [f"{loads['0.6']['latency'][steps]['p95']:.2f} s" for steps in ("10", "100")]
        sides = (side["servers"].get(name) for side in (alike, unlike))
        shares = [f"{found['of_bare']:.2f}" if found else "" for found in sides]
        rows.append((PEERS[name].title, *slowdowns, *tails, *shares))
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "choice": choice_table,
    "performance": performance_table,
    "first-settings": lambda: settings_table(FIRST_SETTINGS),
    "settings": settings_table,
    "metrics": metrics_table,
    "errors": errors_table,
    "formats": formats_table,
    "sample-fields": lambda: request_table(SampleRequest),
    "invert-fields": lambda: request_table(InvertRequest),
    "interpolate-fields": lambda: request_table(InterpolateRequest, without=SamplingRequest.model_fields),
    "sample-response": lambda: response_table(SampleResponse, SampleRequest),
    "invert-response": lambda: response_table(InvertResponse, InvertRequest),
    "interpolate-response": lambda: response_table(
        InterpolateResponse, InterpolateRequest, without=SamplingResponse.model_fields
    ),
    "job-status": lambda: response_table(JobStatus),
    "model-info": lambda: response_table(ModelInfo),
    "problem": lambda: response_table(Problem),
    "samplers": samplers_table,
    "inversions": inversions_table,
    "recipe": recipe_table,
    "quality": quality_table,
    "distance-classifier": lambda: distance_table("classifier"),
    "distance-efficientnet": lambda: distance_table("efficientnet"),
    "accuracy": accuracy_table,
    "inversion": lambda: inversion_table(steps=(20, 50)),
    "inversion-all": inversion_table,
}


def render(text: str) -> str:
    """A page with fresh tables.

    Raises:
        KeyError: it has the markers of a table that is not in TABLES.
    """
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
