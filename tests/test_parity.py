"""Agreement with numbers computed from UCDIR's released code (tests/reference)."""

import json

import numpy as np
import pytest
import torch
from conftest import REFERENCE, reference

from ucdir_plugin.archs import UCDIR, UCDIRDenoiser
from ucdir_plugin.archs.ucdir_blocks import AKGBlock, resize
from ucdir_plugin.diffusion import samplers
from ucdir_plugin.diffusion.schedule import NoiseSchedule, diffuse
from ucdir_plugin.losses import NoisePredictionLoss

TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def small():
    arrays = reference("ucdir_reference.npz")
    config = json.loads(bytes(arrays["config_json"]))
    assert config.pop("norm_groups") == 1
    net = UCDIRDenoiser(**config, released_padding=True).eval()
    net.load_state_dict({k[len("denoiser/") :]: v for k, v in arrays.items() if k.startswith("denoiser/")})
    return arrays, net


@torch.no_grad()
def test_padded_forward(small):
    a, net = small
    torch.testing.assert_close(net(a["fwd_x"], a["fwd_noise_level"], a["fwd_guide"]), a["fwd_out"], **TOLERANCE)


@torch.no_grad()
def test_unpadded_forward(small):
    a, net = small
    config = json.loads(bytes(a["config_json"]))
    config.pop("norm_groups")
    aligned = UCDIRDenoiser(**config).eval()
    aligned.load_state_dict(net.state_dict())
    out = aligned(a["unpadded_x"], a["fwd_noise_level"], a["unpadded_guide"])
    torch.testing.assert_close(out, a["unpadded_out"], **TOLERANCE)


@torch.no_grad()
def test_block(small):
    a, _ = small
    block = AKGBlock(8, 16, emb_dim=8)
    block.load_state_dict({k[len("block/") :]: v for k, v in a.items() if k.startswith("block/")})
    features = block.guide_features(resize(a["block_guide"], a["block_x"].shape[-2:]))
    torch.testing.assert_close(block(a["block_x"], a["block_emb"], features), a["block_out"], **TOLERANCE)


def test_schedule(small):
    a, _ = small
    schedule = NoiseSchedule.linear(50, 1e-6, 0.4)
    names = {"alphas_cumprod": "alpha_bar", "sqrt_alphas_cumprod_prev": "levels"}
    keys = [k for k in a if k.startswith("sched50/")]
    assert len(keys) == 7
    for key in keys:
        name = key[len("sched50/") :]
        np.testing.assert_allclose(getattr(schedule, names.get(name, name)), a[key], atol=1e-4, rtol=1e-4)


def test_trajectory(small):
    a, net = small
    config = json.loads(bytes(a["traj_schedule_json"]))
    schedule = NoiseSchedule.linear(config["n_timestep"], config["linear_start"], config["linear_end"])
    lq, initial = a["traj_lq"], a["traj_initial"]
    result = samplers.ddpm(
        lambda x, level: net(torch.cat((lq, x), 1), level, initial), schedule, lambda draw: a["traj_noises"][draw]
    )
    torch.testing.assert_close(result[0], a["traj_residual"], **TOLERANCE)


@torch.no_grad()
def test_loss(small):
    a, net = small
    lq, initial = a["traj_lq"], a["traj_initial"]
    x_t = diffuse(a["loss_hr"] - initial, a["loss_level"], a["loss_noise"])
    torch.testing.assert_close(x_t, a["loss_xnoisy"], **TOLERANCE)
    eps = net(torch.cat((lq, x_t), 1), a["loss_level"], initial)
    torch.testing.assert_close(NoisePredictionLoss()(eps, a["loss_noise"]), a["loss_l1_mean"], **TOLERANCE)


def released_keys():
    lines = (REFERENCE / "ucdir_sid_checkpoint_keys.txt").read_text().splitlines()
    return {key: json.loads(shape) for key, shape in (line.split(" ", 1) for line in lines if line)}


def formula_state():
    """Weights of the full model by the formula of UCDIR.md, so that no checkpoint is needed."""
    state = {}
    for j, (key, shape) in enumerate(released_keys().items()):
        count = int(np.prod(shape))
        base = np.sin(0.7 * np.arange(count) + j)
        if len(shape) > 1:
            value = base / np.sqrt(count / shape[0])
        elif ("norm" in key and key.endswith("weight")) or key.endswith("final_conv.0.weight"):
            value = 1 + 0.1 * base
        else:
            value = 0.1 * base
        state[key] = torch.from_numpy(value.reshape(shape)).float()
    return state


def test_default_network_has_the_released_keys_and_shapes():
    with torch.device("meta"):
        net = UCDIR(denoiser={"type": "UCDIRDenoiser"}, predictor={"type": "SIDUNet"})
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == released_keys()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert round(count["denoise_fn"] / 1e6, 2) == 97.35
    assert round(count["predictor"] / 1e6, 2) == 7.76


@torch.no_grad()
def test_full_network():
    a = reference("ucdir_full_reference.npz")
    net = UCDIR(
        denoiser={"type": "UCDIRDenoiser", "released_padding": True},
        predictor={"type": "SIDUNet", "released_padding": True},
    ).eval()
    net.load_state_dict(formula_state())
    initial = net.predict(a["lq"])
    torch.testing.assert_close(initial, a["initial"], **TOLERANCE)
    eps = net.denoise(a["x_t"], a["noise_level"], a["lq"], initial)
    torch.testing.assert_close(eps, a["eps"], **TOLERANCE)
