"""Schedules, stateless noise, and the sampler against closed forms of a Gaussian."""

import numpy as np
import pytest
import torch

from ucdir_plugin.diffusion import samplers
from ucdir_plugin.diffusion.noise import generator, key_to_seed, normal
from ucdir_plugin.diffusion.schedule import NoiseSchedule, diffuse


def test_respacing_keeps_the_chosen_levels():
    schedule = NoiseSchedule.linear(2000, 1e-6, 1e-2)
    short = schedule.respace(50)
    indices = np.round(np.linspace(0, 1999, 50)).astype(int)
    np.testing.assert_allclose(short.alpha_bar, schedule.alpha_bar[indices], rtol=1e-12)
    np.testing.assert_allclose(schedule.respace(2000).betas, schedule.betas, rtol=1e-9)
    assert schedule.respace(1).alpha_bar[0] == pytest.approx(schedule.alpha_bar[-1])


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_respacing(steps):
    with pytest.raises(ValueError, match="between 1 and the schedule's 10"):
        NoiseSchedule.linear(10, 1e-4, 0.5).respace(steps)


def test_level_is_uniform_between_neighbouring_levels():
    schedule = NoiseSchedule.linear(4, 0.1, 0.5)
    stream = generator("levels")
    drawn = np.array([schedule.sample_level(stream) for _ in range(8000)])
    counts, _ = np.histogram(drawn, bins=schedule.levels[::-1])
    assert counts.sum() == 8000  # none outside sqrt(alpha_bar_T) .. 1
    np.testing.assert_allclose(counts / 8000, 0.25, atol=0.02)
    middle = (drawn > schedule.levels[2]) & (drawn < schedule.levels[1])
    np.testing.assert_allclose(drawn[middle].mean(), schedule.levels[1:3].mean(), atol=0.004)


def test_diffuse_takes_one_level_per_image():
    x, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)
    out = diffuse(x, torch.tensor([1.0, 0.6]), noise)
    torch.testing.assert_close(out[0], x[0])
    torch.testing.assert_close(out[1], torch.full((1, 2, 2), 0.6 + 0.8 * 2))


def test_noise_is_a_function_of_its_key():
    a = normal((3, 4), 0, "sample", "a.png", 1)
    torch.rand(5)
    torch.testing.assert_close(a, normal((3, 4), 0, "sample", "a.png", 1), rtol=0, atol=0)
    others = [
        (1, "sample", "a.png", 1),
        (0, "sample", "b.png", 1),
        (0, "sample", "a.png", 2),
        (0, "samplea", ".png", 1),
    ]
    for key in others:
        assert not torch.equal(a, normal((3, 4), *key))
    assert key_to_seed(0, "a") == 8898938347678966206  # the same on every machine


VARIANCE, MEAN = 0.25, 0.3


def gaussian_denoiser(x, level):
    """The exact noise prediction where x_0 ~ N(MEAN, VARIANCE) in each pixel."""
    alpha_bar = float(level[0]) ** 2
    x0 = MEAN + alpha_bar**0.5 * VARIANCE * (x - alpha_bar**0.5 * MEAN) / (alpha_bar * VARIANCE + 1 - alpha_bar)
    return (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def recursion(schedule):
    """Mean and variance of the sampler's output: each step is affine in x."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(len(schedule))):
        alpha_bar = schedule.alpha_bar[t]
        gain = alpha_bar**0.5 * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)
        c1, c2 = schedule.posterior_mean_coef1[t], schedule.posterior_mean_coef2[t]
        slope, offset = c1 * gain + c2, c1 * (1 - gain * alpha_bar**0.5) * MEAN
        mean = slope * mean + offset
        variance = slope**2 * variance + (schedule.posterior_variance[t] if t else 0)
    return mean, variance


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_ddpm_equals_the_closed_form_recursion(steps):
    schedule = NoiseSchedule.linear(200, 1e-4, 0.08).respace(steps)
    levels = []

    def denoise(x, level):
        levels.append(float(level[0]))
        return gaussian_denoiser(x, level)

    # Zero noise gives the mean; a unit impulse in one draw gives that draw's weight in the result.
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    base = samplers.ddpm(denoise, schedule, lambda i: zero, clip_x0=False)
    weights = [
        samplers.ddpm(denoise, schedule, lambda i, k=k: zero + (i == k), clip_x0=False) - base for k in range(steps)
    ]
    mean, variance = recursion(schedule)
    assert float(base) == pytest.approx(mean, abs=1e-6)
    assert sum(float(w) ** 2 for w in weights) == pytest.approx(variance, abs=1e-6)
    np.testing.assert_allclose(levels[:steps], np.sqrt(schedule.alpha_bar[::-1]), rtol=1e-6)


def test_ddpm_approaches_the_data_distribution_as_steps_grow():
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    errors = []
    for steps in (5, 20, 100, 1000):
        mean, variance = recursion(schedule.respace(steps))
        errors.append(abs(mean - MEAN) + abs(variance - VARIANCE))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3  # what the 1000 steps themselves leave


def test_clip_keeps_predictions_in_range():
    seen = []
    schedule = NoiseSchedule.linear(10, 0.1, 0.5)
    samplers.ddpm(
        lambda x, level: -3 * torch.ones_like(x),
        schedule,
        lambda i: normal((1, 3, 4, 4), i),
        callback=lambda step, x, x0: seen.append((step, float(x0.abs().max()))),
    )
    assert [step for step, _ in seen] == list(range(10))
    assert all(peak <= 1 for _, peak in seen)
    assert any(peak == 1 for _, peak in seen)
