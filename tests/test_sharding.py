"""One folder, several processes: who does what, what a lost rank leaves, and what the others say."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, merged
from test_restore import files, run
from test_tools import TORCHRUN, numbers

import ucdir_plugin
from ucdir_plugin.options.check import check_options, share_batch
from ucdir_plugin.registry import build_arch
from ucdir_plugin.restoration import folder as restore_folder
from ucdir_plugin.training import testing
from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import remove_leftovers_of
from ucdir_plugin.utils.ranks import Share, own_share


def rank(number: int, of: int) -> dict[str, str]:
    return {"RANK": str(number), "WORLD_SIZE": str(of), "LOCAL_RANK": str(number)}


def slurm(number: int, of: int, port: int = 0) -> dict[str, str]:
    found = {"SLURM_PROCID": str(number), "SLURM_NTASKS": str(of), "SLURM_NODELIST": "here"}
    return {**found, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(true, process):
    while not true():
        assert process.process.is_alive(), process.wait()
        time.sleep(0.01)


def contents(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in files(folder) if not name.endswith(".json")}


def records(folder: str) -> dict[str, dict]:
    """Without what differs from run to run."""
    found = {name: json.loads(Path(folder, name).read_text()) for name in files(folder) if name.endswith(".json")}
    for record in found.values():
        for key in ("date", "seconds", "peak_memory"):
            del record[key]
    return found


def assert_same_results(one: str, two: str) -> None:
    assert contents(one) == contents(two) and records(one) == records(two)


CASES = {
    "no launcher": ({}, Share(0, 1, 0)),
    "torchrun": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Share(5, 8, 1)),
    "slurm": ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Share(2, 4, 0)),
    "torchrun under srun": ({**slurm(1, 2), **rank(3, 4)}, Share(3, 4, 3)),
    "srun": ({**slurm(1, 2), "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}, Share(1, 2, 0)),
    "batch script of one task": ({**slurm(0, 1), "SLURM_JOB_ID": "7"}, Share(0, 1, 0)),
    "torchrun in a batch script": ({**slurm(0, 4), "SLURM_JOB_ID": "7", **rank(1, 2)}, Share(1, 2, 1)),
    "half": ({"SLURM_NTASKS": "4"}, Share(0, 1, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_share_follows_from_the_launchers_variables(name):
    assert own_share(CASES[name][0]) == CASES[name][1]


def test_contradicting_variables():
    with pytest.raises(UserError, match="RANK=2 is none of WORLD_SIZE=2 ranks"):
        own_share(rank(2, 2))
    with pytest.raises(UserError, match="SLURM_PROCID and SLURM_NTASKS are no numbers"):
        own_share({"SLURM_PROCID": "first", "SLURM_NTASKS": "2"})
    with pytest.raises(UserError, match="slurm's job has 4 tasks, and nothing started them: put srun before"):
        own_share({**slurm(0, 4), "SLURM_JOB_ID": "7"})


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_shares_are_disjoint_and_together_all(world):
    shares = [Share(number, world).take(range(13)) for number in range(world)]
    assert sorted(item for share in shares for item in share) == list(range(13))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_leftovers_of_the_dead_are_deleted(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".a.5.png.{dead.pid}.part", f".a.json.{dead.pid}.tmp", f"..a.5.png.{dead.pid}.part.{dead.pid}.tmp"]
    stay = [f".b.png.{dead.pid}.part", f".a.5.png.{os.getpid()}.part", "a.5.png", ".a.5.png.part"]
    for name in gone + stay:
        (tmp_path / name).touch()
    remove_leftovers_of([str(tmp_path / "a.5.png"), str(tmp_path / "a.json"), str(tmp_path / "none" / "a.png")])
    assert sorted(os.listdir(tmp_path)) == sorted(stay)


def test_what_a_lost_rank_left_is_done_by_any_number_of_others(place):
    os.mkdir("photos/below")
    for i in range(4):
        cv2.imwrite(f"photos/below/{i}.png", np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3)))
    assert run(place, target="one").returncode == 0
    command = ("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "out")
    done = place.fork(*command, **slurm(1, 2)).wait()  # the other one is lost
    assert done.returncode == 0, done.stderr
    own = ["below/0.png", "below/2.png", "chelsea.png"]
    keys = ["astronaut.png", *(f"below/{i}.png" for i in range(4)), "chelsea.png", "coffee.png"]
    assert own == keys[1::2]
    assert sorted(contents("out")) == own
    assert [line.split(" -> ")[0] for line in done.stdout.splitlines()[:3]] == [f"rank 1: {name}" for name in own]
    last = "rank 1: 3 of the 7 images of 2 ranks are finished, not (yet): astronaut.png, below/1.png, below/3.png"
    assert done.stdout.splitlines()[3].startswith(last)
    assert "run the same command again" in done.stdout and done.stderr == ""
    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in files("out")}
    ranks = [place.fork(*command, log=str(i), **rank(i, 3)) for i in range(3)]
    texts = [process.wait().stdout for process in ranks]
    assert [process.process.exitcode for process in ranks] == [0, 0, 0], texts
    made = sorted(line.split(": ")[1].split(" -> ")[0] for text in texts for line in text.splitlines() if "->" in line)
    assert made == [key for key in keys if key not in own]
    assert any("all 7 images of 3 ranks are finished" in text for text in texts)
    assert {name: os.stat(f"out/{name}").st_mtime_ns for name in before} == before
    assert_same_results("one", "out")


@pytest.mark.parametrize("name", ["edsr.yml", "bird"])
def test_any_model_is_shared_out(place, capsys, name):
    os.mkdir("small")
    for key in ("a", "b"):
        cv2.imwrite(f"small/{key}.png", cv2.imread("photos/coffee.png")[:24, :24])
    few = {"bird": {"task": "deblur"}, "sampling": {"steps": 1}} if name == "bird" else {}
    model = ucdir_plugin.load_model(name, **few)
    assert restore_folder.restore_files(model, "small", "one") == 0
    for i in range(2):
        assert restore_folder.restore_files(model, "small", "out", share=Share(i, 2)) == 0
    # Of BIR-D: result, record, degraded again, what was learned and its picture.
    assert len(files("out")) == 2 * (5 if name == "bird" else 2)
    assert_same_results("one", "out")
    assert "rank 1: all 2 images of 2 ranks are finished" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_is_stopped_leaves_whole_files(place, number):
    steps = ("--steps", "40")
    assert run(place, *steps, target="one").returncode == 0
    command = ("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "out", *steps)
    lost = place.fork(*command, **rank(0, 1))
    wait_until(lambda: "->" in lost.output(), lost)
    os.kill(lost.process.pid, number)
    done = lost.wait()
    finished = [name for name in files("out") if name.endswith(".png") and not name.startswith(".")]
    assert 0 < len(finished) < 3
    if number == signal.SIGTERM:
        assert done.returncode == 143
        assert done.stderr == "stopped by signal 15; run the same command again to go on\n"
        assert not [name for name in files("out") if name.startswith(".")]
    else:
        Path(f"out/.coffee.png.{lost.process.pid}.part").touch()  # as if killed while it wrote
    assert run(place, *steps).returncode == 0
    assert_same_results("one", "out")


def test_torchrun_lets_the_others_finish_where_an_image_fails(place):
    """It stops all ranks once one ends with an error."""
    Path("photos/a_broken.png").write_bytes(b"no image")  # the first: rank 0 has nothing but it and coffee.png
    for i in range(4):
        cv2.imwrite(f"photos/z{i}.png", np.random.default_rng(i).integers(0, 256, (20 + 80 * (i % 2), 24, 3)))
    done = place.run("restore.py", "-opt", "options.yml", "-i", "photos", "-o", "out", launcher=TORCHRUN)
    assert done.returncode == 1
    assert done.stderr.count("failed: a_broken.png") == 1
    assert len(contents("out")) == 7, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "rank 0: 7 of the 8 images of 2 ranks are finished, not: a_broken.png; the reasons are above"
    )


def test_a_test_goes_on_where_a_rank_was_lost(workplace):
    """Its table is that of an undisturbed run; what is restored already is not restored again."""
    changes = {"path": {"pretrain_network_g": "net.pth"}, "val": {"sampling": {"steps": 20}, "metrics": {"niqe": None}}}
    options = merged(TINY, {"train": None, "datasets": {"train": None}, **changes})
    torch.save({"params": build_arch(options["network_g"]).state_dict()}, workplace.folder / "net.pth")
    results = workplace.folder / "results"
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3))
        cv2.imwrite(str(workplace.folder / "photos" / f"z{i}.png"), noise)
    path = workplace.write(options)
    assert workplace.run("test.py", "-opt", path, "--force_yml", "name=one").returncode == 0
    assert not (results / ".unfinished_one").exists()
    port = str(free_port())
    command = ("test.py", "-opt", path, "--launcher", "slurm", "--force_yml", f"dist_params:port={port}")
    ranks = [workplace.fork(*command, log=str(i), **slurm(i, 2)) for i in range(2)]
    kept = results / ".unfinished_tiny" / "val"
    wait_until(lambda: kept.is_dir() and len(list(kept.glob("*.npz"))) >= 2, ranks[0])
    os.kill(ranks[1].process.pid, signal.SIGKILL)
    assert_one_line_error(ranks[0].wait(), "rank 0 has lost another rank", "what is restored is kept")
    there = {path: path.stat().st_mtime_ns for path in kept.glob("*.npz")}
    assert 2 <= len(there) < 6
    done = workplace.run("test.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    assert f"{len(there)} images of val were restored by a run that stopped: kept" in done.stdout
    tables = [json.loads((results / name / "metrics_val.json").read_text()) for name in ("one", "tiny")]
    assert numbers(tables[0]) == numbers(tables[1]) and tables[0]["mean"] == tables[1]["mean"]
    for picture in (results / "one" / "visualization" / "val").iterdir():
        twin = results / "tiny" / "visualization" / "val" / picture.name.replace("_one", "_tiny")
        assert twin.read_bytes() == picture.read_bytes()
    assert not (results / ".unfinished_tiny").exists()


def test_what_was_restored_otherwise_is_not_kept():
    def decides(changes, weights="1f"):
        opt = check_options(merged(TINY, changes), True)
        return testing._what_decides({**opt, "rank": 0}, None, opt["datasets"]["val"], weights)

    plain = decides({})
    for same in (
        {"num_gpu": 0},
        {"val": {"metrics": None}},
        {"logger": {"print_freq": 3}},
        {"dist_params": {"port": 1}},
    ):
        assert decides(same) == plain
    for other in ({"manual_seed": 1}, {"val": {"sampling": {"steps": 3}}}, {"datasets": {"val": {"quality": 11}}},
                  {"network_g": {"denoiser": {"dropout": 0.1}}}, {"path": {"param_key_g": "params_ema"}}):  # fmt: skip
        assert decides(other) != plain
    assert decides({}, "2f") != plain


@pytest.fixture
def lost(workplace):
    """A training of two ranks without an end, one killed after its second checkpoint; the other's end."""
    options = {
        "train": {"total_iter": 10**6, "scheduler": {"milestones": [10**6]}},
        "datasets": {"train": {"batch_size_per_gpu": None, "batch_size_total": 4}},
    }
    path = workplace.write(merged(TINY, options))
    command = ("train.py", "-opt", path, "--launcher", "slurm", "--force_yml", f"dist_params:port={free_port()}")
    return workplace, path, command


@pytest.mark.parametrize("name", ["basicsr", "mmengine"])
def test_a_training_that_loses_a_rank_stops_and_can_go_on(lost, name):
    workplace, path, command = lost
    run = workplace.folder / "experiments" / "tiny"
    states, form = (run / "training_states", "{}.state") if name == "basicsr" else (run, "iter_{}.pth")
    ranks = [workplace.fork(*command, f"engine={name}", log=str(i), **slurm(i, 2)) for i in range(2)]
    wait_until((states / form.format(4)).exists, ranks[0])
    os.kill(ranks[1].process.pid, signal.SIGKILL)
    done = ranks[0].wait()
    assert_one_line_error(done, "rank 0 has lost another rank", "--auto_resume")
    newest = max(int(state.stem.replace("iter_", "")) for state in states.glob(form.format("*")))
    state = read_checkpoint(str(states / form.format(newest)))
    assert state.get("meta", state)["iter"] == newest
    force = ("--force_yml", f"train:total_iter={newest + 2}", f"engine={name}")
    done = workplace.run("train.py", "-opt", path, "--auto_resume", *force)  # batch 4 on one, too
    assert done.returncode == 0, done.stderr
    if name == "mmengine":
        assert f"resuming tiny from {states / form.format(newest)}" in done.stdout
        assert (states / form.format(newest + 2)).exists()
        return
    assert f"resuming tiny at iteration {newest}" in done.stdout
    assert "2 iterations of 4 x 1 samples" in done.stderr.replace(f"{newest + 2} iterations", "2 iterations")


def test_a_rank_that_does_not_answer_is_given_up_after_the_timeout(lost):
    workplace, _, command = lost
    ranks = [workplace.fork(*command, "dist_params:timeout=2", log=str(i), **slurm(i, 2)) for i in range(2)]
    states = workplace.folder / "experiments" / "tiny" / "training_states"
    wait_until(lambda: (states / "2.state").exists(), ranks[0])
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    done = ranks[0].wait()
    os.kill(ranks[1].process.pid, signal.SIGKILL)
    assert_one_line_error(done, "rank 0 has lost another rank", "Timed out", "dist_params: timeout", "--auto_resume")


def test_a_port_in_use(workplace):
    path = workplace.write(TINY)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = workplace.fork("train.py", "-opt", path, "--launcher", "slurm", **slurm(0, 2, port)).wait()
    assert_one_line_error(done, f"127.0.0.1:{port}: the port is in use", "dist_params: port")


BAD = {
    "cuda": ({"num_gpu": 1}, ["option num_gpu: 1 asked for, 0 found", "0 for the CPU"]),
    "timeout": ({"dist_params": {"timeout": 0}}, ["option dist_params:timeout", "greater than 0"]),
    "key": ({"dist_params": {"backnd": "gloo"}}, ["unknown option dist_params:backnd", "'backend'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_told_before_the_ranks_meet(workplace, name):
    changes, words = BAD[name]
    path = workplace.write(merged(TINY, changes))
    assert_one_line_error(workplace.fork("train.py", "-opt", path, "--launcher", "slurm", **slurm(0, 2)).wait(), *words)


def test_without_slurms_own_command_the_address_is_asked_for(workplace):
    variables = {**slurm(0, 2), "PATH": "/nowhere"}
    del variables["MASTER_ADDR"]
    done = workplace.fork("test.py", "-opt", workplace.write(TINY), "--launcher", "slurm", **variables).wait()
    assert_one_line_error(done, "scontrol show hostname here", "set MASTER_ADDR")
    del variables["SLURM_NODELIST"]
    done = workplace.fork("test.py", "-opt", workplace.write(TINY), "--launcher", "slurm", **variables).wait()
    assert_one_line_error(done, "SLURM_NODELIST is not set", "srun")


def test_a_total_batch_is_shared_out():
    def shared(total, processes):
        dataset = {"batch_size_total": total, "batch_size_per_gpu": 1}
        share_batch(dataset, processes)
        return dataset["batch_size_per_gpu"]

    assert [shared(32, n) for n in (1, 2, 8, 32)] == [32, 16, 4, 1]
    with pytest.raises(UserError, match="batch_size_total: 32 is no multiple of the 5 processes: .* 4 .* 30 or 35"):
        shared(32, 5)
    with pytest.raises(UserError, match="4 is no multiple of the 6 processes: take 4 of them, or a total of 6$"):
        shared(4, 6)
    train = {"batch_size_per_gpu": 4, "batch_size_total": 32}
    with pytest.raises(UserError, match="batch_size_total and batch_size_per_gpu exclude each other"):
        check_options(merged(TINY, {"datasets": {"train": train}}), True)
    with pytest.raises(UserError, match="datasets:val:batch_size_total is for training"):
        check_options(merged(TINY, {"datasets": {"val": {"batch_size_total": 2}}}), True)
    train = {"batch_size_per_gpu": None}
    assert (
        check_options(merged(TINY, {"datasets": {"train": train}}), True)["datasets"]["train"]["batch_size_per_gpu"]
        == 1
    )
    raw = merged(TINY, {"datasets": {"train": {"batch_size_total": 32}}})
    raw["datasets"]["train"]["batch_size_per_gpu"] = None  # as --force_yml datasets:train:batch_size_per_gpu=~ gives it
    assert "batch_size_per_gpu" not in check_options(raw, True)["datasets"]["train"]  # nothing wrong until it is known


def test_ranks_that_do_not_divide_the_batch(workplace):
    changes = {"datasets": {"train": {"batch_size_per_gpu": None, "batch_size_total": 3}}}
    command = ("train.py", "-opt", workplace.write(merged(TINY, changes)), "--launcher", "slurm")
    port = free_port()
    ranks = [workplace.fork(*command, log=str(i), **slurm(i, 2, port)) for i in range(2)]
    for process in ranks:
        assert_one_line_error(process.wait(), "batch_size_total: 3 is no multiple of the 2 processes")
