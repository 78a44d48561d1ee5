"""The README's commands do what it says, on the checkpoint that ships."""

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
from tests.readme import README

CHECKPOINT = Settings.model_fields["checkpoint"].default


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands(begin: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(begin)]


@pytest.fixture(scope="module")
def served():
    with server(CHECKPOINT) as (_, client, _):
        yield client


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_curl_command_answers(served, tmp_path):
    outputs: dict[str, bytes] = {}
    base = str(served.base_url).rstrip("/")
    for line in commands("curl "):
        command = line.replace("localhost:8000", base).replace("curl", "curl --fail-with-body -sS", 1)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        outputs[command] = done.stdout
    again = served.post("/sample", json={"label": "lorelei", "seed": 7})
    head = (tmp_path / "head.png").read_bytes()
    assert Image.open(io.BytesIO(head)).size == (32, 32)
    assert again.content == head
    assert (tmp_path / "ddpm.png").read_bytes() != head
    assert Image.open(io.BytesIO((tmp_path / "heads.png").read_bytes())).size == (4 * 32 + 3 * 2,) * 2
    assert np.load(tmp_path / "images.npy").shape == (4, 3, 32, 32)
    answers = [json.loads(output) for output in outputs.values() if output.startswith(b"{")]
    assert any(len(answer.get("images", [])) == 2 for answer in answers)
    assert any(answer.get("name") == CHECKPOINT.name for answer in answers)

    # The round trip: an error about that of rounding to 8 bits, so at most two or three levels.
    assert np.load(tmp_path / "head.npy").shape == (3, 32, 32)
    assert worst(tmp_path / "back.png", tmp_path / "head.png") <= 8
    assert worst(tmp_path / "other.png", tmp_path / "head.png") > 50
    told = next(answer for answer in answers if "decode" in answer)
    (shown,) = (block for block in blocks("json") if '"decode"' in block)
    printed = json.loads(re.sub(r", …\s*}$", "}", shown.strip()))
    assert printed.keys() <= told.keys()
    for name, value in printed.items():
        if name == "psnr":
            assert abs(told[name] - value) < 1  # of dB; the width of a forward moves the last bits
        elif isinstance(value, int | dict | list) or name in ("method", "spacing", "model", "plan"):
            assert told[name] == value, name

    assert opened(tmp_path / "strip.png").size == (8 * 32 + 7 * 2, 32)
    assert opened(tmp_path / "grid.png").size == (6 * 32 + 5 * 2, 4 * 32 + 3 * 2)
    assert opened(tmp_path / "walk.gif").n_frames == 16
    assert opened(tmp_path / "unstirring.gif").n_frames == 24
    events = [output for output in outputs.values() if output.startswith(b"event: queued")]
    assert len(events) == 1
    assert b"event: completed" in events[0]


def opened_bytes(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def opened(path: Path) -> Image.Image:
    return opened_bytes(path.read_bytes())


def worst(one: Path, other: Path) -> int:
    """The largest difference of two images, of 255."""
    a, b = (np.asarray(opened(path).convert("RGB")).astype(int) for path in (one, other))
    return int(np.abs(a - b).max())


@pytest.mark.parametrize(
    ("language", "command"), [("python", [sys.executable]), ("js", [shutil.which("node") or "node"])]
)
def test_the_recipe_of_a_client(served, tmp_path, language, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    (recipe,) = blocks(language)
    assert len([line for line in recipe.splitlines() if line.strip()]) <= 11
    suffix = {"python": "py", "js": "mjs"}[language]
    script = tmp_path / f"recipe.{suffix}"
    script.write_text(recipe.replace("http://localhost:8000", str(served.base_url).rstrip("/")))
    (tmp_path / "head.png").write_bytes(served.post("/sample", json={"label": "lorelei", "seed": 7}).content)
    done = subprocess.run([*command, script.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 50
    assert worst(tmp_path / "back.png", tmp_path / "head.png") <= 8


def test_held_out_garments_come_back():
    with server(SHIPPED / "fashion-mnist-32") as (_, client, _):
        for name in ("pullover", "sweater"):
            image = (README.parent / "docs" / "garments" / f"{name}.png").read_bytes()
            default, exact = (
                client.post("/invert", files={"image": image}, data=data).raise_for_status().json()
                for data in ({}, {"method": "obelm"})
            )
            assert default["psnr"] > 50  # the median of 256 is 58.0 in docs/quality.md
            assert (exact["exact"], default["warnings"], exact["warnings"]) == (1, [], [])
            again = client.post("/sample", json={**exact["decode"], "latent": {"npy": exact["latent"]}})
            assert again.content == base64.b64decode(exact["reconstruction"])
            assert np.array_equal(np.asarray(opened_bytes(again.content)), np.asarray(opened_bytes(image)))


def test_the_commands_without_a_server(tmp_path):
    program = f"UNSTIR_THREADS=1 {shlex.quote(sys.executable)} -m app "
    lines = [line for line in commands(".venv/bin/unstir ") if re.search(r"unstir (sample|in|replay|call)", line)]
    assert len(lines) == 5
    told = {}
    for line in lines:
        command = line.replace(".venv/bin/unstir ", program, 1)
        environment = {**os.environ, "PYTHONPATH": str(README.parent)}
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        told[line.split()[1]] = done.stdout
    assert "the same bytes again" in told["replay"]
    assert "-m app sample --latent=head.npy" in told["invert"]
    assert opened(tmp_path / "walk.gif").n_frames == 16
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
    seen = f"{card.training['images_seen'] / 1e6:.2f}M images"
    assert seen in README.read_text()
    assert f"{card.numbers['parameters'] / 1e6:.2f}M parameters" in README.read_text()
