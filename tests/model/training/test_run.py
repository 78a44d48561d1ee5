import os
import re
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import checkpoint
from model.diffusion import machine, samplers
from model.training.recipe import TrainingError, highest_rate, rate
from model.training.run import grid, train
from model.training.trainer import Trainer
from tests.tiny_training import CPU, TINY, assert_equal_states, shades


@pytest.fixture
def source(tmp_path):
    dataset = shades(10)
    np.savez(tmp_path / "data.npz", images=dataset.images, labels=dataset.labels, names=np.array(dataset.classes))
    return tmp_path / "data.npz"


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    """The sheets that a run draws: two columns instead of ten."""
    monkeypatch.setattr("model.training.run.grid", lambda net, classes: grid(net, classes, columns=2))


@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_state_on_disk_is_the_whole_state(tmp_path, killed_after):
    whole, first = (Trainer.start(TINY, shades(10), CPU) for _ in range(2))
    for _ in range(7):
        whole.advance()
    for _ in range(killed_after):
        first.advance()
    first.save_state(tmp_path / "state.pt")
    torch.manual_seed(99)
    second = Trainer.start(TINY, shades(10), CPU)
    second.load_state(tmp_path / "state.pt")
    assert_equal_states(first, second)
    assert second.seconds == first.seconds
    for _ in range(7 - killed_after):
        second.advance()
    assert_equal_states(whole, second)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def after(monkeypatch, step, what):
    """Have ``what`` happen at the end of this step."""
    advance = Trainer.advance

    def patched(self):
        advance(self)
        if self.step == step:
            what()

    monkeypatch.setattr(Trainer, "advance", patched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, source, monkeypatch, number):
    whole = train(source, tmp_path / "whole", TINY, CPU)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), number))
        stopped = train(source, tmp_path / "parts", TINY, CPU)
    assert stopped.step == 3
    assert not (tmp_path / "parts" / "samples").exists()  # a stop signal does not wait for samples
    assert checkpoint.load(tmp_path / "parts").card.training["steps"] == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = train(source, tmp_path / "parts", TINY, CPU, resume=True)
    assert resumed.step == whole.step == 7
    assert_equal_states(whole, resumed)
    cards = [checkpoint.load(tmp_path / name).card for name in ("whole", "parts")]
    assert cards[0].sha256 == cards[1].sha256


def test_a_run_that_is_stopped_before_its_first_step_can_be_resumed(tmp_path, source, monkeypatch, capsys):
    """While it times precisions, say, or compiles. Weights that nothing was trained on are no checkpoint."""
    whole = train(source, tmp_path / "whole", TINY, CPU)
    start = Trainer.start

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "start", interrupted)
        assert train(source, tmp_path / "parts", TINY, CPU).step == 0
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["state.pt"]
    last = capsys.readouterr().out.splitlines()[-1]
    unsaid = f"before any training; {tmp_path / 'parts'} has no checkpoint yet"
    assert last == f"stopped (--resume continues) at step 0, {unsaid}"
    resumed = train(source, tmp_path / "parts", TINY, CPU, resume=True)
    assert_equal_states(whole, resumed)


def test_a_run_that_is_stopped_while_precisions_are_timed_ends_before_the_next_gradient(tmp_path, source, monkeypatch):
    recipe = replace(TINY, precision="auto")
    whole = train(source, tmp_path / "whole", replace(recipe, precision="fp32"), CPU)
    gradient, timed = Trainer._gradient, []

    def interrupted(trainer, batch):
        timed.append(trainer.precision)
        os.kill(os.getpid(), signal.SIGTERM)
        return gradient(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradient", interrupted)
        stopped = train(source, tmp_path / "parts", recipe, CPU)
    assert timed == ["fp32"]
    assert stopped.step == 0
    assert stopped.precision == "auto"
    monkeypatch.setattr(Trainer, "choose_precision", lambda trainer, _: setattr(trainer, "precision", "fp32"))
    resumed = train(source, tmp_path / "parts", recipe, CPU, resume=True)
    assert_equal_states(whole, resumed)


@pytest.fixture
def traced(monkeypatch):
    """A compiler that needs none: it runs what was traced."""
    compile_ = Trainer.compile
    monkeypatch.setattr(Trainer, "compile", lambda self: compile_(self, "eager"))


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_that_is_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, source, monkeypatch, capsys):
    recipe = replace(TINY, compile="on")
    whole = train(source, tmp_path / "whole", recipe, CPU)
    assert "compiled in" in capsys.readouterr().out
    assert whole.forward is not whole.net
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(source, tmp_path / "parts", recipe, CPU).step == 3
    resumed = train(source, tmp_path / "parts", recipe, CPU, resume=True)
    assert_equal_states(whole, resumed)
    assert checkpoint.load(tmp_path / "whole").card.sha256 == checkpoint.load(tmp_path / "parts").card.sha256


def test_compilation_takes_nothing_of_the_minutes(tmp_path, source, monkeypatch):
    late = 0.0

    def an_hour(_):
        nonlocal late
        late += 3600

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    monkeypatch.setattr("model.training.trainer.time", clock)
    monkeypatch.setattr(Trainer, "compile", an_hour)
    run = train(source, tmp_path / "out", replace(TINY, minutes=30.0, compile="on"), CPU)
    assert late == 3600
    assert run.step == 7


def test_a_compiler_that_fails_costs_a_line_and_not_the_run(tmp_path, source, monkeypatch, capsys):
    def broken(graph, _):
        raise RuntimeError("no such compiler\nand a page of details")

    compile_ = Trainer.compile
    monkeypatch.setattr(Trainer, "compile", lambda self: compile_(self, broken))
    run = train(source, tmp_path / "out", replace(TINY, compile="on"), CPU)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line]
    assert "no such compiler" in line
    assert_equal_states(run, train(source, tmp_path / "plain", TINY, CPU))


@pytest.mark.parametrize("compile_", ["auto", "off"])
def test_a_cpu_compiles_only_if_asked(tmp_path, source, monkeypatch, compile_):
    monkeypatch.setattr(Trainer, "compile", lambda self: pytest.fail("it compiled"))
    train(source, tmp_path / "out", replace(TINY, steps=1, compile=compile_), CPU)


def test_images_that_are_copied_batch_by_batch_are_logged(tmp_path, source, monkeypatch, capsys):
    whole = train(source, tmp_path / "there", TINY, CPU)
    assert "batch by batch" not in capsys.readouterr().out
    monkeypatch.setattr("model.training.batches._fits", lambda size, device: False)
    sent = train(source, tmp_path / "sent", TINY, CPU)
    assert "batch by batch" in capsys.readouterr().out
    assert_equal_states(whole, sent)


def test_weights_of_half_the_size_are_the_averaged_ones_rounded(tmp_path, source):
    trainer = train(source, tmp_path / "half", replace(TINY, weights="bfloat16"), CPU)
    found = checkpoint.load(tmp_path / "half")
    for key, value in trainer.ema.state_dict().items():
        assert torch.equal(found.net.state_dict()[key], value.bfloat16().float())
    stored = load_file(tmp_path / "half" / "unet" / checkpoint.WEIGHTS)
    assert sum(value.nbytes for value in stored.values()) == 2 * found.card.numbers["parameters"]
    plan = samplers.ddim(found.schedule, 5)
    assert machine.sample(found.net, plan, [0, 1], found.shape, torch.tensor([0, 1])).isfinite().all()


def test_a_run_that_is_killed_without_warning_repeats_what_it_lost(tmp_path, source, monkeypatch):
    whole = train(source, tmp_path / "whole", TINY, CPU)

    def crash():
        raise MemoryError

    with monkeypatch.context() as patch:
        after(patch, 4, crash)
        with pytest.raises(MemoryError):
            train(source, tmp_path / "parts", TINY, CPU, save_seconds=0)
    resumed = train(source, tmp_path / "parts", TINY, CPU, resume=True)
    assert_equal_states(whole, resumed)


def test_progress_in_a_file_is_lines(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr("model.output.ProgressBar.SECONDS", 0)
    train(source, tmp_path / "out", TINY, CPU)
    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert [re.sub(r", [\d.]+ images/s, loss [\d.]+, .*", "", line) for line in lines.splitlines()] == [
        " 14%  step 1",
        "100%  step 7",
    ]


def test_progress_on_a_terminal_is_a_bar_that_begins_with_the_first_step(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(source, tmp_path / "out", TINY, CPU)
    drawn = [part for part in capsys.readouterr().err.split("\r") if "%|" in part]
    assert drawn
    assert all("| step " in part for part in drawn)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"batch": 10}, None),
        (
            {"batch": 11},
            "--batch 11 is more than the number of images, 10: each step has some of them several times; "
            "lower --batch, or give more images",
        ),
        (
            {"warmup": 500},
            "the warm-up (--warmup 500) takes all of this run of 7 steps, so that the learning rate never exceeds 1 % "
            "of --lr; lower --warmup, such as to 0",
        ),
        (
            {"warmup": 6},
            "the warm-up (--warmup 6) takes most of this run of 7 steps, so that the learning rate never exceeds 41 % "
            "of --lr; lower --warmup, such as to 0",
        ),
        (
            {"warmup": 500, "steps": None, "minutes": 1e-9},
            "the warm-up (--warmup 500) takes all of this run of 1 step, so that the learning rate never exceeds 1 % "
            "of --lr; lower --warmup, such as to 0",
        ),
    ],
    ids=["usual", "as-many", "large-batch", "all-warm-up", "much-warm-up", "minutes"],
)
def test_what_is_probably_not_meant_is_said(tmp_path, source, capsys, changes, words):
    train(source, tmp_path / "out", replace(TINY, **changes), CPU)
    said = [line for line in capsys.readouterr().out.splitlines() if "; lower --" in line]
    assert said == ([words] if words else [])


def test_the_highest_rate_is_that_of_the_steps():
    assert highest_rate(500, 150) == pytest.approx(max(rate(k, 500, k / 150) for k in range(150)))
    assert highest_rate(500, 100_000) > 0.99


def test_a_second_signal_means_it(tmp_path, source, monkeypatch):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        after(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
        assert train(source, tmp_path / "out", TINY, CPU).step == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [1]


def test_more_steps_may_be_asked_for_later(tmp_path, source):
    train(source, tmp_path / "out", replace(TINY, steps=2), CPU)
    assert train(source, tmp_path / "out", replace(TINY, steps=4), CPU, resume=True).step == 4


def test_whichever_bound_comes_first_counts(tmp_path, source):
    trainer = train(source, tmp_path / "out", replace(TINY, steps=1000, minutes=1e-9), CPU)
    assert trainer.step == 1
    assert trainer.seconds > 0


def test_precision_is_measured_when_left_open_and_kept_on_resume(tmp_path):
    trainer = Trainer.start(replace(TINY, precision="auto"), shades(10), CPU)
    trainer.choose_precision()
    assert trainer.precision in ("fp32", "bf16")
    fixed = Trainer.start(TINY, shades(10), CPU)
    for run in (trainer, fixed):
        run.precision = "fp32"
        run.advance()
    assert_equal_states(trainer, fixed)  # measuring left no trace
    trainer.save_state(tmp_path / "state.pt")
    again = Trainer.start(replace(TINY, precision="bf16"), shades(10), CPU)
    again.load_state(tmp_path / "state.pt")
    assert again.precision == "fp32"


def test_what_a_run_leaves_behind(tmp_path, source):
    trainer = train(source, tmp_path / "out", TINY, CPU, card={"licence": "MIT", "data": "shades"})
    found = checkpoint.load(tmp_path / "out")
    for key, value in trainer.ema.state_dict().items():
        assert torch.equal(found.net.state_dict()[key], value)
    assert found.shape == (1, 8, 8)
    card = found.card
    assert (card.name, card.licence, card.data) == ("out", "MIT", "shades")
    assert (card.classes, card.null_class) == (("dark", "light"), 2)
    assert (card.training["steps"], card.training["images_seen"]) == (7, 28)
    with Image.open(tmp_path / "out" / "samples" / "step-0000007.png") as image:
        assert image.size == (2 * (2 * 8 + 2), 2 * (2 * 8 + 2))  # two columns, two classes, gaps, doubled
    assert trainer.net.training


def test_a_folder_of_images_may_be_read_as_grey(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "data" / "a.png")
    for grey, channels in ((True, 1), (False, 3)):
        out = tmp_path / f"out-{channels}"
        train(tmp_path / "data", out, replace(TINY, steps=1, grey=grey), CPU)
        assert checkpoint.load(out).shape == (channels, 8, 8)


def test_sheets_are_drawn_on_the_way(tmp_path, source):
    train(source, tmp_path / "out", replace(TINY, steps=2), CPU, grid_minutes=0)
    assert sorted(p.name for p in (tmp_path / "out" / "samples").iterdir()) == ["step-0000001.png", "step-0000002.png"]


def test_a_sheet_is_reproducible_and_changes_no_state():
    trainer = Trainer.start(TINY, shades(4), CPU)
    trainer.advance()
    twin = Trainer.start(TINY, shades(4), CPU)
    twin.advance()
    sheets = [grid(trainer.ema, ("dark", "light"), columns=2) for _ in range(2)]
    assert np.array_equal(*sheets)
    trainer.advance()
    twin.advance()
    assert_equal_states(trainer, twin)


@pytest.mark.parametrize(
    ("recipe", "resume", "held", "message"),
    [
        (replace(TINY, steps=None), False, False, "say how long to train: --minutes or --steps"),
        (TINY, True, False, r"state\.pt does not exist; leave out --resume to start a run"),
        (TINY, False, True, r"state\.pt exists; continue that run with --resume, or choose another --out"),
    ],
    ids=["no-bound", "nothing-to-resume", "exists"],
)
def test_a_run_that_cannot_start_says_why(tmp_path, source, monkeypatch, recipe, resume, held, message):
    def never(self):
        raise AssertionError("it started")

    monkeypatch.setattr(Trainer, "advance", never)
    (tmp_path / "out").mkdir()
    if held:
        (tmp_path / "out" / "state.pt").write_bytes(b"a run")
    with pytest.raises(TrainingError, match=message):
        train(source, tmp_path / "out", recipe, CPU, resume=resume)


@pytest.mark.parametrize(
    "change",
    [{"size": 16}, {"channels": (8, 16)}, {"layers": 2}, {"attention": ()}, {"head_dim": 8}, {"groups": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_run_goes_on_with_the_network_it_began_with(tmp_path, change):
    trainer = Trainer.start(TINY, shades(4), CPU)
    trainer.save_state(tmp_path / "state.pt")
    ((key, value),) = change.items()
    was = list(getattr(TINY, key)) if isinstance(value, tuple) else getattr(TINY, key)
    other = Trainer.start(replace(TINY, **change), shades(4), CPU)
    with pytest.raises(TrainingError) as caught:
        other.load_state(tmp_path / "state.pt")
    assert f"was trained with {key} = {was}, not {value}; keep it, or use another --out" in str(caught.value)


def test_a_run_goes_on_with_the_classes_it_began_with(tmp_path):
    Trainer.start(TINY, shades(6), CPU).save_state(tmp_path / "state.pt")
    other = Trainer.start(TINY, shades(6, ("dark", "grey", "light")), CPU)
    with pytest.raises(TrainingError, match="classes"):
        other.load_state(tmp_path / "state.pt")
