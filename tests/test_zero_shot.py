"""Solvers of deepinv with our priors: the adapter is exact, and what comes out depends on seed and image alone."""

import importlib.util
import math
import sys
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_bird import KNOWN_TASKS, NOISE, gaussian, motion, posterior_mean, psnr, scene

from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel
from ucdir_plugin.diffusion.bird.operators import BlockMean, ChannelMean, Compose, HoleMask, Operator
from ucdir_plugin.diffusion.noise import image_noise, normal
from ucdir_plugin.diffusion.prior import DDPM, DenoiserPrior, GaussianPrior, NetworkPrior
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.schema import BirdOptions
from ucdir_plugin.restoration import deepinv_methods
from ucdir_plugin.restoration.deepinv_methods import DDNM, DDRM, DPS, METHODS, DiffPIR
from ucdir_plugin.restoration.deepinv_solver import ZeroShotSolver, physics_of
from ucdir_plugin.restoration.singular_values import decompose
from ucdir_plugin.utils.errors import NotAvailable, UserError

needs_deepinv = pytest.mark.skipif(
    importlib.util.find_spec("deepinv") is None, reason="deepinv is not installed: pip install -e '.[dev]'"
)


def holes(size, batch=1):
    return HoleMask((normal((batch, 1, size, size), "holes") > -0.5).float())


OPERATORS = {
    "identity": (start_kernel(1, 1), Operator(), "reflect"),
    "valid blur": (motion(4, 5), Operator(), "valid"),
    "reflecting blur": (gaussian(1.0, 5), Operator(), "reflect"),
    "mixing kernel": (start_kernel(1, 3, "random", mixing=True), Operator(), "zeros"),
    "block mean": (start_kernel(1, 1), BlockMean(4), "reflect"),
    "hole mask": (start_kernel(1, 1), holes(16), "reflect"),
    "channel mean": (start_kernel(1, 1), ChannelMean(), "reflect"),
    "all": (gaussian(1.0, 5), Compose([BlockMean(2), ChannelMean(), holes(8)]), "valid"),
}


@needs_deepinv
@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_and_offset(name):
    """<A x, v> = <x, A^T v>, and y of D(x) is A x: M is taken off, what was not observed is zero."""
    kernel, operator, padding = OPERATORS[name]
    border = kernel.shape[-1] // 2 if padding == "valid" else 0
    x = normal((1, 3, 16 + 2 * border, 16 + 2 * border), name).double()
    degradation = Degradation(kernel, normal((1, 1, 16, 16), "mask") / 9, operator, padding)
    blind_spots = degradation(x) + (
        0 if operator.observed(degradation(x)) is None else 1 - operator.observed(degradation(x))
    )
    observed = [(degradation(x), degradation), (blind_spots, degradation)]
    for given in (observed[:1], observed):
        physics, y = physics_of(given, x, NOISE)
        v = normal(y.shape, name, "v").double()
        torch.testing.assert_close((physics.A(x) * v).sum(), (x * physics.A_adjoint(v)).sum(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(physics.A(x), y, rtol=1e-10, atol=1e-10)
        assert float(physics.A(x).abs().sum()) > 0


ORTHOGONAL = {
    "identity": (start_kernel(1, 1), Operator(), "reflect"),
    "border": (start_kernel(1, 5), Operator(), "valid"),
    "block mean": (start_kernel(1, 5), BlockMean(4), "valid"),
    "hole mask": (start_kernel(1, 1), holes(16), "reflect"),
    "channel mean": (start_kernel(1, 1), ChannelMean(), "reflect"),
    "all": (start_kernel(1, 3), Compose([BlockMean(2), ChannelMean(), holes(8)]), "valid"),
    "separable blur": (gaussian(1.0, 5), Operator(), "valid"),
    "separable blur, zeros": (gaussian(1.3, 7), Operator(), "zeros"),
}


@needs_deepinv
@pytest.mark.parametrize("name", ORTHOGONAL)
def test_singular_values(name):
    """A = U S V^T, U and its adjoint agree, V V^T = 1, and coordinates of norm 1 that A sees are images of norm 1."""
    kernel, operator, padding = ORTHOGONAL[name]
    border = kernel.shape[-1] // 2 if padding == "valid" else 0
    like = normal((1, 3, 16 + 2 * border, 20 if name.startswith("sep") else 16 + 2 * border), name).double()
    one = Degradation(kernel, None, operator, padding)
    physics, y = physics_of([(one(like), one)], like, NOISE)
    found = decompose(physics, [(one(like), one)], like)
    exact = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.given(found.values * found.coordinates(like)), y, **exact)
    torch.testing.assert_close(found.image(found.coordinates(like)), like, **exact)
    c, v = normal(found.values.shape, name, "c").double(), normal(y.shape, name, "v").double()
    torch.testing.assert_close((found.given(c) * v).sum(), (c * found.seen(v)).sum(), **exact)
    torch.testing.assert_close((found.image(c) * like).sum(), (c * found.coordinates(like)).sum(), **exact)
    seen = torch.where(found.values > 0, c, torch.zeros_like(c))
    torch.testing.assert_close(found.image(seen).norm(), seen.norm(), **exact)


@needs_deepinv
def test_ddrm_without_noise_keeps_what_was_seen():
    operator = holes(16)
    y = operator((normal((1, 3, 16, 16), "y").tanh() + 1) / 2) * 2 - 1
    prior = DenoiserPrior(lambda x, sigma: x, 0.3)
    one = Degradation(start_kernel(1, 1), None, operator)
    found = run(prior, y, one, DDRM(steps=5, sigma_start=0.3, noise=0.0)).image
    known = operator.known.expand_as(found).bool()
    last = float((1 / prior.schedule.alpha_bar[0] - 1) ** 0.5)
    assert float((found - y)[known].abs().max()) < max(5 * last, 0.05)


DIAGONAL = (torch.eye(5) / 5).expand(1, 3, 1, 5, 5).clone()


@needs_deepinv
@pytest.mark.parametrize("kernel, operator", [(DIAGONAL, Operator()), (gaussian(1.0, 5), BlockMean(2))])
def test_ddrm_says_what_it_cannot_do(kernel, operator):
    y, one = normal((1, 3, 8, 8), "y").tanh(), Degradation(kernel, None, operator, "valid")
    with pytest.raises(UserError, match="DDRM needs singular vectors.*take ddnm") as raised:
        run(DenoiserPrior(local, 0.3), y, one, DDRM(steps=3))
    assert "\n" not in str(raised.value)


def run(prior, y, degradation, method, keys=("a",), seed=0, **further):
    return ZeroShotSolver(prior, [(y, degradation)], method, image_noise(seed, keys), **further).run()


# For the motion, and the others. The mean of four exact samples is 1 dB below the posterior's mean, the gradients of
# DPS need more steps, and DiffPIR's samples spread too little.
ALLOWED = {"ddnm": (1.0, 1.5), "dps": (4.2, 1.3), "diffpir": (0.7, 0.9), "ddrm": (0.5, 0.9)}
ANY_OPERATOR = [name for name in METHODS if name != "ddrm"]


@needs_deepinv
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["motion", "holes", "small"])
def test_samples_come_near_the_posterior(case, name):
    """With a Gaussian prior in closed form, where the best that can be known is known."""
    kernel, operator = KNOWN_TASKS[case]
    prior, truth, y = scene(32, 1, kernel, operator)
    one = Degradation(kernel, None, operator, "valid")
    best = psnr(posterior_mean(prior, one, y)[..., 4:-4, 4:-4], truth)
    start = psnr(operator.lift((y + 1) / 2, 3) * 2 - 1, truth)
    degradation = Degradation(kernel.expand(4, -1, -1, -1, -1), None, operator, "valid")
    method = METHODS[name](steps=12, sigma_start=0.4, noise=NOISE)
    found = run(prior, y.expand(4, -1, -1, -1), degradation, method, [str(i) for i in range(4)])
    mean = psnr(found.image.mean(0, keepdim=True), truth)
    print(f"{case} {name}: {mean:.2f} dB, posterior's mean {best:.2f}, start {start:.2f}")
    assert found.failed == [None] * 4
    assert best - ALLOWED[name][case != "motion"] < mean < best + 0.3
    assert case != "motion" or mean > start + 0.3


def problem(prior, y, degradation, steps, sigma_start=0.5, key="a", seed=0):
    """As the solver makes it of one image."""
    made = []

    class Keep(DDNM):
        def __call__(self, problem):
            made.append(problem)
            return problem.guess

    run(prior, y, degradation, Keep(steps=steps, sigma_start=sigma_start), key, seed)
    return made[0]


@needs_deepinv
def test_without_data_dps_is_ddpm():
    """The levels that deepinv is lent are the schedule's, and its steps those of the posterior q(x_{t-1} | x_t, x_0)."""
    prior = GaussianPrior.natural(16, 16, 0.2)
    p = problem(prior, normal((1, 3, 16, 16), "y").tanh(), Degradation(start_kernel(1, 1)), 7)
    state = p.generator.get_state()
    found = DPS(steps=7, weight=1e-12)(p) * 2 - 1
    p.generator.set_state(state)
    x, s = p.x_t.double(), p.schedule
    assert len(s) == 7
    for t in reversed(range(7)):
        x0 = p.denoise((x / s.levels[t + 1] + 1) / 2, (1 / s.alpha_bar[t] - 1) ** 0.5 / 2) * 2 - 1
        x = s.posterior_mean_coef1[t] * x0 + s.posterior_mean_coef2[t] * x
        if t:
            x = x + s.posterior_variance[t] ** 0.5 * torch.empty_like(x).normal_(generator=p.generator)
    torch.testing.assert_close(found, x.float(), rtol=0, atol=1e-4)


@needs_deepinv
def test_ddnm_without_noise_keeps_what_was_seen():
    """With sigma_n = 0 the pseudo-inverse: what y says is taken as it is, to the noise of the last level."""
    operator = holes(16)
    y = operator((normal((1, 3, 16, 16), "y").tanh() + 1) / 2) * 2 - 1
    prior = DenoiserPrior(lambda x, sigma: x.mean((2, 3), keepdim=True).expand_as(x), 0.3)  # hides all detail
    p = problem(prior, y, Degradation(start_kernel(1, 1), None, operator), 5, 0.3)
    seen = []
    p.denoise = lambda x, sigma: (seen.append((sigma, x)), torch.full_like(x, 0.3))[1]
    DDNM(steps=5, noise=0.0)(p)
    sigma, last = seen[-1]
    known = operator.known.expand_as(last).bool()
    c1, variance = p.schedule.posterior_mean_coef1[1], p.schedule.posterior_variance[1]
    assert c1 > 0.9
    assert 3 * sigma < 0.05
    assert float((last - (y + 1) / 2)[known].abs().max()) < 0.15 > 5 * variance**0.5 / 2
    assert float((last - 0.3)[~known].abs().max()) < 0.15
    assert float(((y + 1) / 2 - 0.3)[known].abs().max()) > 0.3


class Asked(NetworkPrior):
    """A Gaussian prior as a network of time steps; remembers which it was asked for."""

    def __init__(self, schedule):
        self.steps, inner = [], GaussianPrior.natural(16, 16, 0.3)

        def net(x, timesteps):
            self.steps += timesteps.tolist()
            return inner(x, torch.from_numpy(schedule.levels).to(x)[timesteps.round().long() + 1])

        super().__init__(net, schedule)


@needs_deepinv
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("schedule", [DDPM, NoiseSchedule(np.linspace(0.01, 0.17, 60) ** 2)], ids=["ddpm", "other"])
def test_the_levels_are_the_priors(name, schedule):
    """As many calls as steps, from the first level down, at no other noise than the prior was trained with."""
    y, one = normal((1, 3, 16, 16), "y").tanh(), Degradation(start_kernel(1, 1))
    for start, first in ((None, len(schedule) - 1), (0.25, None)):
        prior, method, pixels, numbers = Asked(schedule), METHODS[name](steps=9, sigma_start=start), [], []
        solver = ZeroShotSolver(prior, [(y, one)], method, image_noise(0, ["a"]), progress=pixels.append)
        found = solver.run(lambda call, numbers=numbers: numbers.append(call.number))
        assert (pixels, numbers) == ([256] * 9, list(range(9)))
        assert len(prior.steps) == 9
        assert prior.steps == sorted(prior.steps, reverse=True)
        assert all(step == int(step) for step in prior.steps), prior.steps
        sigma = (1 / schedule.alpha_bar - 1) ** 0.5 / 2
        first = int((sigma <= 0.25).sum()) - 1 if first is None else first
        assert prior.steps[0] == first
        np.testing.assert_allclose(found.trace.sigma, sigma[np.array(prior.steps, int)], rtol=1e-3)


def local(x, sigma):
    """A denoiser that looks two pixels far, not linear."""
    kernel = torch.full((3, 1, 5, 5), 1 / 25)
    return (x + F.conv2d(F.pad(x, (2,) * 4, mode="replicate"), kernel.to(x), groups=3).tanh()) / 2


@pytest.mark.parametrize(
    "prior",
    [
        GaussianPrior.natural(8, 8, 0.3),
        DenoiserPrior(local, 0.3),
        NetworkPrior(local),
        NetworkPrior(local, prediction="v_prediction"),
    ],
    ids=["gaussian", "denoiser", "eps", "v"],
)
def test_priors_are_differentiable(prior):
    """Without its gradient DPS would silently be another method: what the network subtracts would count as constant."""
    x, along, v = (normal((1, 3, 8, 8), name).double() for name in "xdv")
    level = torch.tensor([0.9])
    (gradient,) = torch.autograd.grad((prior(x.requires_grad_(), level) * v).sum(), x)
    ahead, behind = (((prior(x + h * along, level)) * v).sum().detach() for h in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * along).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)


@needs_deepinv
@pytest.mark.parametrize("name", METHODS)
def test_tiled_equals_whole(name):
    y = normal((1, 3, 20, 24), "y").tanh()
    degradation, prior = Degradation(gaussian(1.0, 5), padding="valid"), DenoiserPrior(local, 0.3)
    method = METHODS[name](steps=4)
    whole = run(prior, y, degradation, method).image
    tiled = run(prior, y, degradation, method, tile=16, overlap=2).image
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-5)


def batch(blur):
    y = normal((3, 3, 16, 16), "y").tanh()
    operator = Compose([holes(16, 3)])
    y = operator((y + 1) / 2) * 2 - 1
    return y, Degradation(
        torch.cat([gaussian(s, 5) for s in (0.5, 1.0, 1.5)]) if blur else start_kernel(3, 5),
        normal((3, 1, 16, 16)) / 50,
        operator,
        "valid",
    )


@needs_deepinv
@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_seed_and_image_counts(name):
    """A batch is its images one by one; the same again is the same; the caller's generators are left alone."""
    y, degradation = batch(blur=name != "ddrm")
    prior, method, keys = GaussianPrior.natural(20, 20, 0.3), METHODS[name](steps=4, sigma_start=0.3), "abc"
    torch.manual_seed(5)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    together = run(prior, y, degradation, method, keys)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpys, np.random.get_state()[1])
    assert together.image.shape == y.shape
    assert len(together.trace.loss) == len(together.trace.sigma) == len(together.trace.kernel) == 4
    torch.manual_seed(6)
    for i, key in enumerate(keys):
        alone = run(prior, y[i : i + 1], degradation.for_image(i), method, key)
        torch.testing.assert_close(alone.image, together.image[i : i + 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.degraded[0], together.degraded[0][i : i + 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.stack(alone.trace.loss)[..., 0], torch.stack(together.trace.loss)[..., i])
    assert torch.equal(run(prior, y, degradation, method, keys).image, together.image)
    other = run(prior, y, degradation, method, ("a", "b", "d")).image
    assert torch.equal(other[:2], together.image[:2])
    assert not torch.allclose(other[2], together.image[2], atol=1e-3)
    assert not torch.allclose(run(prior, y, degradation, method, keys, seed=1).image, together.image, atol=1e-3)
    y, one = y[:1], Degradation(start_kernel(1, 5), padding="valid")
    noises = [
        problem(prior, y, one, 4, 0.3, key, seed).generator.initial_seed() for key, seed in ("a0", "b0", "a1", "a0")
    ]
    assert len(set(noises)) == 3 and noises[0] == noises[3]  # of the later steps, too


@needs_deepinv
@pytest.mark.parametrize("name", ANY_OPERATOR)
def test_two_observations_of_a_scene(name):
    """Each says something: together they are nearer to the truth than the better one alone."""
    prior, truth, y = scene(32, 2, motion(6, 9))
    first = Degradation(motion(6, 9), padding="valid")
    second = Degradation(motion(6, 9).transpose(-1, -2).contiguous(), padding="valid")
    whole = prior.sample(normal((1, 3, 40, 40), 2, "truth"))
    z = second((whole + 1) / 2) * 2 - 1 + 2 * NOISE * normal(y.shape, "z")
    method, noise = METHODS[name](steps=12, sigma_start=0.4), image_noise(0, ["a"])
    alone = [psnr(run(prior, seen, d, method).image, truth) for seen, d in ((y, first), (z, second))]
    found = ZeroShotSolver(prior, [(y, first), (z, second)], method, noise).run()
    assert psnr(found.image, truth) > max(alone) + 0.5
    assert [d.shape for d in found.degraded] == [y.shape, z.shape]
    assert found.trace.loss[0].shape == (2, 1)


@needs_deepinv
@pytest.mark.parametrize("name", METHODS)
def test_one_image_that_fails_does_not_take_the_others(name):
    y = normal((2, 3, 16, 16), "y").tanh() / 4 + torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1)
    calls = []

    def denoise(x, sigma):
        calls.append(0)
        return x * (math.nan if len(calls) == 3 else 1.0)  # the third of the first image's

    degradation = Degradation(start_kernel(2, 1))
    found = run(DenoiserPrior(denoise, 0.3), y, degradation, METHODS[name](steps=5), "ab", names=["one.png", "two.png"])
    assert found.failed == ["one.png: the image turned non-finite in step 3", None]
    assert bool(found.image[0].isnan().all()) and bool(found.image[1].isfinite().all())
    losses = torch.stack(found.trace.loss)[:, 0]
    assert losses[:, 0].isfinite().tolist() == [True, True, False, False, False]
    assert bool(losses[:, 1].isfinite().all())


@needs_deepinv
def test_what_does_not_fit_is_said():
    y, one, prior = normal((1, 3, 8, 8), "y").tanh(), Degradation(start_kernel(1, 1)), DenoiserPrior(local, 0.3)
    for method, words in (
        (DDNM(sigma_start=0.5), "more than the prior's 0.3"),
        (DPS(steps=500), "steps 500 is more than the prior's"),
        (DiffPIR(noise=0.4), "noise 0.4 must be below that of the start, 0.3"),
    ):
        with pytest.raises(UserError, match=words):
            run(prior, y, one, method)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ddnm", {"steps": 1}, "DDNM: steps must be at least 2, got 1"),
        ("ddnm", {"noise": -1}, "noise must be a number of at least 0"),
        ("dps", {"weight": 0}, "weight must be a number above 0"),
        ("dps", {"guidance": "annealled"}, "DPS: guidance 'annealled' is not known"),
        ("diffpir", {"weight": math.nan}, "DiffPIR: weight must be"),
        ("ddrm", {"eta": 1.5}, "DDRM: eta must be between 0 and 1"),
        ("ddrm", {"eta_b": -1}, "DDRM: eta_b must be between 0 and 1"),
        ("diffpir", {"zeta": 1.5}, "zeta must be between 0 and 1"),
    ],
)
def test_options_out_of_range(name, options, words):
    with pytest.raises(UserError, match=words):
        METHODS[name](**options)


def test_without_deepinv(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    prior = DenoiserPrior(local, 0.3)
    with pytest.raises(NotAvailable, match=r"pip install 'ucdir-plugin\[deepinv\]'") as raised:
        run(prior, normal((1, 3, 8, 8), "y"), Degradation(start_kernel(1, 1)), DDNM())
    assert "\n" not in str(raised.value)
    assert deepinv_methods.METHODS  # the module itself needs nothing


def test_options_know_every_solver():
    """One list of names: the schema's are BIR-D's own and those of METHODS."""
    assert set(typing.get_args(BirdOptions.model_fields["solver"].annotation)) == {"bird", *METHODS}
