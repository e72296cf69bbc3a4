"""DiffusionPriorModel and what it is made of: schedule, bound, views, training, validation; its prior at work."""

import csv
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.losses import build_loss
from basicsr.models import build_model
from basicsr.utils import get_root_logger
from conftest import ROOT, TINY, assert_one_line_error, merged
from test_tools import TORCHRUN, assert_same, final_state
from torch.distributions import Normal, kl_divergence

from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel
from ucdir_plugin.diffusion.bird.operators import ChannelMean
from ucdir_plugin.diffusion.bird.solver import Solver
from ucdir_plugin.diffusion.bird.tasks import preset
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.diffusion.schedule import NoiseSchedule, diffuse
from ucdir_plugin.losses.diffusion_loss import variational_terms
from ucdir_plugin.options.check import check_options, load_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.zoo.priors import load_prior

VIEWS = {"type": "CleanImageDataset", "dataroot_gt": "photos", "gt_size": 16, "view_scale": [0.5, 1.0]}
NETWORK = {
    "type": "ADMUNet", "image_size": 16, "num_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1,
    "attention_resolutions": [8], "num_head_channels": 32, "resblock_updown": False,
}  # fmt: skip
TINY_PRIOR = {
    "name": "prior",
    "model_type": "DiffusionPriorModel",
    "datasets": {
        "train": {**VIEWS, "name": "train", "use_hflip": True, "batch_size_per_gpu": 4},
        "val": {**VIEWS, "name": "val"},
    },
    "network_g": NETWORK,
    "diffusion": {"timesteps": 100, "start": 1e-3, "end": 0.2},
    "train": {
        "total_iter": 4,
        "diffusion_opt": {"type": "NoisePredictionLoss", "criterion": "l2"},
        "variance_opt": {"type": "VariationalBoundLoss"},
        "optim_g": {"type": "AdamW", "lr": 1e-3},
        "ema_decay": 0.9,
        "grad_clip": 1.0,
    },
    "val": {"val_freq": 2, "samples": 3, "sampling": {"sampler": "ddim", "steps": 3}},
    "logger": {"print_freq": 1, "save_checkpoint_freq": 2},
}
FIXED = {"network_g": {"learn_sigma": False}, "train": {"variance_opt": None}}


def make(changes=None, is_train=True, **path):
    opt = check_options(merged(TINY_PRIOR, changes or {}), True)
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=is_train)
    opt["path"].update(path)
    torch.manual_seed(0)
    return build_model(opt)


def batch(count=4, first=0):
    torch.manual_seed(1)
    return {"gt": torch.rand(count, 3, 16, 16), "sample_number": torch.arange(count) + first}


def step(model, iteration, data):
    model.update_learning_rate(iteration)
    model.feed_data(data)
    model.optimize_parameters(iteration)


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# The schedule and the bound


def test_cosine_schedule_is_its_formula():
    schedule = NoiseSchedule.cosine(200)

    def f(t):
        return math.cos((t / 200 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 2, 50, 100, 190):
        assert schedule.alpha_bar[t - 1] == pytest.approx(f(t) / f(0), rel=1e-9)
    assert schedule.betas.max() == 0.999 == schedule.betas[-1]
    assert schedule.betas[-2] < 0.999


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.linear(1000, 1e-4, 0.02), NoiseSchedule.cosine(30)], ids=["linear", "cosine"]
)
def test_bound_is_the_divergence_of_two_gaussians(schedule):
    """q and p written out from their means and variances, with torch's own divergence; and its gradient in v."""
    steps = torch.tensor([1, 2, len(schedule) // 2, len(schedule) - 1])
    x0, noise = torch.rand(4, 3, 2, 2).double() * 2 - 1, torch.randn(4, 3, 2, 2).double()
    eps, v = noise + 0.3 * torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2).double() * 3 - 1.5
    v.requires_grad_()

    def column(values):
        return torch.from_numpy(values)[steps].view(-1, 1, 1, 1)

    x_t = diffuse(x0, column(schedule.levels[1:]).flatten(), noise)
    guess = x_t / column(schedule.alpha_bar).sqrt() - (1 / column(schedule.alpha_bar) - 1).sqrt() * eps
    c1, c2 = column(schedule.posterior_mean_coef1), column(schedule.posterior_mean_coef2)
    variance = column(schedule.posterior_variance)
    part = (v + 1) / 2
    predicted = (part * column(schedule.betas).log() + (1 - part) * variance.log()).exp()
    q, p = Normal(c1 * x0 + c2 * x_t, variance.sqrt()), Normal(c1 * guess + c2 * x_t, predicted.sqrt())
    expected = kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    found = variational_terms(eps, v, noise, x0, steps.float(), schedule)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(term.sum(), v, retain_graph=True)[0] for term in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mean", [0.31, 0.998, -0.995])
def test_first_term_of_the_bound_is_the_code_length_of_eight_bits(mean):
    """The masses of all 256 values sum to one, also near the ends of the range, and each is its value's."""
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    values = torch.arange(256).double() / 127.5 - 1
    v = torch.tensor(0.4)
    std = math.exp(0.7 * math.log(schedule.betas[0]) / 2 + 0.3 * math.log(schedule.posterior_variance[1]) / 2)
    # x_t and eps such that x_0' is `mean` whatever the true value.
    noise = torch.zeros(256, 1, 1, 1).double()
    eps = ((values - mean) / math.sqrt(1 / schedule.alpha_bar[0] - 1)).view(-1, 1, 1, 1)
    x0 = values.view(-1, 1, 1, 1)
    bits = variational_terms(eps, v.double().expand_as(eps), noise, x0, torch.zeros(256), schedule)
    assert float((2**-bits).sum()) == pytest.approx(1, abs=1e-6)
    at = int((values - mean + 0.03 * np.sign(mean)).abs().argmin())  # not the last bin, which has no far end
    edges = [Normal(mean, std).cdf(values[at] + side / 255) for side in (1, -1)]
    assert float(2 ** -bits[at]) == pytest.approx(float(edges[0] - edges[1]), rel=1e-5)


def test_bound_loss_is_an_estimate_of_the_whole_sum_and_leaves_the_mean_alone():
    schedule = NoiseSchedule.cosine(10)
    x0, noise = torch.rand(10, 3, 4, 4) * 2 - 1, torch.randn(10, 3, 4, 4)
    eps, v = torch.randn(10, 3, 4, 4, requires_grad=True), torch.zeros(10, 3, 4, 4, requires_grad=True)
    loss = build_loss({"type": "VariationalBoundLoss", "loss_weight": 0.5})(
        eps, v, noise, x0, torch.arange(10), schedule
    )
    terms = variational_terms(eps, v, noise, x0, torch.arange(10), schedule)
    assert float(loss.detach()) == pytest.approx(0.5 * float(terms.detach().sum()), rel=1e-5)
    loss.backward()
    assert eps.grad is None and v.grad.abs().min() > 0


# Views


def views(folder, phase="val", **changes):
    return build_dataset({**VIEWS, "name": "v", "phase": phase, "dataroot_gt": str(folder), "use_hflip": False,
                          "use_rot": False, "seed": None, **changes})  # fmt: skip


def ramp(path, height, width):
    """Green grows by 2 a pixel to the right, red by 2 downwards."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 1], image[..., 2] = 2 * np.arange(width), 2 * np.arange(height)[:, None]
    cv2.imwrite(str(path), image)


def test_views_are_made_smaller_within_the_range_and_cut_anywhere(tmp_path):
    ramp(tmp_path / "a.png", 64, 90)
    data = views(tmp_path, "train", view_scale=[0.25, 1.0])
    slopes, corners = [], []
    for _ in range(300):
        gt = data[0]["gt"]
        assert gt.shape == (3, 16, 16)
        slopes.append(float(gt[1, 0, -1] - gt[1, 0, 0]) * 255 / 2 / 15)  # source pixels of one of the view's
        corners.append((float(gt[0, 0, 0]), float(gt[1, 0, 0])))
    scales = 1 / np.array(slopes)
    assert 0.249 <= scales.min() < 0.3 and 0.9 < scales.max() <= 1.001
    assert np.mean(scales) == pytest.approx(0.625, abs=0.05)  # uniform
    assert len(set(corners)) > 200
    # Too small for the crop at 0.1: the whole short side at most.
    steep = [float(g[1, 0, -1] - g[1, 0, 0]) for g in (views(tmp_path, "train", view_scale=0.1)[0]["gt"],)]
    assert steep[0] * 255 / 2 / 15 == pytest.approx(4, rel=0.01)
    assert torch.equal(views(tmp_path, view_scale=None)[0]["gt"] * 255 % 1, torch.zeros(3, 16, 16))  # not resized


def test_a_test_view_is_a_function_of_seed_and_name(tmp_path):
    ramp(tmp_path / "a.png", 64, 90)
    ramp(tmp_path / "b.png", 64, 90)
    first, again, other = views(tmp_path), views(tmp_path), views(tmp_path, seed=1)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(first[0]["gt"], again[0]["gt"])
    assert not torch.equal(first[0]["gt"], first[1]["gt"]) and not torch.equal(first[0]["gt"], other[0]["gt"])


def test_small_images_are_left_out_and_counted(tmp_path, monkeypatch):
    for name, size in (("a.png", (15, 40)), ("b.png", (16, 16)), ("c.png", (40, 15)), ("d.png", (20, 30))):
        ramp(tmp_path / name, *size)
    said = []
    monkeypatch.setattr(get_root_logger(), "warning", said.append)
    data = views(tmp_path, "train")
    assert data.names == ["b.png", "d.png"] and data.skipped == 2
    assert said == ["v: 2 of 4 images left out: smaller than gt_size 16"]
    with pytest.raises(UserError, match="none of the 4 images in .* has 64 pixels a side; lower gt_size"):
        views(tmp_path, "train", gt_size=64)
    for wrong in (0.0001 - 1, [0.5, 1.5], [0.9, 0.5]):
        with pytest.raises(UserError, match="view_scale .* is not within 0 .. 1"):
            views(tmp_path, view_scale=wrong)


# The model


def test_hybrid_loss_and_where_its_gradients_go():
    """l_eps is the mean square of the noise's error; the bound's gradient reaches the variance's half of the head only."""
    model = make({"train": {"grad_clip": None, "ema_decay": 0.0, "optim_g": {"type": "SGD", "lr": 0.0}}})
    torch.nn.init.normal_(model.net_g.out[2].weight, std=0.1)
    model.feed_data(batch())
    part = model.task.draw(model.batch, [0, 1, 2, 3])
    steps = part["timestep"].long()
    level = torch.from_numpy(model.schedule.levels)[steps + 1].float()
    torch.testing.assert_close(part["x_t"], diffuse(model.batch["gt"], level, part["noise"]))
    out = model.net_g(part["x_t"], part["timestep"])
    terms, errors = model.task.terms(model.net_g, part)
    torch.testing.assert_close(errors, (out[:, :3] - part["noise"]).square().flatten(1).mean(1))
    assert float(terms["l_eps"].detach()) == pytest.approx(float(errors.mean()), rel=1e-5)
    bound = variational_terms(out[:, :3], out[:, 3:], part["noise"], part["x0"], part["timestep"], model.schedule)
    assert float(terms["l_variance"].detach()) == pytest.approx(0.001 * 100 * float(bound.detach().mean()), rel=1e-4)
    head = model.net_g.out[2].weight
    for name, own in (("l_eps", slice(0, 3)), ("l_variance", slice(3, 6))):
        gradient = torch.autograd.grad(terms[name], head, retain_graph=True)[0].abs().flatten(1).sum(1)
        assert (gradient[own] > 0).all() and int((gradient > 0).sum()) == 3
    model.feed_data({"gt": batch()["gt"][2:3]})
    alone = model.task.draw(model.batch, [2])  # a function of the sample's number, not of its batch
    assert alone["timestep"][0] == part["timestep"][2] and torch.equal(alone["noise"][0], part["noise"][2])


def test_all_time_steps_are_drawn_evenly():
    model = make({"diffusion": {"timesteps": 10}})
    drawn = [model.schedule.sample_timestep(torch.Generator().manual_seed(i)) for i in range(2000)]
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10 and counts.min() > 140 and counts.max() < 260


@pytest.mark.parametrize("changes", [{}, FIXED, {"diffusion": None}, {"train": {"amp": "bf16"}}], ids=str)
def test_it_learns(changes):
    model = make(changes)
    first = last = 0.0
    for iteration in range(1, 61):
        step(model, iteration, batch(first=4 * iteration))
        if iteration in (10, 60):
            first, last = last, model.get_current_log()["l_eps"]
        elif iteration == 50:
            model.get_current_log()
    assert last < 0.8 * first
    assert (
        "l_variance"
        in {**model.sums.sums, **model.task.terms(model.net_g, model.task.draw(model.batch, [0, 1, 2, 3]))[0]}
    ) == (changes != FIXED)


def test_average_follows_the_weights():
    model = make({"train": {"ema_start": 1, "ema_decay": 0.5}})
    step(model, 1, batch())
    before = weights_of(model.net_g_ema)
    torch.testing.assert_close(before, weights_of(model.net_g), rtol=0, atol=0)
    step(model, 2, batch(first=4))
    decay = 2 / 11
    torch.testing.assert_close(weights_of(model.net_g_ema), decay * before + (1 - decay) * weights_of(model.net_g))


class Guess(torch.nn.Module):
    """Predicts t / T as the noise of every pixel, so that a band's loss has a closed form; v is 0."""

    def forward(self, x, timesteps):
        eps = (timesteps / 100).view(-1, 1, 1, 1).expand_as(x)
        return torch.cat((eps, torch.zeros_like(x)), 1)


def test_validation_losses_by_band(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    model = make({"datasets": {"val": {"gt_size": 32}}})
    data = build_dataset({**model.opt["datasets"]["val"], "phase": "val"})
    found = model.task.validation_losses(Guess(), data)
    bands = [f"l_eps_l2_band{i}" for i in range(4)]
    members = [np.flatnonzero((model.schedule.levels[1:] * 4).astype(int).clip(max=3) == i) for i in range(4)]
    assert sum(map(len, members)) == 100 and all(map(len, members))
    for band, steps in zip(bands, members):
        low, high = ((steps / 100) ** 2).min(), ((steps / 100) ** 2).max()
        assert 1 + low - 0.1 < found[band] < 1 + high + 0.1  # unit noise less a constant
    expected = sum(len(m) / 100 * found[b] for b, m in zip(bands, members))
    assert found["l_eps"] == pytest.approx(expected, rel=1e-6)
    assert found["bound"] > 0 and list(found) == ["l_eps", *bands, "bound"]
    torch.rand(5)
    assert model.task.validation_losses(Guess(), data) == found
    model.opt["manual_seed"] = 1
    assert model.task.validation_losses(Guess(), data) != found


def test_validation_loss_of_an_image_does_not_depend_on_its_neighbours(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    model = make()
    data = build_dataset({**model.opt["datasets"]["val"], "phase": "val"})
    whole = model.task.validation_losses(model.net_g, data)
    single = []
    names = data.names
    for name in names:
        data.names = [name]
        single.append(model.task.validation_losses(model.net_g, data)["l_eps"])
    assert whole["l_eps"] == pytest.approx(np.mean(single), rel=1e-5)


def test_a_band_without_time_steps_is_left_out(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    model = make({"diffusion": {"timesteps": 10, "start": 1e-3, "end": 1e-2}})  # ends at a level of 0.97
    data = build_dataset({**model.opt["datasets"]["val"], "phase": "val"})
    found = model.task.validation_losses(model.net_g, data)
    assert [k for k in found if "band" in k] == ["l_eps_l2_band3"] and found["l_eps"] == found["l_eps_l2_band3"]


def test_samples_depend_on_seed_and_number_alone():
    model = make()
    torch.nn.init.normal_(model.net_g.out[2].weight, std=0.02)
    three = model.task.samples(model.net_g.eval(), 3)
    assert three.shape == (3, 3, 16, 16) and 0 <= three.min() < three.max() <= 1
    torch.rand(5)
    torch.testing.assert_close(model.task.samples(model.net_g, 1)[0], three[0], rtol=1e-4, atol=1e-5)
    assert (three[0] - three[1]).abs().max() > 0.1
    for sampler in ("ddpm", "dpmpp_2m_sde", "heun"):
        other = make({"val": {"sampling": {"sampler": sampler}}})
        assert other.task.samples(model.net_g, 1).isfinite().all()


# The tools


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eight iterations in one go."""
    from conftest import Workplace

    place = Workplace(tmp_path_factory.mktemp("prior"))
    options = merged(TINY_PRIOR, {"train": {"total_iter": 8}, "network_g": {"dropout": 0.1}})
    done = place.run("train.py", "-opt", place.write(options))
    assert done.returncode == 0, done.stderr[-3000:]
    return place, options


def curve(run):
    return list(csv.DictReader((run / "losses_val.csv").open()))


def test_resume_equals_an_uninterrupted_run(trained, workplace):
    """Weights, average, optimizer, validation losses and samples, bit for bit, with another number of workers."""
    place, options = trained
    path = workplace.write(merged(options, {"datasets": {"train": {"num_worker_per_gpu": 1}}}))
    assert workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=4").returncode == 0
    done = workplace.run("train.py", "-opt", path, "--auto_resume")
    assert done.returncode == 0, done.stderr
    assert "resuming prior at iteration 4" in done.stdout
    runs = [p.folder / "experiments" / "prior" for p in (place, workplace)]
    assert_same(final_state(runs[0], 8), final_state(runs[1], 8))
    assert curve(runs[0]) == curve(runs[1])
    assert [row["iteration"] for row in curve(runs[0])] == ["2", "4", "6", "8"]
    grids = [cv2.imread(str(run / "visualization" / "val" / "samples_8.png")) for run in runs]
    assert grids[0].shape == (38, 38, 3) and (grids[0] == grids[1]).all()  # two by two, borders of two


def test_two_processes_share_the_validation(workplace):
    """Weights that stand still have the same losses, whoever measures which image; rank 0 alone writes them."""
    still = {"train": {"optim_g": {"type": "SGD", "lr": 0.0}, "total_iter": 1}, "val": {"samples": 1}}
    whole = workplace.write(merged(TINY_PRIOR, still), "whole.yml")
    assert workplace.run("train.py", "-opt", whole).returncode == 0
    both = workplace.write(merged(TINY_PRIOR, {**still, "name": "both"}), "both.yml")
    done = workplace.run("train.py", "-opt", both, "--launcher", "pytorch", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [curve(workplace.folder / "experiments" / name) for name in ("prior", "both")]
    assert len(rows[0]) == len(rows[1]) == 1
    assert {k: float(v) for k, v in rows[1][0].items()} == pytest.approx({k: float(v) for k, v in rows[0][0].items()})


def test_test_gives_the_losses_of_training(trained):
    place, _ = trained
    done = place.run("test.py", "-opt", "options.yml")
    assert done.returncode == 0, done.stderr[-3000:]
    last = curve(place.folder / "experiments" / "prior")[-1]
    logged = dict(line.split("# ")[1].split(": ") for line in done.stderr.splitlines() if "# " in line)
    assert {k: float(v) for k, v in logged.items()} == {k: pytest.approx(float(last[k]), abs=1e-5) for k in logged}
    assert set(logged) == set(last) - {"iteration"}
    grids = [place.folder / part / "prior" / "visualization" / "val" / name
             for part, name in (("experiments", "samples_8.png"), ("results", "samples_prior.png"))]  # fmt: skip
    assert (cv2.imread(str(grids[0])) == cv2.imread(str(grids[1]))).all()


def test_what_was_trained_is_a_prior(trained):
    """The averaged weights, by load_prior; and the solver runs on it from pure noise."""
    place, _ = trained
    opt = load_options(str(place.folder / "options.yml"))
    file = place.folder / "experiments" / "prior" / "models" / "net_g_8.pth"
    schedule = NoiseSchedule.linear(100, 1e-3, 0.2)
    prior = load_prior(str(file), network=opt["network_g"], schedule=schedule)
    assert prior.learned_variance and prior.size == 16 and prior.generates and len(prior.schedule) == 100
    model = make({"network_g": {"dropout": 0.1}}, False, pretrain_network_g=str(file), param_key_g="params_ema")
    torch.testing.assert_close(weights_of(prior.net), weights_of(model.net_g), rtol=0, atol=0)
    x, level = torch.randn(2, 3, 16, 16), torch.tensor([schedule.levels[1], schedule.levels[100]]).float()
    expected = model.net_g.eval()(x, torch.tensor([0.0, 99.0]))
    torch.testing.assert_close(prior(x, level), expected, rtol=1e-4, atol=1e-5)
    y = torch.rand(1, 1, 16, 16) * 2 - 1
    degradation = Degradation(start_kernel(1, 3, "delta"), None, ChannelMean())
    settings = replace(preset("guided", "colorize"), steps=5)
    result = Solver(prior, [(y, degradation)], settings, image_noise(0, ["a"])).run()
    assert result.image.shape == (1, 3, 16, 16) and result.image.isfinite().all()


def test_bad_input(trained, workplace):
    place, _ = trained
    run = place.folder / "experiments" / "prior"
    resumed = place.run("train.py", "-opt", "options.yml", "--auto_resume", "--force_yml", "network_g:num_channels=64")
    assert_one_line_error(resumed, "net_g_8.pth is of another architecture than ADMUNet", "has other shapes")
    assert sorted(p.name for p in run.parent.iterdir()) == ["prior"]
    for change, words in (
        ("network_g={type: SIDUNet}", "SIDUNet does not say its"),
        ("network_g:class_cond=true", "class_cond: a prior is unconditional"),
        ("network_g:learn_sigma=false", "variance_opt: network_g has no variance"),
        ("train:variance_opt=~", "variance_opt is missing: network_g learns the variance"),
        ("train:initial_opt={type: L1Loss}", "train:initial_opt has no meaning for DiffusionPriorModel"),
        ("val:metrics={psnr: {type: calculate_psnr, crop_border: 0}}", "val:metrics has no meaning"),
        ("val:sampling:tile=64", "val:sampling:tile has no meaning"),
        ("diffusion={type: cosine, start: 1e-4}", "diffusion:start has no meaning for type cosine"),
        ("diffusion={type: cosin}", "diffusion:type"),
        ("datasets:train:view_scale=[0.5, 2]", "view_scale"),
        ("datasets:train:gt_size=600", "none of the 3 images in photos has 600 pixels a side"),
    ):
        assert_one_line_error(
            workplace.run("train.py", "-opt", workplace.write(TINY_PRIOR), "--force_yml", change), words
        )
    (workplace.folder / "bad.pth").write_bytes((run / "models" / "net_g_8.pth").read_bytes()[:5000])
    for name, words in (("bad.pth", "bad.pth cannot be read: it is damaged"), ("none.pth", "nor a file of weights")):
        with pytest.raises(UserError, match=words):
            load_prior(str(workplace.folder / name), network=NETWORK)


def test_a_cosine_schedule_is_an_option():
    opt = check_options(merged(TINY_PRIOR, {"diffusion": None}), True)
    assert opt["diffusion"] == {"type": "linear", "timesteps": 1000, "start": 1e-4, "end": 0.02}
    model = make({"diffusion": {"type": "cosine", "timesteps": 50, "start": None, "end": None}})
    np.testing.assert_array_equal(model.schedule.betas, NoiseSchedule.cosine(50).betas)


def test_options_of_the_other_model_are_refused():
    with pytest.raises(UserError, match="val:samples has no meaning for UCDIRModel"):
        check_options(merged(TINY, {"val": {"samples": 4}}), True)
    with pytest.raises(UserError, match="train:variance_opt has no meaning for UCDIRModel"):
        check_options(merged(TINY, {"train": {"variance_opt": {"type": "VariationalBoundLoss"}}}), True)


def test_natural64_is_what_load_prior_takes_a_file_to_be():
    opt = load_options(str(ROOT / "options" / "prior" / "natural64.yml"))
    net = build_arch(opt["network_g"])
    assert sum(p.numel() for p in net.parameters()) == 3028838
    assert opt["diffusion"] == {"type": "linear", "timesteps": 1000, "start": 1e-4, "end": 0.02}
    assert opt["datasets"]["train"]["dataroot_gt"] != opt["datasets"]["val"]["dataroot_gt"]
