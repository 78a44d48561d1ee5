import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.diffusion.schedule import NoiseSchedule
from model.training.batches import Batches, _fits
from model.training.recipe import TrainingError, network
from model.training.trainer import AHEAD, Trainer, denoising_loss
from tests.fakes import GaussianEps
from tests.tiny_training import CPU, TINY, assert_equal_states, shades

LINEAR = NoiseSchedule.from_config({})


def index_of(x_0):
    """Which images of ``shades`` a batch holds."""
    return ((x_0.amax(dim=(1, 2, 3)) + 1) * 127.5).round().long().sub(10).tolist()


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
def test_loss_of_the_best_predictor_is_the_posterior_variance(t):
    # Data N(μ, s²): the posterior variance of ε is ᾱ s² / v, and no predictor falls below it.
    n, s, generator = 100_000, 0.5, torch.Generator().manual_seed(1)
    x_0 = 0.3 + s * torch.randn(n, 1, 1, 1, generator=generator)
    eps, abar = torch.randn(n, 1, 1, 1, generator=generator), LINEAR.alphas_cumprod[t]
    bound = abar * s**2 / (abar * s**2 + 1 - abar)
    loss = denoising_loss(GaussianEps(LINEAR, 0.3, s), LINEAR, x_0, torch.full((n,), t), eps, None)
    assert abs(loss - bound) < 5 * math.sqrt(2 / n) * bound  # five standard errors of a squared Gaussian's mean


def test_an_untrained_network_predicts_no_noise_at_all():
    trainer = Trainer.start(TINY, shades(4), CPU)
    x_0, t, _, y = trainer.batches.at(0)
    assert trainer.net(x_0, t, y).var() < 1e-12  # nothing but the bias of conv_out
    assert trainer.net.config.num_class_embeds == 3
    assert network(TINY, shades(4, classes=())).config.num_class_embeds is None


def test_the_loss_falls():
    recipe = replace(TINY, steps=120, batch=16, lr=1e-2, dropout=0.0, flip=False, ema=0.9)
    trainer = Trainer.start(recipe, shades(10), CPU)
    batch = trainer.batches.at(0)
    before = denoising_loss(trainer.net, LINEAR, *batch).item()
    while trainer.progress() < 1:
        trainer.advance()
    assert 0.8 < before < 1.2  # no noise predicted: the mean square of 1024 Gaussians, and a bias
    assert denoising_loss(trainer.net, LINEAR, *batch).item() < before / 2
    assert denoising_loss(trainer.ema, LINEAR, *batch).item() < before / 2
    assert trainer.loss < before / 2


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
    # Otherwise each step would add a node to a graph that is never used, and memory would grow with it.
    assert all(p.is_leaf and not p.requires_grad for p in trainer.ema.parameters())


def test_the_rate_warms_up_and_falls_along_a_cosine():
    recipe = replace(TINY, steps=8, warmup=4, lr=0.1)
    trainer = Trainer.start(recipe, shades(10), CPU)
    for step in range(8):
        trainer.advance()
        expected = 0.1 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 8)) / 2
        assert abs(trainer.optimizer.param_groups[0]["lr"] - expected) < 1e-15


def batches(recipe, dataset, count, resident=True):
    """The first batches of a run, without training on them."""
    source = Batches(recipe, dataset, LINEAR.T, CPU, resident)
    return [source.at(step) for step in range(count)]


@pytest.mark.parametrize("resident", [True, False])
def test_a_step_draws_what_its_seed_says_wherever_the_images_are(resident):
    recipe, dataset = replace(TINY, seed=5, batch=7, label_drop=0.5), shades(10)
    for step, batch in enumerate(batches(recipe, dataset, 3, resident)):
        index = np.concatenate([np.random.default_rng([5, epoch]).permutation(10) for epoch in range(3)])
        index = index[7 * step : 7 * step + 7]
        source = torch.Generator()
        source.manual_seed(int(np.random.SeedSequence([5, step]).generate_state(1, np.uint64)[0] >> 1))
        mirrored = torch.rand(7, 1, 1, 1, generator=source) < 0.5
        t = torch.randint(0, 1000, (4,), generator=source)
        eps = torch.randn(7, 1, 8, 8, generator=source)
        dropped = torch.rand(7, generator=source) < 0.5
        x_0 = torch.from_numpy(dataset.images[index]).movedim(-1, 1).float() / 127.5 - 1
        assert torch.equal(batch.x_0, torch.where(mirrored, x_0.flip(-1), x_0))
        assert batch.t.tolist() == [*t.tolist(), *(999 - t[:3]).tolist()]
        assert torch.equal(batch.eps, eps)
        assert batch.y.tolist() == [2 if d else i % 2 for d, i in zip(dropped.tolist(), index.tolist(), strict=True)]


def test_where_the_images_are_changes_nothing():
    there, sent = (Trainer.start(replace(TINY, batch=7), shades(10), CPU, resident) for resident in (True, False))
    for _ in range(3):
        there.advance()
        sent.advance()
    assert (there.batches.resident, sent.batches.resident) == (True, False)
    assert_equal_states(there, sent)


def test_images_that_would_take_over_half_of_a_cuda_device_stay_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    cuda = torch.device("cuda")
    assert [_fits(size, cuda) for size in (500, 501)] == [True, False]
    assert _fits(1 << 60, CPU)  # they are in its memory already


class NobodyReads(TorchDispatchMode):
    """Forbids whatever would make the host wait for numbers of a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "equal.default", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("resident", [True, False])
def test_a_step_reads_no_number_from_the_device(resident):
    trainer = Trainer.start(replace(TINY, precision="bf16"), shades(10), CPU, resident)
    with NobodyReads():
        trainer.advance()
        trainer.advance()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            assert trainer.loss


def test_the_host_waits_for_all_but_the_last_few_steps_and_counts_it():
    waited = []

    class Event:
        def __init__(self, name):
            self.name = name

        def synchronize(self):
            waited.append(self.name)

    trainer = Trainer.start(TINY, shades(10), CPU)
    trainer._queued.extend(Event(k) for k in range(AHEAD + 2))
    trainer.advance()
    assert waited == [0, 1]
    before = trainer.seconds
    trainer.catch_up()
    assert waited == list(range(AHEAD + 2))
    assert trainer.seconds > before


def test_the_loss_is_smoothed_like_plain_numbers():
    trainer, expected = Trainer.start(TINY, shades(10), CPU), 1.0
    for step in range(1, 6):
        loss = trainer._gradient(trainer.batches.at(trainer.step)).item()
        trainer.advance()
        expected += (loss - expected) * max(0.01, 1 / step)
        assert trainer.loss == expected  # float64, the same three operations


def test_a_compiled_network_is_one_graph_and_is_compiled_once():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    plain, compiled = (Trainer.start(TINY, shades(10), CPU) for _ in range(2))
    assert compiled.compile(backend) is None
    assert_equal_states(plain, compiled)  # the trial left no trace
    for _ in range(3):
        plain.advance()
        compiled.advance()
    assert len(graphs) == 1
    assert_equal_states(plain, compiled)  # this backend runs the very operations that were traced


def test_a_compiler_that_fails_is_done_without():
    def backend(graph, _):
        raise OSError("no compiler here")

    plain, other = (Trainer.start(TINY, shades(10), CPU) for _ in range(2))
    assert "no compiler here" in str(other.compile(backend))
    for trainer in (plain, other):
        trainer.advance()
    assert_equal_states(plain, other)


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


def test_images_without_classes_have_no_labels():
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
def test_every_epoch_has_every_image_once(batch):
    count = 100 // batch
    indices = [i for x_0, *_ in batches(replace(TINY, batch=batch), shades(10), count) for i in index_of(x_0)]
    epochs = [indices[k : k + 10] for k in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10  # in another order each time


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_at_random_or_never(flip):
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
        ("compile", "yes"),
        ("weights", "float16"),
        ("seed", -1),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(name, value):
    with pytest.raises(TrainingError) as caught:
        replace(TINY, **{name: value})
    assert str(caught.value).startswith(f"{name} = {value}: ")
