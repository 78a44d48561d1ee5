"""The recipes of README.md, docs/api.md and docs/clients.md do what they say, on the checkpoint that ships."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.settings import SHIPPED, Settings
from model.checkpoint import load
from tests.process import server
from tests.readme import DOCS, README, ROOT

pytestmark = pytest.mark.programs
CHECKPOINT = Settings.model_fields["checkpoint"].default
API, CLIENTS = DOCS / "api.md", DOCS / "clients.md"
RECIPES = (README, API, CLIENTS)
REFUSED = "label=loreley"  # the one call that shows an error


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(begin: str) -> list[str]:
    lines = [
        line for path in RECIPES for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line.startswith(begin)]


def printed(block: str) -> dict:
    """A JSON answer; … stands for members that are not shown."""
    return json.loads(re.sub(r",\s*…(?=\s*[,}])", "", block))


@pytest.fixture(scope="module")
def served():
    with server(CHECKPOINT) as (_, client, _):
        yield client


@pytest.fixture(scope="module")
def called(served, tmp_path_factory):
    """Every curl command of the pages, in their order: the folder that they write to, and what each prints."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    folder, outputs = tmp_path_factory.mktemp("called"), {}
    for line in commands("curl "):
        fail = "" if REFUSED in line else " --fail"
        command = at_port(line, served).replace("curl", f"curl -sS{fail}", 1)
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        outputs[line] = done.stdout
    return folder, outputs


def test_every_curl_command_answers(served, called):
    folder, outputs = called
    head = (folder / "head.png").read_bytes()
    assert served.post("/sample", json={"label": "lorelei", "seed": 7}).content == head
    assert (folder / "ddpm.png").read_bytes() != head
    sizes = {
        "head.png": (32, 32),
        "heads.png": (4 * 32 + 3 * 2,) * 2,
        "trajectory.png": (16 * 32 + 15 * 2, 32),
        "strip.png": (8 * 32 + 7 * 2, 32),
        "grid.png": (6 * 32 + 5 * 2, 4 * 32 + 3 * 2),
        "blend.png": (32, 32),
    }
    assert {name: opened(folder / name).size for name in sizes} == sizes
    assert opened(folder / "trajectory.gif").n_frames == 24
    assert opened(folder / "between.gif").n_frames == 16
    assert np.load(folder / "images.npy").shape == (4, 3, 32, 32)
    code, pair = (json.loads((folder / name).read_text()) for name in ("code.json", "pair.json"))
    assert (code["steps"], pair["exact"]) == (20, 1)
    assert code["warnings"] == pair["warnings"] == []  # an image of this very network

    answers = [json.loads(output) for output in outputs.values() if output.startswith("{")]
    assert any(len(answer.get("images", [])) == 2 for answer in answers)
    assert any(answer.get("name") == CHECKPOINT.name for answer in answers)
    (events,) = (output for output in outputs.values() if output.startswith("event: queued"))
    assert "event: completed" in events
    (accepted,) = (output for line, output in outputs.items() if "respond-async" in line)
    assert re.search(r"^location: /jobs/\w+", accepted, re.MULTILINE | re.IGNORECASE)


def test_the_round_trip_returns_to_the_image(called):
    """With an error about that of rounding to 8 bits, so at most two or three levels."""
    folder, _ = called
    assert np.load(folder / "head.npy").shape == (3, 32, 32)
    assert worst(folder / "back.png", folder / "head.png") <= 8
    assert worst(folder / "other.png", folder / "head.png") > 50


def test_answers_are_as_printed(called):
    folder, outputs = called
    (shown,) = (printed(block) for block in blocks(README, "json"))
    answer = json.loads((folder / "head.json").read_text())
    assert shown.keys() <= answer.keys()
    assert answer["latent"].startswith(shown["latent"].removesuffix("…"))
    # The width of a forward moves the last bits.
    assert answer["psnr"] == pytest.approx(shown["psnr"], abs=1)  # dB
    assert answer["exact"] == pytest.approx(shown["exact"], abs=0.1)
    for name in ("method", "steps", "nfe", "decode"):
        assert answer[name] == shown[name]

    (shown,) = (printed(block) for block in blocks(API, "json"))
    (answer,) = (json.loads(output) for line, output in outputs.items() if REFUSED in line)
    assert shown.items() <= answer.items()


def at_port(text: str, served) -> str:
    """A recipe for the server of the test; only the port differs."""
    return re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", rf"\1:{served.base_url.port}", text)


def opened_bytes(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def opened(path: Path) -> Image.Image:
    return opened_bytes(path.read_bytes())


def worst(one: Path, other: Path) -> int:
    """The largest difference of two images, of 255."""
    a, b = (np.asarray(opened(path).convert("RGB")).astype(int) for path in (one, other))
    return int(np.abs(a - b).max())


INTERPRETERS = {"python": (sys.executable, "py"), "js": (shutil.which("node") or "node", "mjs")}


@pytest.mark.parametrize(
    ("language", "number"), [("python", 0), ("python", 1), ("js", 0)], ids=["python", "python jobs", "js"]
)
def test_the_recipe_of_a_client(served, tmp_path, language, number):
    interpreter, suffix = INTERPRETERS[language]
    if shutil.which(interpreter) is None:
        pytest.skip(f"needs {interpreter}")
    recipe = blocks(CLIENTS, language)[number]
    assert len([line for line in recipe.splitlines() if line.strip()]) <= 11
    script = tmp_path / f"recipe.{suffix}"
    script.write_text(at_port(recipe, served))
    (tmp_path / "head.png").write_bytes(served.post("/sample", json={"label": "lorelei", "seed": 7}).content)
    done = subprocess.run([interpreter, script.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "sheet.png" in recipe:
        assert opened(tmp_path / "sheet.png").size == (2 * 32 + 2,) * 2
        return
    assert float(done.stdout.split()[0]) > 50
    assert worst(tmp_path / "back.png", tmp_path / "head.png") <= 8


def test_there_are_no_other_recipes():
    assert [len(blocks(CLIENTS, language)) for language in ("python", "js")] == [2, 1]


def test_held_out_garments_come_back():
    with server(SHIPPED / "fashion-mnist-32") as (_, client, _):
        for name in ("pullover", "sweater"):
            image = (DOCS / "garments" / f"{name}.png").read_bytes()
            default, exact = (
                client.post("/invert", files={"image": image}, data=data).raise_for_status().json()
                for data in ({}, {"method": "obelm", "embed": "none"})
            )
            assert default["psnr"] > 50  # the median of 256 is 58.0 in docs/quality.md
            assert (exact["exact"], default["warnings"], exact["warnings"]) == (1, [], [])
            again = client.post(
                "/sample", json={**exact["decode"], "latent": {"npy": exact["latent"]}, "embed": "none"}
            )
            assert again.content == base64.b64decode(exact["reconstruction"])
            assert np.array_equal(np.asarray(opened_bytes(again.content)), np.asarray(opened_bytes(image)))


def test_the_commands_without_a_server(tmp_path):
    program = f"UNSTIR_THREADS=1 {shlex.quote(sys.executable)} -m app "
    lines = [line for line in commands(".venv/bin/unstir ") if re.search(r"unstir (sample|in|replay|call)", line)]
    assert len(lines) == 5
    outputs = {}
    for line in lines:
        command = line.replace(".venv/bin/unstir ", program, 1)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        outputs[line.split()[1]] = done.stdout
    assert "the same bytes again" in outputs["replay"]
    assert re.search(r"back to the image:\n  .*\bsample --latent=head\.npy", outputs["invert"])
    assert opened(tmp_path / "between.gif").n_frames == 16
    answer = json.loads((tmp_path / "head.json").read_text())
    assert base64.b64decode(answer["images"][0]) == (tmp_path / "head.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "classes", "last", "licence", "channels"),
    [("fashion-mnist-32", 10, "Ankle boot", "MIT", 1), ("avatars-32", 5, "notionists", "CC0-1.0", 3)],
)
def test_the_shipped_checkpoints_are_what_their_cards_say(name, classes, last, licence, channels):
    loaded = load(SHIPPED / name)  # checks the hash
    card = loaded.card
    assert (card.name, len(card.classes), card.classes[-1], card.null_class) == (name, classes, last, classes)
    assert card.licence == licence
    assert loaded.shape == (channels, 32, 32)
    assert (loaded.schedule.T, loaded.scheduler_config["beta_schedule"]) == (1000, "linear")
    assert sum(path.stat().st_size for path in (SHIPPED / name).rglob("*") if path.is_file()) < 12e6
    text = " ".join((DOCS / "training.md").read_text(encoding="utf-8").split())
    parameters = f"{card.numbers['parameters'] / 1e6:.2f}M parameters"
    seen = f"{card.training['images_seen'] / 1e6:.2f}M images in {card.training['minutes']:.0f} minutes"
    assert f"`{name}`" in text
    assert f"{parameters}, and saw {seen}" in text
