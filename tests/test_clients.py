"""Clients that others' generators make from the OpenAPI document: checked by types, then run against the service.

The generators have environments of their own, which `make` installs: .venv-clients and tests/clients/node_modules.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import contract
from tests.conftest import save_tiny
from tests.process import server
from tests.readme import DOCS, ROOT

pytestmark = pytest.mark.programs
CALLS = ROOT / "tests" / "clients"
PAGE = DOCS / "typed-clients.md"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
STRICT = ("--strict", "--noUncheckedIndexedAccess", "--skipLibCheck", "--target", "es2022", "--module", "nodenext")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout)
    return done.stdout


def install(target: str) -> None:
    run("make", "--no-print-directory", target, f"PYTHON={sys.executable}", cwd=ROOT)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Its address."""
    checkpoint = save_tiny(tmp_path_factory.mktemp("clients"), ("circle", "square", "lorelei"))
    with server(checkpoint) as (_, client, _):
        yield client


@pytest.fixture
def folder(service, tmp_path):
    """With an image, and a way to fill in the address."""
    (tmp_path / "image.png").write_bytes(service.post("/sample", json={"seed": 1, "steps": 2}).content)
    return tmp_path


def address(service) -> str:
    return str(service.base_url).rstrip("/")


def here(text: str, service) -> str:
    """A text of the page for the service of the test."""
    return text.replace("http://127.0.0.1:8000", address(service))


def test_a_python_client(service, folder):
    install(".venv-clients/.ready")
    _, command = here(blocks("sh")[0], service).splitlines()
    words = command.split()
    said = run(PYTHON.with_name(words[0]), *words[1:], cwd=folder)
    # All that it does not know is a body that is a bare image.
    assert re.findall(r"WARNING.*|Unsupported.*|ERROR.*", said) == [
        "WARNING parsing POST /invert within images.",
        "Unsupported content type image/*",
    ]
    shutil.copy(CALLS / "calls.py", folder)
    (folder / "example.py").write_text(here(blocks("python")[0], service))
    cache = ROOT / ".mypy_cache" / "clients"
    checked = ("--strict", "--python-executable", PYTHON, "--cache-dir", cache, "calls.py", "example.py")
    run(sys.executable, "-m", "mypy", *checked, cwd=folder)
    assert run(PYTHON, "calls.py", address(service), "image.png", cwd=folder) == "done\n"
    shown = run(PYTHON, "example.py", cwd=folder)
    assert shown.startswith("SampleResponse(")
    assert "DecodeFields(" in shown


def test_a_typescript_client(service, folder):
    if shutil.which("npm") is None:
        pytest.skip("needs node and npm (Debian, Ubuntu: apt install nodejs npm)")  # .ci/run does not start without
    install("tests/clients/node_modules/.ready")
    (folder / "node_modules").symlink_to(CALLS / "node_modules")
    shutil.copy(CALLS / "package.json", folder)
    shutil.copy(CALLS / "calls.ts", folder)
    (folder / "generate.mjs").write_text(blocks("js")[0])
    (folder / "example.ts").write_text(here(blocks("ts")[0], service))
    _, command = here(blocks("sh")[1], service).splitlines()
    run(*command.split(), cwd=folder)
    run("node_modules/.bin/tsc", *STRICT, "calls.ts", "example.ts", cwd=folder)
    assert run("node", "calls.js", address(service), "image.png", cwd=folder) == "done\n"
    assert "sampler: 'ddim'" in run("node", "example.js", cwd=folder)


def test_requests_made_from_the_document(service, folder):
    """A few of what `make contract` sends."""
    options = ("--phases", "examples,fuzzing", "--max-examples", "2", "--seed", "0")
    said = run(*contract.command(address(service), *options), cwd=folder)
    assert int(re.search(r"(\d+) generated, \1 passed", said)[1]) >= 20


def test_the_page_names_the_packages_that_are_tested():
    (pip, _), (npm, _) = (block.splitlines() for block in blocks("sh"))
    assert pip.split()[2:] == re.findall(r"^[\w-]+", (CALLS / "requirements.txt").read_text(), re.MULTILINE)
    packages = json.loads((CALLS / "package.json").read_text())["devDependencies"]
    assert set(npm.split()[2:]) == packages.keys() - {"@types/node"}
