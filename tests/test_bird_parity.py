"""Agreement with numbers computed from OpenAI's U-Net and from BIR-D's released steps (tests/reference)."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REFERENCE, reference

from ucdir_plugin.archs import ADMUNet
from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel
from ucdir_plugin.diffusion.bird.solver import Solver
from ucdir_plugin.diffusion.bird.tasks import preset
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.zoo.priors import network_prior

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CONFIG = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
    "attention_resolutions": [16],
    "num_head_channels": 16,
}
STEPS = sorted(path.name for path in REFERENCE.glob("bird_step_*.npz"))
# What a step is given, or what the paths to its outputs need.
INPUTS = {
    "x_t",
    "t_index",
    "t_model",
    "y",
    "kernel_in",
    "mask_in",
    "scale_in",
    "prev_log_variance",
    "step_noise",
    "y_noise",
}


def public_shapes():
    lines = (REFERENCE / "imagenet256_uncond_params.txt").read_text().splitlines()
    return {
        k: [int(n) for n in v.split(",")] for k, v in (line.split("\t") for line in lines if not line.startswith("#"))
    }


def test_default_network_has_the_public_checkpoints_keys_and_shapes():
    with torch.device("meta"):
        net = ADMUNet()
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == public_shapes()
    assert list(net.state_dict()) == list(public_shapes())
    assert sum(p.numel() for p in net.parameters()) == 552814086


@pytest.fixture(scope="module")
def small():
    arrays = reference("unet_small.npz")
    described = json.loads((REFERENCE / "unet_small.json").read_text())
    net = ADMUNet(**CONFIG).eval().requires_grad_(False)
    net.load_state_dict({k[len("param/") :]: v for k, v in arrays.items() if k.startswith("param/")})
    assert sum(p.numel() for p in net.parameters()) == described["n_params"]
    return arrays, net


@torch.no_grad()
def test_small_network(small):
    a, net = small
    torch.testing.assert_close(net(a["x"], torch.from_numpy(a["t"])), a["out"], rtol=0, atol=1e-4)


def as_our_scale(value):
    return -torch.as_tensor(value)  # the release's sign ascends


@pytest.mark.parametrize("name", STEPS)
def test_released_step(small, name, monkeypatch):
    """Every array of the file: given, or found.

    The step is given the release's own output of the network, which is compared apart: at t = 999 a step multiplies the
    rounding of a network by 157.
    """
    a = reference(name)
    low_light = "lowlight" in name
    settings = preset("released", "lowlight" if low_light else "deblur")
    passes = len(a["loss"])
    assert passes == (1 if low_light else settings.passes)
    if "y_noise" not in a:  # four visits of the one patch, without noise on y
        settings = replace(settings, noise_target=False, passes=1)
    prior = network_prior(small[1], NoiseSchedule.linear(1000, 1e-4, 0.02))
    degradation = Degradation(
        a["kernel_in"][None], a["mask_in"][None, None], padding=settings.padding, mask_used=low_light
    )

    def noise(shape, draw, *key):
        assert draw == 1
        return a["y_noise"][key[1]][None] if key else a["step_noise"]

    solver = Solver(prior, [(a["y"], degradation)], settings, noise)
    observation, t = solver.observations[0], int(a["t_index"])
    if low_light:
        observation.scale = torch.as_tensor(a["scale_in"])
    else:
        if name == "bird_step_deblur_first_cleany.npz":  # the preset starts as the release did
            assert settings.data.scale.initial == as_our_scale(a["scale_in"])
            torch.testing.assert_close(a["prev_log_variance"], torch.ones(1, 3, 32, 32))
        else:
            observation.scale = as_our_scale(a["scale_in"]).view(1)
            solver.previous = a["prev_log_variance"]
    torch.testing.assert_close(
        prior.timestep(torch.tensor([solver.schedule.alpha_bar[t] ** 0.5])), torch.tensor([float(a["t_model"][0])])
    )
    x_t = a["x_t"]
    level = x_t.new_full((1,), float(solver.schedule.alpha_bar[t] ** 0.5))
    model_output = prior(x_t, level)

    def released_network(x, timestep):
        torch.testing.assert_close(x, x_t.expand_as(x), rtol=0, atol=0)
        torch.testing.assert_close(timestep, torch.full((len(x),), float(a["t_model"][0])))
        return a["model_output"].expand(len(x), -1, -1, -1)

    monkeypatch.setattr(small[1], "forward", released_network)
    done = solver.step(0, x_t, t)
    losses, grads = degradation.gradients(
        (a["x0_hat"] + 1) / 2, observation.targets, ("x", "kernel", "mask") if low_light else ("x", "kernel")
    )
    data_step = done.data_step

    def each(found):  # identical passes are computed once
        return found.expand(passes, *found.shape[1:])

    found = {
        "model_output": model_output,
        "x0_hat": done.x0,
        "mean_unguided": done.mean_unguided,
        "log_variance": solver.log_variance(x_t, solver.predict(x_t, t)[1], t),
        "loss": each(data_step.loss[0])[:, 0],
        "dloss_dx0": each(data_step.gradient[0])[:, 0],
        "dloss_dkernel": each(grads["kernel"])[:, 0],
        "grad_mean_shift": each(data_step.shift[0])[:, 0],
        "scale_used_in_loss": as_our_scale(data_step.scale[0][0]),
        "mean_guided": done.mean,
        "kernel_out": observation.degradation.kernel[0],
        "mask_out": observation.degradation.mask[0, 0],
        "x_prev": done.x_prev,
    }
    torch.testing.assert_close(each(losses)[:, 0], a["loss"], **TOLERANCE)
    if low_light:
        found["dloss_dmask"] = grads["mask"][0, 0, 0]
        found["scale_out"] = observation.scale  # passes through: nothing has a use for it
    else:
        terms = done.terms[0]
        found |= {f"term_{k}": terms[k][0] for k in ("inner", "C", "logN")}
        found |= {"denominator": terms["denominator"][0], "scale_out": as_our_scale(observation.scale[0])}
    assert set(a) - INPUTS <= set(found)
    for key in set(a) - INPUTS:
        torch.testing.assert_close(
            found[key], torch.as_tensor(a[key]), **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_the_release_starts_from_its_own_gaussian():
    kernel = reference("bird_step_deblur_first_cleany.npz")["kernel_in"]
    torch.testing.assert_close(start_kernel(1, 9, "edges", sigma=2.0)[0], kernel, rtol=0, atol=1e-7)


def test_timesteps_of_all_levels():
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    prior = network_prior(ADMUNet(**CONFIG), schedule)
    levels = torch.from_numpy(schedule.levels[1:]).float()
    np.testing.assert_array_equal(prior.timestep(levels).numpy(), np.arange(1000))
    between = torch.tensor([(schedule.levels[401] * schedule.levels[402]) ** 0.5])
    assert 400 < float(prior.timestep(between)) < 401
