"""Option files: safe, overridable, checked with one line per fault."""

import copy
import os
import traceback

import pytest
from conftest import EDSR, LQ_ONLY, TINY, merged

from ucdir_plugin.options import rules
from ucdir_plugin.options.check import check_options, load_options
from ucdir_plugin.options.reading import apply_overrides, read_yaml
from ucdir_plugin.options.rules import BEFORE, RULES
from ucdir_plugin.utils.errors import UserError


def test_numbers_of_yaml_1_2():
    values = read_yaml("{a: 1e-4, b: 1.0e-4, c: -2E3, d: 1, e: yes, f: 1e, g: .5}", "x")
    assert values == {"a": 1e-4, "b": 1e-4, "c": -2000.0, "d": 1, "e": True, "f": "1e", "g": 0.5}


def test_overrides_are_yaml_and_may_create_levels():
    opt = {"train": {"optim_g": {"lr": 1.0}}, "path": None}
    apply_overrides(opt, ["train:optim_g:lr=1e-4", "path:resume_state=a=b.state", "new:list=[1, 2]", "flag=~"])
    assert opt == {
        "train": {"optim_g": {"lr": 1e-4}},
        "path": {"resume_state": "a=b.state"},
        "new": {"list": [1, 2]},
        "flag": None,
    }


@pytest.mark.parametrize("entry", ["train", "train:=3", "train:optim_g:lr:deep=1"])
def test_wrong_overrides(entry):
    with pytest.raises(UserError, match="--force_yml"):
        apply_overrides({"train": {"optim_g": {"lr": 1.0}}}, [entry])


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch HERE']",
        "!!python/object/new:os.system ['touch HERE']",
        "a: !!python/name:os.system",
    ],
)
def test_python_tags_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yml").write_text(text)
    with pytest.raises(UserError, match=r"hostile.yml, line 1: .*tags are refused"):
        load_options("hostile.yml")
    with pytest.raises(UserError, match="tags are refused"):
        apply_overrides({}, [f"a={text.split(' ', 1)[-1]}"] if text.startswith(("name", "a:")) else [f"a={text}"])
    assert not (tmp_path / "HERE").exists()


def test_defaults_are_filled_in():
    opt = check_options(TINY, True)
    assert opt["manual_seed"] == 0
    assert opt["datasets"]["val"]["io_backend"] == {"type": "disk"}
    assert opt["val"]["sampling"] == {
        "sampler": "ddpm", "steps": 2, "spacing": "respace", "rescale_end": 0.1, "eta": None, "start_timestep": None,
        "clip_x0": True, "dynamic_threshold": None, "border": 8, "amp": None, "tile": None, "overlap": 64,
        "tile_batch": 1, "grid": "aligned", "merge": "drop", "split": "inter_step", "cache_mb": 1024,
    }  # fmt: skip
    assert opt["diffusion"]["timesteps"] == 2000
    assert opt["train"]["optim_g"]["lr"] == 1e-3


FAULTS = [
    ({"trian": {}}, "unknown option trian; did you mean 'train'"),
    ({"train": {"ema_deacy": 0.9}}, "unknown option train:ema_deacy; did you mean 'ema_decay'"),
    ({"val": {"sampling": {"step": 3}}}, "unknown option val:sampling:step; did you mean 'steps'"),
    ({"val": {"sampling": {"steps": 2.5}}}, "option val:sampling:steps: .*integer.*got 2.5"),
    ({"val": {"sampling": {"steps": 0}}}, "option val:sampling:steps: .*greater than 0, got 0"),
    ({"val": {"sampling": {"steps": 3000}}}, "option val:sampling:steps: 3000 is more than the schedule's 2000"),
    ({"val": {"sampling": {"sampler": "ddmp"}}}, "option val:sampling:sampler: .*'ddpm', .* got 'ddmp'"),
    ({"val": {"metrics": {"psnr": {"type": "calculate_psnrr"}}}}, "no metric 'calculate_psnrr'; did you mean"),
    ({"val": {"metrics": {"psnr": {"crop_broder": 0}}}}, "unknown option val:metrics:psnr:crop_broder; .*'crop_border'"),
    ({"train": {"total_iter": "many"}}, "option train:total_iter: .*integer, got 'many'"),
    ({"train": {"optim_g": {"type": "Adamw"}}}, "train:optim_g:type: there is no 'Adamw'; did you mean .*'AdamW'"),
    ({"train": {"optim_g": {"weight_deccay": 1}}}, "train:optim_g:weight_deccay for AdamW; did you mean 'weight_decay'"),
    ({"train": {"scheduler": {"type": "Cosine"}}}, "train:scheduler:type: there is no 'Cosine'"),
    ({"train": {"diffusion_opt": {"type": "NoiseLoss"}}}, "there is no loss 'NoiseLoss'"),
    ({"train": {"diffusion_opt": {"criterion": "l3"}}}, "option train:diffusion_opt:criterion: .*got 'l3'"),
    ({"train": {"diffusion_opt": None}}, "option train:diffusion_opt is missing"),
    ({"train": {"predictor": {"frozen": True}}}, "train:initial_opt has no meaning for a predictor that is frozen"),
    ({"train": {"predictor": {"frozen": True, "lr": 1e-5}}}, "train:predictor:lr has no meaning for a predictor that is"),
    ({"train": {"predictor": {"rate": 1e-5}}}, "unknown option train:predictor:rate"),
    ({"path": {"pretrain_network_predictor": "a"}, "network_g": {"type": "SIDUNet", "denoiser": None, "predictor": None}}, "path:pretrain_network_predictor: network_g has no predictor"),
    ({"path": {"pretrain_network_predictor": "a", "pretrain_network_g": "b"}}, "pretrain_network_g holds the predictor too"),
    ({"train": None}, "option train is missing"),
    ({"model_type": "UCDIR_Model"}, "there is no model 'UCDIR_Model'; did you mean 'UCDIRModel'"),
    ({"network_g": {"type": "UCDR"}}, "option network_g:type: there is no arch 'UCDR'; did you mean 'UCDIR'"),
    ({"network_g": {"denoiser": {"inner_chanel": 8}}}, "network_g:denoiser:inner_chanel for UCDIRDenoiser; did you mean"),
    ({"network_g": {"denoiser": {"inner_channel": "8"}}}, "network_g:denoiser:inner_channel: .*integer, got '8'"),
    ({"network_g": {"denoiser": {"norm": "layer_norm"}}}, "option network_g:denoiser:norm: input should be 'layernorm', 'layernorm2d', 'groupnorm' or 'none', got 'layer_norm'; did you mean 'layernorm'"),
    ({"network_g": {"denoiser": {"integration": "akgn"}}}, "option network_g:denoiser:integration: .* got 'akgn'; did you mean 'akgm'"),
    ({"network_g": {"denoiser": {"guidance": "degradd"}}}, "option network_g:denoiser:guidance: .* got 'degradd'; did you mean 'degraded'"),
    ({"network_g": {"denoiser": {"activation": "gelu"}}}, "option network_g:denoiser:activation: .*'swish' or 'relu', got 'gelu'"),
    ({"network_g": {"denoiser": {"mid_attn": "no"}}}, "option network_g:denoiser:mid_attn: .*boolean, got 'no'"),
    ({"network_g": {"denoiser": {"channel_mults": [1, 2.5]}}}, "network_g:denoiser:channel_mults: .*integer"),
    ({"network_g": {"predictor": {"type": "EDSR", "num_fet": 3, "width": None, "levels": None}}}, "network_g:predictor:num_fet for EDSR; .*'num_feat'"),
    ({"network_g": {"predictor": None}}, "option network_g:predictor is missing"),
    ({"datasets": {"train": {"gt_sise": 3}}}, "unknown option datasets:train:gt_sise; did you mean 'gt_size'"),
    ({"datasets": {"train": {"type": "JPEG"}}}, "option datasets:train:type: there is no dataset 'JPEG'"),
    ({"datasets": {"trian": {"name": "a", "type": "JPEGDataset"}}}, "datasets:trian: the phases are train, val"),
    ({"datasets": {"train": {"batch_size_per_gpu": 0}}}, "datasets:train:batch_size_per_gpu: .*greater than 0"),
    ({"datasets": {"train": None}}, "option datasets:train is missing"),
    ({"manual_seed": 1.5}, "option manual_seed: .*integer"),
    ({"name": "../elsewhere"}, "option name: "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[m[:40] for _, m in FAULTS])
def test_faults_are_named(change, message):
    with pytest.raises(UserError, match=message) as caught:
        check_options(merged(TINY, change), True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "no valid YAML"),
        ("- a\n- b", "a mapping of options is expected"),
        ("", "a mapping of options is expected"),
        ("name: a\nname: b", "line 2: the key 'name' is given twice"),
    ],
)
def test_broken_files(text, message, tmp_path):
    path = tmp_path / "broken.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_options(str(path))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_options(str(tmp_path / "none.yml"))
    (tmp_path / "image.yml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="it is no text"):
        load_options(str(tmp_path / "image.yml"))


def test_an_option_file_of_basicsr(tmp_path):
    """The habits of BasicSR's own files: !!float counts, empty sections and values, keys that only it knows."""
    text = """
name: MSRResNet
model_type: SRModel
scale: 4
num_gpu: 0  # cpu
manual_seed: ~
datasets:
  train:
    name: DIV2K
    type: PairedImageDataset
    dataroot_gt: gt
    dataroot_lq: lq
    meta_info_file: ~
    filename_tmpl: '{}x4'
    io_backend: {type: disk}
    gt_size: 128
    use_hflip: true
    use_rot: true
    use_shuffle: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: 16
    dataset_enlarge_ratio: 100
    prefetch_mode: ~
network_g: {type: MSRResNet, num_in_ch: 3, num_out_ch: 3, num_feat: 64, num_block: 16, upscale: 4}
path: ~
train:
  ema_decay: 0.999
  optim_g: {type: Adam, lr: !!float 2e-4, weight_decay: 0, betas: [0.9, 0.99]}
  scheduler: {type: CosineAnnealingRestartLR, periods: [250000], restart_weights: [1], eta_min: !!float 1e-7}
  total_iter: !!float 1e6
  warmup_iter: -1
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
val:
  val_freq: !!float 5e3
  save_img: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: false, better: higher}
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb: {project: ~, resume_id: ~}
dist_params: {backend: nccl, port: 29500}
"""
    (tmp_path / "basicsr.yml").write_text(text)
    opt = load_options(str(tmp_path / "basicsr.yml"))
    assert opt["train"]["total_iter"] == 10**6
    assert isinstance(opt["val"]["val_freq"], int)
    assert opt["datasets"]["train"]["use_shuffle"] is True
    assert "meta_info_file" not in opt["datasets"]["train"]
    assert opt["manual_seed"] == 0
    assert opt["path"]["pretrain_network_g"] is None


def test_foreign_models_keep_their_own_options():
    foreign = merged(
        TINY,
        {
            "model_type": "SRGANModel",
            "network_g": None,
            "network_d": {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 4},
            "train": {
                "diffusion_opt": None,
                "initial_opt": None,
                "ema_start": None,
                "grad_clip": None,
                "optim_d": {"type": "Adam"},
                "net_d_iters": 1,
            },
            "path": {"pretrain_network_d": "d.pth"},
        },
    )
    foreign["network_g"] = {"type": "MSRResNet", "num_in_ch": 3, "num_out_ch": 3, "upscale": 1}
    opt = check_options(foreign, True)
    assert opt["train"]["net_d_iters"] == 1
    assert opt["path"]["pretrain_network_d"] == "d.pth"
    assert "diffusion" not in opt
    with pytest.raises(UserError, match="option train:total_iter"):
        check_options(merged(foreign, {"train": {"total_iter": 2.5}}), True)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"tile": 100}, "overlap: 64 must be smaller than half the tile .100.: take at most 49"),
        ({"steps": 0}, "steps: .*greater than 0"),
        ({"steps": 5000}, "steps: 5000 is more than the schedule's 2000"),
        ({"steps": 50, "start_timestep": 20}, "steps: 50 is more than start_timestep's 20"),
        ({"start_timestep": 3000}, "start_timestep: 3000 is more than"),
        ({"start_timestep": 100, "spacing": "rescale"}, "no meaning with spacing: rescale"),
        ({"eta": 0.5}, "eta: has no meaning for ddpm"),
        ({"dynamic_threshold": 0.99, "clip_x0": False}, "set clip_x0 to true"),
        ({"sampler": "dpmpp"}, "val:sampling:sampler"),
    ],
)
def test_impossible_sampling(sampling, message):
    with pytest.raises(UserError, match=f"val:sampling:.*{message}|{message}"):
        check_options(merged(TINY, {"val": {"sampling": sampling}}), True)


MERGING = """
first: &first {a: 1, b: {c: 2, d: 3}}
second: &second {a: 4, e: 5}
one: {<<: *first, a: 6}
two: {<<: [*second, *first], f: 7}
"""


def test_merge_keys_are_yaml():
    """The mapping's own keys win, then the first that is named; what is merged can be changed in one place."""
    options = read_yaml(MERGING, "here")
    assert options["one"] == {"a": 6, "b": {"c": 2, "d": 3}}
    assert options["two"] == {"a": 4, "e": 5, "b": {"c": 2, "d": 3}, "f": 7}
    apply_overrides(options, ["one:b:c=8"])
    assert options["one"]["b"]["c"] == 8 and options["first"]["b"]["c"] == options["two"]["b"]["c"] == 2


MULTIPLYING = "a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(50)) + "}\n"
MULTIPLYING += "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 3000)}]}}\n" for i in (1, 2, 3))


@pytest.mark.parametrize(
    "text",
    ["9" * 5000, "0x" + "f" * 300_000, "0b" + "1" * 9000, "0" + "7" * 9000, ":".join(["59"] * 5000), "9" * 5000 + ".5"],
)
def test_endless_numbers_are_one_line(text):
    for yaml_text in (f"a:\n  b: {text}", f"a:\n  {text[:1000]}: 1"):  # keys of YAML are not longer
        with pytest.raises(UserError, match=r"^here: line 2: a number of \d+ characters is no option$"):
            read_yaml(yaml_text, "here")
    with pytest.raises(UserError, match="--force_yml .* a number of"):
        apply_overrides({}, [f"a={text}"])


@pytest.mark.parametrize("text", [MULTIPLYING, "a: {<<: 3}", "a: {<<: [{x: 1}, 3]}", "a: &a {<<: *a, x: 1}"])
def test_merge_keys_that_mean_nothing_are_one_line(text):
    with pytest.raises(UserError, match=r"^here.*line [12]"):
        read_yaml(text, "here")


@pytest.mark.parametrize("as_base", [False, True])
def test_a_pipe_is_no_option_file(tmp_path, as_base):
    pipe = tmp_path / "pipe.yml"
    os.mkfifo(pipe)
    (tmp_path / "file.yml").write_text("_base_: pipe.yml")
    with pytest.raises(UserError, match=r"option file .*pipe\.yml cannot be read: it is no file, but a pipe"):
        load_options(str(tmp_path / "file.yml" if as_base else pipe))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"total_iter": None, "total_iterr": 4}}, "unknown option train:total_iterr; did you mean 'total_iter', which is required?"),
        ({"datasets": {"train": {"nane": "x", "name": None}}}, "unknown option datasets:train:nane; did you mean 'name', which is required?"),
        ({"model_type": None, "modeltype": "UCDIRModel"}, "unknown option modeltype; did you mean 'model_type', which is required?"),
        ({"train": {"optim_g": {"type": None, "tpye": "AdamW"}}}, "unknown option train:optim_g:tpye; did you mean 'type', which is required?"),
        ({"network_g": {"type": None, "typ": "UCDIR"}}, "unknown option network_g:typ; did you mean 'type', which is required?"),
        ({"train": {"total_iter": None}}, "option train:total_iter is missing"),
    ],
)  # fmt: skip
def test_a_misspelt_required_key_is_named(changes, message):
    with pytest.raises(UserError) as error:
        check_options(merged(TINY, changes), True, "file.yml")
    assert str(error.value) == f"file.yml: {message}"


BIRD = {"name": "bird", "model_type": "BIRDModel", "bird": {"task": "deblur"}}
ESRGAN = merged(EDSR, {"datasets": {"train": {"name": "t", "type": "PairedImageDataset"}}, "train": {"total_iter": 1, "optim_g": {"type": "Adam"}, "scheduler": {"type": "MultiStepLR", "milestones": [1]}}})  # fmt: skip
RULE_CASES = {
    "meaningless": (BIRD, {"compile": True}, "option compile has no meaning for BIRDModel, which restores without training; remove it"),
    "registered_model": (TINY, {"model_type": "UCDIRModell"}, "option model_type: there is no model 'UCDIRModell'; did you mean 'UCDIRModel'"),
    "network_or_bird": (TINY, {"network_g": None}, "option network_g is missing"),
    "bird": (BIRD, {"bird": {"mask": "holes.png"}}, "option bird:mask: only the task inpaint has holes, not deblur; remove it"),
    "engine": (TINY, {"mmengine": {"hooks": []}}, "option mmengine has no meaning for engine: basicsr"),
    "networks": (TINY, {"network_g": {"denoiser": {"widht": 3}}}, "unknown option network_g:denoiser:widht"),
    "phases": (TINY, {"datasets": {"validation": LQ_ONLY}}, "option datasets:validation: the phases are"),
    "datasets": (TINY, {"datasets": {"train": {"condition_file": "c.csv"}}}, "option datasets:train:condition_file has no meaning for JPEGDataset; remove it"),
    "batches": (TINY, {"datasets": {"train": {"batch_size_total": 4}}}, "option datasets:train:batch_size_total and batch_size_per_gpu exclude each other"),
    "degradations": (TINY, {"datasets": {"train": {"type": "MixedDegradationDataset", "quality": None, "degradations": [{"type": "blurr"}]}}}, "datasets:train:degradations"),
    "conditions": (TINY, {"network_g": {"denoiser": {"conditions": {"ratio": {"range": [1, 300]}}}}}, "option datasets:train"),
    "metrics": (TINY, {"val": {"metrics": {"psnr": {"crop_bordr": 1}}}}, "unknown option val:metrics:psnr:crop_bordr"),
    "training_is_there": (TINY, {"datasets": {"train": None}}, "option datasets:train is missing"),
    "optimizer": (TINY, {"train": {"optim_g": {"type": "AdamV"}}}, "option train:optim_g:type: there is no 'AdamV'"),
    "scheduler": (TINY, {"train": {"scheduler": {"type": "MultiStep"}}}, "option train:scheduler:type: there is no 'MultiStep'"),
    "losses": (TINY, {"train": {"initial_opt": {"type": "L2Loss"}}}, "option train:initial_opt:type: there is no loss 'L2Loss'"),
    "predictor": (TINY, {"train": {"predictor": {"frozen": True}}}, "option train:initial_opt has no meaning for a predictor that is frozen"),
    "needed_for_training": (TINY, {"train": {"diffusion_opt": None}}, "option train:diffusion_opt is missing"),
    "student": (TINY, {"model_type": "UCDIRStudentModel", "train": {"diffusion_opt": None, "initial_opt": None, "distillation_opt": {"type": "MSELoss"}}, "val": {"sampling": {"steps": 1}}}, "option train:teacher is missing"),
    "predictor_weights": (TINY, {"path": {"pretrain_network_predictor": "p.pth", "pretrain_network_g": "g.pth"}}, "option path:pretrain_network_predictor: pretrain_network_g holds the predictor too"),
    "foreign_training": (ESRGAN, {"train": {"grad_clip": 1.0}}, "option train:grad_clip is for UCDIRModel; SRModel would ignore it"),
    "sampling": (TINY, {"val": {"sampling": {"eta": 0.5}}}, "option val:sampling:eta: has no meaning for ddpm, only for ddim and dpmpp_2m_sde; remove it"),
    "foreign_network": (ESRGAN, {"compile": True}, "option compile is for UCDIRModel; SRModel would ignore it"),
}  # fmt: skip


@pytest.mark.parametrize("rule", [r.__name__ for r in (*BEFORE, *RULES) if r is not rules.other_models_sections])
def test_each_rule_refuses_what_it_is_about(rule):
    """One line that names file and key, and the rule is the one that says so."""
    base, changes, message = RULE_CASES[rule]
    check_options(copy.deepcopy(base), is_train="train" in base)
    with pytest.raises(UserError) as error:
        check_options(merged(base, changes), is_train="train" in base, where="file.yml")
    assert str(error.value).startswith("file.yml: ") and message in str(error.value)
    assert rule in [frame.name for frame in traceback.extract_tb(error.value.__cause__.__traceback__)]


def test_sections_of_other_models_are_dropped():
    assert not {"diffusion", "compile", "bird"} & check_options(copy.deepcopy(ESRGAN), True).keys()
    assert not {"diffusion", "network_g"} & check_options(copy.deepcopy(BIRD), False).keys()
    assert {"diffusion", "compile"} <= check_options(copy.deepcopy(TINY), True).keys()
