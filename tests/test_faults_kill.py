"""Trainings and restorations that are killed or stopped at any moment: nothing is lost, half-written or done twice.

Moments are hit on purpose (the tools run in forked processes, in which :func:`dying` replaces a function), and in the
campaign at random: at a call of the process whose number is drawn (:func:`counting`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from conftest import TINY, Workplace, assert_one_line_error, merged
from test_restore import files, run
from test_sharding import contents, free_port, records, slurm, wait_until
from test_tools import assert_same, final_state

from ucdir_plugin.data import jpeg_dataset
from ucdir_plugin.evaluation import tables
from ucdir_plugin.models.ucdir_model import UCDIRModel
from ucdir_plugin.restoration import folder as restore_folder
from ucdir_plugin.restoration import jobs
from ucdir_plugin.training import loop, setup, validation
from ucdir_plugin.utils import cli, training_states
from ucdir_plugin.utils.checkpoints import read_checkpoint

TOTAL = 8
OPTIONS = merged(
    TINY,
    {
        "train": {"total_iter": TOTAL},
        "network_g": {"denoiser": {"dropout": 0.1}},  # draws from the global generator at every step
        "logger": {"save_checkpoint_freq": 2},
        "val": {"val_freq": 2},
    },
)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until it arrives


def half(obj, file) -> None:
    content = io.BytesIO()
    SAVE(obj, content)
    file.write(content.getvalue()[: content.tell() // 2])
    file.flush()
    killed()


SAVE = torch.save
PLACES = {
    "step": (torch.optim.AdamW, "step"),
    "save": (training_states.torch, "save"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "latest": (UCDIRModel, "save_network"),
    "restoring": (UCDIRModel, "test"),
    "picture": (validation, "write_image"),
    "table": (tables, "write_tables"),
    "leftovers": (setup, "remove_leftovers"),
    "read": (jpeg_dataset.JPEGDataset, "__getitem__"),
}


def dying(place: str, call: int, when: str = "before") -> None:
    """This process is killed at a call of a function: before it, after it, or when it has written half."""
    owner, name = PLACES[place]
    function, left = getattr(owner, name), [call]

    @functools.wraps(function)
    def replaced(*args, **kwargs):
        left[0] -= 1
        if left[0]:
            return function(*args, **kwargs)
        if when == "half":
            half(*args)
        if when == "after":
            function(*args, **kwargs)
        killed()

    setattr(owner, name, replaced)


def newest(run: Path) -> int:
    """The iteration of the newest checkpoint; it must be whole."""
    found = [int(path.stem) for path in (run / "training_states").glob("[0-9]*.state")]
    if not found:
        return 0
    assert read_checkpoint(run / "training_states" / f"{max(found)}.state")["iter"] == max(found)
    read_checkpoint(run / "models" / f"net_g_{max(found)}.pth")
    return max(found)


def assert_equal_runs(one: Path, two: Path, total: int = TOTAL) -> None:
    """Weights, averages, optimizer, the latest model, the last table and pictures; nothing hidden is left."""
    assert_same(final_state(one, total), final_state(two, total))
    latest = [torch.load(run / "models" / "net_g_latest.pth", weights_only=True)["params"] for run in (one, two)]
    assert_same(*latest)
    assert (one / "metrics_val.csv").read_bytes() == (two / "metrics_val.csv").read_bytes()
    pictures = [{p.name: p.read_bytes() for p in (run / "visualization").rglob("*.png")} for run in (one, two)]
    assert pictures[0] == pictures[1]
    assert not list(two.rglob(".*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    place = Workplace(tmp_path_factory.mktemp("undisturbed"))
    done = place.run("train.py", "-opt", place.write(OPTIONS))
    assert done.returncode == 0, done.stderr
    return place.folder / "experiments" / "tiny"


MOMENTS = {  # in the order of a training; each goes on where the one before was killed
    "while images are read": ("read", 1),
    "in a step": ("step", 2, "after"),
    "the first file half-written": ("save", 1, "half"),
    "between weights and state": ("replace", 3),  # the options' copy is the first, the weights the second
    "the state half-written": ("save", 2, "half"),
    "before the state's renaming": ("replace", 3),
    "after the state's renaming": ("replace", 3, "after"),
    "in a validation": ("restoring", 2),
    "before a picture": ("picture", 2),
    "before a picture's renaming": ("replace", 3),
    "in a table": ("table", 1),
    "before the flush to the disk": ("fsync", 8),
    "while leftovers are deleted": ("leftovers", 1, "after"),
    "before the latest weights": ("latest", 4),
}


def test_a_training_killed_at_any_moment_goes_on(undisturbed, workplace):
    command = ("train.py", "-opt", workplace.write(OPTIONS), "--auto_resume")
    run, before = workplace.folder / "experiments" / "tiny", 0
    for name, moment in MOMENTS.items():
        done = workplace.fork(*command, before=functools.partial(dying, *moment)).wait()
        assert done.returncode == -signal.SIGKILL, (name, done.stdout, done.stderr)
        found = newest(run)
        assert found >= before, name
        start = f"resuming tiny at iteration {before}" if before else "starting tiny from scratch"
        assert start in done.stdout or name == "while leftovers are deleted", name
        assert "passed over" not in done.stdout, name
        before = found
    assert before >= TOTAL - 2
    done = workplace.run(*command)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(undisturbed, run)


def pair(place: Workplace, path: str, hooks: dict) -> list:
    """Two ranks of a training run to their ends; returns their exit codes."""
    command = ("train.py", "-opt", path, "--auto_resume", "--launcher", "slurm")
    port = ("--force_yml", f"dist_params:port={free_port()}")
    ranks = [place.fork(*command, *port, log=str(i), before=hooks.get(i), **slurm(i, 2)) for i in range(2)]
    return [process.wait() for process in ranks]


DOUBLE = {"train": {"total_iter": 4}, "datasets": {"train": {"batch_size_per_gpu": None, "batch_size_total": 4}}}


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory) -> Path:
    place = Workplace(tmp_path_factory.mktemp("pair"))
    ends = pair(place, place.write(merged(OPTIONS, DOUBLE)), {})
    assert [end.returncode for end in ends] == [0, 0], ends
    return place.folder / "experiments" / "tiny"


def test_either_of_two_processes_killed(undisturbed_pair, workplace):
    path, run = workplace.write(merged(OPTIONS, DOUBLE)), workplace.folder / "experiments" / "tiny"
    for rank, moment, kept in ((0, ("save", 4, "half"), 2), (1, ("restoring", 1), 2)):
        ends = pair(workplace, path, {rank: functools.partial(dying, *moment)})
        assert ends[rank].returncode == -signal.SIGKILL, ends
        assert_one_line_error(ends[1 - rank], "has lost another rank", "--auto_resume")
        assert newest(run) == kept
    assert [end.returncode for end in pair(workplace, path, {})] == [0, 0]
    assert_equal_runs(undisturbed_pair, run, 4)


# Signals


def hanging() -> None:
    """Images can be neither read nor left once the file ``away`` is there, as of a disk that does not answer."""
    dataset = jpeg_dataset.JPEGDataset
    read = dataset.__getitem__

    def replaced(self, index):
        while os.path.exists("away"):
            time.sleep(1)
        return read(self, index)

    dataset.__getitem__ = replaced


def slow_validation() -> None:
    def replaced(self):
        Path(f"validates{self.opt['rank']}").touch()
        time.sleep(100)

    UCDIRModel.test = replaced
    import ucdir_plugin.mm.loops

    ucdir_plugin.mm.loops.Restoring.test = replaced


def in_a_session(*hooks) -> None:
    """As in a process that a user starts: a group of its own, and workers that are forked."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)
    for hook in hooks:
        hook()


def in_session(number: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


SIGNALS = {  # number, where, workers, engine
    "in training, to the workers too": (signal.SIGINT, "training", 1, "basicsr"),
    "in a validation": (signal.SIGTERM, "validation", 0, "basicsr"),
    "in MMEngine's validation": (signal.SIGINT, "validation", 0, "mmengine"),
    "while data are waited for": (signal.SIGTERM, "data", 0, "basicsr"),
    "while a worker hangs": (signal.SIGTERM, "data", 1, "basicsr"),
    "while MMEngine's worker hangs": (signal.SIGTERM, "data", 1, "mmengine"),
}


LONG = ("while a worker hangs", "while MMEngine's worker hangs")  # 5 s of patience, twice


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign) if name in LONG else name for name in SIGNALS]
)
def test_a_signal_saves_and_leaves_within_30_seconds(workplace, name, record_property):
    number, where, workers, which = SIGNALS[name]
    shutil.copytree(workplace.folder / "photos", workplace.folder / "safe")
    changes = {
        "engine": which,
        "train": {"total_iter": 10**6},
        "logger": {"save_checkpoint_freq": 10**6},
        "val": {"val_freq": 2 if where == "validation" else 10**6},
        "datasets": {"train": {"num_worker_per_gpu": workers}, "val": {"dataroot_gt": "safe"}},
    }
    path = workplace.write(merged(OPTIONS, changes))
    hooks = {"validation": [slow_validation], "data": [hanging]}.get(where, [])
    hook = functools.partial(in_a_session, *hooks)
    process = workplace.fork("train.py", "-opt", path, before=hook)
    run = workplace.folder / "experiments" / "tiny"

    def there() -> bool:
        printed = process.output() + (process.streams[1].read_text() if process.streams[1].exists() else "")
        return (workplace.folder / "validates0").exists() if where == "validation" else "l_eps" in printed

    wait_until(there, process)
    if where == "data":
        (workplace.folder / "away").touch()
        time.sleep(1)
    asked = time.monotonic()
    os.killpg(process.process.pid, number)
    done = process.wait()
    seconds = time.monotonic() - asked
    record_property("seconds to the end", round(seconds, 1))
    assert seconds < 30  # what a cluster waits before it kills
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert not in_session(process.process.pid)  # a worker that hangs
    saved = run.glob("iter_*.pth") if which == "mmengine" else run.glob("training_states/*.state")
    (iteration,) = (int(state.stem.replace("iter_", "")) for state in saved)
    assert iteration == 2 or where != "validation"
    assert f"stopped and saved at iteration {iteration}; go on with --auto_resume" in done.stdout + done.stderr
    if name == "in training, to the workers too":
        for run_name, arguments in (("tiny", ["--auto_resume"]), ("whole", [])):
            more = ("--force_yml", f"train:total_iter={iteration + 2}", f"name={run_name}")
            more += ("datasets:train:num_worker_per_gpu=0",)  # the same, and sooner there
            again = workplace.run("train.py", "-opt", path, *arguments, *more)
            assert again.returncode == 0, again.stderr
        assert_same(*(final_state(run.parent / run_name, iteration + 2) for run_name in ("whole", "tiny")))


def test_two_processes_that_validate_are_stopped(workplace):
    """Both get the signal, as from torchrun or slurm."""
    rare = {"train": {"total_iter": 10**6}, "logger": {"save_checkpoint_freq": 10**6}}
    path = workplace.write(merged(merged(OPTIONS, DOUBLE), rare))
    command = ("train.py", "-opt", path, "--launcher", "slurm", "--force_yml", f"dist_params:port={free_port()}")
    ranks = [workplace.fork(*command, log=str(i), before=slow_validation, **slurm(i, 2)) for i in range(2)]
    wait_until(lambda: all((workplace.folder / f"validates{i}").exists() for i in range(2)), ranks[0])
    asked = time.monotonic()
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGTERM)
    ends = [rank.wait() for rank in ranks]
    assert time.monotonic() - asked < 30
    assert [end.returncode for end in ends] == [143, 143], ends
    assert newest(workplace.folder / "experiments" / "tiny") == 2
    assert "stopped and saved at iteration 2" in ends[0].stderr


def worker_killed(iteration: int) -> None:
    """In a step: torch raises there, wherever the process is."""
    start, step = loop.CPUPrefetcher.__init__, UCDIRModel.optimize_parameters
    workers = []

    def started(self, data):
        start(self, data)
        workers.extend(self.loader._workers)

    def stepped(self, current_iter):
        if current_iter == iteration:
            workers[0].kill()
            time.sleep(30)
        return step(self, current_iter)

    loop.CPUPrefetcher.__init__ = started
    UCDIRModel.optimize_parameters = stepped


@pytest.mark.parametrize("iteration", [1, 5])
def test_a_loaders_worker_that_is_killed_is_one_line(workplace, iteration):
    """As by the system where memory is short; in the first step, of which all else is taken for wrong options, too."""
    changes = {"train": {"total_iter": 10**6}, "datasets": {"train": {"num_worker_per_gpu": 1}}}
    hook = functools.partial(in_a_session, functools.partial(worker_killed, iteration))
    done = workplace.fork("train.py", "-opt", workplace.write(merged(TINY, changes)), before=hook).wait()
    assert_one_line_error(done, "a process that reads data was killed", "memory", "--auto_resume")
    assert newest(workplace.folder / "experiments" / "tiny") == (4 if iteration == 5 else 0)


# Restoring


def small_photos(place: Workplace, count: int) -> None:
    shutil.rmtree("photos")
    os.mkdir("photos")
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (16 + i % 3, 20, 3))
        cv2.imwrite(f"photos/{i:02}.png", noise)


def finished(folder: str) -> dict[str, tuple[int, int]]:
    """Files of finished images, and what tells whether they are written again."""
    found = {}
    for name in files(folder) if os.path.isdir(folder) else ():
        if name.endswith(".json") and not name.startswith("."):
            record = jobs.read_record(os.path.join(folder, name[:-5]))
            names = [name, *record["outputs"]]
            if all(os.path.exists(os.path.join(folder, n)) for n in names):
                states = [os.stat(os.path.join(folder, n)) for n in names]
                found.update({n: (state.st_ino, state.st_mtime_ns) for n, state in zip(names, states)})
    return found


def assert_whole(place: Workplace, folder: str, of: str, before: dict) -> dict:
    """What is finished is that of the undisturbed run, and what was so before has not been written again."""
    now = finished(folder)
    assert {name: now.get(name) for name in before} == before
    want = contents(of)
    assert all(Path(folder, name).read_bytes() == want[name] for name in now if not name.endswith(".json"))
    return now


RESTORE_MOMENTS = [("fsync", 1), ("replace", 2), ("replace", 3), ("replace", 3, "after"), ("replace", 5, "after")]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_folder_killed_at_any_moment_goes_on(place, samples):
    small_photos(place, 4)
    more = ("--samples", str(samples), "--steps", "1")
    assert run(place, *more, target="one").returncode == 0
    command = ("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "out", *more)
    before: dict = {}
    for moment in RESTORE_MOMENTS if samples == 1 else [("replace", 7), ("replace", 6, "after")]:
        done = place.fork(*command, before=functools.partial(dying, *moment)).wait()
        assert done.returncode == -signal.SIGKILL, done
        before = assert_whole(place, "out", "one", before)
    assert run(place, *more).returncode == 0
    assert_whole(place, "out", "one", before)
    assert files("out") == files("one") and records("out") == records("one")


@pytest.mark.parametrize("call", [3, pytest.param(2, marks=pytest.mark.campaign)])
def test_what_is_overwritten_is_never_a_mix(place, call):
    """Killed between the new record and the new result, an image counted as finished: the new record, the old pixels."""
    small_photos(place, 2)
    assert run(place, "--seed", "1", "--steps", "1", target="one").returncode == 0
    assert run(place, "--seed", "2", "--steps", "1").returncode == 0
    command = ("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "out", "--seed", "1", "--steps", "1")
    done = place.fork(*command, "--overwrite", before=functools.partial(dying, "replace", call)).wait()
    assert done.returncode == -signal.SIGKILL
    assert run(place, "--seed", "1", "--steps", "1").returncode == 0
    made = records("out")
    for name in ("00", "01"):
        seed = made[f"{name}.json"]["settings"]["seed"]
        same = contents("out")[f"{name}.png"] == contents("one")[f"{name}.png"]
        assert same == (seed == 1), name
    assert not [name for name in files("out") if name.startswith(".")]


# The campaign


def counting(start: str, last: int, log: str) -> None:
    """From the start of the work on, this process is killed at its call ``last``; where, is written to a file.

    Calls and returns are counted, Python's and C's, of all threads; with ``last`` 0 all, and their number is written.
    """
    owner, name = {"train": (loop, "Stop"), "restore": (restore_folder, "_Writer")}[start]
    begin, end, count = getattr(owner, name), cli.run_cli, [0]
    places = {"validate": "validating", "optimize_parameters": "in a step", "next": "reading images"}
    places["_restore_one"] = "restoring"
    places.update(dict.fromkeys(("save", "atomic_write", "finish", "write"), "saving"))

    def called(frame, event, arg):
        count[0] += 1
        if count[0] == last:
            sys.setprofile(None)
            place = "between"
            while frame is not None:
                place, frame = places.get(frame.f_code.co_name, place), frame.f_back
            Path(log).write_text(place)
            killed()

    def begun(*args):
        threading.setprofile(called)
        sys.setprofile(called)
        return begin(*args)

    def ended(main):
        code = end(main)
        sys.setprofile(None)
        Path(log).write_text(str(count[0]))
        return code

    setattr(owner, name, begun)
    cli.run_cli = ended


@pytest.mark.campaign
@pytest.mark.parametrize("processes, kills", [(1, 35), (2, 15)])
def test_killed_at_random_moments(request, tmp_path, record_property, processes, kills):
    whole = request.getfixturevalue("undisturbed" if processes == 1 else "undisturbed_pair")
    options, total = (OPTIONS, TOTAL) if processes == 1 else (merged(OPTIONS, DOUBLE), 4)
    draw, places, trainings = random.Random(11), Counter(), 0

    def go_on(place: Workplace, last: int) -> list:
        path = place.write(options)
        hook = functools.partial(counting, "train", last, "where")
        if processes == 2 and last:
            return pair(place, path, {draw.randrange(2): hook})
        return [place.fork("train.py", "-opt", path, "--auto_resume", before=hook).wait()]

    (tmp_path / "count").mkdir()
    place = Workplace(tmp_path / "count")
    assert [end.returncode for end in go_on(place, 0)] == [0]  # two processes each make as many calls
    calls = int((place.folder / "where").read_text())
    while sum(places.values()) < kills:
        trainings += 1
        (tmp_path / str(trainings)).mkdir()
        place, before = Workplace(tmp_path / str(trainings)), 0
        run = place.folder / "experiments" / "tiny"
        while True:
            ends = go_on(place, draw.randint(1, calls // 2))
            assert not any("passed over" in end.stdout for end in ends)
            if all(end.returncode == 0 for end in ends):
                break
            codes = sorted(end.returncode for end in ends)
            assert codes in ([-signal.SIGKILL], [-signal.SIGKILL, 0], [-signal.SIGKILL, 2]), ends
            places[(place.folder / "where").read_text()] += 1
            assert newest(run) >= before
            before = newest(run)
        assert_equal_runs(whole, run, total)
    for name, count in {"kills": sum(places.values()), "trainings, all equal": trainings, **places}.items():
        record_property(f"{processes} process(es): {name}", count)


@pytest.mark.campaign
def test_a_folder_killed_twenty_times(place, record_property):
    small_photos(place, 40)
    assert run(place, "--steps", "1", target="one").returncode == 0
    command = ("restore.py", "-opt", "options.yml", "-i", "photos", "--steps", "1", "-o")
    hook = functools.partial(counting, "restore")
    done = place.fork(*command, "two", before=functools.partial(hook, 0, "where")).wait()
    assert done.returncode == 0
    calls, draw, before, places = int(Path("where").read_text()), random.Random(11), {}, Counter()
    for _ in range(20):
        done = place.fork(*command, "out", before=functools.partial(hook, draw.randint(1, calls // 12), "where")).wait()
        assert done.returncode == -signal.SIGKILL, done
        places[Path("where").read_text()] += 1
        before = assert_whole(place, "out", "one", before)
    left = 40 - len(before) // 2
    assert left, "finished before it was killed twenty times"
    assert run(place, "--steps", "1").returncode == 0
    assert_whole(place, "out", "one", before)
    assert files("out") == files("one") and records("out") == records("one")
    for name, count in {"images left for the last run": left, **places}.items():
        record_property(name, count)
