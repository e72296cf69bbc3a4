"""Each patch of BasicSR against what upstream does wrong."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from basicsr.data.degradations import random_add_jpg_compression
from basicsr.metrics import calculate_niqe
from basicsr.models.base_model import BaseModel
from conftest import PHOTOS

from ucdir_plugin.utils.errors import UserError


def model_with(scheduler, lr=1.0):
    model = BaseModel({"num_gpu": 0, "is_train": True, "train": {"scheduler": dict(scheduler)}, "dist": False})
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    model.optimizers = [model.get_optimizer("SGD", [parameter], lr)]
    model.setup_schedulers()
    return model


def rates(model, iterations, warmup):
    result = []
    for i in range(1, iterations + 1):
        model.update_learning_rate(i, warmup_iter=warmup)
        result.append(model.get_current_learning_rate()[0])
        model.optimizers[0].step()
    return result


def test_warm_up_ends_at_the_full_rate():
    model = model_with({"type": "MultiStepLR", "milestones": [8], "gamma": 0.5})
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.5, 0.5]
    np.testing.assert_allclose(rates(model, 10, warmup=4), expected)


def test_cosine_holds_its_end_past_the_last_period():
    model = model_with({"type": "CosineAnnealingRestartLR", "periods": [4], "eta_min": 0.1})
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * min(i, 4) / 4)) for i in range(8)]
    np.testing.assert_allclose(rates(model, 8, warmup=-1), expected)


def test_any_optimizer_of_torch():
    model = BaseModel({"num_gpu": 0, "is_train": True})
    optimizer = model.get_optimizer("AdamW", [torch.nn.Parameter(torch.zeros(1))], 1e-4, weight_decay=0.01)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    with pytest.raises(UserError, match="did you mean .*'AdamW'"):
        model.get_optimizer("Adamw", [], 1e-4)


def test_jpeg_compression_takes_a_drawn_quality():
    image = np.random.rand(16, 16, 3).astype(np.float32)
    assert random_add_jpg_compression(image, (30.5, 60.5)).shape == image.shape


def test_ema_takes_buffers_too():
    model = BaseModel({"num_gpu": 0, "is_train": True})
    model.net_g, model.net_g_ema = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    model.net_g.running_mean.fill_(3.0)
    with torch.no_grad():
        model.model_ema(0.5)
    torch.testing.assert_close(model.net_g_ema.running_mean, torch.full((2,), 3.0))


def test_niqe_is_basicsrs_own():
    import cv2

    # Measured with BasicSR 1.4.2 on this photograph; baboon.png, of BasicSR's docs, is not free to ship.
    assert calculate_niqe(cv2.imread(str(PHOTOS / "astronaut.png")), crop_border=0) == pytest.approx(3.0646, abs=1e-3)


def test_a_script_with_its_own_stand_in_for_functional_tensor():
    """A common workaround: a module without a spec, which importlib.util.find_spec refuses to look at."""
    script = """
import sys, types, torchvision.transforms.functional as f
stand_in = types.ModuleType("torchvision.transforms.functional_tensor")
stand_in.rgb_to_grayscale = f.rgb_to_grayscale
sys.modules[stand_in.__name__] = stand_in
import basicsr, ucdir_plugin
assert sys.modules[stand_in.__name__] is stand_in
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
