"""Full, read-only and vanishing disks, and damaged LMDBs: what was good stays good, and one line names path and space.

Where a tmpfs can be mounted, disks are real ones; tests without one let the system's functions fail instead.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, merged
from test_faults_kill import OPTIONS, TOTAL, assert_equal_runs, assert_whole, newest, small_photos
from test_faults_kill import undisturbed as undisturbed  # a fixture
from test_restore import files, run
from test_sharding import wait_until

import ucdir_plugin
from ucdir_plugin.data import jpeg_dataset, preparation
from ucdir_plugin.data.paired_dataset import PairedRestorationDataset
from ucdir_plugin.restoration import folder as restore_folder
from ucdir_plugin.training import setup, stops, validation
from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.errors import UserError, WriteError
from ucdir_plugin.utils.files import write_atomically


def mount(folder: Path, options: str) -> None:
    """A tmpfs; where there is none to be had the test is skipped."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here (it takes root): {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small disk in the workplace; its folder."""
    mounted = []

    def made(name: str, options: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        mount(folder, options)
        mounted.append(folder)
        return folder

    yield made
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def no_traceback(done) -> None:
    assert "Traceback" not in done.stderr and "--- Logging error" not in done.stderr, done.stderr


def fill(folder: str) -> None:
    with open(f"{folder}/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def full_at_a_picture(folder: str) -> None:
    """The disk becomes full when the second picture is written."""
    write, calls = validation.write_image, [0]

    def replaced(*args):
        calls[0] += 1
        if calls[0] == 2:
            fill(folder)
        return write(*args)

    validation.write_image = replaced


def test_a_log_that_cannot_be_written_is_said_once(capsys):
    handler, logger = setup.LogFile("/dev/full"), logging.Logger("full")
    logger.addHandler(handler)
    for i in range(3):
        logger.info(f"line {i}")
    err = capsys.readouterr().err
    assert err.startswith("warning: the log /dev/full cannot be written: No space left on device")
    assert err.count("\n") == 1
    with contextlib.suppress(OSError):
        handler.close()


def checkpoint_bytes(run: Path) -> int:
    return sum((run / name).stat().st_size for name in ("models/net_g_2.pth", "training_states/2.state"))


def test_a_training_on_a_disk_that_fills_up(undisturbed, workplace, disk):
    """With checkpoints; then there is room again, and it fills up with something else while a picture is written."""
    folder = disk("experiments", f"size={round(2.5 * checkpoint_bytes(undisturbed)) // 1024}k")
    path, run_ = workplace.write(OPTIONS), folder / "tiny"
    done = workplace.run("train.py", "-opt", path)
    no_traceback(done)
    assert_one_line_error(done, f"cannot write {run_}", "(0 MB free)", "go on with --auto_resume")
    kept = newest(run_)
    assert 2 <= kept < TOTAL
    assert not list(run_.rglob(".*"))
    done = workplace.run("train.py", "-opt", path, "--auto_resume")
    assert_one_line_error(done, f"cannot write {run_}", "(0 MB free)")
    assert newest(run_) == kept
    enlarge(folder)
    command = ("train.py", "-opt", path, "--auto_resume")
    done = workplace.fork(*command, before=functools.partial(full_at_a_picture, str(folder))).wait()
    no_traceback(done)
    assert_one_line_error(done, f"cannot write {run_}/visualization", "(0 MB free)", "go on with --auto_resume")
    assert newest(run_) >= kept
    (folder / "filler").unlink()
    done = workplace.run("train.py", "-opt", path, "--auto_resume")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(undisturbed, run_)


def limited(iteration: int, size: int) -> None:
    """From an iteration on no file can be longer than ``size``."""
    step = stops.FiniteLosses.look

    def replaced(self, model, now):
        if now == iteration:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return step(self, model, now)

    stops.FiniteLosses.look = replaced


@pytest.mark.parametrize("which", ["basicsr", "mmengine"])
def test_a_checkpoint_that_cannot_be_written_whole(undisturbed, workplace, which):
    path, run_ = workplace.write({**OPTIONS, "engine": which}), workplace.folder / "experiments" / "tiny"
    if which == "basicsr":
        hook = functools.partial(limited, 4, (undisturbed / "training_states" / "2.state").stat().st_size - 100)
    else:
        hook = functools.partial(full_disk, 6)
    done = workplace.fork("train.py", "-opt", path, before=hook).wait()
    no_traceback(done)
    assert_one_line_error(done, f"cannot write {run_}", "MB free)", "go on with --auto_resume")
    assert not [p for p in run_.rglob(".*") if p.name.endswith(".tmp")]
    if which == "mmengine":
        assert list(run_.glob("iter_*.pth"))
    else:
        assert newest(run_) == 2
        assert (run_ / "models" / "net_g_4.pth").exists()  # without its state it is none
    done = workplace.run("train.py", "-opt", path, "--auto_resume")
    assert done.returncode == 0, done.stderr
    if which == "basicsr":
        assert_equal_runs(undisturbed, run_)


def full_disk(call: int, code: int = errno.ENOSPC) -> None:
    """Nothing can be flushed to the disk from a call on; where it is read-only, nothing removed either."""
    flush, left = os.fsync, [call]

    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    def replaced(handle):
        left[0] -= 1
        if left[0] > 0:
            return flush(handle)
        if code == errno.EROFS:
            os.remove = os.unlink = refuse
        return refuse()

    os.fsync = replaced


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EDQUOT, errno.ESTALE])
def test_a_disk_that_breaks_while_a_file_is_written(tmp_path, monkeypatch, code):
    """ext4 becomes read-only after an error: what is half-written cannot even be removed."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for name in ("fsync", "remove", "unlink"):
        monkeypatch.setattr(os, name, getattr(os, name))
    full_disk(1, code)
    with pytest.raises(WriteError, match=f"cannot write {path}: {os.strerror(code)} .*MB free"):
        write_atomically(b"new", path)
    assert path.read_bytes() == b"old"


def test_no_room_for_more_files(disk):
    folder = disk("small", "size=1m,nr_inodes=4")
    for i in range(3):
        (folder / str(i)).touch()
    with pytest.raises(WriteError, match=r"cannot write .*No space left on device \(1 MB free, but room for no more"):
        write_atomically(b"", folder / "one more")


def test_read_only_folders(workplace, disk):
    for name in ("experiments", "results", "out"):
        disk(name, "ro")
    path = workplace.write(TINY)
    for which in ("basicsr", "mmengine"):
        done = workplace.run("train.py", "-opt", path, "--force_yml", f"engine={which}")
        assert_one_line_error(done, f"{workplace.folder}/experiments/tiny", "Read-only file system", "MB free")
    done = workplace.run("test.py", "-opt", path)
    assert done.returncode == 2


def test_results_on_a_full_disk_and_output_that_nobody_takes(place, disk):
    """The finished ones are kept; with room again the rest is restored."""
    small_photos(place, 6)
    assert run(place, "--steps", "1", target="one").returncode == 0
    folder = disk("out", "size=28k")
    done = run(place, "--steps", "1")
    assert_one_line_error(done, f"cannot write {folder}/", "No space left", "(0 MB free)", "run the same command again")
    before = assert_whole(place, "out", "one", {})
    assert 0 < len(before) < 12 and not [name for name in files("out") if name.startswith(".")]
    enlarge(folder)
    assert run(place, "--steps", "1").returncode == 0
    assert_whole(place, "out", "one", before)
    assert files("out") == files("one")

    done = place.fork("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "two", before=output_full).wait()
    assert_one_line_error(done, "No space left on device")


def output_full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize("name", ["edsr.yml", "bird"])
def test_a_full_disk_at_each_file_of_an_image(place, monkeypatch, name):
    """Result, what was learned, picture, record; in any of them nothing is left of the image."""
    os.mkdir("small")
    cv2.imwrite("small/a.png", cv2.imread("photos/coffee.png")[:16, :16])
    few = {"bird": {"task": "deblur"}, "sampling": {"steps": 1}} if name == "bird" else {}
    model = ucdir_plugin.load_model(name, **few)
    assert restore_folder.restore_files(model, "small", "one") == 0
    count = len(files("one"))
    for call in range(1, count + 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", os.fsync)
            full_disk(call)
            with pytest.raises(WriteError, match="No space left on device .*MB free.*what is finished is kept"):
                restore_folder.restore_files(model, "small", "out")
        assert files("out") == []
    assert restore_folder.restore_files(model, "small", "out") == 0
    assert_whole(place, "out", "one", {})
    assert files("out") == files("one")


def test_a_test_whose_report_cannot_be_written(workplace):
    options = merged(TINY, {"train": None, "datasets": {"train": None}, "path": {"pretrain_network_g": "net.pth"}})
    net = ucdir_plugin.registry.build_arch(options["network_g"])
    torch.save({"params": net.state_dict()}, workplace.folder / "net.pth")
    path = workplace.write(options)
    results = workplace.folder / "results" / "tiny"
    # Per image what is kept, the result and the strip; then the tables.
    for call, name in ((2, "visualization"), (10, "metrics_val"), (10, "report_val.html")):
        done = workplace.fork("test.py", "-opt", path, before=functools.partial(full_disk, call)).wait()
        no_traceback(done)
        assert_one_line_error(done, f"cannot write {results}/{name}", "No space left", "run the same command again")
    done = workplace.run("test.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    assert "3 images of val were restored by a run that stopped: kept" in done.stdout
    assert (results / "report_val.html").exists()


# Data that go away


def vanishing(call: int) -> None:
    """The data folder is renamed at a call, as if it was unmounted."""
    dataset = jpeg_dataset.JPEGDataset
    read, left = dataset.__getitem__, [call]

    def replaced(self, index):
        left[0] -= 1
        if not left[0]:
            os.rename("photos", "away")
        return read(self, index)

    dataset.__getitem__ = replaced


# Calls: 4 a step, 3 a validation, which comes after two steps.
@pytest.mark.parametrize("call", [6, pytest.param(10, marks=pytest.mark.campaign)])
def test_data_that_go_away_and_come_back(undisturbed, workplace, call):
    process = workplace.fork("train.py", "-opt", workplace.write(OPTIONS), before=functools.partial(vanishing, call))
    warning = "warning: photos does not answer: waiting up to 300 s"
    while process.process.is_alive() and not (
        process.streams[1].exists() and warning in process.streams[1].read_text()
    ):
        time.sleep(0.05)
    os.rename(workplace.folder / "away", workplace.folder / "photos")
    done = process.wait()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(warning) == 1
    assert_equal_runs(undisturbed, workplace.folder / "experiments" / "tiny")


@pytest.mark.parametrize("where", ["in a worker", "in a validation"])
def test_data_that_stay_away(workplace, where):
    sets = {"train": {"wait_for_data": 0.5}, "val": {"wait_for_data": 0.5}}
    changes = {"datasets": sets, "val": {"val_freq": 3}, "logger": {"save_checkpoint_freq": 10**6}}
    hook = functools.partial(vanishing, 14)  # after three steps of four images
    if where == "in a worker":
        sets["train"]["num_worker_per_gpu"], hook = 1, None
        changes.update(train={"total_iter": 10**6}, val={"val_freq": 10**6})
    path, run_ = workplace.write(merged(OPTIONS, changes)), workplace.folder / "experiments" / "tiny"
    process = workplace.fork("train.py", "-opt", path, before=hook)
    if where == "in a worker":
        wait_until(lambda: process.streams[1].exists() and "l_eps" in process.streams[1].read_text(), process)
        os.rename(workplace.folder / "photos", workplace.folder / "away")
    done = process.wait()
    assert_one_line_error(done, "photos does not answer, waited", "cannot be read: No such file")
    kept = newest(run_)
    assert kept == 3 or (where == "in a worker" and kept)
    done = workplace.run("train.py", "-opt", path, "--auto_resume")
    assert_one_line_error(done, "the folder photos does not exist")
    assert newest(run_) == kept


def test_data_that_stay_away_under_mmengine(workplace):
    sets = {"train": {"wait_for_data": 0}, "val": None}
    changes = {"engine": "mmengine", "datasets": sets, "val": None, "logger": {"save_checkpoint_freq": 10**6}}
    path = workplace.write(merged(OPTIONS, changes))
    done = workplace.fork("train.py", "-opt", path, before=functools.partial(vanishing, 14)).wait()
    assert_one_line_error(done, "photos does not answer, waited", "cannot be read: No such file")
    (kept,) = (workplace.folder / "experiments" / "tiny").glob("iter_*.pth")
    assert kept.name == "iter_3.pth" and read_checkpoint(kept)["meta"]["iter"] == 3


def test_photographs_that_go_away(place):
    small_photos(place, 4)
    done = place.fork("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "out", before=photos_vanish).wait()
    assert_one_line_error(done, "-i photos is not there any more", "run the same command again")
    os.rename("away", "photos")
    assert run(place).returncode == 0
    assert len(files("out")) == 8


def photos_vanish() -> None:
    read, left = restore_folder.image_reading.read_photo, [3]

    def replaced(*args):
        left[0] -= 1
        if not left[0]:
            os.rename("photos", "away")
        return read(*args)

    restore_folder.image_reading.read_photo = replaced


# LMDBs


@pytest.fixture
def pairs(tmp_path):
    """Twenty noisy images each in train/lq and gt, and the options of their LMDBs."""
    for kind in ("lq", "gt"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        for i in range(20):
            noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3))
            cv2.imwrite(str(tmp_path / "train" / kind / f"{i}.png"), noise)
    opt = {"name": "train", "type": "PairedRestorationDataset", "phase": "test", "io_backend": {"type": "lmdb"}}
    roots = {f"dataroot_{kind}": str(tmp_path / "train" / f"{kind}.lmdb") for kind in ("lq", "gt")}
    return {**opt, **roots, "filename_tmpl": "{}"}


def test_an_lmdb_on_a_full_disk(pairs, tmp_path, disk):
    folder = disk("small", "size=300k")
    for image in (tmp_path / "train" / "lq").iterdir():
        (folder / "lq").mkdir(exist_ok=True)
        (folder / "lq" / image.name).write_bytes(image.read_bytes())
    with pytest.raises(WriteError, match=rf"cannot write {folder}/lq.lmdb: .* \(0 MB free\)"):
        preparation.make_lmdb(str(folder / "lq"))
    assert os.listdir(folder) == ["lq"]
    enlarge(folder)
    preparation.make_lmdb(str(folder / "lq"))
    assert len(preparation.read_lmdb_names(str(folder / "lq.lmdb"))) == 20


def test_an_lmdb_that_needs_more_than_it_was_given(pairs, tmp_path, monkeypatch):
    """JPEGs become PNGs there, many times as large."""
    monkeypatch.setattr(preparation.os.path, "getsize", lambda _: -(2**24) // 80 - 8192 + 1000)
    preparation.make_pair_lmdbs(str(tmp_path))
    monkeypatch.undo()
    dataset = PairedRestorationDataset(pairs)
    assert len(dataset) == 20 and all(dataset[i]["lq"].shape == (3, 40, 40) for i in range(20))


@pytest.mark.parametrize("size", [0, 2**20, 2**45])
def test_another_map_size_in_the_file_does_not_matter(pairs, tmp_path, size):
    preparation.make_pair_lmdbs(str(tmp_path))
    with open(tmp_path / "train" / "lq.lmdb" / "data.mdb", "r+b") as file:
        for page in range(2):
            file.seek(4096 * page + 16 + 16)  # of the meta pages, after the header, magic, version and address
            file.write(size.to_bytes(8, "little"))
    dataset = PairedRestorationDataset(pairs)
    assert all(dataset[i]["lq"].shape == (3, 40, 40) for i in range(20))


def cut(pairs, share: float) -> None:
    file = os.path.join(pairs["dataroot_gt"], "data.mdb")
    os.truncate(file, int(share * os.path.getsize(file)))


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_an_lmdb_without_content(pairs, tmp_path, share):
    preparation.make_pair_lmdbs(str(tmp_path))
    cut(pairs, share)
    with pytest.raises(UserError, match="gt.lmdb cannot be read: .*make it again"):
        PairedRestorationDataset(pairs)


@pytest.mark.parametrize("share", [0.99, pytest.param(0.5, marks=pytest.mark.campaign)])
def test_an_lmdb_that_is_cut_short_is_one_line(pairs, tmp_path, workplace, share):
    """Reading beyond the end of a file that is mapped into memory ends a process without a word (SIGBUS)."""
    preparation.make_pair_lmdbs(str(tmp_path))
    cut(pairs, share)
    options = merged(TINY, {"datasets": {"train": {**pairs, "quality": None, "gt_size": 16}}})
    del options["datasets"]["train"]["phase"]
    done = workplace.run("train.py", "-opt", workplace.write(options))
    assert_one_line_error(done, f"LMDB {tmp_path}/train/gt.lmdb is cut short", "make it again")
