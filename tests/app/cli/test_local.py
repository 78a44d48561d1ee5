"""The endpoints on the command line, as one types them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from app.cli import in_process
from app.cli.main import main
from model import images
from tests.process import server

PNG = images.png(np.random.default_rng(1).integers(0, 256, (8, 8, 1), np.uint8))


def opened(path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A folder with one image in it, and the tiny checkpoint as the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNSTIR_CHECKPOINT", str(tiny))
    monkeypatch.setenv("UNSTIR_DEVICE", "cpu")
    monkeypatch.setenv("UNSTIR_MAX_WIDTH", "4")
    (tmp_path / "noise.png").write_bytes(PNG)
    return tmp_path


@pytest.fixture
def unstir(here, capsys):
    """Runs a command; gives its status, output and complaints."""

    def run(line: str) -> tuple[int, str, str]:
        status = main(shlex.split(line))
        return status, *capsys.readouterr()

    return run


def test_sample_writes_what_the_name_says(unstir, tmp_path):
    status, printed, _ = unstir("sample --label circle --seed 7 --steps 4 -o a.png")
    assert (status, printed) == (0, "a.png: seed 7, 4 evaluations\n")
    assert opened(tmp_path / "a.png").size == (8, 8)
    assert unstir("sample --seed 7 --steps 4 --trajectory 4 -o a.gif")[0] == 0
    assert opened(tmp_path / "a.gif").n_frames > 1
    assert unstir("sample --n 3 --steps 2 -o a.npy")[0] == 0
    assert np.load(tmp_path / "a.npy").shape == (3, 1, 8, 8)
    assert unstir("sample --steps 2")[0] == 0
    assert (tmp_path / "sample.png").exists()


def test_invert_names_the_command_that_leads_back(unstir, tmp_path):
    status, printed, _ = unstir("invert noise.png --steps 10 --refinements 4 --method fixed_point --label 'Big star'")
    assert status == 0
    assert np.load(tmp_path / "noise.npy").shape == (1, 8, 8)
    assert re.search(r"psnr -?[\d.]+, max_error", printed)
    back = next(line for line in printed.splitlines() if line.strip().startswith("unstir sample"))
    for embed in ("request_and_files", "none"):
        assert unstir(back.split(maxsplit=1)[1] + f" --embed {embed}")[0] == 0
        again = f"invert noise.png --steps 10 --refinements 4 --label 'Big star' --embed {embed} -o rebuilt.png"
        assert unstir(again)[0] == 0
        assert (tmp_path / "back.png").read_bytes() == (tmp_path / "rebuilt.png").read_bytes()


def test_invert_as_json_is_the_answer_of_the_endpoint(unstir, tmp_path):
    assert unstir("invert noise.png --steps 5 --method obelm -o code.json")[0] == 0
    answer = json.loads((tmp_path / "code.json").read_text())
    assert (answer["method"], answer["decode"]["sampler"], answer["exact"]) == ("obelm", "obelm", 1)


def test_interpolate_between_images_latents_and_seeds(unstir, tmp_path):
    assert unstir("invert noise.png --steps 4 -o code.npy")[0] == 0
    assert unstir("interpolate noise.png 8 --steps 4 --frames 3")[0] == 0
    assert opened(tmp_path / "interpolate.png").size == (3 * 8 + 2 * 2, 8)
    assert unstir("interpolate code.npy 8 --steps 4 --frames 3 -o path.npy")[0] == 0
    assert np.load(tmp_path / "path.npy").shape == (3, 1, 8, 8)
    assert unstir("interpolate 1 2 3 --weights 1,2,3 --steps 4 -o blend.npy")[0] == 0
    assert np.load(tmp_path / "blend.npy").shape == (1, 1, 8, 8)
    assert unstir("interpolate 1 2 3 4 --grid 2,3 --steps 4 -o grid.png")[0] == 0
    assert opened(tmp_path / "grid.png").size == (3 * 8 + 2 * 2, 2 * 8 + 2)


@pytest.mark.parametrize(
    "command",
    [
        "sample --label square --steps 4 -o a.png",
        "sample --steps 4 --n 3 --sampler ddpm -o a.png",
        "sample --steps 4 --trajectory 3 --trajectory-of x_t -o a.png",
        "sample --steps 4 --trajectory 3 -o a.apng",
        "sample --steps 4 --embed request_and_files --latent noise.png -o a.png",
        "invert noise.png --steps 4 --embed request_and_files -o a.png",
        "invert noise.png --steps 4 --trajectory 3 --embed request_and_files -o a.png",
        "interpolate noise.png 8 --steps 4 --frames 3 --embed request_and_files -o a.png",
        "interpolate noise.png noise.png --steps 4 --frames 3 --sampler obelm --embed request_and_files -o a.png",
        "interpolate 7 7 --steps 4 --frames 3 -o a.apng",
        "interpolate 1 2 --steps 4 --labels circle,square -o a.apng",
    ],
)
def test_an_image_replays_from_itself(unstir, tmp_path, command):
    status, _, complaint = unstir(command)
    assert status == 0, complaint
    name = command.rpartition(" ")[2]
    status, printed, complaint = unstir(f"replay {name} -o again{name[1:]}")
    assert (status, complaint) == (0, "")
    assert printed == f"{name}: the same bytes again\n"
    assert (tmp_path / f"again{name[1:]}").read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("sample --steps 4 --latent noise.png -o a.png", ["latent.image"]),
        ("sample --steps 4 --latent code.npy -o a.png", ["latent.npy"]),
        ("invert noise.png --steps 4 -o a.png", ["image"]),
        ("invert noise.png --steps 4 --trajectory 3 -o a.apng", ["image"]),
        ("interpolate noise.png 8 --steps 4 --frames 3 -o a.png", ["a.image"]),
        ("interpolate noise.png code.npy 7 --weights 1,2,3 --steps 4 -o a.png", ["latents.0.image", "latents.1.npy"]),
    ],
)
def test_an_image_replays_from_itself_and_the_files_that_it_names(unstir, tmp_path, command, fields):
    np.save(tmp_path / "code.npy", np.random.default_rng(2).standard_normal((1, 8, 8)).astype(np.float32))
    name = command.rpartition(" ")[2]
    assert unstir(command)[0] == 0
    status, _, complaint = unstir(f"replay {name}")
    assert status == 2
    for line, field in zip(complaint.splitlines(), fields, strict=True):
        file = tmp_path / ("noise.png" if field.endswith("image") else "code.npy")
        named = f"{field}, {file.stat().st_size} bytes with sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
        assert line == f"unstir: {name}: it was made of a file that is not in it: {named}; give it with --file"
    status, printed, complaint = unstir(f"replay {name} --file noise.png --file code.npy -o again{name[1:]}")
    assert (status, complaint) == (0, "")
    assert printed == f"{name}: the same bytes again\n"
    assert (tmp_path / f"again{name[1:]}").read_bytes() == (tmp_path / name).read_bytes()


def test_replay_takes_no_other_file(unstir, tmp_path):
    unstir("sample --steps 4 --latent noise.png -o a.png")
    (tmp_path / "other.png").write_bytes(PNG + b"x")
    status, _, complaint = unstir("replay a.png --file other.png")
    assert status == 2
    wrong, right = (hashlib.sha256(content).hexdigest() for content in (PNG + b"x", PNG))
    assert complaint == (
        f"unstir: --file = other.png: it has {len(PNG) + 1} bytes and sha256 {wrong}; "
        f"a.png was made of latent.image, {len(PNG)} bytes with sha256 {right}; give that\n"
    )
    assert unstir("replay a.png --file nothing.png")[2] == "unstir: nothing.png: No such file or directory\n"


@pytest.mark.parametrize("embed", ["request", "none", "request_and_files"])
def test_whether_an_image_holds_what_it_was_made_of(unstir, tmp_path, embed):
    """Its latent gives it back to the bit of every pixel."""
    unstir(f"sample --steps 4 --latent noise.png --sampler obelm --embed {embed} -o a.png")
    text = opened(tmp_path / "a.png").text
    if embed == "none":
        assert text == {}
        assert "does not say how it was made" in unstir("replay a.png")[2]
        return
    latent = json.loads(text["unstir"])["request"]["latent"]
    if embed == "request":
        assert latent == {"image": {"sha256": hashlib.sha256(PNG).hexdigest(), "bytes": len(PNG)}}
        assert len((tmp_path / "a.png").read_bytes()) < 1200
    else:
        assert np.load(io.BytesIO(base64.b64decode(latent["npy"]))).shape == (2, 1, 8, 8)


def test_replay_notices_an_image_that_was_changed(unstir, tmp_path):
    unstir("sample --steps 4 --seed 1 -o a.png")
    text = opened(tmp_path / "a.png").text["unstir"]
    changed = images.png(np.zeros((8, 8, 1), np.uint8), {"unstir": text})
    (tmp_path / "a.png").write_bytes(changed)
    status, printed, _ = unstir("replay a.png")
    assert status == 1
    assert re.search(r"^a.png: other bytes: \d+ of 64 pixels differ, by up to \d+: another device, dtype, ", printed)


def test_replay_says_what_differs_where_pixels_do_not(unstir, tmp_path):
    unstir("sample --steps 4 --seed 1 -o a.png")
    image = opened(tmp_path / "a.png")
    pixels, facts = np.asarray(image)[..., None], json.loads(image.text["unstir"])
    older = facts | {"version": "0.0.1", "request": {k: v for k, v in facts["request"].items() if k != "embed"}}
    (tmp_path / "b.png").write_bytes(images.png(pixels, {"unstir": json.dumps(older)}))
    status, printed, _ = unstir("replay b.png")
    assert status == 1
    told = f'version was "0.0.1", is "{facts["version"]}", embed was not said, is "request"'
    assert printed == f"b.png: other bytes: the same pixels; {told}\n"
    (tmp_path / "c.png").write_bytes(images.png(pixels, {"unstir": image.text["unstir"]}, scale=2))
    assert "other images, 1 of 8x8 instead of 1 of 16x16" in unstir("replay c.png")[1]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("replay noise.png", "does not say how it was made"),
        ("replay nothing.png", "nothing.png: No such file"),
        ("sample --steps ten", "--steps = ten: must be an integer from 1"),
        ("sample --steps 0", "--steps = 0: must be an integer from 1"),
        ("sample --steps 2000 --seed 1", "--steps = 2000: must lie in 1..1000"),
        ("sample --sampler dimm", "--sampler = dimm: did you mean ddim? choose one of ddim, ddpm"),
        ("sample --label hexagon", "--label = hexagon: choose one of circle, square, Big star"),
        ("sample --guidance nan", "--guidance = nan: must be a finite number of 0 to 20"),
        ("sample --latent nothing.png", "nothing.png: No such file"),
        ("sample -o a.tiff", "--out = a.tiff: choose a suffix of .png"),
        ("sample --checkpoint nowhere", "--checkpoint (UNSTIR_CHECKPOINT) = nowhere: no such folder"),
        ("sample --device tpu", "--device (UNSTIR_DEVICE) = tpu"),
        ("sample --device cuda:99", "--device (UNSTIR_DEVICE) = cuda:99"),
        ("sample --steps 2 -o no/such/folder.png", "--out = no/such/folder.png"),
        ("invert nothing.png", "nothing.png: No such file"),
        ("invert noise.png --method ddim --refinements 2", "--refinements = 2: "),
        ("interpolate 1", "LATENTS = "),
        ("interpolate 1 2 3 --weights 1,2", "--weights (an array): one for each of the 3 latents"),
        ("interpolate 1 2 --grid 1,two", "--grid = two: must be an integer"),
        ("interpolate 1 2 --sampler ddpm", "deterministic"),
        ("interpolate 1 noise.npz", "noise.npz: No such file"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(unstir, command, words):
    status, _, complaint = unstir(command)
    assert status == 2
    assert complaint.startswith("unstir: ")
    assert words in complaint


@pytest.mark.parametrize("command", ["sample --steps 0", "invert noise.png --steps x", "interpolate 1 --frames 1"])
def test_a_wrong_flag_does_not_wait_for_the_network(unstir, monkeypatch, command):
    monkeypatch.setattr(in_process, "create_app", None)
    assert unstir(command)[0] == 2


def test_the_command_that_leads_back_is_the_one_that_was_called(unstir, monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/unstir"])
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "\n  .venv/bin/unstir sample --latent=noise.npy " in unstir("invert noise.png --steps 4")[1]


def test_standard_output_is_a_file_among_others(here, capsysbinary):
    assert main(shlex.split("sample --seed 1 --steps 2 -o -")) == 0
    png, said = capsysbinary.readouterr()
    assert Image.open(io.BytesIO(png)).size == (8, 8)
    assert said == b"-: seed 1, 2 evaluations\n"
    assert main(shlex.split("invert noise.png --steps 4 -o -")) == 0
    npy, said = capsysbinary.readouterr()
    assert np.load(io.BytesIO(npy)).shape == (1, 8, 8)
    assert b"back to the image" not in said  # there is no file to begin at
    assert not (here / "-").exists()


def test_progress_on_a_terminal_changes_no_byte(unstir, tmp_path, monkeypatch):
    assert unstir("sample --seed 1 --steps 50 -o quiet.png")[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, printed, watched = unstir("sample --seed 1 --steps 50 -o watched.png")
    assert (status, printed) == (0, "watched.png: seed 1, 50 evaluations\n")
    assert watched.startswith("loading ")
    assert "%|" in watched
    assert (tmp_path / "watched.png").read_bytes() == (tmp_path / "quiet.png").read_bytes()
    status, _, complaint = unstir("sample --label hexagon")
    assert (status, "--label = hexagon: choose one of" in complaint) == (2, True)


def test_a_broken_checkpoint_is_named(unstir, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, complaint = unstir("sample --checkpoint empty")
    assert status == 1  # the command was typed well
    assert "is no checkpoint; neither unet/ nor config.json is in it" in complaint


def test_call_is_the_http_surface(here, capsysbinary):
    assert main(["call", "GET", "/healthz"]) == 0
    assert json.loads(capsysbinary.readouterr().out) == {"status": "alive"}
    assert main(["call", "POST", "/sample", '{"seed": 7, "steps": 4}']) == 0
    png = capsysbinary.readouterr().out
    assert Image.open(io.BytesIO(png)).size == (8, 8)
    assert main(["call", "POST", "/sample", '{"seed": 7, "steps": 4}', "-o", "x.png"]) == 0
    assert (here / "x.png").read_bytes() == png
    assert main(["call", "POST", "/sample", '{"steps": 0}']) == 1
    assert json.loads(capsysbinary.readouterr().err)["code"] == "invalid_field"
    assert main(["call", "POST", "/sample", '{"steps": 2}', "--accept", "text/event-stream"]) == 0
    assert b"event: completed" in capsysbinary.readouterr().out


@pytest.fixture(scope="module")
def running(tiny):
    """The address of a server that runs."""
    with server(tiny) as (_, client, _lines):
        yield f"http://{client.base_url.host}:{client.base_url.port}"


def test_a_running_server_answers_the_same_commands(unstir, running, tmp_path):
    status, printed, _ = unstir(f"sample --url {running} --label circle --seed 7 --steps 4 -o a.png")
    assert (status, printed) == (0, "a.png: seed 7, 4 evaluations\n")
    assert unstir("sample --label circle --seed 7 --steps 4 -o b.png")[0] == 0
    assert opened(tmp_path / "a.png").size == opened(tmp_path / "b.png").size
    assert unstir(f"replay --url {running}/ a.png")[:2] == (0, "a.png: the same bytes again\n")
    status, printed, _ = unstir(f"invert --url {running} noise.png --steps 2")
    assert status == 0
    assert f"--url={running}" in printed
    assert unstir(f"interpolate --url {running} 1 2 --steps 2 -o c.gif")[0] == 0
    status, printed, _ = unstir(f"call --url {running} GET /model")
    assert json.loads(printed)["name"] == "tiny"
    status, _, complaint = unstir(f"sample --url {running} --steps 1001")
    assert (status, "--steps" in complaint) == (2, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sample --url http://127.0.0.1:9", ["--url = http://127.0.0.1:9", "is the server running?"]),
        ("sample --url nonsense", ["--url = nonsense", "is the server running?"]),
        ("sample --url http://127.0.0.1:9 --device cpu", ["--device = cpu", "leave one of them out"]),
    ],
)
def test_an_address_where_nobody_answers(unstir, line, words):
    status, _, complaint = unstir(line)
    assert status == 2
    assert all(word in complaint for word in words), complaint


@pytest.mark.parametrize("error", [StopIteration(), MemoryError(), SystemExit(), RuntimeError("two\nlines")])
def test_a_failed_load_is_one_line_and_status_1(unstir, tiny, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("app.engine.loading.calibrate", fail)
    status, printed, complaint = unstir("sample --steps 2")
    assert (status, printed) == (1, "")
    assert complaint.startswith(f"unstir: the network could not be loaded: {tiny}: {type(error).__name__}")
    assert complaint.count("\n") == 1
    assert "; " in complaint  # and what to do


@pytest.mark.parametrize("command", ["sample --steps 2", "invert noise.png", "replay made.png", "call GET /model"])
def test_a_checkpoint_that_is_refused_is_one_line_and_status_1(unstir, tiny, tmp_path, command):
    assert unstir("sample --label circle --steps 2 -o made.png")[0] == 0
    shutil.copytree(tiny, tmp_path / "flow")
    config = tmp_path / "flow" / "scheduler" / "scheduler_config.json"
    config.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    status, printed, complaint = unstir(f"{command} --checkpoint flow")
    assert (status, printed, complaint.count("\n")) == (1, "", 1)
    assert 'scheduler_config.json: _class_name = "FlowMatchEulerDiscreteScheduler": is flow matching' in complaint
