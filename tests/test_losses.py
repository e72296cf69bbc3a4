"""Diffusion losses against their formulas."""

import pytest
import torch
from basicsr.losses import build_loss

from ucdir_plugin.utils.errors import UserError


def setup_function():
    torch.manual_seed(0)


PRED, TARGET = torch.tensor([[[[1.0, -2.0]]], [[[0.5, 0.5]]]]), torch.zeros(2, 1, 1, 2)
LEVEL = torch.tensor([0.6, 0.8])  # SNR 0.5625 and 16 / 9
SNR = LEVEL**2 / (1 - LEVEL**2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1.5 + 0.5) / 2),
        ({"criterion": "l2"}, (2.5 + 0.25) / 2),
        ({"loss_weight": 3.0}, 3.0),
        ({"weighting": "min_snr", "gamma": 1.0}, (1.5 + 0.5 / float(SNR[1])) / 2),
        ({"weighting": "p2", "gamma": 1.0}, (1.5 / (1 + float(SNR[0])) + 0.5 / (1 + float(SNR[1]))) / 2),
    ],
)
def test_values(options, expected):
    loss = build_loss({"type": "NoisePredictionLoss", **options})
    assert float(loss(PRED, TARGET, LEVEL)) == pytest.approx(expected, rel=1e-5)


def test_a_clean_image_has_a_finite_weight():
    for weighting in ("min_snr", "p2"):
        loss = build_loss({"type": "NoisePredictionLoss", "weighting": weighting})
        assert loss(PRED, TARGET, torch.ones(2)).isfinite()


def test_usable_by_other_models_without_a_level():
    assert float(build_loss({"type": "NoisePredictionLoss"})(PRED, TARGET)) == pytest.approx(1.0)
    with pytest.raises(UserError, match="needs the noise level"):
        build_loss({"type": "NoisePredictionLoss", "weighting": "p2"})(PRED, TARGET)


def test_wrong_names():
    with pytest.raises(UserError, match="criterion 'l3'"):
        build_loss({"type": "NoisePredictionLoss", "criterion": "l3"})
    with pytest.raises(UserError, match="weighting 'snr'"):
        build_loss({"type": "NoisePredictionLoss", "weighting": "snr"})
