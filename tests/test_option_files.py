"""Every file in options/ is checked, and trains a few steps and is tested on stand-in data with its sizes cut down."""

import json

import pytest
import yaml
from conftest import PHOTOS, ROOT

from ucdir_plugin.options import apply_overrides, load_options

FILES = sorted(p.relative_to(ROOT / "options").as_posix() for p in (ROOT / "options").rglob("*.yml"))

DENOISER = ["inner_channel=8", "channel_mults=[1,2]", "res_blocks=1"]
CUT = {
    "UCDIR": [
        *(f"network_g:denoiser:{change}" for change in DENOISER),
        "network_g:predictor:width=4",
        "network_g:predictor:levels=2",
        "val:sampling:steps=2",
    ],
    "UCDIRDenoiser": [f"network_g:{change}" for change in DENOISER],
}


def test_there_are_option_files():
    assert {"demo_ucdir.yml", "demo_regression.yml", "sid_ucdir.yml", "gopro_ucdir.yml", "jpeg_ucdir.yml"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_loads_as_it_is(file):
    opt = load_options(str(ROOT / "options" / file))
    assert opt["name"] == file.rsplit("/", 1)[-1][: -len(".yml")]


@pytest.mark.parametrize("file", ["sid_ucdir.yml", "gopro_ucdir.yml", "jpeg_ucdir.yml"])
def test_paper_settings(file):
    opt = load_options(str(ROOT / "options" / file))
    train = opt["train"]
    assert 8 * opt["datasets"]["train"]["batch_size_per_gpu"] == 32
    assert train["total_iter"] == 500000
    assert train["optim_g"] == {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.01}
    assert (train["ema_decay"], train["ema_start"]) == (0.9999, 5000)
    assert opt["diffusion"] == {"type": "linear", "timesteps": 2000, "start": 1e-6, "end": 1e-2}
    assert (opt["val"]["sampling"]["steps"], opt["val"]["sampling"]["spacing"]) == (50, "respace")
    assert opt["datasets"]["train"]["gt_size"] == 256


@pytest.mark.parametrize("file", FILES)
def test_trains_and_tests(file, workplace):
    raw = yaml.safe_load((ROOT / "options" / file).read_text())
    changes = [*CUT[raw["network_g"]["type"]], "train:total_iter=2", "val:val_freq=2", "logger:print_freq=1"]
    for phase, dataset in raw["datasets"].items():
        roots = [key for key in dataset if key.startswith("dataroot")]
        changes += [f"datasets:{phase}:{key}=photos" for key in roots]
        changes += [f"datasets:{phase}:{key}={value}" for key, value in
                    (("batch_size_per_gpu", 2), ("num_worker_per_gpu", 1), ("gt_size", 16)) if phase == "train"]  # fmt: skip
    path = str(ROOT / "options" / file)
    apply_overrides(raw, changes)
    for tool in ("train.py", "test.py"):
        done = workplace.run(tool, "-opt", path, "--force_yml", *changes)
        assert done.returncode == 0, done.stderr[-3000:]
    mean = json.loads((workplace.folder / "results" / raw["name"]).glob("metrics_*.json").__next__().read_text())[
        "mean"
    ]
    assert set(mean) == (
        {"input", "initial", "restored"} if raw["network_g"]["type"] == "UCDIR" else {"input", "restored"}
    )


def test_demo_data(workplace):
    done = workplace.run("../datasets/prepare_demo.py")
    assert done.returncode == 0, done.stderr
    demo = workplace.folder / "datasets" / "demo"
    train, test = ({p.name for p in (demo / part).iterdir()} for part in ("train", "test"))
    assert (len(train), len(test)) == (9, 2)
    assert not train & test
    assert (demo / "test" / "coffee.png").read_bytes() == (PHOTOS / "coffee.png").read_bytes()
