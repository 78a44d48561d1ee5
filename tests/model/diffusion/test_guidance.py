import pytest
import torch

from model.checkpoint import load
from model.diffusion import inversion, machine, samplers
from model.diffusion.schedule import NoiseSchedule
from tests.fakes import GaussianEps
from tests.oracles import guided
from tests.plans import guide

LINEAR = NoiseSchedule.from_config({})
NULL = 3


class Shifted:
    """ε = u + y, and a second half of channels that is 10 y; ``rows`` are those of each forward."""

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


def test_guided_rows_get_the_combination_and_the_others_their_own_bits():
    u, t, y = inputs()
    net = Shifted()
    out = guide(net, [1.0, 2.5, 1.0, 0.0], NULL)(u, t, y)
    conditional, unconditional = net(u, t, y), net(u, t, torch.full_like(y, NULL))
    assert torch.equal(out[[0, 2]], conditional[[0, 2]])
    assert torch.allclose(out[1], unconditional[1] + 2.5 * (conditional[1] - unconditional[1]))
    assert torch.equal(out[3], unconditional[3])
    assert net.rows == [6, 4, 4]  # four rows, and a copy of each of the two that are guided


def test_without_guided_rows_nothing_is_added():
    u, t, y = inputs()
    net = Shifted()
    assert torch.equal(guide(net, [1.0] * 4, NULL)(u, t, y), net(u, t, y))
    assert net.rows == [4, 4]


def test_a_learned_variance_is_not_guided():
    u, t, y = inputs()
    net = Shifted(learned=True)
    out = guide(net, [3.0] * 4, NULL)(u, t, y)
    plain = net(u, t, y)
    assert torch.equal(out[:, 2:], plain[:, 2:])
    assert not torch.equal(out[:, :2], plain[:, :2])


@pytest.fixture(scope="module")
def ckpt(tiny):
    return load(tiny)


PLANS = {
    **{name: lambda s=sampler: s.compile(LINEAR, 8, spacing="trailing") for name, sampler in samplers.SAMPLERS.items()},
    "ddim, eta 1": lambda: samplers.ddim(LINEAR, 8, eta=1.0, spacing="trailing"),
    "inversion ddim": lambda: inversion.ddim(LINEAR, 8, spacing="trailing"),
    "inversion fixed_point": lambda: inversion.fixed_point(LINEAR, 4, refinements=3, spacing="trailing"),
    "inversion obelm": lambda: inversion.obelm(LINEAR, 8, spacing="trailing"),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_can_be_guided(ckpt, name):
    """Guidance in one forward is the paper's combination of two."""
    plan, y = PLANS[name](), torch.tensor([1])
    nets = guide(ckpt.net, [2.0], NULL), guided(ckpt.net, [2.0], NULL), ckpt.net
    ours, expected, unguided = (machine.sample(net, plan, [5], ckpt.shape, y) for net in nets)
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
    net = guide(by_class, [2.0, 2.0], NULL)
    x_T = machine.run(net, inversion.fixed_point(LINEAR, 50, refinements=10), x_0, y)
    same, other = (machine.run(each, samplers.ddim(LINEAR, 50), x_T, y) for each in (net, by_class))
    assert (same - x_0).abs().max() < 1e-4
    assert (other - x_0).abs().max() > 0.1
