"""Prose cannot drift: the README's tables, tree, links and verbs are held to the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from itertools import pairwise

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from app import __version__
from app.api.app import create_app
from app.cli.main import main
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.settings import Settings
from model.data import Dataset
from model.diffusion import levels as walk
from model.diffusion import machine, samplers
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS, Sampler
from model.diffusion.schedule import NoiseSchedule
from model.training.recipe import Recipe, network
from tests.fakes import GaussianEps
from tests.readme import README, rendered

ROOT = README.parent
TEXT = README.read_text()


def test_tables_are_fresh():
    assert rendered(TEXT) == TEXT, "run `make golden`"


def test_every_field_of_a_request_is_explained():
    told = {name for cell in re.findall(r"^\| (`.+?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    for model in (SampleRequest, InvertRequest, InterpolateRequest):
        assert model.model_fields.keys() <= told, model.model_fields.keys() - told


def test_every_route_is_named():
    for path in create_app().openapi()["paths"]:
        assert path in TEXT, path
    assert "/docs" in TEXT


def test_the_tree_lists_every_module_and_nothing_else():
    tree = re.search(r"```\n(model/ .*?)```", TEXT, re.DOTALL)[1]
    named: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        else:
            named.add(folder + name)
    modules = {
        str(path.relative_to(ROOT))
        for package in ("app", "model")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == modules


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(("name", "channels", "classes"), [("fashion-mnist-32-large", 1, 10), ("avatars-64", 3, 5)])
def test_recipes_have_the_size_that_is_told(name, channels, classes, monkeypatch, tmp_path):
    (command,) = re.findall(rf"unstir train (--data \S+ --out weights/{name} .*)", TEXT.replace("\\\n", ""))
    recipes: list[Recipe] = []
    monkeypatch.setattr("app.cli.train.run", lambda *given, **_: recipes.append(given[2]))
    arguments = re.sub(r"--data \S+", f"--data {tmp_path}", command)  # the data need not be here
    assert main(["train", *shlex.split(arguments)]) == 0
    (recipe,) = recipes
    images = np.zeros((1, recipe.size, recipe.size, channels), np.uint8)
    with torch.device("meta"):
        net = network(recipe, Dataset(images, None, tuple(map(str, range(classes)))))
    count = sum(parameter.numel() for parameter in net.parameters())
    assert f"{count:,} parameters" in TEXT
    assert f"{2 * count / 1e6:.1f} MB" in TEXT
    assert recipe.weights == "bfloat16"
    assert 2 * count <= 40e6


def test_make_verbs_exist_and_the_bare_make_lists_them():
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    verbs = {line.split()[0] for line in listed.splitlines()}
    assert {"serve", "test", "check", "bench"} <= verbs
    for verb in re.findall(r"`?make ([a-z-]+)", TEXT):
        assert verb in verbs, verb


def test_ci_calls_what_the_readme_names():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert "make test" in TEXT


def test_versions_agree():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


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
    namespace = {"pairwise": pairwise, "Plan": Plan, "Sampler": Sampler}
    namespace |= {"levels": walk.levels, "step": walk.step, "terms": walk.terms}
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
