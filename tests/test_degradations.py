"""Degradations: equalities with their formulas, chains in their order, and datasets that a seed reproduces."""

import math

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from conftest import PHOTOS, TINY, merged
from torch.utils.data import default_collate

from ucdir_plugin.data.loader import KeyedDataset
from ucdir_plugin.options.check import check_options
from ucdir_plugin.utils import degradations
from ucdir_plugin.utils.errors import UserError


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def photo():
    return cv2.imread(str(PHOTOS / "coffee.png"))[100:149, 100:164].astype(np.float32) / 255


def test_what_changes_nothing(photo):
    functions = degradations
    for same in (functions.blur(photo, 0), functions.motion_blur(photo, 1, 30), functions.noise(photo, 0, rng()),
                 functions.resize(photo, 1)):  # fmt: skip
        np.testing.assert_array_equal(same, photo)
    np.testing.assert_allclose(functions.linear_to_srgb(functions.srgb_to_linear(photo)), photo, atol=1e-6)


def test_jpeg_is_opencvs(photo):
    _, content = cv2.imencode(".jpg", (photo * 255).round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 20])
    np.testing.assert_array_equal(degradations.jpeg(photo, 20) * 255, cv2.imdecode(content, cv2.IMREAD_COLOR))


def test_blur_is_a_convolution(photo):
    """By its definition, with a kernel without symmetry; and a point becomes the kernel itself."""
    kernel = rng().random((3, 5)).astype(np.float32)
    point = np.zeros((9, 11, 3), np.float32)
    point[4, 5] = 1
    np.testing.assert_allclose(degradations.convolve(point, kernel)[3:6, 3:8, 1], kernel, atol=1e-6)
    found = degradations.convolve(photo, kernel)
    y, x = 20, 30
    around = photo[y - 1 : y + 2, x - 2 : x + 3, 0][::-1, ::-1]
    assert found[y, x, 0] == pytest.approx((kernel * around).sum(), rel=1e-5)


def test_kernels():
    kernel = degradations.gaussian_kernel(1.5)
    x = np.mgrid[-5:6, -5:6][1]
    assert kernel.sum() == pytest.approx(1, abs=1e-6) and (kernel * x**2).sum() == pytest.approx(1.5**2, rel=0.03)
    np.testing.assert_allclose(kernel, kernel.T)
    line = degradations.motion_kernel(5, 0)
    np.testing.assert_allclose(line[len(line) // 2][1:-1], 0.2, atol=1e-6)
    np.testing.assert_allclose(degradations.motion_kernel(5, 90), line.T, atol=1e-6)
    diagonal = degradations.motion_kernel(7, 45)
    np.testing.assert_allclose(np.fliplr(diagonal), np.fliplr(diagonal).T, atol=1e-6)
    assert np.trace(np.fliplr(diagonal)) > 3 * np.trace(diagonal)  # upwards to the right


def test_noise_and_gray(photo):
    flat = np.full((200, 200, 3), 0.5, np.float32)
    assert (degradations.noise(flat, 20, rng()) - flat).std() * 255 == pytest.approx(20, rel=0.02)
    gray = degradations.gray(photo)
    luma = photo @ np.array([0.114, 0.587, 0.299], np.float32)
    for channel in range(3):
        np.testing.assert_allclose(gray[..., channel], luma, atol=1e-5)


def test_resize_keeps_the_size(photo):
    small = cv2.resize(photo, (round(64 * 0.3), round(49 * 0.3)), interpolation=cv2.INTER_AREA)
    found = degradations.resize(photo, 0.3)
    np.testing.assert_array_equal(found, cv2.resize(small, (64, 49), interpolation=cv2.INTER_CUBIC).clip(0, 1))


def linear(electrons, **changes):
    """Recorded electrons of a flat gray of linear value 0.25 (before amplification), many rows and columns."""
    values = {"ratio": 50.0, "electrons": electrons, "read": 0.0, "row": 0.0, "bits": 24, **changes}
    image = np.full((300, 400, 3), degradations.linear_to_srgb(np.float64(0.25)), np.float32)
    lq = degradations.low_light(image, **values, rng=rng())
    return degradations.srgb_to_linear(lq.astype(np.float64)) * electrons / values["ratio"]


def test_low_light_has_the_moments_of_its_parts():
    mean = 0.25 * 20000 / 50  # 100 electrons
    shot = linear(20000.0)
    assert shot.mean() == pytest.approx(mean, rel=1e-3) and shot.var() == pytest.approx(mean, rel=0.02)
    assert linear(20000.0, read=8.0).var() == pytest.approx(mean + 64, rel=0.02)
    rows = linear(20000.0, row=8.0)
    assert rows.mean(1).var() == pytest.approx(64, rel=0.15)  # of 900 rows
    assert (rows - rows.mean(1, keepdims=True)).var() == pytest.approx(mean, rel=0.02)
    coarse = linear(20000.0, bits=10)
    steps = coarse / (20000 / 2**10)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-2)
    assert len(np.unique(steps.round())) < 10


def test_low_light_saturates_and_is_clean_where_light_is_plenty(photo):
    clean = degradations.low_light(photo, 1.0, 1e9, 0.0, 0.0, 24, rng())
    np.testing.assert_allclose(clean, photo, atol=2e-3)
    dark = degradations.low_light(photo, 300.0, 1000.0, 2.0, 1.0, 12, rng())
    assert dark.dtype == np.float32 and dark.min() == 0 and dark.max() == 1


CHAIN = [
    {"type": "blur", "sigma": [0.5, 2]},
    {"type": "noise", "sigma": 10},
    {"type": "resize", "scale": [0.5, 1]},
    {"type": "jpeg", "quality": [20, 90]},
    {"type": "gray", "probability": 0.5},
    {"type": "blur", "sigma": [0.5, 2], "probability": 0.5},
]


def test_a_chain_is_its_functions_in_their_order(photo):
    steps = degradations.chain([CHAIN[0], CHAIN[1], CHAIN[3]])
    found, values = degradations.degrade(steps, photo, rng(3))
    assert list(values) == ["blur_sigma", "noise_sigma", "jpeg_quality"]
    assert 0.5 <= values["blur_sigma"] <= 2 and values["noise_sigma"] == 10 and values["jpeg_quality"] in range(20, 91)
    stream = rng(3)
    stream.random(), stream.uniform(), stream.random(), stream.uniform()
    expected = degradations.noise(degradations.blur(photo, values["blur_sigma"]), 10, stream)
    np.testing.assert_array_equal(found, degradations.jpeg(expected, values["jpeg_quality"]))
    other, _ = degradations.degrade(degradations.chain([CHAIN[3], CHAIN[1], CHAIN[0]]), photo, rng(3))
    assert np.abs(other - found).max() > 0.01


def test_what_is_left_out_is_nan(photo):
    steps = degradations.chain([CHAIN[5], CHAIN[5]])
    seen = [degradations.degrade(steps, photo, rng(seed))[1] for seed in range(40)]
    assert set(seen[0]) == {"blur_sigma", "blur2_sigma"}
    kinds = {tuple(math.isnan(v) for v in values.values()) for values in seen}
    assert len(kinds) == 4
    skipped = next(s for s, values in enumerate(seen) if all(map(math.isnan, values.values())))
    np.testing.assert_array_equal(degradations.degrade(steps, photo, rng(skipped))[0], photo)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "blurr", "sigma": 1}, "degradations:0:type: there is no degradation 'blurr'; did you mean 'blur'"),
        ({"sigma": 1}, "degradations:0:type: there is no degradation None"),
        ({"type": ["blur"], "sigma": 1}, r"degradations:0:type: there is no degradation \['blur'\]"),
        ({"type": "blur", "sigmas": 1}, "degradations:0:sigmas; did you mean 'sigma'"),
        ({"type": "blur"}, "degradations:0:sigma is missing"),
        ({"type": "jpeg", "quality": 10.5}, "degradations:0:quality: a whole number or .*within 1 .. 100.* got 10.5"),
        ({"type": "jpeg", "quality": [50, 101]}, r"degradations:0:quality: .* got \[50, 101\]"),
        ({"type": "noise", "sigma": [3, 2]}, r"degradations:0:sigma: .* got \[3, 2\]"),
        ({"type": "gray", "probability": 2}, "degradations:0:probability: .* got 2"),
        ({"type": "gray", "probability": [0, 1]}, "degradations:0:probability: one number"),
    ],
)
def test_wrong_chains_are_named_by_the_options(entry, message):
    mixed = {"type": "MixedDegradationDataset", "quality": None, "degradations": [entry]}
    with pytest.raises(UserError, match=f"option datasets:train:{message}"):
        check_options(merged(TINY, {"datasets": {"train": mixed}}), True)


def test_keys_of_other_datasets_have_no_meaning():
    for kind, key, value in (("JPEGDataset", "ratio", 100), ("LowLightDataset", "quality", 10), ("JPEGDataset", "degradations", CHAIN)):  # fmt: skip
        with pytest.raises(UserError, match=f"datasets:val:{key} has no meaning for {kind}"):
            check_options(merged(TINY, {"datasets": {"val": {"type": kind, key: value}}}), True)


@pytest.fixture
def options(workplace):
    return {
        "LowLightDataset": {"ratio": [100, 300]},
        "MixedDegradationDataset": {"degradations": CHAIN},
        "JPEGDataset": {"quality": [10, 90]},
    }, {"name": "d", "scale": 1, "gt_size": 16, "use_hflip": True, "use_rot": True, "dataroot_gt": str(workplace.folder / "photos")}  # fmt: skip


@pytest.mark.parametrize("kind", ["LowLightDataset", "MixedDegradationDataset", "JPEGDataset"])
def test_samples_are_functions_of_the_seed_and_the_image(options, kind):
    own, common = options
    opt = {**common, **own[kind], "type": kind}
    train = build_dataset({**opt, "phase": "train"})
    drawn = [KeyedDataset(train, 3)[(i % 3, i)] for i in range(6)]
    again = [KeyedDataset(train, 3)[(i % 3, i)] for i in reversed(range(6))][::-1]
    for a, b in zip(drawn, again):
        assert torch.equal(a["lq"], b["lq"]) and a["lq"].shape == a["gt"].shape == (3, 16, 16)
        torch.testing.assert_close(a["condition"], b["condition"], rtol=0, atol=0, equal_nan=True)
        assert a["lq"].min() >= 0 and a["lq"].max() <= 1 and not torch.equal(a["lq"], a["gt"])
    assert not torch.equal(drawn[0]["lq"], drawn[3]["lq"])
    assert {len(column) for column in default_collate(drawn)["condition"].values()} == {6}
    test = build_dataset({**opt, "phase": "val"})
    assert torch.equal(test[1]["lq"], test[1]["lq"]) and test[1]["lq"].shape[-2:] == (40, 36)
    if kind != "JPEGDataset":
        other = build_dataset({**opt, "phase": "val", "seed": 1})
        assert not torch.equal(other[1]["lq"], test[1]["lq"])


def test_the_conditions_are_what_was_done(options):
    own, common = options
    for kind, name, low, high in (("LowLightDataset", "ratio", 100, 300), ("JPEGDataset", "quality", 10, 90)):
        dataset = KeyedDataset(build_dataset({**common, **own[kind], "type": kind, "phase": "train"}), 0)
        values = [dataset[(0, i)]["condition"][name] for i in range(60)]
        assert low <= min(values) < low + 0.2 * (high - low) and high - 0.2 * (high - low) < max(values) <= high
    sample = dataset[(0, 5)]  # of the JPEGDataset: the crop compressed at the quality that it names
    gt = sample["gt"].numpy().transpose(1, 2, 0)[..., ::-1]
    lq = degradations.jpeg(gt, sample["condition"]["quality"])
    np.testing.assert_array_equal(sample["lq"].numpy().transpose(1, 2, 0)[..., ::-1], lq)


def test_wrong_ranges_are_named(options):
    _, common = options
    with pytest.raises(UserError, match=r"d: ratio: .*within 1 .. 10000 is expected, got 0"):
        build_dataset({**common, "type": "LowLightDataset", "phase": "val", "ratio": 0})
    with pytest.raises(UserError, match=r"d: degradations is missing"):
        build_dataset({**common, "type": "MixedDegradationDataset", "phase": "val"})
