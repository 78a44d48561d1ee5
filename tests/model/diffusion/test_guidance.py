import pytest
import torch

from model.checkpoint import load
from model.diffusion import machine, samplers
from model.diffusion.inversion import methods as inversion
from model.diffusion.schedule import NoiseSchedule
from tests.fakes import GaussianEps

LINEAR = NoiseSchedule.from_config({})
NULL = 3


class Shifted:
    """ε = u + y, and a second half of channels that is 10 y; it notes how many rows each forward had."""

    def __init__(self, learned=False):
        self.learned = learned
        self.rows = []

    def __call__(self, u, t, y):
        self.rows.append(len(u))
        shift = y[:, None, None, None].to(u.dtype)
        eps = u + shift + 0 * t[:, None, None, None]
        return torch.cat([eps, 10 * shift.expand_as(u)], dim=1) if self.learned else eps


def inputs(count=4):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(count, 2, 3, 3, generator=generator)
    return u, torch.arange(count).float(), torch.arange(count) % NULL


def test_rows_that_ask_get_the_blend_and_the_others_their_own_bits():
    u, t, y = inputs()
    net = Shifted()
    scale = torch.tensor([1.0, 2.5, 1.0, 0.0])
    out = machine.guided(net, scale, NULL)(u, t, y)
    plain, nobody = net(u, t, y), net(u, t, torch.full_like(y, NULL))
    assert torch.equal(out[[0, 2]], plain[[0, 2]])
    assert torch.allclose(out[1], nobody[1] + 2.5 * (plain[1] - nobody[1]))
    assert torch.equal(out[3], nobody[3])
    assert net.rows == [6, 4, 4]  # four rows, and one more for each of the two that ask


def test_without_anybody_asking_it_is_the_network_itself():
    net = Shifted()
    assert machine.guided(net, torch.ones(4), NULL) is net


def test_a_learned_variance_is_left_as_it_was():
    u, t, y = inputs()
    net = Shifted(learned=True)
    out = machine.guided(net, torch.full((4,), 3.0), NULL)(u, t, y)
    plain = net(u, t, y)
    assert torch.equal(out[:, 2:], plain[:, 2:])
    assert not torch.equal(out[:, :2], plain[:, :2])


@pytest.fixture(scope="module")
def ckpt(tiny):
    return load(tiny)


WALKS = {
    **{name: lambda s=sampler: s.compile(LINEAR, 8, spacing="trailing") for name, sampler in samplers.SAMPLERS.items()},
    "ddim, eta 1": lambda: samplers.ddim(LINEAR, 8, eta=1.0, spacing="trailing"),
    "inversion ddim": lambda: inversion.ddim(LINEAR, 8, spacing="trailing"),
    "inversion fixed_point": lambda: inversion.fixed_point(LINEAR, 4, refinements=3, spacing="trailing"),
    "inversion obelm": lambda: inversion.obelm(LINEAR, 8, spacing="trailing"),
}


@pytest.mark.parametrize("walk", WALKS)
def test_every_walk_can_be_guided(ckpt, walk):
    """Guiding is the same as walking on the blended network, whatever the walk."""
    plan, y = WALKS[walk](), torch.tensor([1])

    def blended(u, t, y):
        nobody = ckpt.net(u, t, torch.full_like(y, NULL))
        return nobody + 2.0 * (ckpt.net(u, t, y) - nobody)

    guided = machine.guided(ckpt.net, torch.tensor([2.0]), NULL)
    ours, expected = (machine.sample(net, plan, [5], ckpt.shape, y) for net in (guided, blended))
    unguided = machine.sample(ckpt.net, plan, [5], ckpt.shape, y)
    # Forwards of one and of two rows differ by 1e-7; random weights let that grow with the size of the result.
    scale = max(1.0, float(expected.abs().max()))
    assert (ours - expected).abs().max() < 1e-4 * scale
    assert (ours - unguided).abs().max() > 1e-3 * scale


def by_class(u, t, y):
    """Every class a Gaussian of its own mean; the null class that of all."""
    nets = [GaussianEps(LINEAR, mu, 0.3) for mu in (-0.4, 0.0, 0.4)] + [GaussianEps(LINEAR, 0.0, 0.5)]
    return torch.stack([nets[k](u[[i]], t[[i]])[0] for i, k in enumerate(y.tolist())])


def test_a_guided_latent_is_decoded_under_the_same_guidance():
    x_0 = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    y = torch.tensor([0, 2])
    guided = machine.guided(by_class, torch.tensor([2.0, 2.0]), NULL)
    there = machine.run(guided, inversion.fixed_point(LINEAR, 50, refinements=10), x_0, y)
    back, elsewhere = (machine.run(net, samplers.ddim(LINEAR, 50), there, y) for net in (guided, by_class))
    assert (back - x_0).abs().max() < 1e-4
    assert (elsewhere - x_0).abs().max() > 0.1
