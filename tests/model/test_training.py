import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint, training
from model.data import Dataset
from model.recipe import Recipe, TrainingError, network
from model.schedule import NoiseSchedule
from model.training import Trainer, denoising_loss, train
from tests.fakes import GaussianEps

LINEAR = NoiseSchedule.from_config({})
CPU = torch.device("cpu")
TINY = Recipe(
    size=8,
    channels=(8, 8),
    attention=(4,),
    head_dim=4,
    groups=4,
    batch=4,
    warmup=2,
    steps=7,
    dropout=0.1,
    flip=True,
    precision="fp32",
)


def shades(n, classes=("dark", "light")):
    """n pictures, each of one grey level that tells which it is; lopsided, so that a mirrored one shows."""
    images = np.zeros((n, 8, 8, 1), np.uint8)
    images[:, :, :4] = np.arange(10, 10 + n, dtype=np.uint8)[:, None, None, None]
    return Dataset(images, np.arange(n) % len(classes) if classes else None, classes)


def index_of(x_0):
    """Which pictures of ``shades`` a batch holds."""
    return ((x_0.amax(dim=(1, 2, 3)) + 1) * 127.5).round().long().sub(10).tolist()


@pytest.fixture
def source(tmp_path):
    dataset = shades(10)
    np.savez(tmp_path / "data.npz", images=dataset.images, labels=dataset.labels, names=np.array(dataset.classes))
    return tmp_path / "data.npz"


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    """The sheets that a run draws as it goes: two columns instead of ten."""
    grid = training.grid
    monkeypatch.setattr(training, "grid", lambda net, classes: grid(net, classes, columns=2))


def assert_equal_states(a, b):
    """Weights, averages and moments of two runs, bit for bit."""
    for key in ("net", "ema"):
        states = getattr(a, key).state_dict(), getattr(b, key).state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), key
    moments = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    for name in moments[0]:
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(moments[0][name][moment], moments[1][name][moment])
    assert (a.step, a.loss) == (b.step, b.loss)


def test_loss_of_a_perfect_a_lazy_and_a_biased_predictor():
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.rand(8, 1, 4, 4, generator=generator) * 2 - 1, torch.randn(8, 1, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 900, 999])
    abar = torch.as_tensor(LINEAR.alphas_cumprod, dtype=torch.float32)[t][:, None, None, None]

    def perfect(x, t, y):
        return (x - abar.sqrt() * x_0) / (1 - abar).sqrt()

    # float32: at t = 0 a rounding of 1e-7 is divided by √1e-4, and then squared.
    assert denoising_loss(perfect, LINEAR, x_0, t, eps, None) < 1e-9
    lazy = denoising_loss(lambda x, t, y: torch.zeros_like(x), LINEAR, x_0, t, eps, None)
    assert abs(lazy - eps.square().mean()) < 1e-6
    biased = denoising_loss(lambda x, t, y: perfect(x, t, y) + 0.5, LINEAR, x_0, t, eps, None)
    assert abs(biased - 0.25) < 1e-4


@pytest.mark.parametrize("t", [50, 300, 700])
def test_loss_of_the_best_predictor_is_what_cannot_be_known(t):
    # Data N(μ, s²): the posterior variance of ε is ᾱ s² / v, and no predictor falls below it.
    n, s, generator = 100_000, 0.5, torch.Generator().manual_seed(1)
    x_0 = 0.3 + s * torch.randn(n, 1, 1, 1, generator=generator)
    eps, abar = torch.randn(n, 1, 1, 1, generator=generator), LINEAR.alphas_cumprod[t]
    bound = abar * s**2 / (abar * s**2 + 1 - abar)
    loss = denoising_loss(GaussianEps(LINEAR, 0.3, s), LINEAR, x_0, torch.full((n,), t), eps, None)
    assert abs(loss - bound) < 5 * math.sqrt(2 / n) * bound  # five standard errors of a squared Gaussian's mean


def test_an_untrained_network_predicts_no_noise_at_all():
    trainer = Trainer.start(TINY, shades(4), CPU)
    x_0, t, _, y = trainer._batch()
    assert trainer.net(x_0, t, y).var() < 1e-12  # nothing but the bias of conv_out
    assert trainer.net.config.num_class_embeds == 3
    assert network(TINY, shades(4, classes=())).config.num_class_embeds is None


def test_the_loss_falls():
    recipe = replace(TINY, steps=120, batch=16, lr=1e-2, dropout=0.0, flip=False, ema=0.9)
    trainer = Trainer.start(recipe, shades(10), CPU)
    batch = trainer._batch()
    before = denoising_loss(trainer.net, LINEAR, *batch).item()
    while trainer.progress() < 1:
        trainer.advance()
    assert 0.8 < before < 1.2  # no noise predicted: the mean square of 1024 Gaussians, and a bias
    assert denoising_loss(trainer.net, LINEAR, *batch).item() < before / 2
    assert denoising_loss(trainer.ema, LINEAR, *batch).item() < before / 2
    assert trainer.loss < before / 2


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
def test_a_run_that_is_told_to_stop_and_resumed_is_the_uninterrupted_run(tmp_path, source, monkeypatch, number):
    whole = train(source, tmp_path / "whole", TINY, CPU)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), number))
        stopped = train(source, tmp_path / "parts", TINY, CPU)
    assert stopped.step == 3
    assert not (tmp_path / "parts" / "samples").exists()  # who is told to stop does not draw first
    assert checkpoint.load(tmp_path / "parts").card.training["steps"] == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = train(source, tmp_path / "parts", TINY, CPU, resume=True)
    assert resumed.step == whole.step == 7
    assert_equal_states(whole, resumed)
    cards = [checkpoint.load(tmp_path / name).card for name in ("whole", "parts")]
    assert cards[0].sha256 == cards[1].sha256


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


def test_the_seed_decides():
    trainers = [Trainer.start(replace(TINY, seed=seed), shades(10), CPU) for seed in (1, 1, 2)]
    for trainer in trainers:
        trainer.advance()
    assert_equal_states(trainers[0], trainers[1])
    assert not torch.equal(trainers[0].net.conv_in.weight, trainers[2].net.conv_in.weight)


@pytest.mark.parametrize(("ema", "decays"), [(0.999, [1 / 10, 2 / 11, 3 / 12]), (0.15, [0.1, 0.15, 0.15])])
def test_the_average_starts_short_and_grows_longer(ema, decays):
    trainer = Trainer.start(replace(TINY, ema=ema), shades(10), CPU)
    for decay in decays:
        before = [p.clone() for p in trainer.ema.parameters()]
        trainer.advance()
        for old, new, average in zip(before, trainer.net.parameters(), trainer.ema.parameters(), strict=True):
            # float32: a few roundings of weights below 2.
            assert (average - (decay * old + (1 - decay) * new)).abs().max() < 1e-6
    # Otherwise each step would hang one more node on a graph that nobody ever walks, and memory would grow with it.
    assert all(p.is_leaf and not p.requires_grad for p in trainer.ema.parameters())


def test_the_rate_warms_up_and_falls_along_a_cosine():
    recipe = replace(TINY, steps=8, warmup=4, lr=0.1)
    trainer = Trainer.start(recipe, shades(10), CPU)
    for step in range(8):
        trainer.advance()
        expected = 0.1 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 8)) / 2
        assert abs(trainer.optimizer.param_groups[0]["lr"] - expected) < 1e-15


def batches(recipe, dataset, count):
    """The first batches of a run, without training on them."""
    trainer = Trainer.start(recipe, dataset, CPU)
    for trainer.step in range(count):
        yield trainer._batch()


@pytest.mark.parametrize(("drop", "share"), [(0.0, (0, 0)), (1.0, (1, 1)), (0.25, (0.1, 0.4))])
def test_labels_are_dropped_for_the_null_class_only(drop, share):
    recipe = replace(TINY, label_drop=drop, batch=40)
    names = ("a", "b", "c")
    dropped = []
    for x_0, _, _, y in batches(recipe, shades(10, names), 3):
        for i, label in zip(index_of(x_0), y.tolist(), strict=True):
            assert label in (i % 3, 3)
            dropped.append(label == 3)
    # 120 draws at 0.25: five standard deviations are 0.2; 0.15 holds for this seed, and forever.
    assert share[0] <= sum(dropped) / len(dropped) <= share[1]


def test_pictures_without_classes_have_no_labels():
    ((_, _, _, y),) = batches(TINY, shades(4, classes=()), 1)
    assert y is None


@pytest.mark.parametrize("batch", [6, 7])
def test_timesteps_come_in_mirrored_pairs(batch):
    for _, t, _, _ in batches(replace(TINY, batch=batch), shades(10), 3):
        half = (batch + 1) // 2
        assert len(t) == batch
        assert t.min() >= 0
        assert t.max() <= 999
        assert (t[:half][: batch - half] + t[half:]).tolist() == [999] * (batch - half)


def test_noise_and_timesteps_change_from_step_to_step():
    (_, t, eps, _), (_, t_next, eps_next, _) = batches(replace(TINY, batch=64), shades(10), 2)
    assert not torch.equal(t, t_next)
    assert not torch.equal(eps, eps_next)
    # 4096 standard normals: five standard errors of their mean and of their variance.
    assert abs(eps.mean()) < 5 / 64
    assert abs(eps.var() - 1) < 5 * math.sqrt(2) / 64


@pytest.mark.parametrize("batch", [4, 10, 25], ids=["small", "an-epoch", "two-and-a-half"])
def test_every_epoch_visits_every_picture_once(batch):
    count = 100 // batch
    visited = [i for x_0, *_ in batches(replace(TINY, batch=batch), shades(10), count) for i in index_of(x_0)]
    epochs = [visited[k : k + 10] for k in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10  # in another order each time


@pytest.mark.parametrize("flip", [True, False])
def test_pictures_are_mirrored_at_random_or_never(flip):
    ((x_0, *_),) = batches(replace(TINY, flip=flip, batch=40), shades(10), 1)
    mirrored = (x_0[:, 0, 0, 0] == -1).tolist()  # the black half is on the left
    assert any(mirrored) == flip
    assert not all(mirrored)
    assert x_0[:, :, :, :4].amax(dim=(1, 2, 3)).ne(x_0[:, :, :, 4:].amax(dim=(1, 2, 3))).all()


def test_minutes_bound_a_run():
    trainer = Trainer.start(replace(TINY, steps=None, minutes=2.0), shades(4), CPU)
    assert trainer.progress() == 0
    trainer.seconds = 30.0
    assert trainer.progress() == 0.25
    trainer.seconds = 500.0
    assert trainer.progress() == 1


def test_whichever_bound_comes_first_counts(tmp_path, source):
    trainer = train(source, tmp_path / "out", replace(TINY, steps=1000, minutes=1e-9), CPU)
    assert trainer.step == 1
    assert trainer.seconds > 0


def test_precision_is_measured_when_left_open_and_kept_on_resume(tmp_path):
    trainer = Trainer.start(replace(TINY, precision="auto"), shades(10), CPU)
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
    assert (card.training["steps"], card.training["pictures_seen"]) == (7, 28)
    with Image.open(tmp_path / "out" / "samples" / "step-0000007.png") as image:
        assert image.size == (2 * (2 * 8 + 2), 2 * (2 * 8 + 2))  # two columns, two classes, gaps, doubled
    assert trainer.net.training


def test_a_folder_of_pictures_may_be_read_as_grey(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "data" / "a.png")
    for grey, channels in ((True, 1), (False, 3)):
        out = tmp_path / f"out-{channels}"
        train(tmp_path / "data", out, replace(TINY, steps=1, grey=grey), CPU)
        assert checkpoint.load(out).shape == (channels, 8, 8)


def test_sheets_are_drawn_on_the_way(tmp_path, source):
    train(source, tmp_path / "out", replace(TINY, steps=2), CPU, grid_minutes=0)
    assert sorted(p.name for p in (tmp_path / "out" / "samples").iterdir()) == ["step-0000001.png", "step-0000002.png"]


def test_a_sheet_is_repeatable_and_leaves_no_trace():
    trainer = Trainer.start(TINY, shades(4), CPU)
    trainer.advance()
    twin = Trainer.start(TINY, shades(4), CPU)
    twin.advance()
    sheets = [training.grid(trainer.ema, ("dark", "light")) for _ in range(2)]
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
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("minutes", 0.0),
        ("size", 0),
        ("layers", 0),
        ("channels", (8, 0)),
        ("groups", 0),
        ("head_dim", 0),
        ("batch", 0),
        ("lr", 0.0),
        ("warmup", -1),
        ("ema", 1.0),
        ("dropout", 1.0),
        ("label_drop", 1.1),
        ("precision", "fp64"),
        ("seed", -1),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(name, value):
    with pytest.raises(TrainingError) as caught:
        replace(TINY, **{name: value})
    assert str(caught.value).startswith(f"{name} = {value}: ")


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
