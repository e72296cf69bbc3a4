"""Shared fixtures: small photographs, a tiny network, and the tools run as a user runs them."""

from __future__ import annotations

import copy
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Optional

import cv2
import numpy as np
import pytest
import skimage
import torch
import yaml

import ucdir_plugin  # noqa: F401  (before any test module imports BasicSR)
from ucdir_plugin.registry import build_arch

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).parent / "reference"
PHOTOS = Path(skimage.__file__).parent / "data"

TINY_DENOISER = {
    "type": "UCDIRDenoiser",
    "inner_channel": 8,
    "channel_mults": [1, 2],
    "res_blocks": 1,
    "attn_res": [],
    "dropout": 0.0,
}
TINY_PREDICTOR = {"type": "SIDUNet", "width": 4, "levels": 2}

TINY = {
    "name": "tiny",
    "model_type": "UCDIRModel",
    "datasets": {
        "train": {
            "name": "train",
            "type": "JPEGDataset",
            "dataroot_gt": "photos",
            "quality": [5, 30],
            "gt_size": 16,
            "use_hflip": True,
            "use_rot": True,
            "batch_size_per_gpu": 4,
        },
        "val": {"name": "val", "type": "JPEGDataset", "dataroot_gt": "photos", "quality": 10},
    },
    "network_g": {"type": "UCDIR", "denoiser": TINY_DENOISER, "predictor": TINY_PREDICTOR},
    "train": {
        "total_iter": 4,
        "diffusion_opt": {"type": "NoisePredictionLoss"},
        "initial_opt": {"type": "L1Loss", "loss_weight": 0.5},
        "optim_g": {"type": "AdamW", "lr": 1e-3},
        "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 0.5},
        "warmup_iter": 2,
        "ema_decay": 0.9,
        "ema_start": 1,
        "grad_clip": 1.0,
    },
    "val": {
        "val_freq": 100,
        "sampling": {"steps": 2},
        "metrics": {
            "psnr": {"type": "calculate_psnr", "crop_border": 0},
            "niqe": {"type": "calculate_niqe", "crop_border": 0, "better": "lower"},
        },
    },
    "logger": {"print_freq": 1, "save_checkpoint_freq": 2},
}


def merged(base: dict, changes: dict) -> dict:
    """A deep copy of ``base`` with nested ``changes``; a value of None removes the key."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


LQ_ONLY = {"name": "val", "type": "PairedRestorationDataset", "dataroot_lq": "photos"}
RESTORING = merged(
    TINY, {"train": None, "datasets": {"train": None, "val": None}, "path": {"pretrain_network_g": "net.pth"}}
)
RESTORING["datasets"] = {"val": LQ_ONLY}
EDSR = {
    "name": "edsr",
    "model_type": "SRModel",
    "scale": 2,
    "datasets": {"val": LQ_ONLY},
    "network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2},
    "path": {"pretrain_network_g": "edsr.pth"},
}


# A process that has imported everything, and computed nothing, is forked for each run of a tool: seconds are saved each time.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["ucdir_plugin.training.loop", "ucdir_plugin.mm.runner", "ucdir_plugin.evaluation.compare"]
)
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # for what is started from here on


def _run_tool(
    script: str, args: tuple[str, ...], folder: str, environment: dict[str, str], log: str, before: Optional[Callable]
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [script, *args]
    if before:
        before()
    runpy.run_path(script, run_name="__main__")


class Forked:
    """A tool that runs in a forked process."""

    def __init__(
        self,
        folder: Path,
        tool: str,
        args: tuple[str, ...],
        environment: dict[str, str],
        log: str,
        before: Optional[Callable] = None,
    ):
        script = os.path.normpath(ROOT / "tools" / tool)
        self.args, self.streams = [tool, *args], [folder / f"{log}.{name}" for name in ("stdout", "stderr")]
        for stream in self.streams:
            stream.unlink(missing_ok=True)
        self.process = _FORKS.Process(target=_run_tool, args=(script, args, str(folder), environment, log, before))
        self.process.start()

    def output(self) -> str:
        """What it has printed by now."""
        return self.streams[0].read_text() if self.streams[0].exists() else ""

    def wait(self) -> subprocess.CompletedProcess:
        self.process.join(600)
        out, err = (stream.read_text() for stream in self.streams)
        return subprocess.CompletedProcess(self.args, self.process.exitcode, out, err)


class Workplace:
    """A working directory with photographs and option files, and the tools."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "photos").mkdir()
        for i, name in enumerate(("chelsea.png", "coffee.png", "astronaut.png")):
            image = cv2.imread(str(PHOTOS / name))
            cv2.imwrite(str(folder / "photos" / name), image[100 : 140 + 4 * i, 100:136])

    def write(self, options: dict, name: str = "options.yml") -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(options, sort_keys=False))
        return str(path)

    def start(self, tool: str, *args: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, *launcher, str(ROOT / "tools" / tool), *args]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def fork(
        self, tool: str, *args: str, log: str = "", before: Optional[Callable] = None, **environment: str
    ) -> Forked:
        """Start a tool in a forked process with more in its environment; ``before`` (for pickling) is called there."""
        return Forked(self.folder, tool, args, environment, log, before)

    def run(self, tool: str, *args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        """Run a tool to its end; with ``launcher`` in a new interpreter."""
        if not launcher:
            return self.fork(tool, *args).wait()
        process = self.start(tool, *args, launcher=launcher)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def place(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A workplace to restore in: option files and random weights of a UCDIR and an EDSR."""
    for options, name, path in ((RESTORING, "options.yml", "net.pth"), (EDSR, "edsr.yml", "edsr.pth")):
        torch.manual_seed(1)
        net = build_arch(options["network_g"])
        torch.save({"params": net.state_dict(), "params_ema": net.state_dict()}, workplace.folder / path)
        workplace.write(options, name)
    monkeypatch.chdir(workplace.folder)
    return workplace


@pytest.fixture(autouse=True)
def _steady():
    """Tests may draw from the global generators; each starts from the same state."""
    torch.manual_seed(0)
    np.random.seed(0)


def reference(name: str) -> dict[str, Any]:
    with np.load(REFERENCE / name) as file:
        return {k: torch.from_numpy(file[k]) if file[k].dtype.kind == "f" else file[k] for k in file.files}


def assert_one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, one line on stderr with all the words, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--figures", type=Path, help="append what the tests measured to this file, a Markdown table row each"
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """What tests measured (``record_property``), a line each: the figures of docs/reliability.md."""
    if hasattr(config, "workerinput"):  # of pytest-xdist
        return
    reports = [report for key in ("passed", "failed") for report in terminalreporter.getreports(key)]
    measured = [(r.nodeid.split("/")[-1], k, v) for r in reports if r.when == "call" for k, v in r.user_properties]
    if measured:
        terminalreporter.section("figures")
        for row in measured:
            terminalreporter.write_line("{}: {}: {}".format(*row))
    if measured and config.getoption("figures"):
        with config.getoption("figures").open("a") as file:
            file.writelines("| `{}` | {} | {} |\n".format(*row) for row in measured)
