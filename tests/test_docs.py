"""README.md and docs/ agree with the code: tables, fields, routes, headers, modules, verbs, commands, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from app import __version__
from app.api.app import create_app
from app.api.routes.operations import OPERATIONS
from app.errors import catalogue
from app.settings import Settings
from model.data import Dataset
from model.diffusion import machine, samplers
from model.diffusion.samplers import SAMPLERS, Sampler, classical
from model.diffusion.schedule import NoiseSchedule
from model.training.recipe import Recipe, network
from tests.fakes import GaussianEps
from tests.readme import DOCS, MARKED, PAGES, README, ROOT, TABLES, render

PROSE = (*PAGES, ROOT / "CHANGELOG.md")
ARCHITECTURE = DOCS / "architecture.md"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def section(path: Path, title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", read(path), re.DOTALL | re.MULTILINE)[1]


def table_rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    tables = [block.splitlines()[2:] for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for lines in tables for line in lines]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_are_fresh(path):
    assert render(read(path)) == read(path), "run `make golden`"


def test_every_table_is_shown_once():
    shown = Counter(name for path in PAGES for _, name, _ in MARKED.findall(read(path)))
    assert shown == dict.fromkeys(TABLES, 1)


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 200


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_field_of_a_request_and_a_response_is_explained(operation):
    text = section(DOCS / "api.md", f"POST {operation.path}")
    if operation.name == "interpolate":  # whose sampling fields are those of /sample
        text += section(DOCS / "api.md", "POST /sample")
    named = {name for row in table_rows(text) for name in re.findall(r"`(\w+)`", row[0])}
    assert operation.request.model_fields.keys() | operation.response.model_fields.keys() <= named


def test_every_route_is_named():
    text = read(DOCS / "api.md")
    for path in create_app().openapi()["paths"]:
        assert path in text, path
    assert "/docs" in text


def test_every_header_of_a_response_is_named():
    """Headers are what the code of the API writes with a capital after each hyphen."""
    sources = "".join(
        read(path) for path in [*(ROOT / "app" / "api").rglob("*.py"), *(ROOT / "app" / "errors").glob("*.py")]
    )
    headers = set(re.findall(r'"([A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]*)+|Location|Vary)"', sources))
    assert {"X-NFE", "Retry-After", "Server-Timing"} <= headers
    assert headers <= set(re.findall(r"[A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]*)*", read(DOCS / "api.md")))


def test_names_in_prose_exist():
    """Settings, metrics, errors, samplers and inversions that a page mentions."""
    settings = {f"UNSTIR_{name.upper()}" for name in Settings.model_fields}
    metrics = set(re.findall(r"`(unstir_\w+)`", TABLES["metrics"]()))
    for path in PAGES:
        text = read(path)
        assert set(re.findall(r"UNSTIR_[A-Z_]+[A-Z]", text)) <= settings, path
        assert set(re.findall(r"\bunstir_(?!client\b)[a-z_]+[a-z]", text)) <= metrics, path  # unstir_client: a package
        statuses = {kind.code: str(kind.status) for kind in catalogue()}
        for status, code in re.findall(r"\b([45]\d\d) `(\w+)`", text):
            assert statuses.get(code) == status, (path, code)


def test_the_readme_chooses_between_five_samplers():
    shown = {row[1].strip("`") for row in table_rows(section(README, "Which sampler?"))}
    assert shown <= SAMPLERS.keys()
    assert len(shown) == 5


# Architecture: modules, folders, terms, where to find what.


def test_the_list_of_modules_is_complete():
    named = re.findall(r"^(\w\S+\.py) ", section(ARCHITECTURE, "Modules"), re.MULTILINE)
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("app", "model")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert set(named) == modules
    assert len(named) == len(modules)


def test_the_readme_names_every_folder():
    named = re.findall(r"^(\w[\w/]*)/ ", section(README, "How it works"), re.MULTILINE)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("not a checkout")
    parts = [Path(line).parts for line in tracked.splitlines()]
    layers = {"/".join(part[:2]) for part in parts if part[0] in ("app", "model") and len(part) > 2}
    others = {part[0] for part in parts if len(part) > 1} - {"app", "model", "docs", ".ci"}
    assert set(named) == layers | others


def test_the_glossary_is_short():
    terms = table_rows(section(ARCHITECTURE, "Terms"))
    assert 0 < len(terms) <= 20
    assert len({row[0] for row in terms}) == len(terms)


@pytest.mark.parametrize("row", table_rows(section(ARCHITECTURE, "Where is … ?")), ids=lambda row: row[0])
def test_a_question_is_answered_by_three_files_at_most(row):
    answer = row[1]
    files = re.findall(r"`((?:app|model)/[\w/]+\.py)`", answer)
    assert 1 <= len(set(files)) <= 3
    for path in files:
        assert (ROOT / path).is_file(), path
    for path, name in re.findall(r"`((?:app|model)/[\w/]+\.py)` \(`(\w+)`", answer):
        assert re.search(rf"\b{name}\b", read(ROOT / path)), (path, name)


def test_there_are_twelve_questions():
    assert len(table_rows(section(ARCHITECTURE, "Where is … ?"))) == 12


# Links and commands.


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = read(path)
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", text) + re.findall(r'<img src="(?!https?://)([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        page = path.parent / target if target else path
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), link


def test_every_page_is_linked():
    """Every page of docs/ can be reached from the README."""
    reached, todo = set(), [README]
    while todo:
        page = todo.pop()
        if page not in reached and page.exists():
            reached.add(page)
            todo += [(page.parent / link).resolve() for link in re.findall(r"\]\((?!http)([^)#\s]+\.md)", read(page))]
    assert set(PAGES) <= reached


def test_make_verbs_exist_and_all_are_named():
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    verbs = {line.split()[0] for line in listed.splitlines()} - {"help"}
    for path in PAGES:
        assert set(re.findall(r"`(?:UNSTIR_\w+=\S+ )?make ([a-z][a-z-]*)", read(path))) <= verbs, path
    assert verbs <= set(re.findall(r"make ([a-z][a-z-]*)", read(README)))


def documented_commands() -> list[list[str]]:
    """The words of every `unstir` command that a block of a page shows."""
    blocks = [block for path in PAGES for block in re.findall(r"```sh\n(.*?)```", read(path), re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(".venv/bin/unstir ")]


def test_commands_and_their_flags_exist():
    typer_main = pytest.importorskip("typer.main")
    from app.cli.main import app  # noqa: PLC0415 - torch is imported by most subcommands, not by this

    group = typer_main.get_command(app)
    named = set()
    for name, *words in documented_commands():
        _, command, _ = group.resolve_command(group.make_context("unstir", [name, *words]), [name, *words])
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= options, (name, words)
        named.add(name)
    assert named == group.commands.keys()


@pytest.mark.parametrize(("name", "channels", "classes"), [("fashion-mnist-32-large", 1, 10), ("avatars-64", 3, 5)])
def test_recipes_have_the_size_that_is_said(name, channels, classes):
    (words,) = (words for words in documented_commands() if f"weights/{name}" in words and words[0] == "train")
    given = {flag[2:].replace("-", "_"): value for flag, value in zip(words[1::2], words[2::2], strict=True)}
    kinds = get_type_hints(Recipe)
    options = {}
    for option in (field.name for field in fields(Recipe) if field.name in given):
        value = given[option].split(",") if isinstance(getattr(Recipe, option), tuple) else given[option]
        options[option] = TypeAdapter(kinds[option]).validate_python(value)
    recipe = Recipe(**options)
    images = np.zeros((1, recipe.size, recipe.size, channels), np.uint8)
    with torch.device("meta"):
        net = network(recipe, Dataset(images, None, tuple(map(str, range(classes)))))
    count = sum(parameter.numel() for parameter in net.parameters())
    text = " ".join(section(DOCS / "training.md", "On a CUDA device").split())
    assert f"{count:,} parameters, {2 * count / 1e6:.1f} MB" in text
    assert recipe.weights == "bfloat16"
    assert 2 * count <= 40e6


def test_ci_calls_what_the_readme_names():
    for verb in ("check", "test", "test-programs"):
        assert f"\nmake {verb}\n" in read(ROOT / ".ci" / "run")
        assert f"`make {verb}`" in read(README)


def test_versions_agree():
    assert tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["version"] == __version__
    assert f"## [{__version__}]" in read(ROOT / "CHANGELOG.md")


def test_the_container_copies_what_it_needs():
    text = (ROOT / "Dockerfile").read_text()
    for path in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in path.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines(), source


def test_a_sampler_is_added_by_one_function_and_one_row(monkeypatch, tiny):
    """The lines of docs/add-a-sampler.md, as they stand there, in a running service."""
    function, row = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-sampler.md").read_text(), re.DOTALL)
    assert len(function.strip().splitlines()) == 9
    namespace = {**vars(classical), "Sampler": Sampler}  # as at the end of that module
    exec(function, namespace)
    entry = eval(row, namespace)
    monkeypatch.setitem(SAMPLERS, entry.name, entry)

    # Second order: on Gaussian data, four times the steps leave a sixteenth of the error.
    net = GaussianEps(schedule := NoiseSchedule.from_config({}), 0.3, 0.5)
    exact = samplers.heun(schedule, 1000)
    x = torch.tensor([-1.0, 0.4, 1.3], dtype=torch.float64).reshape(3, 1, 1, 1)
    errors = [
        float((machine.run(net, entry.compile(schedule, n), x) - machine.run(net, exact, x)).abs().max())
        for n in (50, 200)
    ]
    assert errors[0] / errors[1] > 8

    with TestClient(create_app(Settings(checkpoint=tiny, device="cpu", threads=1))) as client:
        while client.get("/readyz").status_code != 200:
            pass
        answer = client.post("/sample", json={"sampler": "lms", "steps": 10, "seed": 1})
        described = {sampler["name"]: sampler for sampler in client.get("/model").json()["samplers"]}
    assert (answer.status_code, answer.headers["x-nfe"]) == (200, "10")
    assert described["lms"]["what"] == "Adams-Bashforth in σ/α."
