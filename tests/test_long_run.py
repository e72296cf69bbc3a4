"""Long runs in one process: what they hold (memory, tensors, files, processes) and what a step takes, from first to last.

The quick part is a hundredth of the long one, and counts tensors and files only.
"""

from __future__ import annotations

import gc
import time
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
import pytest
import torch
from conftest import PHOTOS, RESTORING, TINY, merged
from ucdir_cli.command_line import parse_run_arguments

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.cli import run as run_command
from ucdir_plugin.models import UCDIRModel
from ucdir_plugin.restoration import folder
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.utils import image_writing
from ucdir_plugin.utils.files import write_atomically

SMALL = {
    "denoiser": {"inner_channel": 4, "channel_mults": [1], "num_bases": 2},
    "predictor": {"width": 2, "levels": 1},
}
GROWTH = 4 * 2**20
"""Bytes that a process may grow by after the first hundredth, by the line through its resident memory."""


class Sample(NamedTuple):
    """What the process held after so many steps."""

    step: int
    memory: int
    files: int
    processes: int
    tensors: int
    seconds: float


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, every: int) -> list[Sample]:
    """Samples, taken at every n-th call of a function."""
    process, samples, calls = psutil.Process(), [], [0]
    function = getattr(owner, name)

    def watched(*args: Any) -> Any:
        result = function(*args)
        calls[0] += 1
        if calls[0] % every == 0:
            seconds = time.process_time()
            gc.collect()
            tensors = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
            children = len(process.children(recursive=True))
            held = process.memory_info().rss, process.num_fds(), children, tensors
            samples.append(Sample(calls[0], *held, seconds - overhead[0]))
            overhead[0] += time.process_time() - seconds
        return result

    overhead = [0.0]
    monkeypatch.setattr(owner, name, watched)
    return samples


def judge(samples: list[Sample], unit: str, long: bool, record_property) -> None:
    """Files, processes and tensors are constant; of the long run the memory too, and all of it is on record."""
    warm = [s for s in samples if s.step > samples[-1].step // 100] if long else samples[len(samples) // 2 :]
    assert len({(s.files, s.processes) for s in warm}) == 1, {(s.files, s.processes) for s in warm}
    # The cycle of checkpoints, validations and lines in the log holds a few more for a while.
    tensors = [s.tensors for s in warm]
    half = len(warm) // 2
    assert max(tensors[half:]) <= max(tensors[:half]), tensors
    if not long:
        return
    steps, memory = np.array([(s.step, s.memory) for s in warm], dtype=float).T
    slope, origin = np.polyfit(steps, memory, 1)
    noise = float(np.std(memory - slope * steps - origin, ddof=2))
    error = noise / (np.std(steps) * len(steps) ** 0.5)
    each = np.diff([s.seconds for s in warm]) / np.diff([s.step for s in warm])
    tenth = len(each) // 10
    first, last = np.median(each[:tenth]), np.median(each[-tenth:])
    record_property(f"{unit}s", samples[-1].step)
    record_property(f"bytes a {unit} (line through resident memory)", f"{slope:.1f} +- {error:.1f}")
    quarters = [warm[round(share * (len(warm) - 1))].memory / 2**20 for share in (0, 0.25, 0.5, 0.75, 1)]
    record_property(
        "resident MB after the first hundredth, a quarter, ..., all", ", ".join(f"{q:.1f}" for q in quarters)
    )
    record_property("scatter around the line, KB", f"{noise / 1024:.0f}")
    record_property(
        "open files; child processes; tensors", f"{warm[-1].files}; {warm[-1].processes}; {tensors[0]}, {tensors[-1]}"
    )
    record_property(
        f"CPU ms a {unit}, median of first and last tenth", f"{first * 1e3:.2f}, {last * 1e3:.2f}: {last / first:.3f}"
    )
    assert slope * (steps[-1] - steps[0]) < GROWTH


LENGTHS = pytest.mark.parametrize(
    "long", [False, pytest.param(True, marks=pytest.mark.campaign)], ids=["quick", "long"]
)


@pytest.fixture(autouse=True)
def _new_objects_only():
    """What is there by now is not looked at: a million objects of imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@LENGTHS
def test_training(long, workplace, monkeypatch, record_property):
    """Steps with checkpoints, validations and the log in proportion: each comes in the first hundredth too."""
    count = 20_000 if long else 100
    often = count // 100 if long else count // 5
    options = merged(
        TINY,
        {
            "network_g": SMALL,
            "datasets": {"train": {"gt_size": 8, "batch_size_per_gpu": 1}, "val": {"dataroot_gt": "one"}},
            "train": {"total_iter": count, "scheduler": {"milestones": [count // 2]}},
            "val": {"val_freq": often, "save_img": False, "sampling": {"steps": 1}, "metrics": {"niqe": None}},
            "logger": {"print_freq": max(count // 200, 10), "save_checkpoint_freq": often, "use_tb_logger": True},
        },
    )
    (workplace.folder / "one").mkdir()
    (workplace.folder / "photos/chelsea.png").rename(workplace.folder / "one/chelsea.png")
    monkeypatch.chdir(workplace.folder)
    samples = watch(monkeypatch, UCDIRModel, "optimize_parameters", 100 if long else 10)
    args = parse_run_arguments("", ["-opt", workplace.write(options)])
    assert run_command.train(args) == 0
    assert samples[-1].step == count
    judge(samples, "step", long, record_property)


@LENGTHS
def test_restoring(long, workplace, monkeypatch, record_property):
    """A folder, image by image, of two sizes in turn."""
    count = 2_000 if long else 40
    options = merged(RESTORING, {"network_g": SMALL, "val": {"sampling": {"steps": 1}}})
    torch.manual_seed(1)
    net = UCDIR(**{k: v for k, v in options["network_g"].items() if k != "type"})
    torch.save({"params_ema": net.state_dict()}, workplace.folder / "net.pth")
    photo = cv2.imread(str(PHOTOS / "chelsea.png"))
    for number in range(count):
        view = photo[number % 200 :, number % 300 :][: 12 + number % 2, :16]
        write_atomically(cv2.imencode(".png", view)[1].tobytes(), workplace.folder / "many" / f"{number:04}.png")
    monkeypatch.chdir(workplace.folder)
    model = load_model(workplace.write(options))
    samples = watch(monkeypatch, image_writing, "encode_result", 10 if long else 2)
    if not long:  # few samples: what the next image, computed meanwhile, holds at that moment is chance
        submit = folder._Writer.submit

        def settled(writer: Any, *args: Any) -> None:
            submit(writer, *args)
            writer.wait()

        monkeypatch.setattr(folder._Writer, "submit", settled)
    assert folder.restore_files(model, "many", "restored") == 0
    assert samples[-1].step == count
    judge(samples, "image", long, record_property)
