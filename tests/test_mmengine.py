"""MMEngine beside BasicSR: the same numbers from the same code, its own checkpoints, and what it refuses."""

import json
import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from basicsr.models import build_model
from conftest import LQ_ONLY, ROOT, TINY, TINY_DENOISER, assert_one_line_error, merged
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, METRICS, MODELS
from test_model import batch, weights_of
from test_prior_model import TINY_PRIOR
from test_sharding import free_port, slurm, wait_until
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from ucdir_cli.command_line import parse_run_arguments

from ucdir_plugin import registry
from ucdir_plugin.mm import runner as mm_engine
from ucdir_plugin.mm.data import KeyedSampler
from ucdir_plugin.mm.hooks import AverageHook
from ucdir_plugin.mm.loops import KeyedTrainLoop
from ucdir_plugin.mm.runner import mmengine_errors
from ucdir_plugin.options.check import check_options, load_options
from ucdir_plugin.training import setup
from ucdir_plugin.training.steps import parts_of
from ucdir_plugin.utils.checkpoints import choose_state, read_checkpoint
from ucdir_plugin.utils.errors import UserError

MM = merged(TINY, {"name": "mm", "engine": "mmengine"})
SGD = {"train": {"optim_g": {"type": "SGD", "lr": 0.1}, "scheduler": None, "warmup_iter": -1}}


def weights(file, key):
    return choose_state(read_checkpoint(file), str(file), key)[0]


def assert_same_weights(one, two):
    for key in ("params", "params_ema"):
        a, b = weights(one, key), weights(two, key)
        assert a.keys() == b.keys() and len(a) > 10
        for name in a:
            assert torch.equal(a[name], b[name]), name


# Registries


@pytest.mark.parametrize("kind, root", [("arch", MODELS), ("loss", MODELS), ("dataset", DATASETS), ("metric", METRICS)])
def test_everything_of_ours_is_in_mmengine_too(kind, root):
    entries = dict(iter(registry.BASICSR[kind]))
    own = [n for n, obj in entries.items() if obj.__module__.startswith("ucdir_plugin.")]
    assert own
    for name in own:
        found = root.get(f"ucdir_plugin.{name}")
        assert found is entries[name] or (kind == "metric" and callable(found)), name


def test_a_metric_is_built_by_its_name():
    metric = METRICS.build({"type": "ucdir_plugin.calculate_loe"})
    image = torch.rand(3, 40, 40)
    metric.process(None, [{"key": "a", "output": image, "lq": image, "gt": image}])
    assert metric.evaluate(1)["restoration/loe"] == 0
    with pytest.raises(UserError, match="unknown option metrics:loe:sizee"):
        METRICS.build({"type": "ucdir_plugin.calculate_loe", "sizee": 3})


def test_models_are_built_by_name_and_carry_nothing_else():
    model = MODELS.build({"type": "ucdir_plugin.UCDIRModel", "opt": {"network_g": TINY["network_g"]}})
    samples = model.val_step([{"lq": torch.rand(3, 16, 20), "key": "a"}, {"lq": torch.rand(3, 16, 20), "key": "b"}])
    assert [s["key"] for s in samples] == ["a", "b"] and samples[0]["output"].shape == (3, 16, 20)
    assert {name.split(".")[0] for name in model.state_dict()} == {"net_g"}


@MODELS.register_module()
class PlainPredictor(nn.Module):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain


def test_a_network_of_mmengine_predicts():
    child = registry.mm.Registry("model", parent=MODELS, scope="elsewhere")
    try:
        child.register_module(name="Other", module=PlainPredictor)
        for name in ("PlainPredictor", "mmengine.PlainPredictor", "elsewhere.Other"):
            opt = check_options(merged(TINY, {"network_g": {"predictor": None}}) | {
                "network_g": {"type": "UCDIR", "denoiser": TINY_DENOISER, "predictor": {"type": name, "gain": 0.5}}
            }, True)  # fmt: skip
            net = registry.build_arch(opt["network_g"]).eval()
            lq = torch.rand(1, 3, 8, 8) * 2 - 1
            torch.testing.assert_close(net.predict(lq), (lq + 1) / 2 * 0.5 * 2 - 1)  # it sees [0, 1]
    finally:
        del MODELS.children["elsewhere"]
    for name, words in (("elsewhere.Other", "no scope 'elsewhere' .*--import"), ("os.system", "no scope 'os'")):
        with pytest.raises(UserError, match=words):
            registry.build_arch({"type": name})
    with pytest.raises(UserError, match="no arch 'PlainPredicto'"):
        registry.build_arch({"type": "PlainPredicto"})


# The same numbers


class Loop:
    """As much of a runner as the hooks ask for."""

    def __init__(self, model, wrapper):
        self.model, self.optim_wrapper, self.iter = model, wrapper, 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_loss_gradients_and_average_after_five_steps(accumulate):
    """From the same weights and batches, SGD, dropout 0; parts of 2, 1 and 1 samples."""
    opt = check_options(merged(TINY, {**SGD, "train": {**SGD["train"], "accumulate": accumulate}}), True)
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=True)
    torch.manual_seed(0)
    one = build_model(opt)
    two = MODELS.build({"type": "ucdir_plugin.UCDIRModel", "opt": opt})
    two.net_g.load_state_dict(one.net_g.state_dict())
    two.net_g_ema.load_state_dict(one.net_g_ema.state_dict())
    wrapper = build_optim_wrapper(two, {"constructor": "ucdir_plugin.DiffusionOptimConstructor"})
    loop, average = Loop(two, wrapper), AverageHook(opt["train"]["ema_decay"], opt["train"]["ema_start"])
    gradients = {}
    wrapper.zero_grad = lambda **kwargs: gradients.update({n: p.grad for n, p in two.net_g.named_parameters()})
    for i in range(5):
        data = batch(first=4 * i)
        one.feed_data(data)
        one.optimize_parameters(i + 1)
        two.train()
        for p in two.net_g.parameters():
            p.grad = None
        total = 0.0
        for rows in parts_of(4, accumulate):
            wrapper.part((rows.stop - rows.start) / 4, rows.stop == 4)
            log = two.train_step({k: v[rows] for k, v in data.items()}, wrapper)
            total += float(log["loss"].detach()) * (rows.stop - rows.start) / 4
        loop.iter = i
        average.after_train_iter(loop, i)
        sums = one.get_current_log()
        assert total == pytest.approx(sums["l_eps"] + sums["l_initial"], rel=1e-6)
        for name, p in one.net_g.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights_of(two.net_g), weights_of(one.net_g), rtol=0, atol=1e-7)
    torch.testing.assert_close(weights_of(two.net_g_ema), weights_of(one.net_g_ema), rtol=0, atol=1e-7)
    assert not torch.equal(weights_of(two.net_g_ema), weights_of(two.net_g))


def test_a_step_without_a_finite_loss_changes_nothing():
    opt = check_options(merged(TINY, {**SGD, "train": {**SGD["train"], "max_bad_steps": 2}}), True)
    model = MODELS.build({"type": "ucdir_plugin.UCDIRModel", "opt": opt})
    wrapper = build_optim_wrapper(model, {"constructor": "ucdir_plugin.DiffusionOptimConstructor"})
    before, bad = weights_of(model), batch()
    bad["gt"][0, 0, 0, 0] = float("nan")
    model.train_step(bad, wrapper)
    AverageHook(0.9).after_train_iter(Loop(model, wrapper), 0)
    assert not wrapper.stepped and torch.equal(weights_of(model), before)
    with pytest.raises(UserError, match="2 steps in a row without a finite loss"):
        model.train_step(bad, wrapper)
    assert wrapper.state_dict()["stepper"]["bad_steps"] == 2


def test_tools_agree_and_weights_cross(workplace):
    """tools/train.py under both engines: equal weights and tables; each tests, and restores, what the other trained."""
    psnr = {"niqe": None}  # PSNR alone is quick
    changes = {
        "network_g": {"denoiser": {"dropout": 0.1}},  # random too
        "val": {"val_freq": 2, "metrics": psnr},
        "train": {"accumulate": 2, "optim_g": {"type": "Adam", "lr": 1e-3}},
    }
    paths = {name: workplace.write(merged(base, changes), f"{name}.yml") for name, base in (("tiny", TINY), ("mm", MM))}
    for path in paths.values():
        done = workplace.run("train.py", "-opt", path)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = workplace.folder / "experiments"
    assert_same_weights(runs / "tiny/models/net_g_4.pth", runs / "mm/iter_4.pth")
    assert (runs / "tiny/metrics_val.md").read_text() == (runs / "mm/metrics_val.md").read_text()
    assert "l_eps_l1_band" in next((runs / "mm").glob("*/*.log")).read_text()
    assert list((runs / "mm").glob("*/vis_data/vis_image/*.png"))
    for name, other in (("mm", runs / "tiny/models/net_g_4.pth"), ("tiny", runs / "mm/iter_4.pth")):
        done = workplace.run("test.py", "-opt", paths[name])  # finds its own
        assert done.returncode == 0, done.stderr[-3000:]
        table = (workplace.folder / f"results/{name}/metrics_val.md").read_text()
        first = (workplace.folder / f"results/{name}/visualization/val/chelsea_{name}.png").read_bytes()
        force = ("--force_yml", f"path:pretrain_network_g={other}", "path:param_key_g=params_ema")
        done = workplace.run("test.py", "-opt", paths[name], *force)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (workplace.folder / f"results/{name}/metrics_val.md").read_text() == table
        assert (workplace.folder / f"results/{name}/visualization/val/chelsea_{name}.png").read_bytes() == first
    tables = [(workplace.folder / f"results/{name}/metrics_val.md").read_text() for name in ("tiny", "mm")]
    assert tables[0] == tables[1] and (workplace.folder / "results/mm/report_val.html").exists()
    for name in ("tiny", "mm"):
        done = workplace.run("restore.py", "-opt", paths[name], "-i", "photos", "-o", f"restored_{name}")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (cv2.imread(str(workplace.folder / f"restored_{n}/chelsea.png")) for n in ("tiny", "mm"))
    assert one is not None and (one == two).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_resume_is_exact_and_passes_over_what_is_torn(workplace, number):
    """Stopped after the learning rate has gone down."""
    path = workplace.write(merged(MM, {"datasets": {"val": None}, "train": {"scheduler": {"milestones": [1]}}}))
    run = workplace.folder / "experiments/mm"
    first = workplace.fork("train.py", "-opt", path, "--force_yml", "train:total_iter=1000000")
    wait_until((run / "iter_2.pth").exists, first)
    os.kill(first.process.pid, number)
    done = first.wait()
    newest = max(int(f.stem[5:]) for f in run.glob("iter_*.pth"))
    if number == signal.SIGTERM:
        assert done.returncode == 143 and f"stopped and saved at iteration {newest}" in done.stderr + done.stdout
    (run / f"iter_{newest + 1}.pth").write_bytes((run / f"iter_{newest}.pth").read_bytes()[:2000])
    (run / ".iter_9.pth.1.tmp").touch()  # as if killed while it wrote
    total = ("--force_yml", f"train:total_iter={newest + 2}")
    done = workplace.run("train.py", "-opt", path, "--auto_resume", *total)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "passed over" in done.stdout and f"iter_{newest}.pth" in done.stdout
    assert not [f for f in os.listdir(run) if f.endswith(".tmp")]
    resumed = workplace.folder / "resumed.pth"
    shutil.move(run / f"iter_{newest + 2}.pth", resumed)
    assert workplace.run("train.py", "-opt", path, *total).returncode == 0
    assert_same_weights(resumed, run / f"iter_{newest + 2}.pth")
    for file in (resumed, run / f"iter_{newest + 2}.pth"):
        assert read_checkpoint(str(file))["optimizer"]["param_groups"][0]["lr"] == 5e-4
    if number == signal.SIGTERM:
        return
    changed = f"train:scheduler={{type: MultiStepLR, milestones: [{newest + 2}], gamma: 0.1}}"
    done = workplace.run(
        "train.py", "-opt", path, "--auto_resume", "--force_yml", f"train:total_iter={newest + 3}", changed
    )
    assert "learning rates go on as the options say: other milestones, gamma" in done.stdout + done.stderr
    newest += 1
    assert read_checkpoint(str(run / f"iter_{newest + 2}.pth"))["optimizer"]["param_groups"][0]["lr"] == pytest.approx(
        5e-5
    )
    for changes, words in (("network_g:denoiser:inner_channel=16", "other shapes"), ("train:optim_g:type=SGD", "SGD")):
        force = ("--force_yml", f"train:total_iter={newest + 3}", changes)
        assert_one_line_error(workplace.run("train.py", "-opt", path, "--auto_resume", *force), words)
    for file in run.glob("iter_*.pth"):
        file.write_bytes(b"torn")
    assert_one_line_error(workplace.run("train.py", "-opt", path, "--auto_resume"), "no checkpoint", "can be read")


def test_two_processes(workplace):
    """Train, validate, resume; gradients of SGD as those of one process with the same global batch."""
    changes = {**SGD, "val": {"val_freq": 2, "metrics": {"niqe": None}}, "train": {**SGD["train"], "total_iter": 2}}
    path = workplace.write(merged(MM, changes))
    assert workplace.run("train.py", "-opt", path).returncode == 0
    runs = workplace.folder / "experiments"
    shutil.move(runs / "mm", workplace.folder / "one")
    two = ("--force_yml", "datasets:train:batch_size_per_gpu=2")
    train_on_two(workplace, "-opt", path, *two)
    for key in ("params", "params_ema"):
        a, b = weights(workplace.folder / "one/iter_2.pth", key), weights(runs / "mm/iter_2.pth", key)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    one, both = (json.loads((f / "metrics_val.json").read_text()) for f in (workplace.folder / "one", runs / "mm"))
    assert [r["image"] for r in one["images"]] == [r["image"] for r in both["images"]]
    assert both["mean"]["restored"]["psnr"] == pytest.approx(one["mean"]["restored"]["psnr"], abs=0.05)
    more = (*two, "train:total_iter=3")
    train_on_two(workplace, "-opt", path, "--auto_resume", *more)
    assert read_checkpoint(runs / "mm/iter_3.pth")["meta"]["iter"] == 3


def train_on_two(workplace, *args):
    """Forked, as slurm would start them: torchrun's three new interpreters take several times as long."""
    command = ("train.py", "--launcher", "slurm", *args, f"dist_params:port={free_port()}")
    for process in [workplace.fork(*command, log=str(i), **slurm(i, 2)) for i in range(2)]:
        done = process.wait()
        assert done.returncode == 0, done.stderr[-3000:]


def test_what_mmengine_says_in_a_run_is_one_line(workplace):
    checkpoint = {"type": "CheckpointHook", "interval": 2, "by_epoch": False, "save_best": "psnrr", "rule": "greater"}
    changes = {
        "val": {"val_freq": 1, "metrics": {"niqe": None}, "sampling": {"steps": 1}},
        "mmengine": {"default_hooks": {"checkpoint": checkpoint}},
    }
    done = workplace.run("train.py", "-opt", workplace.write(merged(MM, changes)))
    assert_one_line_error(done, "option mmengine: ", "psnrr")


def test_only_mmengines_own_errors_are_told_in_one_line():
    with pytest.raises(UserError, match="a.yml: KeyError: .*Nothing"), mmengine_errors("a.yml"):
        MODELS.build({"type": "Nothing"})
    for bug in (lambda: {}["bug"], lambda: parts_of(4, "2")):
        with pytest.raises((KeyError, TypeError)), mmengine_errors("a.yml"):
            bug()


def test_a_loop_refuses_other_samplers():
    """With which a resumed run would read other samples."""
    loader = DataLoader(TensorDataset(torch.zeros(4)), batch_size=2, sampler=KeyedSampler(range(4), batch=4))
    with pytest.raises(UserError, match="KeyedSampler', batch=2"):
        KeyedTrainLoop(SimpleNamespace(visualizer=SimpleNamespace()), loader, max_iters=2)


def test_another_wrapper_gets_its_own_arguments_only(monkeypatch):
    monkeypatch.setattr(mm_engine, "Runner", lambda cfg, **others: cfg["model_wrapper_cfg"])
    opt = check_options(MM, True)
    assert mm_engine.runner_of(opt, "", "none", {})["broadcast_buffers"] is False
    opt["mmengine"]["model_wrapper"] = {"type": "MMFullyShardedDataParallel", "use_orig_params": True}
    assert dict(mm_engine.runner_of(opt, "", "none", {})) == opt["mmengine"]["model_wrapper"]


def test_one_process_takes_one_gpu_and_the_whole_batch(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    total = {"datasets": {"train": {"batch_size_per_gpu": None, "batch_size_total": 4}}}
    args = parse_run_arguments("", ["-opt", workplace.write(merged(MM, total))])
    opt = setup.setup(args, is_train=True)
    assert opt["num_gpu"] == 1 and opt["datasets"]["train"]["batch_size_per_gpu"] == 4
    args.force_yml = ["num_gpu=2"]
    with pytest.raises(UserError, match="num_gpu: 2: a process of MMEngine uses one GPU"):
        setup.setup(args, is_train=True)


FLEXIBLE = {"mmengine": {"strategy": {"type": "SingleDeviceStrategy"}, "hooks": [{"type": "EmptyCacheHook"}],
                         "optim_wrapper": {"type": "OptimWrapper"}}}  # fmt: skip


def test_a_strategy_trains_the_same(workplace):
    """FlexibleRunner, of which FSDP and DeepSpeed are strategies, with MMEngine's own wrapper of the optimizer."""
    small = {"datasets": {"val": None}, "train": {"total_iter": 2, "optim_g": {"fused": True}}}
    for name, more in (("mm", {}), ("flexible", FLEXIBLE)):
        path = workplace.write(merged(merged(MM, small), {"name": name, **more}))
        done = workplace.run("train.py", "-opt", path)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = workplace.folder / "experiments"
    assert_same_weights(runs / "mm/iter_2.pth", runs / "flexible/iter_2.pth")
    shutil.move(runs / "flexible/iter_2.pth", runs / "mm/iter_2.pth")
    done = workplace.run("train.py", "-opt", path, "--auto_resume", "--force_yml", "name=mm", "train:total_iter=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_checkpoint(runs / "mm/iter_4.pth")["meta"]["iter"] == 4


def test_a_prior_trains_the_same(workplace):
    for name in ("basicsr", "mmengine"):
        path = workplace.write(merged(TINY_PRIOR, {"name": name, "engine": name, "train": {"total_iter": 2}}))
        done = workplace.run("train.py", "-opt", path)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (workplace.folder / "experiments" / name for name in ("basicsr", "mmengine"))
    assert_same_weights(one / "models/net_g_2.pth", two / "iter_2.pth")
    assert (one / "losses_val.csv").read_text() == (two / "losses_val.csv").read_text()
    pictures = [(f / "visualization/val/samples_2.png").read_bytes() for f in (one, two)]
    assert pictures[0] == pictures[1]


def test_bird_restores_the_same(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    opt = check_options(
        {"name": "b", "model_type": "BIRDModel", "engine": "mmengine", "bird": {"settings": {"steps": 2}},
         "datasets": {"val": LQ_ONLY}}, False,
    )  # fmt: skip
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=False)
    opt["datasets"]["val"].update(phase="val", scale=1)
    dataset = DATASETS.build({"type": "ucdir_plugin.BasicSRDataset", "opt": opt["datasets"]["val"], "phase": "val"})
    assert dataset[0]["key"] == "astronaut.png"
    one, two = build_model(opt), MODELS.build({"type": "ucdir_plugin.BIRDModel", "opt": opt})
    (sample,) = two.val_step([dataset[0]])
    one.feed_data({"lq": dataset[0]["lq"].unsqueeze(0), "key": ["astronaut.png"]})
    one.test()
    assert torch.equal(sample["output"], one.output[0]) and sorted(sample["files"]) == sorted(one.result_files())
    with pytest.raises(UserError, match="restores without training"):
        two(two.data_preprocessor([dataset[0]])["inputs"], ["a"], mode="loss")


# MMEngine's own configurations

CONFIG = """
custom_imports = dict(imports=["ucdir_plugin"])
model = dict(type="ucdir_plugin.UCDIRModel", opt={opt!r})
data = dict(type="PairedImageDataset", dataroot_gt="gt.lmdb", dataroot_lq="lq.lmdb", io_backend=dict(type="lmdb"),
            gt_size=16, use_hflip=True, use_rot=True, filename_tmpl="{{}}")
train_dataloader = dict(batch_size=2, dataset=dict(type="ucdir_plugin.BasicSRDataset", opt=data),
                        sampler=dict(type="ucdir_plugin.KeyedSampler", batch=2), collate_fn=dict(type="default_collate"))
train_cfg = dict(by_epoch=False, max_iters=2, val_interval=2)
optim_wrapper = dict(constructor="ucdir_plugin.DiffusionOptimConstructor")
files = dict(type="PairedRestorationDataset", dataroot_gt="photos", dataroot_lq="photos")
val_dataloader = dict(batch_size=1, dataset=dict(type="ucdir_plugin.BasicSRDataset", opt=files, phase="val"),
                      sampler=dict(type="DefaultSampler", shuffle=False))
val_cfg = dict()
val_evaluator = [dict(type="ucdir_plugin.RestorationMetrics", metrics=dict(psnr=dict(type="calculate_psnr", crop_border=0))),
                 dict(type="ucdir_plugin.calculate_loe")]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False))
custom_hooks = [dict(type="ucdir_plugin.AverageHook", decay=0.9), dict(type="ucdir_plugin.NoiseBandsHook", interval=1),
                dict(type="ucdir_plugin.PicturesHook"), dict(type="ucdir_plugin.SeedHook"),
                dict(type="ucdir_plugin.PlainCheckpointHook")]
log_processor = dict(by_epoch=False)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
"""


def test_a_configuration_of_mmengines_own(workplace):
    """LMDBs by BasicSR's own dataset, MMEngine's loops and metrics; refused without --trust-config."""
    files = {p.stem: p.read_bytes() for p in (workplace.folder / "photos").iterdir()}
    for name in ("gt.lmdb", "lq.lmdb"):
        make_lmdb(workplace.folder / name, files)
    opt = {"network_g": TINY["network_g"], "train": {**TINY["train"]}, "val": {"sampling": {"steps": 2}}}
    (workplace.folder / "own.py").write_text(CONFIG.format(opt=opt))
    refused = workplace.run("train.py", "-opt", "own.py")
    assert_one_line_error(refused, "own.py", "run code", "--trust-config")
    done = workplace.run("train.py", "-opt", "own.py", "--trust-config")
    assert done.returncode == 0, done.stderr[-3000:]
    run = workplace.folder / "experiments/own"
    log = next(run.glob("*/*.log")).read_text()
    assert "restoration/psnr" in log and "restoration/input/loe: 0.0000" in log and "l_eps_l1_band" in log
    assert len(list(run.glob("*/vis_data/vis_image/*.png"))) == 3
    more = ("--auto_resume", "--force_yml", "train_cfg.max_iters=3")
    done = workplace.run("train.py", "-opt", "own.py", "--trust-config", *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed epoch: 0, iter: 2" in done.stdout + done.stderr


def make_lmdb(path, files):
    import lmdb

    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as txn:
        for key, content in files.items():
            txn.put(key.encode(), content)
    lines = [f"{key}.png ({cv2.imdecode(np.frombuffer(c, np.uint8), 1).shape[0]},36,3) 1\n" for key, c in files.items()]
    (path / "meta_info.txt").write_text("".join(lines))


# Bad input


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("base", [TINY, MM], ids=["basicsr", "mmengine"])
def test_a_hostile_pickle_is_refused_as_weights(workplace, base):
    content = pickle.dumps({"state_dict": Hostile()})
    (workplace.folder / "hostile.pth").write_bytes(content)
    torch.save({"state_dict": {}, "meta": Hostile(), "optimizer": {}}, workplace.folder / "zip.pth")
    path = workplace.write(base)
    for key, name in (
        ("pretrain_network_g", "hostile.pth"),
        ("pretrain_network_g", "zip.pth"),
        ("resume_state", "zip.pth"),
    ):
        done = workplace.run("train.py", "-opt", path, "--force_yml", f"path:{key}={name}")
        assert_one_line_error(done, name)
    assert not (workplace.folder / "hacked").exists()


WRONG = [
    ({"engine": "mmengin"}, "engine: input should be 'basicsr' or 'mmengine'"),
    ({"mmengine": {"hooks": []}}, "option mmengine has no meaning for engine: basicsr"),
    ({"engine": "mmengine", "model_type": "SRModel"}, "SRModel is a loop of BasicSR: remove engine"),
    ({"engine": "mmengine", "mmengine": {"hook": []}}, "unknown option mmengine:hook; did you mean 'hooks'"),
    ({"engine": "mmengine", "mmengine": {"hooks": [{"type": "EmptyCachHook"}]}}, "did you mean 'EmptyCacheHook'"),
    ({"engine": "mmengine", "mmengine": {"hooks": [{"type": "os.system"}]}}, "mmengine:hooks:0:type: there is no 'os.system'"),
    ({"engine": "mmengine", "mmengine": {"hooks": [{"type": "EMAHook", "begin_itr": 3}]}}, None),
    ({"engine": "mmengine", "mmengine": {"hooks": [{"type": "EMAHook", "ema_type": "os.system"}]}}, "hooks:0:ema_type: 'os.system' is in none"),
    ({"engine": "mmengine", "mmengine": {"hooks": [{"type": "EmptyCacheHook", "before": True}]}}, "unknown option mmengine:hooks:0:before"),
    ({"engine": "mmengine", "mmengine": {"strategy": {"type": "FSDPStrateg"}}}, "did you mean 'FSDPStrategy'"),
    ({"engine": "mmengine", "mmengine": {"strategy": {"type": "FSDPStrategy"}}}, "FSDPStrategy needs a CUDA device"),
    ({"engine": "mmengine", "mmengine": {"optim_wrapper": {"type": "AmpOptimWrapper"}}}, "AmpOptimWrapper needs a CUDA device"),
    ({"engine": "mmengine", "mmengine": {"strategy": {"type": "DeepSpeedStrategy"}}}, r"\[deepspeed\]"),
    ({"engine": "mmengine", "mmengine": {"optim_wrapper": {"type": "OptimWrapper"}}, "train": {**TINY["train"], "amp": "bf16"}}, "train:amp has no meaning for mmengine:optim_wrapper"),
    ({"engine": "mmengine", "mmengine": {"visualizer": {"type": "Visualizer", "vis_backends": [{"type": "subprocess.Popen"}]}}}, "vis_backends:0:type: there is no 'subprocess.Popen'"),
    ({"engine": "mmengine", "mmengine": {"log_processor": {"window": {"type": "os.system"}}}}, "'os.system' is in none of MMEngine's registries"),
    ({"engine": "mmengine", "network_g": {"predictor": {"type": "mmagic.EDSR"}}}, "no scope 'mmagic'"),
    ({"engine": "mmengine", "mmengine": {"param_scheduler": [{"type": "LinearLR"}]}}, "remove train:scheduler and train:warmup_iter"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", WRONG, ids=lambda v: str(v)[-60:])
def test_bad_options(changes, words):
    base = {**TINY, "network_g": {**TINY["network_g"]}}
    if "network_g" in changes:
        base["network_g"] = {**TINY["network_g"], **changes["network_g"]}
        changes = {k: v for k, v in changes.items() if k != "network_g"}
    if words is None:
        check_options({**base, **changes}, True)
        return
    with pytest.raises(UserError, match=words):
        check_options({**base, **changes}, True)


def test_bad_command_lines(workplace, tmp_path):
    path = workplace.write(merged(MM, {"mmengine": {"custom_imports": ["wave"]}}))
    assert_one_line_error(workplace.run("train.py", "-opt", path), "custom_imports", "--trust-config")
    path = workplace.write(merged(MM, {"num_gpu": 1}))
    assert_one_line_error(workplace.run("train.py", "-opt", path), "num_gpu: 1 asked for, 0 found")
    folder = workplace.folder / "experiments/mm/training_states"
    folder.mkdir(parents=True)
    (folder / "2.state").write_bytes(b"")
    done = workplace.run("train.py", "-opt", workplace.write(MM), "--auto_resume")
    assert_one_line_error(done, "trained with engine: basicsr", "pretrain_network_g")


def test_settings_for_clusters_are_known(monkeypatch):
    """options/mmengine/*.yml for CUDA are checked as if there were some; nothing of them is run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    files = sorted((ROOT / "options/mmengine").glob("*.yml"))
    assert len(files) >= 3
    for file in files:
        assert load_options(str(file))["engine"] == "mmengine"
