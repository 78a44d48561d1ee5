"""The README's commands do what it says, on the checkpoint that ships."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from app.settings import SHIPPED, Settings
from model.checkpoint import load
from tests.process import server
from tests.readme import README

CHECKPOINT = Settings.model_fields["checkpoint"].default


def curls() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [command for command in commands if command.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_curl_command_answers(tmp_path):
    outputs: dict[str, bytes] = {}
    with server(CHECKPOINT) as (_, client, _):
        base = str(client.base_url).rstrip("/")
        for line in curls():
            command = line.replace("localhost:8000", base).replace("curl", "curl --fail-with-body -sS", 1)
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            outputs[command] = done.stdout
        again = client.post("/sample", json={"label": "lorelei", "seed": 7})
    head = (tmp_path / "head.png").read_bytes()
    assert Image.open(io.BytesIO(head)).size == (32, 32)
    assert again.content == head
    assert (tmp_path / "ddpm.png").read_bytes() != head
    assert Image.open(io.BytesIO((tmp_path / "heads.png").read_bytes())).size == (4 * 32 + 3 * 2,) * 2
    assert np.load(tmp_path / "pictures.npy").shape == (4, 3, 32, 32)
    answers = [json.loads(output) for output in outputs.values() if output.startswith(b"{")]
    assert any(len(answer.get("images", [])) == 2 for answer in answers)
    assert any(answer.get("name") == CHECKPOINT.name for answer in answers)


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
    seen = f"{card.training['pictures_seen'] / 1e6:.2f}M pictures"
    assert seen in README.read_text()
    assert f"{card.numbers['parameters'] / 1e6:.2f}M parameters" in README.read_text()
