"""Distillation: a student gives in one network call what its teacher samples in many."""

import json
import math

import pytest
import torch
from basicsr.models import build_model
from conftest import EDSR, TINY, assert_one_line_error, merged
from test_spandrel import model_file
from torch import nn

from ucdir_plugin.diffusion.noise import normal
from ucdir_plugin.mm.models import MODELS
from ucdir_plugin.options.check import check_options
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.registry import ARCH_REGISTRY
from ucdir_plugin.restoration import sampling
from ucdir_plugin.training.student_task import StudentTask

ONE_STEP = {"sampler": "ddim", "steps": 1, "spacing": "trailing", "start_timestep": 300, "border": 0}
TEACHER = merged(
    TINY, {"name": "teacher", "train": None, "datasets": None, "val": {"metrics": None, "sampling": {**ONE_STEP, "sampler": "dpmpp_2m", "steps": 4, "border": 8, "clip_x0": False}}}
)  # fmt: skip
STUDENT = merged(
    TINY,
    {
        "name": "student",
        "model_type": "UCDIRStudentModel",
        "train": {
            "teacher": {"model": "teacher.safetensors"},
            "distillation_opt": {"type": "RelativeMSELoss"},
            "diffusion_opt": None,
            "initial_opt": None,
            "warmup_iter": None,
            "scheduler": None,
            "ema_start": 0,
        },
        "val": {"sampling": ONE_STEP},
    },
)


@pytest.fixture
def school(place):
    model_file(TEACHER, place.folder)
    return place


def in_training(options):
    opt = check_options(options, True)
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=True)
    return opt


def batch(size=4, side=16):
    return {
        "lq": normal((size, 3, side, side), "lq").sigmoid(),
        "gt": normal((size, 3, side, side), "gt").sigmoid(),
        "sample_number": torch.arange(size),
    }


def test_a_teacher_of_one_step_has_nothing_to_teach(school):
    """With the student's own sampling the teacher's sample is the student's, so that the loss is 0 from the start."""
    changes = {"train": {"teacher": {"sampling": {"sampler": "ddim", "steps": 1}}}}
    model = build_model(in_training(merged(STUDENT, changes)))
    model.feed_data(batch())
    terms, errors = model.task.terms(model.net_g, model.task.draw(model.batch, [0, 1, 2, 3]))
    assert float(terms["l_distillation"]) < 1e-9 and float(errors.max()) < 1e-5
    other = build_model(in_training(STUDENT))
    other.feed_data(batch())
    terms, _ = other.task.terms(other.net_g, other.task.draw(other.batch, [0, 1, 2, 3]))
    assert float(terms["l_distillation"]) > 1e-4  # four steps are not one


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "heun"])
def test_what_is_taught_is_what_the_teacher_samples(school, sampler):
    """The same crop from the same noise."""
    model = build_model(in_training(merged(STUDENT, {"train": {"teacher": {"sampling": {"sampler": sampler}}}})))
    model.feed_data(batch())
    part = model.task.draw(model.batch, [5, 6, 7, 8])
    initial, taught = model.task.teach(part)
    options = SamplingOptions(**merged(TEACHER["val"]["sampling"], {"sampler": sampler, "border": 0}))
    for row in range(4):
        one = part["lq"][row : row + 1]
        expected = sampling.restore(
            model.task.teacher, one, model.task.teacher_schedule, options,
            lambda shape, draw, row=row: part["noise"][row : row + 1].clone(),
        )  # fmt: skip
        torch.testing.assert_close(initial[row : row + 1], expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(taught[row : row + 1], expected[1] - expected[0], rtol=0, atol=1e-5)
    assert float(part["noise"].std()) == pytest.approx(1, abs=0.05)  # sampling left it as it was


class GaussianResidual(nn.Module):
    """The denoiser of a residual N(0, variance), in closed form, times a number that is 1 for the teacher."""

    def __init__(self, variance=0.04):
        super().__init__()
        self.variance, self.factor = variance, nn.Parameter(torch.ones(1, 3, 1, 1))

    guidance = "degraded"

    def forward(self, x, level, guide):
        level = level.view(-1, 1, 1, 1)
        spread = (1 - level**2).sqrt()
        return self.factor * x[:, 3:] * spread / (level**2 * self.variance + spread**2)


def test_a_student_of_a_teacher_in_closed_form_reaches_it(place):
    """Each step of DDIM multiplies by a known number, so the best one-step network is known too; training finds it."""
    ARCH_REGISTRY.register(GaussianResidual)
    try:
        network = {"type": "UCDIR", "denoiser": {"type": "GaussianResidual"}, "predictor": None}
        teacher = merged(TEACHER, {"network_g": None, "val": {"sampling": {"sampler": "ddim", "steps": 6}}})
        model_file({**teacher, "network_g": network}, place.folder)
        options = merged(STUDENT, {"network_g": None, "train": {"optim_g": {"type": "Adam", "lr": 0.03}, "ema_decay": None}})  # fmt: skip
        options["train"].pop("weight_decay", None)
        model = build_model(in_training({**options, "network_g": network}))
        model.task.teacher.denoise_fn.factor.data.fill_(1.0)
        for step in range(150):
            model.feed_data({**batch(), "sample_number": torch.arange(4) + 4 * step})
            model.optimize_parameters(step + 1)
        loss = float(model.get_current_log()["l_distillation"])
        drawn = model.task.draw(model.batch, [1000, 1001, 1002, 1003])
        _, taught = model.task.teach(drawn)
        schedule = model.task.teacher_schedule
        levels = sampling.sampling_schedule(schedule, model.task.teacher_sampling).levels[::-1][:-1]
        ratio, x = 1.0, math.sqrt(1 - levels[0] ** 2)
        for here, after in zip(levels, [*levels[1:], 1.0]):
            spread = math.sqrt(1 - here**2)
            x0 = here * 0.04 / (here**2 * 0.04 + spread**2) * x
            eps = (x - here * x0) / spread
            x = after * x0 + math.sqrt(max(1 - after**2, 0)) * eps
        ratio = x
        torch.testing.assert_close(taught, ratio * drawn["noise"], rtol=1e-3, atol=1e-4)
        level = model.task.level
        spread = math.sqrt(1 - level**2)
        best = (1 - ratio * level / spread) * (level**2 * 0.04 + spread**2) / spread**2
        torch.testing.assert_close(model.net_g.denoise_fn.factor.data, torch.full((1, 3, 1, 1), best), rtol=1e-2, atol=1e-3)  # fmt: skip
        assert loss < 1.0
        terms, _ = model.task.terms(model.net_g, drawn)
        assert float(terms["l_distillation"]) < 1e-2
    finally:
        ARCH_REGISTRY._obj_map.pop("GaussianResidual")


def test_it_learns_and_restores_in_one_call(school):
    """Forty steps explain most of what the teacher's sample has and the start has not; a test counts one call."""
    model = build_model(in_training(merged(STUDENT, {"train": {"optim_g": {"lr": 3e-3}, "ema_decay": 0.8}})))
    before = {k: v.clone() for k, v in model.net_g.predictor.state_dict().items()}
    losses = []
    for step in range(60):
        model.feed_data({**batch(), "sample_number": torch.arange(4) + 4 * step})
        model.optimize_parameters(step + 1)
        losses.append(float(model.get_current_log()["l_distillation"]))
    assert sum(losses[-10:]) < 0.4 * sum(losses[:3]) / 3 * 10, losses
    assert all(torch.equal(before[k], v) for k, v in model.net_g.predictor.state_dict().items())
    calls = []
    model.net_g_ema.denoise_fn.register_forward_hook(lambda *_: calls.append(0))
    model.opt["is_train"] = False
    model.feed_data({"lq": batch(1)["lq"], "key": ["a.png"]})
    model.test()
    assert len(calls) == 1 and model.output.isfinite().all()


def test_both_engines_train_the_same_student(school):
    opt = in_training(merged(STUDENT, {"train": {"optim_g": {"type": "SGD", "lr": 0.05}}}))
    one = build_model(opt)
    two = MODELS.build({"type": "ucdir_plugin.UCDIRStudentModel", "opt": opt})
    data = batch()
    one.feed_data(data)
    terms, _ = one.task.terms(one.net_g, one.task.draw(one.batch, [0, 1, 2, 3]))
    two.train()
    processed = two.data_preprocessor(data, True)
    losses = two(**processed, mode="loss")
    assert float(losses["loss_distillation"]) == pytest.approx(float(terms["l_distillation"]), rel=1e-6)


@pytest.mark.parametrize("engine", ["basicsr", "mmengine"])
def test_tools_train_resume_exactly_and_ship(school, engine):
    def options(name, total):
        return school.write(
            merged(STUDENT, {"name": name, "engine": engine, "train": {"total_iter": total}, "logger": {"save_checkpoint_freq": 2}}),
            f"{name}.yml",
        )  # fmt: skip

    def file_of(name):
        return f"experiments/{name}/" + ("models/net_g_4.pth" if engine == "basicsr" else "iter_4.pth")

    done = school.run("train.py", "-opt", options("whole", 4))
    assert done.returncode == 0, done.stderr[-2000:]
    assert engine == "mmengine" or "weights: teacher.safetensors" in done.stderr
    for total in (2, 4):
        done = school.run("train.py", "-opt", options("parts", total), "--auto_resume")
        assert done.returncode == 0, done.stderr[-2000:]
    states = [torch.load(file_of(name), weights_only=False) for name in ("whole", "parts")]
    flat = [
        {k: v for k, v in flatten(state).items() if torch.is_tensor(v) and v.is_floating_point()} for state in states
    ]
    assert flat[0].keys() == flat[1].keys()
    weights = [k for k in flat[0] if "denoise_fn" in k or "predictor" in k]
    assert weights and all(torch.equal(flat[0][k], flat[1][k]) for k in weights)
    (school.folder / "teacher.safetensors").unlink()  # a test needs no teacher
    done = school.run("test.py", "-opt", options("whole", 4))
    assert done.returncode == 0, done.stderr[-2000:]
    done = school.run(
        "convert_weights.py", "--from", "training", "-opt", options("whole", 4), file_of("whole"), "student.safetensors"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    done = school.run("restore.py", "--model", "student.safetensors", "-i", "photos", "-o", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    for wrong in (["--steps", "3"], ["--set", "start_timestep=200"], ["--sampler", "heun"]):
        done = school.run("restore.py", "--model", "student.safetensors", "-i", "photos", "-o", "no", *wrong)
        assert_one_line_error(done, "was distilled for its one step")
    for fine in (["--sampler", "dpmpp_2m"], ["--tile", "32", "--overlap", "8"], ["--blend", "0.5"]):
        done = school.run("restore.py", "--model", "student.safetensors", "-i", "photos", "-o", "yes", *fine)
        assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((school.folder / "out" / "coffee.json").read_text())
    assert record["settings"]["steps"] == 1


def flatten(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{prefix}.{key}").items()}
    return {prefix: value}


@pytest.mark.parametrize("changes, words", [
    ({"train": {"teacher": {"model": "none.safetensors"}}}, ["none.safetensors"]),
    ({"train": {"teacher": {"model": "jpeg_smal"}}}, ["jpeg_smal", "did you mean 'jpeg_small'"]),
    ({"train": {"teacher": {"model": "edsr.safetensors"}}}, ["edsr.safetensors does not sample"]),
    ({"train": {"teacher": {"sampling": {"stepps": 3}}}}, ["stepps"]),
    ({"train": {"teacher": {"sampling": {"sampler": "ddpm"}}}}, ["ddpm draws new noise", "take ddim"]),
    ({"train": {"teacher": {"sampling": {"sampler": "dpmpp_2m_sde"}}}}, ["dpmpp_2m_sde draws new noise"]),
    ({"train": {"teacher": {"sampling": {"sampler": "ddim", "eta": 0.5}}}}, ["ddim draws new noise"]),
    ({"network_g": {"predictor": {"width": 6}}, "path": {"pretrain_network_g": "net.pth", "strict_load_g": False}}, ["not the predictor of the teacher"]),
    ({"network_g": {"denoiser": {"inner_channel": 16}}}, ["not the network of the teacher teacher.safetensors"]),
    ({"network_g": {"residual_scale": 3}}, ["another residual_scale"]),
    ({"val": {"sampling": {"steps": 2}}}, ["val:sampling: a student samples in one step, not 2"]),
    ({"val": {"sampling": {"sampler": "heun"}}}, ["one step, not 1 of heun"]),
    ({"train": {"distillation_opt": None}}, ["train:distillation_opt is missing"]),
    ({"train": {"diffusion_opt": {"type": "NoisePredictionLoss"}}}, ["train:diffusion_opt has no meaning for UCDIRStudentModel"]),
    ({"model_type": "UCDIRModel"}, ["train:teacher has no meaning for UCDIRModel"]),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(school, changes, words):
    model_file({**merged(EDSR, {"datasets": None, "path": None}), "name": "edsr"}, school.folder)
    done = school.run("train.py", "-opt", school.write(merged(STUDENT, changes)))
    assert_one_line_error(done, *words)


def test_the_schedule_says_the_level(school):
    task = StudentTask(in_training(STUDENT), torch.device("cpu"))
    task.network()
    assert task.level == pytest.approx(math.sqrt(task.schedule.alpha_bar[299]))
