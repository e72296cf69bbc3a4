"""NaN and infinity at every door: found at the step, by name. Precisions and threads: how far results may differ."""

from __future__ import annotations

import logging
import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from basicsr.utils import get_root_logger
from conftest import EDSR, TINY, TINY_PREDICTOR, merged
from test_model import batch, make, step, weights_of
from torch import nn
from ucdir_cli.command_line import parse_run_arguments

from ucdir_plugin.cli import run as run_command
from ucdir_plugin.data.loader import KeyedDataset
from ucdir_plugin.diffusion import samplers
from ucdir_plugin.diffusion.bird.solver import Solver
from ucdir_plugin.diffusion.bird.tasks import TASKS, preset
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.registry import build_arch
from ucdir_plugin.training.steps import Stepper
from ucdir_plugin.utils import training_states
from ucdir_plugin.utils.checkpoints import not_finite
from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def told(caplog):
    """What the root logger of BasicSR says."""
    logger = get_root_logger()
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


# Training


@pytest.mark.parametrize("value", BAD)
def test_an_image_with_nan_is_named(value):
    sample = {"lq": torch.rand(3, 4, 4), "gt": torch.rand(3, 4, 4), "gt_path": "photos/cat.png", "lq_path": "l.png"}
    sample["condition"] = {"quality": math.nan}  # left out
    assert KeyedDataset([sample], 0)[0, 7]["sample_number"] == 7
    sample["gt"][1, 2, 3] = value
    with pytest.raises(UserError, match=r"image photos/cat.png \(gt\) holds NaN or infinite values"):
        KeyedDataset([sample], 0)[0, 7]


@pytest.mark.parametrize("engine_name", ["basicsr", "mmengine"])
def test_an_image_with_nan_ends_training_and_keeps_the_checkpoint(workplace, engine_name, monkeypatch):
    from ucdir_plugin.data.jpeg_dataset import JPEGDataset

    taken, whole = [], JPEGDataset.__getitem__

    def sometimes(self, index):
        sample = whole(self, index)
        taken.append(index)
        if len(taken) > 8:
            sample["lq"][0, 0, 0] = math.nan
        return sample

    monkeypatch.setattr(JPEGDataset, "__getitem__", sometimes)
    monkeypatch.chdir(workplace.folder)
    opt = workplace.write(merged(TINY, {"engine": engine_name, "datasets": {"val": None}}))
    with pytest.raises(UserError, match=r"image .*\.png \(lq\) holds NaN"):
        run_command.train(parse_run_arguments("", ["-opt", opt]))
    root = workplace.folder / "experiments" / "tiny"
    assert (root / ("models/net_g_2.pth" if engine_name == "basicsr" else "iter_2.pth")).is_file()


@pytest.mark.parametrize("where, value", [("l_eps", math.nan), ("l_initial", math.inf), ("l_eps", -math.inf)])
def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(told, where, value):
    """Also where its gradient is finite: that of |x - infinity| is 1."""
    model = make({"train": {"max_bad_steps": 3}})
    step(model, 1, batch())
    before, average = weights_of(model.net_g), weights_of(model.net_g_ema)
    terms = model.task.terms

    def bad(net, part):
        losses, errors = terms(net, part)
        return {**losses, where: losses[where] + value}, errors

    model.task.terms = bad
    step(model, 2, batch())
    assert f"iteration 2: the loss {where} is {value}; step skipped (1)" in told.text
    torch.testing.assert_close(weights_of(model.net_g), before, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(model.net_g_ema), average, rtol=0, atol=0)
    with pytest.raises(UserError, match=rf"stopped at iteration 4: 3 steps in a row .*the loss {where} is {value}"):
        for i in range(3, 5):
            step(model, i, batch())


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("value", BAD)
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(told, value, clip):
    model = make({"train": {"grad_clip": clip}})
    name, weight = list(model.net_g.named_parameters())[5]
    before = weights_of(model.net_g)
    handle = weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor(0), value))
    step(model, 1, batch())
    assert f"iteration 1: the gradient of {name} is not finite; step skipped (1)" in told.text
    torch.testing.assert_close(weights_of(model.net_g), before, rtol=0, atol=0)
    handle.remove()
    step(model, 2, batch())
    assert model.stepper.bad_in_a_row == 0 and not torch.equal(weights_of(model.net_g), before)


@pytest.mark.parametrize("change", [{"lr": 1e38}, {"lr": 1e-3, "eps": 0.0}], ids=["rate", "no eps"])
def test_weights_that_a_step_destroys_stop_at_once(change):
    """The gradient of that step is finite: neither the average nor a checkpoint may take the weights."""
    model = make({"train": {"optim_g": change}})
    step(model, 1, batch()) if change["lr"] < 1 else None
    average = weights_of(model.net_g_ema)
    if "eps" in change:  # Adam divides 0 by 0 where a gradient has always been 0
        name, weight = next(iter(model.net_g.named_parameters()))
        for value in model.optimizer_g.state[weight].values():
            value.zero_() if value.dim() else None
        weight.register_hook(lambda grad: grad * 0)
    else:
        name = ""
    with pytest.raises(UserError, match=f"stopped at iteration 2: the weight .*{name}.* is no longer finite; the last"):
        for _ in range(9):
            step(model, 2, batch())
    torch.testing.assert_close(weights_of(model.net_g_ema), average, rtol=0, atol=0, equal_nan=False)
    assert not_finite(model.net_g_ema) is None


def test_a_weight_that_turns_nan_between_steps_is_named():
    model = make()
    step(model, 1, batch())
    average = weights_of(model.net_g_ema)
    name, weight = list(model.net_g.named_parameters())[3]
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    with pytest.raises(UserError, match=f"stopped at iteration 2: the weight {name} is no longer finite"):
        step(model, 2, batch())
    torch.testing.assert_close(weights_of(model.net_g_ema), average, rtol=0, atol=0)


def test_a_run_ends_with_code_2_and_keeps_its_last_good_checkpoint(workplace, monkeypatch, capsys):
    """The scheduler makes the rate destructive after three iterations."""
    options = merged(
        TINY,
        {
            "datasets": {"val": None},
            "train": {
                "total_iter": 8,
                "warmup_iter": -1,
                "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 1e60},
            },
            "logger": {"save_checkpoint_freq": 1},
        },
    )
    monkeypatch.chdir(workplace.folder)
    for name in ("basicsr", "mmengine"):
        args = parse_run_arguments("", ["-opt", workplace.write({**options, "name": name, "engine": name})])
        assert run_cli(lambda args=args: run_command.train(args)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.match(
            r"error: training stopped at iteration 4: the weight \S+ is no longer finite; the last checkpoint", error
        )
        root = workplace.folder / "experiments" / name
        files = [*root.rglob("net_g_*.pth"), *root.rglob("iter_*.pth")]
        assert files
        for file in files:
            state = torch.load(file, weights_only=True)
            state = state.get("state_dict", state)
            flat = {**state.get("params", {}), **state.get("params_ema", {})} or state
            assert all(v.isfinite().all() for v in flat.values() if v.is_floating_point()), file


def test_basicsrs_own_model_saves_no_nan(workplace, monkeypatch):
    """It steps whatever the gradient is: its last loss was finite, its weights are not."""
    train = {
        "total_iter": 6,
        "optim_g": {"type": "Adam", "lr": 1e-3},
        "pixel_opt": {"type": "L1Loss"},
        "scheduler": {"type": "MultiStepLR", "milestones": [100], "gamma": 0.5},
    }
    changes = {"scale": 1, "network_g": {"type": "SIDUNet", **{k: v for k, v in TINY_PREDICTOR.items() if k != "type"}}}
    options = {**EDSR, "name": "sr", **changes, "path": {}, "train": train, "logger": {"save_checkpoint_freq": 1}}
    options["datasets"] = {"train": TINY["datasets"]["train"]}
    from basicsr.models.sr_model import SRModel

    stepped = SRModel.optimize_parameters

    def lost(self, iteration):
        stepped(self, iteration)
        if iteration == 3:
            with torch.no_grad():
                next(self.net_g.parameters()).fill_(math.nan)

    monkeypatch.setattr(SRModel, "optimize_parameters", lost)
    monkeypatch.chdir(workplace.folder)
    with pytest.raises(UserError, match="stopped at iteration 3, which is not saved: .* of net_g holds NaN"):
        run_command.train(parse_run_arguments("", ["-opt", workplace.write(options)]))
    assert sorted(p.name for p in (workplace.folder / "experiments/sr/models").iterdir()) == [
        "net_g_1.pth",
        "net_g_2.pth",
    ]


def small_stepper(**arguments):
    net = nn.Linear(2, 1)
    return net, Stepper(torch.optim.SGD(net.parameters(), 0.1), net, **arguments)


def test_fp16_lowers_its_scale_before_it_counts(caplog):
    """On the CPU too, where options refuse it: the scaler is torch's."""
    net, stepper = small_stepper(amp="fp16", limit=2)
    logger = logging.getLogger("scaler")
    weight = net.weight.detach().clone()

    def once(loss):
        stepper.optimizer.zero_grad()
        stepper.backward(loss)
        return stepper.step(1, {"l": loss.detach()}, logger)

    scale = stepper.scaler.get_scale()
    assert scale > 1
    assert not once(net(torch.ones(1, 2)).sum() * 1e36)  # times the scale an overflow, alone it is none
    assert stepper.scaler.get_scale() == scale / 2 and stepper.bad == 0
    assert torch.equal(net.weight, weight)
    assert once(net(torch.ones(1, 2)).sum())
    with pytest.raises(UserError, match="2 steps in a row"):  # NaN is none that a lower scale cures
        for _ in range(40):
            once(net(torch.full((1, 2), math.nan)).sum())


def test_a_norm_that_overflows_while_gradients_are_finite_is_counted():
    """The scaler sees finite gradients and does not lower its scale: without a count it would go on for ever."""
    net, stepper = small_stepper(amp="fp16", limit=3)
    with pytest.raises(UserError, match=r"3 steps in a row .*the norm of the gradient"):
        for _ in range(4):
            stepper.optimizer.zero_grad()
            loss = net(torch.full((1, 2), 1e30)).sum()
            stepper.backward(loss)
            stepper.step(1, {"l": torch.tensor(1.0)}, logging.getLogger("norm"))


# Weights from files


@pytest.mark.parametrize("value", BAD)
def test_a_checkpoint_with_nan_is_refused_by_name(tmp_path, value):
    net = build_arch(TINY_PREDICTOR)
    state = net.state_dict()
    name = list(state)[2]
    state[name].view(-1)[-1] = value
    training_states.atomic_save({"params": state}, tmp_path / "net.pth")
    from ucdir_plugin.utils.checkpoints import load_into

    with pytest.raises(UserError, match=rf"net.pth is damaged: {name} holds NaN or infinite values"):
        load_into(build_arch(TINY_PREDICTOR), str(tmp_path / "net.pth"))


def test_an_infinite_mask_is_no_damage():
    net = nn.BatchNorm1d(2)
    net.register_buffer("mask", torch.tensor([-math.inf, 0]))
    assert not_finite(net) is None
    net.running_mean[0] = math.nan
    assert not_finite(net) == "running_mean"


# Sampling


@pytest.mark.parametrize("name", list(samplers.SAMPLERS))
@pytest.mark.parametrize("value", BAD)
def test_a_denoiser_that_overflows_is_not_taken_for_white(name, value):
    """x_0 is clamped to [-1, 1], and the clamp of infinity is 1."""

    def denoise(x, level):
        eps = torch.zeros_like(x)
        eps[..., 2, 3] = value
        return eps

    noise = image_noise(0, ["a"])
    schedule = NoiseSchedule.linear(20, 1e-3, 0.2).respace(4)
    found = samplers.SAMPLERS[name].sample(denoise, schedule, lambda k: noise((1, 3, 4, 5), k))
    assert found[..., 2, 3].isnan().all()
    assert found.isfinite().sum() == 3 * 19


@pytest.mark.parametrize("value", BAD)
def test_a_prior_that_overflows_is_named(value):
    from ucdir_plugin.diffusion.prior import GaussianPrior

    prior, settings = GaussianPrior.natural(12, 12), replace(preset("default"), kernel_size=1)

    class Overflows(GaussianPrior):
        def __call__(self, x_t, level):
            eps = super().__call__(x_t, level)
            eps[1, 0, 3, 4] = value
            return eps

    bad = Overflows(prior.spectrum)
    y = torch.rand(2, 3, 12, 12) * 2 - 1
    degradation = TASKS["blind"].degradation(y, settings)
    found = Solver(bad, [(y, degradation)], settings, image_noise(0, ["a", "b"]), names=["a.png", "b.png"]).run()
    assert found.failed == [None, "b.png: the prior's prediction turned non-finite in step 1"]
    assert found.image[1].isnan().all() and found.image[0].isfinite().all()


# Precisions and threads


def restoring(net: nn.Module, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """eps of a UCDIR network, from its own prediction."""
    lq = x.flip(-1)
    return net.denoise(x, level, lq, net.prepare(net.guide(lq, net.predict(lq))), None)


ADM = {
    "type": "ADMUNet",
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "num_head_channels": 16,
}
NETWORKS = {
    "predictor": (TINY_PREDICTOR, lambda net, x, level: net(x)),
    "UCDIR, AKGM": (TINY["network_g"], restoring),
    "UCDIR, addition": (merged(TINY["network_g"], {"denoiser": {"integration": "addition"}}), restoring),
    "ADM": (ADM, lambda net, x, level: net(x, level * 999)),
    "FFDNet": ({"type": "FFDNet"}, lambda net, x, level: net(x, level)),
}
BOUNDS = {None: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative RMS difference from float64; measured at most 8e-7, 3.2e-3 and 2.6e-2 (CPU, random weights, -m campaign)."""


@pytest.mark.parametrize("seeds", [1, pytest.param(200, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", NETWORKS)
def test_precisions_agree(name, seeds, record_property):
    """float32, and float16 and bfloat16 by autocast, against the same network in float64 (ADM's body has no such type)."""
    config, call = NETWORKS[name]
    exactly = torch.float32 if name == "ADM" else torch.float64
    worst = dict.fromkeys(BOUNDS, 0.0)
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = build_arch(config).eval()
        for weight in net.parameters():  # those that start at zero hide what is before them
            if not weight.any():
                nn.init.normal_(weight, 0, 0.05)
        x, level = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2)
        with torch.no_grad():
            exact = call(deepcopy(net).to(exactly), x.to(exactly), level.to(exactly)).double()
            for dtype in BOUNDS:
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    found = call(net, x, level).double()
                error = ((found - exact).square().mean() / exact.square().mean()).sqrt()
                worst[dtype] = max(worst[dtype], float(error))
    if seeds > 1:
        figures = ", ".join(f"{str(dtype or 'torch.float32')[6:]} {value:.1e}" for dtype, value in worst.items())
        record_property("largest relative RMS difference", figures)
    assert all(worst[dtype] < bound for dtype, bound in BOUNDS.items()), worst


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("steps", [1, pytest.param(100, marks=pytest.mark.campaign)])
def test_threads_agree(steps, threads, record_property):
    """Gradients of a training step, and a restored image, with 1, 2 and 4 threads, each step from the same weights."""
    model = make({"train": {"optim_g": {"type": "SGD", "lr": 1e-2}, "grad_clip": None}})
    tester = make({"val": {"sampling": {"steps": 2}}}, is_train=False)
    worst = {"gradient": 0.0, "restored, of 255": 0.0}
    for number in range(steps):
        state = deepcopy(model.net_g.state_dict())
        found = {}
        for count in (1, 2, 4):
            threads(count)
            model.net_g.load_state_dict(state)
            step(model, number + 1, batch(2, 32, 2 * number))
            gradient = torch.cat([p.grad.flatten() for p in model.net_g.parameters()])
            tester.net_g.load_state_dict(state)
            tester.feed_data({**batch(1, 40, number), "key": [f"{number}"]})
            tester.test()
            found[count] = gradient, tester.output.clamp(0, 1) * 255
        for count in (2, 4):
            error = (found[count][0] - found[1][0]).norm() / found[1][0].norm()
            worst["gradient"] = max(worst["gradient"], float(error))
            worst["restored, of 255"] = max(
                worst["restored, of 255"], float((found[count][1] - found[1][1]).abs().max())
            )
    if steps > 1:
        for name, value in worst.items():
            record_property(f"largest difference of 2 and 4 threads from 1: {name}", f"{value:.1e}")
    assert worst["gradient"] < 1e-4 and worst["restored, of 255"] < 0.5, worst
