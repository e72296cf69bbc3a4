"""BasicSR's own train_pipeline and test_pipeline run the option files of this package, after ``import ucdir_plugin``."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from conftest import ROOT, TINY, merged
from test_option_files import CUT

from ucdir_plugin.options.reading import apply_overrides, read_options

OPTIONS = ROOT / "options"
FILES = sorted(p.relative_to(OPTIONS).as_posix() for p in OPTIONS.rglob("*.yml") if "\n_base_:" not in p.read_text())
OF_BASICSR = [file for file in FILES if file.startswith("basicsr/")]
PIPELINE = """
import os, ucdir_plugin
from basicsr.{0} import {0}_pipeline
{0}_pipeline(os.getcwd())
"""


def changes_for(file: str) -> list[str]:
    """Overrides that make an option file small, and point it at the photographs of a workplace."""
    raw = read_options(str(OPTIONS / file))
    changes = []
    if raw["model_type"] != "BIRDModel":
        kind = raw["network_g"]["type"]
        changes += CUT.get(kind, ["network_g:channel_mult=[1, 1]", "network_g:image_size=16", "val:samples=2"])
        changes += ["train:total_iter=2", "val:val_freq=2", "logger:print_freq=1", "logger:save_checkpoint_freq=2"]
        changes += ["logger:use_tb_logger=false"]
    else:
        changes += ["bird:settings={steps: 2}"]
    if raw["model_type"] == "SRModel":
        changes = [change for change in changes if "sampling" not in change]
    for phase, dataset in raw["datasets"].items():
        lmdb = dataset.get("io_backend", {}).get("type") == "lmdb"
        roots = [key for key in dataset if key.startswith("dataroot")]
        changes += [f"datasets:{phase}:{key}={f'{phase}{key[-3:]}.lmdb' if lmdb else 'photos'}" for key in roots]
        if phase == "train" or "gt_size" in dataset:
            changes += [f"datasets:{phase}:gt_size=16"]
        if phase == "train":
            batch = "batch_size_total" if "batch_size_total" in dataset else "batch_size_per_gpu"
            changes += [f"datasets:{phase}:{key}={value}" for key, value in
                        ((batch, 2), ("num_worker_per_gpu", 0), ("persistent_workers", "false"))]  # fmt: skip
    return changes


@pytest.fixture
def pipelines(workplace):
    """A workplace with LMDBs, and scripts that call BasicSR's pipelines as its users do."""
    for kind in ("train", "test"):
        (workplace.folder / f"{kind}_pipeline.py").write_text(PIPELINE.format(kind))
    names = sorted(p.name for p in (workplace.folder / "photos").iterdir())
    for lmdb in ("train_lq", "train_gt", "val_lq", "val_gt"):
        keys, lmdb = [name[:-4] for name in names], str(workplace.folder / f"{lmdb}.lmdb")
        make_lmdb_from_imgs(str(workplace.folder / "photos"), lmdb, names, keys, multiprocessing_read=False)
    return workplace


def call(pipelines, kind: str, path: str, changes: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    script = str(pipelines.folder / f"{kind}_pipeline.py")
    more = ["--force_yml", *changes] if changes else []
    if processes == 1:
        return pipelines.run(script, "-opt", path, *more)
    launcher = ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master-port=29621")
    return pipelines.run(script, "-opt", path, "--launcher", "pytorch", *more, launcher=launcher)


def check_runs(pipelines, file: str, processes: int) -> None:
    path, changes = str(OPTIONS / file), changes_for(file)
    name = read_options(path)["name"]
    visual = pipelines.folder / "results" / name / "visualization"
    bird = file.startswith("bird/")
    if not bird:
        done = call(pipelines, "train", path, changes, processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (pipelines.folder / "experiments" / name / "models" / "net_g_latest.pth").is_file()
        assert (pipelines.folder / "experiments" / name / path.rsplit("/", 1)[-1]).is_file()
    done = call(pipelines, "test", path, changes, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(visual.rglob("*.png")) or not read_options(path)["val"]["save_img"]
    if bird:  # what was learned of each image is there too
        assert len(list(visual.rglob("*.learned.npz"))) == 3


@pytest.mark.parametrize("file", FILES)
def test_every_file_without_a_base(file, pipelines):
    check_runs(pipelines, file, 1)


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=() if f in ("demo_ucdir.yml", "basicsr/lmdb.yml") else pytest.mark.campaign) for f in FILES],
)
def test_every_file_under_two_processes(file, pipelines):
    check_runs(pipelines, file, 2)


def test_there_is_a_file_for_folders_and_one_for_lmdbs():
    backends = {read_options(str(OPTIONS / f))["datasets"]["train"]["io_backend"]["type"] for f in OF_BASICSR}
    assert backends == {"disk", "lmdb"}
    for file in OF_BASICSR:
        assert {d["type"] for d in read_options(str(OPTIONS / file))["datasets"].values()} == {"PairedImageDataset"}


@pytest.mark.parametrize("file", FILES)
def test_numbers_are_numbers_for_every_reader(file):
    """YAML 1.1, which most readers read, takes 1e-2 for text."""

    def texts(node):
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from texts(value) if isinstance(value, (dict, list)) else [value]

    plain = yaml.safe_load((OPTIONS / file).read_text())
    for text in texts(plain):
        if isinstance(text, str):
            with pytest.raises(ValueError, match="could not convert"):
                float(text)


def test_the_same_loss_as_by_our_own_command(pipelines):
    """BasicSR's loop draws other weights and batches: the whole set as it is, and a predictor that starts as nothing."""
    options = merged(
        TINY,
        {
            "network_g": {"predictor": {"residual": True}},
            "train": {"total_iter": 1, "warmup_iter": -1},
            "datasets": {"train": {"quality": 10, "gt_size": 36, "use_hflip": False, "use_rot": False}},
        },
    )
    for image in (pipelines.folder / "photos").iterdir():
        cv2.imwrite(str(image), cv2.imread(str(image))[:36, :36])
    options["datasets"]["train"]["batch_size_per_gpu"] = 3
    path = pipelines.write(options)
    losses = []
    for run in (lambda: call(pipelines, "train", path, []), lambda: pipelines.run("train.py", "-opt", path)):
        done = run()
        assert done.returncode == 0, done.stderr[-3000:]
        (log,) = (pipelines.folder / "experiments" / "tiny").glob("train_*.log")
        line = next(line for line in log.read_text().splitlines() if "l_initial" in line)
        losses.append(float(line.split("l_initial: ")[1].split()[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] > 0


REFUSED = {
    "_base_": ({"_base_": "other.yml"}, "--write FLAT.yml"),
    "imports": ({"imports": ["their_archs"]}, "import ['their_archs'] beside ucdir_plugin"),
    "engine": ({"engine": "mmengine"}, "engine: mmengine is not BasicSR's"),
    "key": ({"val": {"sampling": {"setps": 3}}}, "unknown option val:sampling:setps; did you mean 'steps'"),
    "cuda": ({"num_gpu": 1}, "option num_gpu: 1 asked for, 0 found; use auto, or 0 for the CPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line(case, pipelines):
    changes, words = REFUSED[case]
    path = pipelines.write(merged(TINY, changes))
    done = call(pipelines, "train", path, [])
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: " in last and "options.yml: " in last and words in last, done.stderr[-2000:]
    assert not (pipelines.folder / "experiments").exists()


def test_a_test_without_weights_is_refused(pipelines):
    done = call(pipelines, "test", pipelines.write(TINY), [])
    assert "no weights: set path:pretrain_network_g, or train first" in done.stderr.strip().splitlines()[-1]


def test_files_of_others_are_read_safely_and_else_left_alone(pipelines):
    """A file that uses nothing of this package keeps its keys; a python tag in it runs nothing."""
    other = merged(TINY, {"model_type": "SRModel", "diffusion": None, "own_key": {"a": 1}})
    other["datasets"] = {"val": {"name": "v", "type": "PairedImageDataset", "dataroot_gt": "photos",
                                 "dataroot_lq": "photos", "io_backend": {"type": "disk"}}}  # fmt: skip
    other["num_gpu"], other["path"] = 0, {}
    path = pipelines.write(other)
    code = """
import sys, json, ucdir_plugin
from basicsr.utils.options import parse_options
opt, _ = parse_options('.', is_train=False)
print(json.dumps(opt))
"""
    command = [sys.executable, "-c", code, "-opt", path, "--force_yml", "train:optim_g:lr=1e-4", "manual_seed=none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pipelines.folder)
    opt = json.loads(done.stdout.splitlines()[-1])
    assert opt["own_key"] == {"a": 1} and opt["train"]["optim_g"]["lr"] == 1e-4 and opt["manual_seed"] is None
    assert set(opt["datasets"]["val"]) == {*other["datasets"]["val"], "phase"}
    with open(path, "a") as file:
        file.write("evil: !!python/object/apply:os.mkdir [ran]\n")
    done = subprocess.run(command, capture_output=True, text=True, cwd=pipelines.folder)
    assert "tags are refused" in done.stderr and not (pipelines.folder / "ran").exists()


def test_niqe_of_a_small_image_is_a_line_and_not_the_end(pipelines):
    """Its 40x36 photographs are too small for NIQE, under SRModel's own validation too."""
    file = "demo_regression.yml"
    done = call(pipelines, "train", str(OPTIONS / file), changes_for(file))
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stderr + done.stdout
    assert "calculate_niqe has no number for an image of 36x40 pixels" in log and "# psnr: " in log


def test_data_sets_have_their_own_defaults(workplace, monkeypatch):
    """Built by who knows only the keys that matter."""
    from basicsr.data import build_dataset

    monkeypatch.chdir(workplace.folder)
    for kind, own in (
        ("PairedRestorationDataset", {"dataroot_lq": "photos"}),
        ("JPEGDataset", {"quality": 10}),
        ("LowLightDataset", {}),
        ("MixedDegradationDataset", {"degradations": [{"type": "noise", "sigma": 5}]}),
    ):
        options = {"name": "a", "type": kind, "dataroot_gt": "photos", "phase": "train", "gt_size": 16, **own}
        sample = build_dataset(options)[0]
        assert sample["gt"].shape == (3, 16, 16) and np.isfinite(sample["lq"].numpy()).all()


def test_an_option_file_with_a_base_is_written_flat(workplace):
    """The one line that BasicSR's own commands need."""
    source = OPTIONS / "ablation" / "kernel_5.yml"
    done = workplace.run("train.py", "-opt", str(source), "--write", "flat.yml", "--force_yml", "manual_seed=3")
    assert done.returncode == 0, done.stderr
    expected = read_options(str(source))
    apply_overrides(expected, ["manual_seed=3"])
    assert yaml.safe_load((workplace.folder / "flat.yml").read_text()) == expected
    assert not (workplace.folder / "experiments").exists()
