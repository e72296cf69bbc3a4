"""UCDIRModel: steps, averages, faults, sampling; and that it really restores."""

import math

import pytest
import torch
from basicsr.models import build_model
from conftest import TINY, merged

from ucdir_plugin.options.check import check_options
from ucdir_plugin.options.schema import sampling_schedule
from ucdir_plugin.restoration.sampling import plan
from ucdir_plugin.training.task import training_noise
from ucdir_plugin.utils.errors import UserError


def make(changes=None, is_train=True, **path):
    opt = check_options(merged(TINY, changes or {}), True)
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=is_train)
    opt["path"].update(path)
    torch.manual_seed(0)
    return build_model(opt)


def batch(count=4, size=16, first=0):
    torch.manual_seed(1)
    gt = torch.rand(count, 3, size, size)
    return {"lq": (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1), "gt": gt, "sample_number": torch.arange(count) + first}


def step(model, iteration, data):
    model.update_learning_rate(iteration, warmup_iter=-1)
    model.feed_data(data)
    model.optimize_parameters(iteration)


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_each_image_has_its_own_level_and_noise():
    schedule = make().schedule
    levels, noise = training_noise(schedule, [0, 1, 2], (3, 4, 4), seed=0)
    assert len(set(levels.tolist())) == 3
    again, noise_again = training_noise(schedule, [2], (3, 4, 4), seed=0)
    assert again[0] == levels[2]
    torch.testing.assert_close(noise_again[0], noise[2], rtol=0, atol=0)


def test_both_networks_learn_from_the_noise_loss_alone():
    model = make({"train": {"initial_opt": None, "ema_decay": 0.0, "grad_clip": None}})
    step(model, 1, batch())
    for part in (model.net_g.predictor, model.net_g.denoise_fn):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_ema_copies_then_averages():
    model = make({"train": {"ema_start": 2, "ema_decay": 0.9}})
    for iteration in (1, 2):
        step(model, iteration, batch(first=4 * iteration))
        torch.testing.assert_close(weights_of(model.net_g_ema), weights_of(model.net_g), rtol=0, atol=0)
    before = weights_of(model.net_g_ema)
    step(model, 3, batch(first=12))
    decay = 2 / 11  # (1 + n) / (10 + n) at the first update, below 0.9
    expected = decay * before + (1 - decay) * weights_of(model.net_g)
    torch.testing.assert_close(weights_of(model.net_g_ema), expected)


def test_sampling_defaults_without_complete_options():
    opt = merged(TINY, {"val": {"sampling": None}})
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=False, manual_seed=0, path={})
    model = build_model(opt)
    assert len(sampling_schedule(model.schedule, model.sampling)) == 50
    assert len(model.schedule) == 2000


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_accumulation_equals_the_whole_batch(parts):
    gradients = []
    for accumulate in (1, parts):
        model = make({"train": {"accumulate": accumulate, "grad_clip": None, "optim_g": {"type": "SGD", "lr": 0.0}}})
        step(model, 1, batch())
        gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
        log = model.get_current_log()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * float(gradients[0].norm()))
    assert log["l_eps"] > 0


def test_gradient_clipping():
    model = make({"train": {"grad_clip": 1e-3}})
    step(model, 1, batch())
    norm = torch.stack([p.grad.norm() for p in model.net_g.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_loss_is_logged_by_noise_level():
    model = make()
    data = batch(count=64, size=8)
    step(model, 1, data)
    log = model.get_current_log()
    levels, _ = training_noise(model.schedule, list(range(64)), (3, 8, 8), 0)
    counts = [int(((levels * 4).long().clamp(max=3) == i).sum()) for i in range(4)]
    assert all(count > 0 for count in counts)
    bands = [log[f"l_eps_l1_band{i}"] for i in range(4)]
    mean = sum(c * b for c, b in zip(counts, bands)) / 64
    assert log["l_eps"] == pytest.approx(mean, rel=1e-5)
    assert model.get_current_log() == {}  # averaged since the last call


def test_bf16_steps_stay_close():
    losses = []
    for amp in (None, "bf16"):
        model = make({"train": {"amp": amp}})
        step(model, 1, batch())
        losses.append(model.get_current_log()["l_eps"])
        assert weights_of(model.net_g).dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_compile_is_one_flag(monkeypatch):
    """The same steps and restored images, the same keys; inductor itself is tested with the denoiser."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    plain, compiled = make(), make({"compile": True})
    assert compiled.net_g_ema.denoise_fn._compiled_call_impl and compiled.net_g.predictor._compiled_call_impl
    assert list(compiled.net_g.state_dict()) == list(plain.net_g.state_dict())
    for model in (plain, compiled):
        step(model, 1, batch())
        model.feed_data({"lq": batch()["lq"][:1], "key": ["a"]})
        model.test()
    torch.testing.assert_close(compiled.output, plain.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights_of(compiled.net_g), weights_of(plain.net_g), rtol=1e-3, atol=1e-5)


def test_bf16_sampling_stays_close():
    outputs = []
    for amp in (None, "bf16"):
        model = make({"val": {"sampling": {"amp": amp}}})
        model.feed_data({"lq": batch()["lq"], "key": list("abcd")})
        model.test()
        assert model.output.dtype == torch.float32
        outputs.append(model.output)
    difference = (outputs[1] - outputs[0]).abs().mean()
    assert 0 < difference < 0.02


def restored(sampling, size=(24, 28), count=1):
    model = make({"val": {"sampling": sampling}})
    torch.manual_seed(2)
    model.feed_data({"lq": torch.rand(count, 3, *size), "key": list("abcd")[:count]})
    model.test()
    return model


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_every_sampler_is_an_option(sampler):
    calls = []
    model = make({"val": {"sampling": {"sampler": sampler, "steps": 5, "spacing": "trailing"}}})
    model.net_g_ema.denoise_fn.register_forward_hook(lambda *args: calls.append(1))
    model.feed_data({"lq": batch()["lq"][:1], "key": ["a"]})
    model.test()
    assert len(calls) == (9 if sampler == "heun" else 5)
    assert model.output.isfinite().all()


def test_warm_start_samples_below_its_timestep():
    cold, warm = (restored({"steps": 4, "start_timestep": t}) for t in (None, 100))
    levels = [sampling_schedule(m.schedule, m.sampling).levels[-1] for m in (cold, warm)]
    assert levels[1] == pytest.approx(cold.schedule.levels[100]) and levels[1] > levels[0]
    residual = [(m.output - m.initial).abs().mean() for m in (cold, warm)]
    assert residual[1] < residual[0]  # an untrained network leaves the noise in: there is less of it


@pytest.mark.parametrize(
    "sampling", [{"tile": 16, "overlap": 4}, {"tile": 16, "overlap": 4, "tile_batch": 3, "merge": "blend"},
                 {"tile": 16, "overlap": 4, "grid": "released", "border": 3, "cache_mb": 0}], ids=str,
)  # fmt: skip
def test_tiles_of_a_size_that_covers_the_image_change_nothing_and_smaller_ones_little(sampling):
    """The tiny network is not local (GroupNorm), so smaller patches come close, no more."""
    whole = restored({**sampling, "tile": None})
    torch.testing.assert_close(restored({**sampling, "tile": 40}).output, whole.output, rtol=0, atol=0)
    tiled = restored(sampling)
    torch.testing.assert_close(tiled.initial, whole.initial, rtol=1e-5, atol=1e-5)  # its predictor is local
    difference = (tiled.output - whole.output).abs()
    assert 0 < difference.mean() < 0.2 * (whole.output - whole.initial).abs().mean()


def test_guide_features_of_patches_are_computed_once(monkeypatch):
    from ucdir_plugin.archs import UCDIRDenoiser

    calls, guide_features = [], UCDIRDenoiser.guide_features
    monkeypatch.setattr(
        UCDIRDenoiser, "guide_features", lambda self, g: calls.append(g.shape) or guide_features(self, g)
    )
    kept = restored({"tile": 16, "overlap": 4, "steps": 3})
    patches = len(calls)
    anew = restored({"tile": 16, "overlap": 4, "steps": 3, "cache_mb": 0})
    assert patches > 1 and len(calls) - patches == 3 * patches
    torch.testing.assert_close(kept.output, anew.output, rtol=0, atol=0)


def test_patches_sampled_on_their_own_have_their_own_noise():
    inter, own = (restored({"tile": 16, "overlap": 4, "split": split}) for split in ("inter_step", "per_patch"))
    assert (inter.output - own.output).abs().mean() > 1e-3
    torch.testing.assert_close(inter.initial, own.initial)


def test_tiles_that_do_not_suit_the_network_are_named_at_the_start():
    with pytest.raises(UserError, match="tile 4 is too small for overlap 1 at the network's stride 4"):
        make({"network_g": {"denoiser": {"channel_mults": [1, 2, 2]}}, "val": {"sampling": {"tile": 4, "overlap": 1}}})


def test_no_image_is_split_for_its_border_alone():
    model = make({"val": {"sampling": {"tile": 32, "overlap": 4}}}, is_train=False)
    patches = [plan(model.net_g, side, side, model.sampling).patches for side in (32, 33)]
    assert model.sampling.border == 8 and patches == [1, 4]
    released = model.sampling.model_copy(update={"grid": "released"})
    assert plan(model.net_g, 32, 32, released).patches > 1
    assert plan(model.net_g, 32, 32, released.model_copy(update={"border": 0})).patches == 1


def test_adam_is_fused_unless_the_options_say_otherwise():
    assert make().optimizer_g.defaults["fused"] is True
    assert not make({"train": {"optim_g": {"fused": False}}}).optimizer_g.defaults["fused"]
    assert not make({"train": {"optim_g": {"foreach": True}}}).optimizer_g.defaults["fused"]


def test_fp16_needs_cuda():
    with pytest.raises(UserError, match="amp: fp16 needs a CUDA device"):
        make({"train": {"amp": "fp16"}})
    with pytest.raises(UserError, match="val:sampling:amp: fp16 needs a CUDA device"):
        make({"val": {"sampling": {"amp": "fp16"}}})


def test_a_step_without_a_finite_loss_changes_nothing_and_ten_stop():
    model = make()
    step(model, 1, batch())
    before, average = weights_of(model.net_g), weights_of(model.net_g_ema)
    moments = {k: v["exp_avg"].clone() for k, v in model.optimizer_g.state_dict()["state"].items()}
    bad = batch()
    bad["gt"][0, 0, 0, 0] = math.nan
    for i in range(9):
        step(model, 2 + i, bad)
    torch.testing.assert_close(weights_of(model.net_g), before, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(model.net_g_ema), average, rtol=0, atol=0)
    for k, v in model.optimizer_g.state_dict()["state"].items():
        torch.testing.assert_close(v["exp_avg"], moments[k], rtol=0, atol=0)
    assert model.stepper.bad == 9
    step(model, 11, batch())  # a good one between starts the count anew
    assert model.stepper.bad_in_a_row == 0
    bad["gt"][0, 0, 0, 0] = math.inf
    for i in range(9):
        step(model, 12 + i, bad)
    with pytest.raises(UserError, match=r"stopped at iteration 21: 10 steps in a row .* last checkpoint is kept"):
        step(model, 21, bad)


def test_restored_images_depend_on_their_key_alone():
    model = make(is_train=False)
    data = batch(count=3)
    del data["sample_number"]

    def restore(indices, keys):
        model.feed_data({**{k: v[indices] for k, v in data.items()}, "key": keys})
        model.test()
        return model.output.clone()

    together = restore([0, 1, 2], ["a", "b", "c"])
    torch.rand(7)
    for i, key in enumerate("abc"):
        torch.testing.assert_close(restore([i], [key])[0], together[i], rtol=1e-4, atol=1e-5)
    assert (restore([0], ["b"])[0] - together[0]).abs().max() > 1e-3


def test_result_is_prediction_plus_residual_and_border_is_cut():
    for border in (0, 5, 40):
        model = make({"val": {"sampling": {"border": border, "steps": 3}}}, is_train=False)
        model.feed_data({**batch(count=1), "key": ["a"]})
        model.test()
        visuals = model.get_current_visuals()
        assert visuals["result"].shape == visuals["initial"].shape == visuals["lq"].shape
        residual = (visuals["result"] - visuals["initial"]) * 2  # in [-1, 1]
        assert 0 < residual.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("scale", [0.5, 1, 12])
@pytest.mark.parametrize(
    ("sampling", "limited"),
    [
        ({}, lambda x: x.clamp(-1, 1)),
        ({"start_timestep": 100}, lambda x: x.clamp(-1, 1)),
        ({"dynamic_threshold": 1.0}, lambda x: x / 1.6),
        ({"clip_x0": False}, lambda x: x),
    ],
)
def test_a_denoiser_that_knows_the_residual_restores_it_at_any_scale(scale, sampling, limited):
    """Up to the clipping, which is that of the residual itself: to [-1, 1]."""
    model = make({"network_g": {"residual_scale": scale}, "val": {"sampling": {"border": 0, "steps": 5, **sampling}}})
    residual = torch.linspace(-1.6, 0.9, 3 * 16 * 16).view(1, 3, 16, 16)

    def forward(x, level, guide):
        level = level.view(-1, 1, 1, 1)
        return (x[:, 3:] - level * scale * residual) / (1 - level**2).sqrt()

    model.net_g_ema.denoise_fn.forward = forward
    model.feed_data({**batch(count=1), "key": ["a"]})
    model.test()
    torch.testing.assert_close((model.output - model.initial) * 2, limited(residual), rtol=1e-3, atol=1e-3)


def test_rescaled_schedule():
    model = make({"val": {"sampling": {"spacing": "rescale", "steps": 200, "rescale_end": 0.1}}})
    schedule = sampling_schedule(model.schedule, model.sampling)
    assert len(schedule) == 200
    assert schedule.betas[0] == pytest.approx(1e-6)
    assert schedule.betas[-1] == pytest.approx(0.1)


OVERFIT = {
    "network_g": {
        "denoiser": {"inner_channel": 16, "channel_mults": [1, 2]},
        "predictor": {"width": 2, "levels": 1, "residual": True},
    },
    "train": {
        "optim_g": {"lr": 1e-2}, "ema_decay": 0.95, "ema_start": 0,
        "scheduler": {"type": "CosineAnnealingRestartLR", "milestones": None, "gamma": None, "periods": [400]},
    },
    "val": {"sampling": {"steps": 50, "border": 0}},  # its one training image has none
}  # fmt: skip


def test_overfitting_one_pair_restores_it(monkeypatch):
    """At least 5 dB above the input; worse without the guide, and with the noise levels shuffled."""
    import cv2
    from basicsr.utils import img2tensor
    from conftest import PHOTOS

    from ucdir_plugin.utils.degradations import jpeg

    gt = cv2.imread(str(PHOTOS / "coffee.png"))[128:144, 308:324].astype("float32") / 255
    lq, gt = (img2tensor(image).unsqueeze(0) for image in (jpeg(gt, 5), gt))
    model = make(OVERFIT)
    for iteration in range(1, 401):
        first = 8 * iteration
        data = {"lq": lq.expand(8, -1, -1, -1), "gt": gt.expand(8, -1, -1, -1)}
        step(model, iteration, {**data, "sample_number": torch.arange(first, first + 8)})

    def psnr(image):
        return float(-10 * torch.log10((image.clamp(0, 1) - gt).square().mean()))

    def restored():
        model.feed_data({"lq": lq, "key": ["pair"]})
        model.test()
        return psnr(model.output)

    right = restored()
    assert right >= psnr(lq) + 5, f"restored {right:.2f} dB, input {psnr(lq):.2f} dB"
    denoiser = model.net_g_ema.denoise_fn
    forward, guide_features = denoiser.forward, denoiser.guide_features
    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "guide_features", lambda guide: guide_features(torch.zeros_like(guide)))
        no_guide = restored()
    levels = sampling_schedule(model.schedule, model.sampling).levels[1:]
    shuffled = dict(zip(levels.tolist(), levels[torch.randperm(50).numpy()].tolist()))
    with monkeypatch.context() as patch:

        def wrong_level(x, level, guide):
            nearest = min(shuffled, key=lambda v: abs(v - float(level[0])))
            return forward(x, torch.full_like(level, shuffled[nearest]), guide)

        patch.setattr(denoiser, "forward", wrong_level)
        wrong = restored()
    assert no_guide < right - 1, f"{no_guide:.2f} dB without the guide, {right:.2f} with it"
    assert wrong < right - 1, f"{wrong:.2f} dB with shuffled levels, {right:.2f} with the right ones"
