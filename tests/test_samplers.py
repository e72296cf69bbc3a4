"""Every sampler against the closed form of a Gaussian, against diffusers, and against its neighbours."""

import numpy as np
import pytest
import torch

from ucdir_plugin.diffusion import samplers
from ucdir_plugin.diffusion.noise import normal
from ucdir_plugin.diffusion.samplers import SAMPLERS
from ucdir_plugin.diffusion.schedule import NoiseSchedule

# x_0 ~ N(0.1, 0.5) in each pixel, observed as 0.5 with noise of variance 0.5: the posterior is known.
PRIOR_MEAN, PRIOR_VARIANCE, SEEN, SEEN_VARIANCE = 0.1, 0.5, 0.5, 0.5
VARIANCE = 1 / (1 / PRIOR_VARIANCE + 1 / SEEN_VARIANCE)
MEAN = VARIANCE * (PRIOR_MEAN / PRIOR_VARIANCE + SEEN / SEEN_VARIANCE)

# Each sampler as it is called here: its name, and what is passed beyond the common arguments.
VARIANTS = {
    "ddpm": ("ddpm", {}),
    "ddim": ("ddim", {}),
    "ddim eta 0.5": ("ddim", {"eta": 0.5}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde eta 0.5": ("dpmpp_2m_sde", {"eta": 0.5}),
    "heun": ("heun", {}),
}
STOCHASTIC = {"ddpm", "ddim eta 0.5", "dpmpp_2m_sde", "dpmpp_2m_sde eta 0.5"}


def posterior_mean(x, level):
    """E[x_0 | x_t, observation]."""
    gain = level * VARIANCE / (level**2 * VARIANCE + 1 - level**2)
    return MEAN + gain * (x - level * MEAN)


def gaussian_denoiser(x, level):
    level = float(level[0])
    return (x - level * posterior_mean(x, level)) / (1 - level**2) ** 0.5


def update(variant, schedule, t, first, h_last):
    """One step as a row over (x, x_0 of the last step, 1), its noise, and its h: written as in the papers."""
    x, x0_last, one = np.eye(3)
    level, level_next = schedule.levels[t + 1], schedule.levels[t]
    spread, spread_next = np.sqrt(1 - level**2), np.sqrt(1 - level_next**2)
    x0 = posterior_mean(0, level) * one + (posterior_mean(1, level) - posterior_mean(0, level)) * x
    if t == 0:
        return x0, x0, 0, None
    eps = (x - level * x0) / spread
    if variant.startswith("dd"):
        eta = {"ddpm": 1, "ddim": 0, "ddim eta 0.5": 0.5}[variant]
        std = eta * spread_next / spread * np.sqrt(1 - level**2 / level_next**2)
        return level_next * x0 + np.sqrt(spread_next**2 - std**2) * eps, x0, std, None
    if variant == "heun":
        sigma, sigma_next = spread / level, spread_next / level_next
        z = x / level
        euler = z + (sigma_next - sigma) * eps
        low, high = (posterior_mean(v, level_next) for v in (0, 1))
        eps_next = (euler - (low * one + (high - low) * level_next * euler)) / sigma_next
        return level_next * (z + (sigma_next - sigma) * (eps + eps_next) / 2), x0, 0, None
    h = np.log(level_next / spread_next) - np.log(level / spread)
    d = x0 if first else x0 + (x0 - x0_last) * h / h_last / 2
    if variant == "dpmpp_2m":
        return spread_next / spread * x - level_next * (np.exp(-h) - 1) * d, x0, 0, h
    eta = 0.5 if "eta" in variant else 1
    row = spread_next / spread * np.exp(-eta * h) * x + level_next * (1 - np.exp(-(1 + eta) * h)) * d
    return row, x0, spread_next * np.sqrt(1 - np.exp(-2 * eta * h)), h


def recursion(variant, schedule, start_mean=0.0, start_variance=1.0):
    """Mean and variance of the result, from the second moments of (x, last x_0, 1)."""
    moments = np.diag([start_variance, 0, 0]) + np.outer([start_mean, 0, 1], [start_mean, 0, 1])
    h = None
    for t in reversed(range(len(schedule))):
        row, x0, std, h = update(variant, schedule, t, t == len(schedule) - 1, h)
        step = np.stack([row, x0, [0, 0, 1]])
        moments = step @ moments @ step.T + np.diag([std**2, 0, 0])
    return moments[0, 2], moments[0, 0] - moments[0, 2] ** 2


def measured(variant, schedule, **further):
    """The same from the sampler: without noise it gives the mean, an impulse in one draw gives that draw's weight."""
    name, arguments = VARIANTS[variant]

    def run(impulse):
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        noise = lambda draw: zero + (draw == impulse)  # noqa: E731
        x = SAMPLERS[name].sample(gaussian_denoiser, schedule, noise, clip_x0=False, **arguments, **further)
        return float(x)

    mean = run(None)
    return mean, sum((run(k) - mean) ** 2 for k in range(len(schedule)))


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_closed_form_recursion(variant, steps, spacing):
    schedule = NoiseSchedule.linear(200, 1e-4, 0.08).respace(steps, spacing)
    np.testing.assert_allclose(measured(variant, schedule), recursion(variant, schedule), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_warm_start_equals_the_closed_form_recursion(variant):
    schedule = NoiseSchedule.linear(200, 1e-4, 0.08).truncate(80).respace(10)
    alpha_bar = schedule.alpha_bar[-1]
    assert alpha_bar > 0.2  # far from noise
    expected = recursion(variant, schedule, 0.7 * alpha_bar**0.5, 1 - alpha_bar)
    np.testing.assert_allclose(measured(variant, schedule, start=0.7), expected, rtol=0, atol=1e-6)
    picture = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    np.testing.assert_allclose(measured(variant, schedule, start=picture), expected, rtol=0, atol=1e-6)


def error(variant, steps, spacing="trailing"):
    mean, variance = recursion(variant, NoiseSchedule.linear(1000, 1e-4, 0.02).respace(steps, spacing))
    return abs(mean - MEAN) + abs(variance - VARIANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_approaches_the_posterior_as_steps_grow(variant):
    errors = [error(variant, steps) for steps in (5, 20, 100, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3  # the 1000 steps themselves, and the x_T that is not quite noise


def test_second_order_needs_fewer_steps():
    for steps in (20, 50, 100):
        assert error("dpmpp_2m", steps) < error("ddim", steps) / 2
        assert error("heun", steps) < error("ddim", steps) / 2
        assert error("dpmpp_2m_sde", steps) < error("ddpm", steps) / 2
        # why the docstring advises against it: its last step but one is long, and the extrapolation overshoots
        assert error("dpmpp_2m", steps, "uniform") > 2 * error("dpmpp_2m", steps)


class Net(torch.nn.Module):
    """A small network that is far from linear and knows the level."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, level):
        h = torch.tanh(self.first(x) * (0.5 + level.view(-1, 1, 1, 1)))
        return x * (1 - level.view(-1, 1, 1, 1) ** 2) ** 0.5 + self.last(h)


SCHEDULES = {
    "ddpm 12": NoiseSchedule.linear(1000, 1e-4, 0.02).respace(12),
    "ucdir 10": NoiseSchedule.linear(2000, 1e-6, 1e-2).respace(10),
    "ucdir 20 trailing": NoiseSchedule.linear(2000, 1e-6, 1e-2).respace(20, "trailing"),
}
SHAPE = (2, 3, 9, 7)


def step_noise(draw):
    return normal(SHAPE, "samplers", draw)


def diffusers_sample(scheduler, net, schedule, heun=False, **step):
    """The scheduler's own loop, with the level in place of t and our noise in its hands."""
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)  # float64, as ours
    count = len(schedule)
    if heun:
        scheduler.set_timesteps(timesteps=list(range(count))[::-1])
        x = step_noise(0) / schedule.alpha_bar[-1] ** 0.5  # it works on x / sqrt(alpha_bar)
    elif "DPMSolver" in type(scheduler).__name__:
        scheduler.set_timesteps(timesteps=list(range(count))[::-1])
        x = step_noise(0)
    else:
        scheduler.set_timesteps(count)
        x = step_noise(0)
    for number, t in enumerate(scheduler.timesteps):
        level = torch.full((len(x),), float(schedule.alpha_bar[int(t)] ** 0.5))
        eps = net(scheduler.scale_model_input(x, t), level)
        if "variance_noise" in step:
            step["variance_noise"] = step_noise(number + 1)
        x = scheduler.step(eps, t, x, **step).prev_sample.float()
    return x


@torch.no_grad()
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "dpmpp_2m_sde eta 0.5"])  # it has no such thing
def test_agrees_with_diffusers(variant, name, clip):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")
    schedule, net = SCHEDULES[name], Net()
    common = {"num_train_timesteps": len(schedule), "trained_betas": schedule.betas}
    clipping = {"clip_sample": clip}
    solver = {"thresholding": clip, "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
    if variant == "ddpm":
        # It has no argument for the noise, but DDIM at eta 1 has; without clipping its own eps is the same.
        expected = diffusers_sample(
            diffusers.DDIMScheduler(**common, **clipping), net, schedule,
            eta=1.0, use_clipped_model_output=True, variance_noise=None,
        )  # fmt: skip
    elif variant.startswith("ddim"):
        eta = VARIANTS[variant][1].get("eta", 0.0)
        expected = diffusers_sample(
            diffusers.DDIMScheduler(**common, **clipping), net, schedule,
            eta=eta, use_clipped_model_output=True, variance_noise=None,
        )  # fmt: skip
    elif variant == "heun":
        expected = diffusers_sample(diffusers.HeunDiscreteScheduler(**common, **clipping), net, schedule, heun=True)
    elif variant == "dpmpp_2m":
        scheduler = diffusers.DPMSolverMultistepScheduler(**common, **solver, algorithm_type="dpmsolver++")
        expected = diffusers_sample(scheduler, net, schedule)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**common, **solver, algorithm_type="sde-dpmsolver++")
        expected = diffusers_sample(scheduler, net, schedule, variance_noise=None)
    sampler, arguments = VARIANTS[variant]
    result = SAMPLERS[sampler].sample(net, schedule, step_noise, clip, **arguments)
    assert result.abs().max() > 0.5
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_ddpm_agrees_with_diffusers_ddpm():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")
    schedule, net = SCHEDULES["ddpm 12"], Net()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=12, trained_betas=schedule.betas, clip_sample=True)
    draws = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in range(12)]
    x = draws[0]
    for t in reversed(range(12)):
        eps = net(x, torch.full((len(x),), float(schedule.alpha_bar[t] ** 0.5)))
        x = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(12 - t)).prev_sample
    result = samplers.ddpm(net, schedule, lambda draw: draws[draw])
    torch.testing.assert_close(result, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_is_ddpm(clip):
    schedule, net = NoiseSchedule.linear(60, 1e-4, 0.2), Net()
    a = samplers.ddpm(net, schedule, step_noise, clip)
    b = samplers.ddim(net, schedule, step_noise, clip, eta=1.0)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_calls_draws_and_inputs(variant):
    """NFE as stated, callback once a step, draws as numbered, and neither the noise nor the start is written to."""
    name, arguments = VARIANTS[variant]
    schedule, net = NoiseSchedule.linear(200, 1e-4, 0.08).respace(6), Net()
    stored = [step_noise(draw) for draw in range(6)]
    copies = [draw.clone() for draw in stored]
    start = torch.full(SHAPE, 0.25)
    drawn, levels, seen = [], [], []

    def noise(draw):
        drawn.append(draw)
        return stored[draw]

    def denoise(x, level):
        levels.append(float(level[0]))
        assert level.shape == (2,)
        before = x.clone()
        eps = net(x, level)
        assert torch.equal(x, before)
        return eps

    def callback(step, x, x0):
        assert x.shape == x0.shape == SHAPE
        assert x0.abs().max() <= 1
        seen.append((step, x.clone()))

    result = SAMPLERS[name].sample(denoise, schedule, noise, True, callback, start=start, **arguments)
    assert result.isfinite().all()
    assert len(levels) == SAMPLERS[name].nfe(6) == (11 if name == "heun" else 6)
    assert drawn == (list(range(6)) if variant in STOCHASTIC else [0])
    assert [step for step, _ in seen] == list(range(6))
    np.testing.assert_allclose(sorted(set(levels)), sorted(schedule.levels[1:]), rtol=1e-6)
    first = schedule.alpha_bar[-1] ** 0.5 * start + (1 - schedule.alpha_bar[-1]) ** 0.5 * stored[0]
    torch.testing.assert_close(seen[0][1], first)
    for a, b in zip([*stored, start], [*copies, torch.full(SHAPE, 0.25)]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_equals_single_images_and_strips_the_whole(name, monkeypatch):
    schedule, net = NoiseSchedule.linear(200, 1e-4, 0.08).respace(4, "trailing"), Net()
    batch = SAMPLERS[name].sample(net, schedule, step_noise, dynamic_threshold=0.9)
    monkeypatch.setattr(samplers, "STRIP_ELEMENTS", 50)
    for i in range(2):
        one = SAMPLERS[name].sample(net, schedule, lambda draw, i=i: step_noise(draw)[i : i + 1], dynamic_threshold=0.9)
        torch.testing.assert_close(one[0], batch[i], rtol=0, atol=1e-5)


def test_half_precision_denoiser_keeps_the_state_in_float32():
    schedule, net = NoiseSchedule.linear(200, 1e-4, 0.08).respace(5), Net()
    result = samplers.ddpm(lambda x, level: net(x, level).bfloat16(), schedule, step_noise)
    expected = samplers.ddpm(lambda x, level: net(x, level).bfloat16().float(), schedule, step_noise)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_dynamic_threshold():
    """One step to x_0, whose prediction is known: each image is limited by its own quantile, at least 1."""
    schedule = NoiseSchedule.linear(1, 0.5, 0.5)
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)]).view(2, 1, 1, 101)

    def denoise(x, level):
        return (x - 0.5**0.5 * x0) / 0.5**0.5

    def run(**arguments):
        return samplers.ddim(denoise, schedule, lambda draw: torch.zeros_like(x0), **arguments)

    limit = torch.quantile(x0[0].abs(), 0.9)
    torch.testing.assert_close(run(dynamic_threshold=0.9)[0], (x0[0].clamp(-limit, limit)) / limit)
    torch.testing.assert_close(run(dynamic_threshold=0.9)[1], x0[1])
    torch.testing.assert_close(run(dynamic_threshold=1.0)[0], x0[0] / 4)
    torch.testing.assert_close(run(dynamic_threshold=1.0, clip_x0=2.0)[0], x0[0] / 2)
    torch.testing.assert_close(run(dynamic_threshold=1.0, clip_x0=2.0)[1], x0[1])
    torch.testing.assert_close(run(clip_x0=2.0)[0], x0[0].clamp(-2, 2))
    torch.testing.assert_close(run()[0], x0[0].clamp(-1, 1))
    torch.testing.assert_close(run(clip_x0=False), x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_arguments(name):
    schedule = NoiseSchedule.linear(4, 0.1, 0.5)
    for arguments in ({"dynamic_threshold": 0.0}, {"dynamic_threshold": 1.5}):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            SAMPLERS[name].sample(Net(), schedule, step_noise, **arguments)
    with pytest.raises(ValueError, match="clip_x0 on"):
        SAMPLERS[name].sample(Net(), schedule, step_noise, clip_x0=False, dynamic_threshold=0.9)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.dpmpp_2m_sde])
def test_impossible_eta(sampler):
    with pytest.raises(ValueError, match="eta must be between 0 and 1, got 1.5"):
        sampler(Net(), NoiseSchedule.linear(4, 0.1, 0.5), step_noise, eta=1.5)


@pytest.mark.parametrize("timesteps", [7, 50, 2000])
@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic"])
def test_spacings_take_existing_levels_once_and_end_at_the_noisiest(spacing, timesteps):
    schedule = NoiseSchedule.linear(timesteps, 1e-6, 1e-2)
    for steps in {1, 2, 5, timesteps // 2, timesteps - 1, timesteps} - {0}:
        if steps > timesteps:
            continue
        indices = np.searchsorted(-schedule.alpha_bar, -schedule.respace(steps, spacing).alpha_bar * (1 + 1e-9))
        assert len(set(indices)) == steps
        assert indices[-1] == timesteps - 1
        assert (np.diff(indices) > 0).all()


def test_spacings_are_those_of_the_papers():
    def indices(spacing):
        schedule = NoiseSchedule.linear(1000, 1e-5, 1e-2)
        return np.searchsorted(-schedule.alpha_bar, -schedule.respace(10, spacing).alpha_bar * (1 + 1e-12)).tolist()

    assert indices("uniform") == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert indices("trailing") == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert indices("quadratic") == [0, 12, 49, 111, 197, 308, 444, 604, 789, 999]
    with pytest.raises(ValueError, match="uniform, trailing, quadratic, got 'linear'"):
        indices("linear")


def test_truncate():
    schedule = NoiseSchedule.linear(100, 1e-4, 0.08)
    np.testing.assert_allclose(schedule.truncate(30).alpha_bar, schedule.alpha_bar[:30])
    np.testing.assert_allclose(schedule.truncate(100).alpha_bar, schedule.alpha_bar)
    for timesteps in (0, 101):
        with pytest.raises(ValueError, match=f"between 1 and the schedule's 100, got {timesteps}"):
            schedule.truncate(timesteps)
