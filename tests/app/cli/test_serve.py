"""`unstir serve`: settings from flags and from the environment."""

from __future__ import annotations

import pytest

from app.api import server
from app.cli.main import main
from app.settings import Settings


@pytest.fixture
def served(monkeypatch) -> list[Settings]:
    seen: list[Settings] = []
    monkeypatch.setattr(server, "serve", lambda settings: seen.append(settings) or 0)
    return seen


def test_a_setting_from_the_environment_and_a_flag_that_overrides_it(served, monkeypatch, tiny):
    monkeypatch.setenv("UNSTIR_PORT", "9001")
    monkeypatch.setenv("UNSTIR_MAX_IMAGES", "3")
    assert main(["serve", "--checkpoint", str(tiny), "--port", "9002", "--drain-seconds", "1.5"]) == 0
    (settings,) = served
    assert (settings.port, settings.max_images, settings.checkpoint) == (9002, 3, tiny)
    assert settings.drain_seconds == 1.5


def test_the_exit_status_is_that_of_the_server(monkeypatch, tiny):
    monkeypatch.setattr(server, "serve", lambda _: 1)
    assert main(["serve", "--checkpoint", str(tiny)]) == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "lines"),
    [
        (["--port", "eighty"], {}, ["--port (UNSTIR_PORT) = eighty: must be an integer of 0 to 65535"]),
        ([], {"UNSTIR_PORT": "70000"}, ["--port (UNSTIR_PORT) = 70000: must be an integer of 0 to 65535"]),
        (["--dtype", "fp8"], {}, ["--dtype (UNSTIR_DTYPE) = fp8: choose one of auto, float32, tf32, bfloat16"]),
        (
            ["--cors-origins", "null"],
            {},
            ["--cors-origins (UNSTIR_CORS_ORIGINS) = null: null is every page without a site, .*"],
        ),
        (["--device", "tpu"], {}, ["--device (UNSTIR_DEVICE) = tpu: choose auto, cpu, cuda or cuda:N"]),
        (["--device", "cpu", "--dtype", "tf32"], {}, ["--dtype (UNSTIR_DTYPE) = tf32: only CUDA devices have it; .*"]),
        (["--checkpoint", "no where"], {}, ["--checkpoint (UNSTIR_CHECKPOINT) = 'no where': no such folder"]),
        (
            ["--max-lanes", "0"],
            {"UNSTIR_MAX_JOBS": "-1"},
            [
                "--max-jobs (UNSTIR_MAX_JOBS) = -1: must be an integer from 1",
                "--max-lanes (UNSTIR_MAX_LANES) = 0: must be an integer from 1",
            ],
        ),
    ],
    ids=["number", "environment", "choice", "origin", "device", "dtype", "checkpoint", "two"],
)
def test_a_bad_setting_is_named_with_its_value_and_the_remedy(
    served, monkeypatch, capsys, arguments, environment, lines
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    for line, words in zip(said, lines, strict=True):
        assert line.startswith(f"unstir: {words.removesuffix('.*')}")
    assert not served


@pytest.mark.parametrize("name", ["card.json", "unet/config.json"])
def test_a_file_of_a_checkpoint_is_answered_with_its_folder(served, capsys, tiny, name):
    assert main(["serve", "--checkpoint", str(tiny / name)]) == 2
    wanted = f"{tiny / name}: is a file; give the checkpoint's folder, {tiny}\n"
    assert capsys.readouterr().err == f"unstir: --checkpoint (UNSTIR_CHECKPOINT) = {wanted}"
    assert not served
