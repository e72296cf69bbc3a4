"""The tools as a user runs them: train, test, resume, foreign models, several processes, bad input."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, merged
from test_checkpoint import Hostile

from ucdir_plugin.options.check import check_options
from ucdir_plugin.utils.checkpoints import read_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def final_state(folder, iteration):
    """Weights, average and optimizer of an iteration, as one flat dict of tensors."""
    nets = torch.load(folder / "models" / f"net_g_{iteration}.pth", weights_only=True)
    state = torch.load(folder / "training_states" / f"{iteration}.state", weights_only=True)
    flat = {f"{k}.{n}": v for k, net in nets.items() for n, v in net.items()}
    for i, moments in state["optimizers"][0]["state"].items():
        flat.update({f"{i}.{n}": v for n, v in moments.items()})
    flat["lr"] = torch.tensor(state["optimizers"][0]["param_groups"][0]["lr"], dtype=torch.float64)
    return flat


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def numbers(table):
    """Of each image; where its files are differs between validation and test."""
    return {row["image"]: row["metrics"] for row in table["images"]}


def losses(folder):
    """iteration -> logged losses, over all logs of a run."""
    found = {}
    for log in sorted(folder.glob("train_*.log")):
        for line in log.read_text().splitlines():
            if "l_eps:" in line:
                found[int(line.split("iter:")[1].split(",")[0])] = line.split("l_eps:")[1]
    return found


def test_train_then_test_gives_the_same_table(workplace):
    options = workplace.write(TINY)
    done = workplace.run("train.py", "-opt", options)
    assert done.returncode == 0, done.stderr
    assert "starting tiny from scratch" in done.stdout
    run = workplace.folder / "experiments" / "tiny"
    assert sorted(p.name for p in (run / "models").iterdir()) == ["net_g_2.pth", "net_g_4.pth", "net_g_latest.pth"]
    assert set(losses(run)) == {1, 2, 3, 4}
    strip = cv2.imread(str(run / "visualization" / "coffee" / "coffee_4.png"))
    assert strip.shape == (44, 4 * 36 + 3 * 8, 3)  # input | initial | restored | truth
    truth = cv2.imread(str(workplace.folder / "photos" / "coffee.png"))
    np.testing.assert_array_equal(strip[:, -36:], truth)

    done = workplace.run("test.py", "-opt", options)
    assert done.returncode == 0, done.stderr
    results = workplace.folder / "results" / "tiny"
    tables = [json.loads((folder / "metrics_val.json").read_text()) for folder in (run, results)]
    assert numbers(tables[0]) == numbers(tables[1])
    files = [{row["image"]: row["files"] for row in table["images"]} for table in tables]
    for image, found in files[1].items():
        assert found == {**files[0][image], "restored": f"visualization/val/{image[:-4]}_tiny.png"}
    assert tables[0]["mean"] == tables[1]["mean"]
    assert (run / "metrics_val.md").read_text() == (results / "metrics_val.md").read_text()
    assert (results / "metrics_val.md").read_text() in done.stdout

    restored = cv2.imread(str(results / "visualization" / "val" / "coffee_tiny.png"))
    mse = ((restored.astype(float) - truth) ** 2).mean()
    row = next(
        r
        for r in csv.DictReader((results / "metrics_val.csv").open())
        if r["image"] == "coffee.png" and r["stage"] == "restored"
    )
    assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / mse))
    assert row["niqe"] == ""  # 36 pixels are too few for NIQE
    assert "not measurable" in (results / "metrics_val.md").read_text()
    assert {r["metrics"]["input"]["niqe"] for r in tables[0]["images"]} == {None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Twelve iterations in one go."""
    from conftest import Workplace

    place = Workplace(tmp_path_factory.mktemp("undisturbed"))
    options = merged(TINY, {"train": {"total_iter": 12}, "logger": {"save_checkpoint_freq": 3, "print_freq": 4}})
    options["network_g"]["denoiser"]["dropout"] = 0.1  # draws from the global generator at every step
    assert place.run("train.py", "-opt", place.write(options)).returncode == 0
    return place, options


def test_resume_equals_an_uninterrupted_run(undisturbed, workplace):
    """k + k iterations = 2k, bit for bit, with other workers: weights, average, optimizer, rate, losses."""
    place, options = undisturbed
    half = workplace.write(merged(options, {"train": {"total_iter": 6}}), "half.yml")
    assert workplace.run("train.py", "-opt", half).returncode == 0
    whole = workplace.write(merged(options, {"datasets": {"train": {"num_worker_per_gpu": 2}}}))
    done = workplace.run("train.py", "-opt", whole, "--auto_resume")
    assert done.returncode == 0, done.stderr
    assert "resuming tiny at iteration 6" in done.stdout
    runs = [p.folder / "experiments" / "tiny" for p in (place, workplace)]
    assert_same(final_state(runs[0], 12), final_state(runs[1], 12))
    assert losses(runs[0]) == losses(runs[1])
    assert set(losses(runs[0])) == {4, 8, 12}  # the line at 8 averages over the stop at 6


def newest_state(run):
    states = [p for p in (run / "training_states").glob("*.state") if p.stem.isdigit()]
    return max(states, key=lambda p: int(p.stem), default=None)


def test_resume_passes_over_a_damaged_state(undisturbed, workplace):
    place, options = undisturbed
    path, run = workplace.write(options), workplace.folder / "experiments" / "tiny"
    assert workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=9").returncode == 0
    newest = newest_state(run)
    newest.write_bytes(newest.read_bytes()[:100])
    (run / "models" / ".net_g_9.pth.1.tmp").write_bytes(b"half")
    done = workplace.run("train.py", "-opt", path, "--auto_resume")
    assert done.returncode == 0, done.stderr
    assert f"passed over: checkpoint {newest}" in done.stdout
    assert not list((run / "models").glob(".*.tmp"))
    assert_same(final_state(place.folder / "experiments" / "tiny", 12), final_state(run, 12))


def test_changes_between_resumed_runs(workplace):
    path = workplace.write(TINY)
    assert workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=2").returncode == 0
    resume = ["-opt", path, "--auto_resume", "--force_yml"]
    done = workplace.run("train.py", *resume, "train:optim_g:type=SGD")
    assert_one_line_error(done, "the training state is of optimizer AdamW, the options ask for SGD")
    assert_one_line_error(workplace.run("train.py", *resume, "train:scheduler=~"), "resuming", "schedulers")
    file = workplace.folder / "experiments/tiny/training_states/2.state"
    whole = file.read_bytes()
    torch.save({k: v for k, v in read_checkpoint(str(file)).items() if k != "schedulers"}, file)
    assert_one_line_error(workplace.run("train.py", *resume, "train:total_iter=4"), "resuming", "schedulers")
    file.write_bytes(whole)
    added = "val:metrics:ssim={type: calculate_ssim, crop_border: 0}"
    done = workplace.run("train.py", *resume, added)
    assert done.returncode == 0, done.stderr
    mean = json.loads((workplace.folder / "experiments" / "tiny" / "metrics_val.json").read_text())["mean"]
    assert set(mean["restored"]) == {"psnr", "niqe", "ssim"}


def test_resumed_rates_follow_the_options(workplace):
    """A milestone that the first run did not have; none where the options say the same."""
    path = workplace.write(merged(TINY, {"datasets": {"val": None}}))
    assert workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=2").returncode == 0
    changed = "train:scheduler={type: MultiStepLR, milestones: [2], gamma: 0.5}"
    done = workplace.run("train.py", "-opt", path, "--auto_resume", "--force_yml", "train:total_iter=4", changed)
    assert done.returncode == 0, done.stderr
    assert "learning rates go on as the options say: other milestones" in done.stdout + done.stderr
    state = read_checkpoint(str(workplace.folder / "experiments/tiny/training_states/4.state"))
    group = state["optimizers"][0]["param_groups"][0]
    assert group["lr"] == 0.5 * group["initial_lr"]
    done = workplace.run("train.py", "-opt", path, "--auto_resume", "--force_yml", "train:total_iter=5", changed)
    assert done.returncode == 0 and "learning rates" not in done.stdout + done.stderr


def test_a_validation_lost_by_a_stop_is_made_up(workplace):
    path = workplace.write(merged(TINY, {"val": {"val_freq": 2}}))
    assert (
        workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=2", "val:val_freq=9").returncode == 0
    )
    shutil.rmtree(workplace.folder / "experiments" / "tiny" / "visualization")
    assert workplace.run("train.py", "-opt", path, "--auto_resume").returncode == 0
    made = {p.name for p in (workplace.folder / "experiments" / "tiny" / "visualization" / "coffee").iterdir()}
    assert made == {"coffee_2.png", "coffee_4.png"}


def test_images_alone(workplace):
    """Validation and test without true images: pictures and no-reference metrics only."""
    alone = {"type": "PairedRestorationDataset", "dataroot_gt": None, "dataroot_lq": "photos", "quality": None}
    path = workplace.write(merged(TINY, {"datasets": {"val": alone}, "train": {"total_iter": 1}}))
    for tool in ("train.py", "test.py"):
        done = workplace.run(tool, "-opt", path)
        assert done.returncode == 0, done.stderr
    results = workplace.folder / "results" / "tiny"
    assert len(list((results / "visualization" / "val").glob("*_tiny.png"))) == 3
    rows = json.loads((results / "metrics_val.json").read_text())["images"]
    assert all(set(stage) == {"niqe"} for row in rows for stage in row["metrics"].values())
    done = workplace.run(
        "test.py", "-opt", path, "--force_yml", "val:metrics:niqe={type: calculate_psnr, crop_border: 0}"
    )
    assert done.returncode == 0, done.stderr


def test_test_takes_what_was_trained_unless_forced(workplace):
    options = merged(TINY, {"train": {"total_iter": 1}})
    path = workplace.write(options)
    assert workplace.run("train.py", "-opt", path, "--force_yml", "name=first").returncode == 0
    start = str(workplace.folder / "experiments" / "first" / "models" / "net_g_1.pth")
    path = workplace.write(merged(options, {"path": {"pretrain_network_g": start}}))
    assert workplace.run("train.py", "-opt", path).returncode == 0
    done = workplace.run("test.py", "-opt", path)
    assert f"weights: {workplace.folder}/experiments/tiny/models/net_g_1.pth" in done.stdout, done.stderr
    done = workplace.run("test.py", "-opt", path, "--force_yml", f"path:pretrain_network_g={start}")
    assert f"weights: {start}" in done.stdout


def test_a_bad_image_during_training_stops_with_its_name_and_a_checkpoint(workplace):
    options = merged(TINY, {"train": {"total_iter": 100000}, "logger": {"save_checkpoint_freq": 100000}})
    options["datasets"]["train"]["num_worker_per_gpu"] = 1
    run = workplace.folder / "experiments" / "tiny"
    process = workplace.start("train.py", "-opt", workplace.write(options))
    while not losses(run) and process.poll() is None:
        time.sleep(0.02)
    (workplace.folder / "photos" / "coffee.png").write_bytes(b"")
    out, err = process.communicate(timeout=120)
    assert_one_line_error(subprocess.CompletedProcess([], process.returncode, out, err), "photos/coffee.png is empty")
    assert len(list((run / "training_states").glob("*.state"))) == 1


def test_two_processes_train_validate_and_resume(workplace):
    """Two gloo processes equal one process with the same global batch; weights compared after one SGD step's worth."""
    changes = {
        "train": {"optim_g": {"type": "SGD", "lr": 0.1}, "scheduler": None, "warmup_iter": None, "total_iter": 5},
        "logger": {"save_checkpoint_freq": 5},
    }
    options = merged(TINY, changes)
    single = workplace.run("train.py", "-opt", workplace.write(options))
    assert single.returncode == 0, single.stderr
    half = merged(
        options, {"name": "double", "datasets": {"train": {"batch_size_per_gpu": None, "batch_size_total": 4}}}
    )
    path = workplace.write(half, "double.yml")
    first = workplace.run("train.py", "-opt", path, "--launcher", "pytorch", "--force_yml", "train:total_iter=3",
                          "logger:save_checkpoint_freq=3", launcher=TORCHRUN)  # fmt: skip
    assert first.returncode == 0, first.stderr[-3000:]
    both = workplace.run("train.py", "-opt", path, "--launcher", "pytorch", "--auto_resume", launcher=TORCHRUN)
    assert both.returncode == 0, both.stderr[-3000:]
    assert "resuming double at iteration 3" in both.stdout
    assert both.stdout.count("resuming") == 1
    runs = [workplace.folder / "experiments" / name for name in ("tiny", "double")]
    a, b = (torch.load(run / "models" / "net_g_5.pth", weights_only=True)["params"] for run in runs)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, msg=key)
    tables = [json.loads((run / "metrics_val.json").read_text()) for run in runs]
    assert [r["image"] for r in tables[0]["images"]] == [r["image"] for r in tables[1]["images"]]
    for one, two in zip(*(t["images"] for t in tables)):
        assert one["metrics"]["restored"]["psnr"] == pytest.approx(two["metrics"]["restored"]["psnr"], abs=1e-2)
    done = workplace.run("test.py", "-opt", path, "--launcher", "pytorch", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((workplace.folder / "results" / "double" / "metrics_val.json").read_text())
    assert numbers(again) == numbers(tables[1])


@pytest.mark.parametrize("arch", ["EDSR", "UCDIRDenoiser", "MSRResNet"])
def test_other_models_run_through_the_same_tools(workplace, arch):
    networks = {
        "EDSR": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 1},
        "UCDIRDenoiser": {**TINY["network_g"]["denoiser"], "in_channel": 3, "residual": True},
        "MSRResNet": {
            "type": "MSRResNet",
            "num_in_ch": 3,
            "num_out_ch": 3,
            "num_feat": 4,
            "num_block": 1,
            "upscale": 2,
        },
    }
    options = merged(
        TINY,
        {
            "model_type": "SRModel",
            "train": {"diffusion_opt": None, "initial_opt": None, "ema_start": None, "grad_clip": None},
            "network_g": None,
        },
    )
    options["network_g"] = networks[arch]
    options["train"]["pixel_opt"] = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    if arch == "MSRResNet":  # super-resolution, with BasicSR's own dataset
        options["scale"] = 2
        (workplace.folder / "lr").mkdir()
        for photo in (workplace.folder / "photos").iterdir():
            cv2.imwrite(str(workplace.folder / "lr" / photo.name), cv2.imread(str(photo))[::2, ::2])
        for phase in ("train", "val"):
            options["datasets"][phase].update(type="PairedImageDataset", dataroot_lq="lr")
            options["datasets"][phase].pop("quality")
    path = workplace.write(options)
    done = workplace.run("train.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    done = workplace.run("test.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    tables = [
        json.loads((workplace.folder / kind / "tiny" / "metrics_val.json").read_text())
        for kind in ("experiments", "results")
    ]
    assert tables[0]["mean"]["restored"]["psnr"] > 5
    assert numbers(tables[0]) == numbers(tables[1])


def edsr(loss, **train):
    """TINY's task for BasicSR's SRModel with an EDSR."""
    own = dict.fromkeys(("diffusion_opt", "initial_opt", "ema_start", "grad_clip"))
    options = merged(TINY, {"model_type": "SRModel", "network_g": None, "train": {**own, **train}})
    options["network_g"] = {
        "type": "EDSR",
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_feat": 4,
        "num_block": 1,
        "upscale": 1,
    }
    options["train"]["pixel_opt"] = {"type": loss}
    return options


def test_foreign_models_resume_exactly_too(workplace):
    options = edsr("L1Loss")
    whole = workplace.write(options)
    half = workplace.write(merged(options, {"name": "half", "train": {"total_iter": 2}}), "half.yml")
    rest = workplace.write(merged(options, {"name": "half"}), "rest.yml")
    for arguments in ((whole,), (half,), (rest, "--auto_resume")):
        done = workplace.run("train.py", "-opt", *arguments)
        assert done.returncode == 0, done.stderr
    runs = [workplace.folder / "experiments" / name for name in ("tiny", "half")]
    assert_same(final_state(runs[0], 4), final_state(runs[1], 4))


def test_under_basicsrs_own_loop(workplace):
    """The model trains, validates and resumes when a user's script calls basicsr.train itself."""
    options = merged(TINY, {"datasets": {"train": {"batch_size_per_gpu": 2}}})  # its loader drops incomplete batches
    complete = merged(check_options(options, True), {"num_gpu": 0, "diffusion": None, "val": {"sampling": None}})
    path = workplace.write(complete)  # without what only this package knows
    script = workplace.folder / "own_train.py"
    script.write_text(
        "import sys, ucdir_plugin\nfrom basicsr.train import train_pipeline\n"
        f"sys.argv = ['train.py', '-opt', {path!r}, *sys.argv[1:]]\ntrain_pipeline({str(workplace.folder)!r})\n"
    )
    tool = os.path.relpath(script, ROOT / "tools")
    done = workplace.run(tool, "--force_yml", "train:total_iter=2")
    assert done.returncode == 0, done.stderr[-2000:]
    done = workplace.run(tool, "--auto_resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Resuming training from epoch" in done.stderr
    assert (workplace.folder / "experiments" / "tiny" / "models" / "net_g_4.pth").exists()
    assert "psnr: input" in done.stderr


def test_debug_and_force_yml(workplace):
    path = workplace.write(TINY)
    done = workplace.run(
        "train.py", "-opt", path, "--debug", "--force_yml", "train:optim_g:lr=1e-5", "--force_yml", "train:total_iter=1"
    )
    assert done.returncode == 0, done.stderr
    assert (workplace.folder / "experiments" / "debug_tiny" / "models" / "net_g_1.pth").exists()
    assert "lr: 1e-05" in done.stderr


def test_an_earlier_run_is_moved_away_not_overwritten(workplace):
    path = workplace.write(merged(TINY, {"train": {"total_iter": 1}}))
    for _ in range(2):
        assert workplace.run("train.py", "-opt", path).returncode == 0
    names = sorted(p.name for p in (workplace.folder / "experiments").iterdir())
    assert len(names) == 2
    assert names[1].startswith("tiny_archived_")


BAD = {
    "no option file": ({}, ["-opt", "none.yml"], ["none.yml cannot be read"]),
    "missing folder": ({"datasets": {"train": {"dataroot_gt": "nowhere"}}}, [], ["the folder nowhere does not exist"]),
    "unknown key": ({"train": {"ema_deacy": 0.9}}, [], ["train:ema_deacy", "'ema_decay'"]),
    "unknown arch": ({"network_g": {"type": "UCDRI"}}, [], ["'UCDRI'", "'UCDIR'"]),
    "wrong type": ({}, ["--force_yml", "val:sampling:steps=2.5"], ["val:sampling:steps", "2.5"]),
    "crop too large": ({"datasets": {"train": {"gt_size": 64}}}, [], [".png", "smaller than the crop gt_size 64"]),
    "python tag": ({}, ["--force_yml", "name=!!python/object/apply:os.mkdir [mark]"], ["tags are refused"]),
    "missing weights": ({"path": {"pretrain_network_g": "none.pth"}}, [], ["none.pth does not exist"]),
    "hostile weights": ({"path": {"pretrain_network_g": "bomb.pth"}}, [], ["bomb.pth is refused"]),
    "other weights": ({"path": {"pretrain_network_g": "other.pth"}}, [], ["other.pth is of another architecture than UCDIR"]),
    "hostile state": ({"path": {"resume_state": "bomb.pth"}}, [], ["bomb.pth is refused"]),
    "too many gpus": ({"num_gpu": 99}, [], ["num_gpu: 99 asked for, 0 found"]),
    "no torchrun": ({}, ["--launcher", "pytorch"], ["RANK is not set", "torchrun"]),
    "no bases": ({"network_g": {"denoiser": {"num_bases": 0}}}, [], ["num_bases must be at least 1, got 0"]),
    "unquoted braces": ({}, ["--force_yml", "name={{NAME}}"], ["a key must be plain text"]),
    "io backend": ({"datasets": {"val": {"type": "PairedRestorationDataset", "quality": None, "dataroot_lq": "photos", "io_backend": {"type": "lmbd"}}}}, [], ["there is no type 'lmbd'"]),
    "dead key": ({"datasets": {"train": {"dataroot_lq": "photos"}}}, [], ["datasets:train:dataroot_lq has no meaning for JPEGDataset"]),
    "bad width": ({"network_g": {"denoiser": {"inner_channel": 12}}}, [], ["12 channels is no multiple of num_bases 8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(workplace, name):
    changes, arguments, words = BAD[name]
    torch.save({"params": Hostile("mark")}, workplace.folder / "bomb.pth")
    torch.save({"params": {"weight": torch.zeros(1)}}, workplace.folder / "other.pth")
    path = workplace.write(merged(TINY, changes))
    done = workplace.run("train.py", *(arguments if "-opt" in arguments else ["-opt", path, *arguments]))
    assert_one_line_error(done, *words)
    assert not (workplace.folder / "mark").exists()
    # An earlier experiment is not moved away, nor an empty one begun, for options that cannot work.
    assert not (workplace.folder / "experiments").exists()


def test_test_without_weights_or_data(workplace):
    path = workplace.write(TINY)
    assert_one_line_error(workplace.run("test.py", "-opt", path), "no weights: set path:pretrain_network_g")
    done = workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=1")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(workplace.folder / "photos")
    assert_one_line_error(workplace.run("test.py", "-opt", path), "the folder photos does not exist")


def test_nan_losses_of_a_foreign_model_stop_too(workplace):
    path = workplace.write(edsr("MSELoss", total_iter=50))
    done = workplace.run(
        "train.py", "-opt", path, "--force_yml", "train:optim_g:lr=1e30", "logger:save_checkpoint_freq=1"
    )
    assert_one_line_error(done, "training stopped at iteration", "10 steps in a row")
    # The loss of the first iteration is finite; nothing is saved of those after it.
    run = workplace.folder / "experiments" / "tiny"
    assert [p.name for p in (run / "training_states").iterdir()] == ["1.state"]
    assert [p.name for p in (run / "models").iterdir()] == ["net_g_1.pth"]
    done = workplace.run("train.py", "-opt", path, "--force_yml", "train:grad_clip=1.0")
    assert_one_line_error(done, "train:grad_clip is for UCDIRModel; SRModel would ignore it")


def test_nan_losses_stop_with_the_last_checkpoint_kept(workplace):
    path = workplace.write(merged(TINY, {"train": {"total_iter": 50}}))
    assert workplace.run("train.py", "-opt", path, "--force_yml", "train:total_iter=2").returncode == 0
    forced = ["--force_yml", "train:optim_g:lr=1e30", "train:grad_clip=~", "train:warmup_iter=-1"]
    done = workplace.run("train.py", "-opt", path, "--auto_resume", *forced)
    # The resumed optimizer keeps its own rate: only a fresh run takes the absurd one.
    assert done.returncode == 0, done.stderr
    done = workplace.run("train.py", "-opt", path, *forced)
    assert_one_line_error(done, "training stopped at iteration", "10 steps in a row")
    assert done.stderr.count("step skipped") == 10


TOOLS = ("train", "test", "restore", "evaluate", "compare", "convert_weights", "benchmark", "study_bird", "study_ucdir")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("argument", ["-h", "--ouptut", "-opt"])
def test_wrong_arguments_are_answered_before_anything_is_loaded(tmp_path, tool, argument):
    """One line for what is wrong, exit code 2; neither torch nor the package is imported for it."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / f"{tool}.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "argparse" in imported and not {"torch", "numpy", "ucdir_plugin"} & imported
    if argument == "-h":
        assert done.returncode == 0 and done.stdout.startswith("usage:")
        return
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines


@pytest.mark.parametrize(
    ("tool", "args", "words"),
    [
        ("restore", ["--model", "bird", "-o", "out", "-i", ".", "--taks", "deblur"], "unknown argument --taks; did you mean --task?"),
        ("benchmark", ["train", "--reapeats", "3"], "unknown argument --reapeats; did you mean --repeats?"),
        ("train", ["-opt", "none.yml"], "option file none.yml cannot be read: No such file or directory"),
        ("restore", ["--model", "bird", "-o", "out", "-i", "no\x1b[31mne.png"], "-i no\\x1b[31mne.png does not exist"),
        ("restore", ["--model", "bird", "-o", "out"], "-i is missing"),
        ("convert_weights", ["--from", "training", "a.pth", "b.safetensors"], "--from training needs the option file"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(tmp_path, tool, args, words):
    done = subprocess.run([sys.executable, ROOT / "tools" / f"{tool}.py", *args], capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert_one_line_error(done, words)


def test_the_help_of_restore_names_what_there_is():
    """It stands outside the package, which would have to be imported for the names: they are repeated, and held here."""
    from ucdir_plugin.diffusion.bird.settings import PRESETS
    from ucdir_plugin.diffusion.bird.tasks import TASKS
    from ucdir_plugin.diffusion.samplers import SAMPLERS
    from ucdir_plugin.options.schema import SPACINGS

    done = subprocess.run([sys.executable, str(ROOT / "tools" / "restore.py"), "-h"], capture_output=True, text=True)
    words = set(re.findall(r"[\w+]+", done.stdout))
    assert set(SAMPLERS) | set(TASKS) | set(PRESETS) <= words
    assert set(SPACINGS) - {"rescale"} <= words  # of the release's schedule: an option file's
