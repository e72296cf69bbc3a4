"""benchmark.py calibration: a perfect denoiser keeps the power that it should; others are told by how much they do not."""

import cv2
import numpy as np
import pytest
import torch
from conftest import RESTORING, assert_one_line_error, merged
from ucdir_cli.benchmarks import calibration as benchmark_calibration

from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.utils.errors import UserError

DEVIATION = 0.1  # of the residual, in [-1, 1] units
PAIRS = {"name": "pairs", "type": "PairedRestorationDataset", "dataroot_lq": "lq", "dataroot_gt": "gt"}


def test_power_is_in_the_band_of_a_wave_and_all_of_it_is_the_sum_of_squares():
    columns = torch.arange(96)
    for period, band in ((48, None), (24, 0), (12, 1), (6, 2), (3, 3)):
        wave = torch.cos(2 * torch.pi * columns / period).expand(2, 3, 64, 96)
        found = benchmark_calibration.band_power(wave)
        torch.testing.assert_close(found[-1], wave.double().square().sum())
        expected = torch.zeros(4, dtype=torch.float64)
        if band is not None:
            expected[band] = found[-1]
        torch.testing.assert_close(found[:-1], expected, rtol=1e-6, atol=1e-3)


def test_informative_levels_are_those_between_10_db_of_signal_and_of_noise():
    schedule = NoiseSchedule.linear(2000, 1e-6, 1e-2)
    sigma = np.sqrt(1 / schedule.alpha_bar - 1)
    for scaled in (0.081, 0.97):
        decibels = 20 * np.log10(scaled / sigma)
        assert benchmark_calibration.informative(schedule, scaled) == np.mean(np.abs(decibels) < 10)


@pytest.fixture
def known(place, monkeypatch):
    """White residuals of a known deviation; a predictor that returns its input; returns a function that gives rows."""
    rng = np.random.default_rng(0)
    for name in ("lq", "gt"):
        (place.folder / name).mkdir()
    for i in range(2):
        residual = rng.normal(0, DEVIATION / 2 * 255, (96, 128, 3))
        cv2.imwrite(f"lq/{i}.png", np.full((96, 128, 3), 128, np.uint8))
        cv2.imwrite(f"gt/{i}.png", np.rint(128 + residual).clip(0, 255).astype(np.uint8))
    load_model = benchmark_calibration.load_model

    def rows(scale=1, of_perfect=1.0, crops=None):
        def denoise(x_t, level, lq, guide, condition):
            """Eps for ``of_perfect`` times the mean of the residual, of those sizes only where ``crops`` says."""
            level, variance = level.view(-1, 1, 1, 1), (DEVIATION * scale) ** 2
            mean = level * variance * x_t / (level**2 * variance + 1 - level**2)
            mean = mean * (of_perfect if crops is None or x_t.shape[-1] == crops else 1)
            return (x_t - level * mean) / (1 - level**2).sqrt()

        def loaded(*args, **kwargs):
            model = load_model(*args, **kwargs)
            model.net.predict, model.net.denoise = torch.clone, denoise
            return model

        monkeypatch.setattr(benchmark_calibration, "load_model", loaded)
        options = {"datasets": {"val": PAIRS}, "network_g": {"residual_scale": scale}}
        opt = place.write(merged(RESTORING, options), "known.yml")
        (table,) = benchmark_calibration.denoising(opt, None, 32)
        return table["benchmark"], {(row["on"], row["noise / residual"]): row for row in table["rows"]}

    return rows


@pytest.mark.parametrize("scale", [1, 12])
def test_a_perfect_denoiser_keeps_the_sum_at_any_scale(known, scale):
    title, rows = known(scale)
    assert "standard deviation is 0.100" in title and "residual_scale 10.0 would" in title
    for (_, relative), row in rows.items():
        error = relative**2 / (1 + relative**2)  # Wiener
        assert row["error, all"] == pytest.approx(error, rel=0.05, abs=0.002)
        assert row["power, all"] == pytest.approx(1 - error, rel=0.05, abs=0.002)
        assert row["sum, all"] == pytest.approx(1, abs=0.02) and row["sum, finest"] == pytest.approx(1, abs=0.02)


def test_one_that_shrinks_loses_what_the_formula_says(known):
    shrunk = known(of_perfect=0.7)[1]
    for (_, relative), row in shrunk.items():
        power = 1 / (1 + relative**2)
        assert row["sum, all"] == pytest.approx(1 - 2 * 0.7 * power + 2 * 0.49 * power, abs=0.02)


def test_crops_are_told_from_whole_images(known):
    rows = known(of_perfect=0.5, crops=32)[1]
    assert rows["whole images", 1.0]["sum, all"] == pytest.approx(1, abs=0.02)
    assert rows["crops of 32", 1.0]["sum, all"] == pytest.approx(0.75, abs=0.02)


def test_the_tool_prints_both_tables_and_the_truth_has_all_its_texture(place):
    (place.folder / "lq").symlink_to(place.folder / "photos")
    (place.folder / "gt").symlink_to(place.folder / "photos")
    same = place.write(merged(RESTORING, {"datasets": {"val": PAIRS}}), "same.yml")
    done = place.run("benchmark.py", "calibration", "-opt", same, "--size", "16")
    assert done.returncode == 0, done.stderr
    assert "| crops of 16 | 5.0 |" in done.stdout and "| initial prediction |" in done.stdout
    assert "| input | 1.0 | 1.0 | 1.0 | 1.0 |" in done.stdout


@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ("edsr.yml", (), "EDSR restores in one pass"),
        ("same.yml", ("--size", "500"), "is smaller than a crop of 500"),
        ("same.yml", ("--size", "0"), "must be at least 1"),
        ("options.yml", (), "has no true images to measure with: set dataroot_gt"),
        ("options.yml", ("--only", "texture"), "has no true images to measure with: set dataroot_gt"),
    ],
)
def test_what_cannot_be_calibrated_is_named(place, file, more, message):
    place.write(
        merged(RESTORING, {"datasets": {"val": {**PAIRS, "dataroot_lq": "photos", "dataroot_gt": "photos"}}}),
        "same.yml",
    )
    assert_one_line_error(place.run("benchmark.py", "calibration", "-opt", file, *more), message)


def test_a_perfect_prediction_has_nothing_to_calibrate(known, place):
    for i in range(2):
        cv2.imwrite(f"gt/{i}.png", cv2.imread(f"lq/{i}.png"))
    with pytest.raises(UserError, match="the prediction is the truth"):
        known()
