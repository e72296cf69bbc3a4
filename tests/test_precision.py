"""``--dtype auto``: bf16 where it is faster and changes no pixel by more than 1 of 255."""

import json
import os

import cv2
import numpy as np
import pytest
import torch
from conftest import PHOTOS, TINY, merged
from test_spandrel import model_file

import ucdir_plugin
from ucdir_plugin.options.check import check_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.restoration import precision
from ucdir_plugin.utils.errors import UserError, WriteError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A CPU as a test says it is: ``cpu(ratio)`` has the instructions, and bf16 takes ``ratio`` of fp32's time."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    measured = []

    def make(ratio, instructions=True):
        monkeypatch.setattr(precision, "_measure", lambda: measured.append(ratio) or ratio)
        monkeypatch.setattr(precision, "has_instructions", lambda: instructions)
        return measured

    return make


@pytest.fixture(scope="module")
def net():
    return build_arch(TINY["network_g"])


def test_the_faster_one_is_taken(cpu, net, tmp_path):
    cpu(0.5)
    choice = precision.choose(net, CPU)
    assert choice == ("bf16", "on this CPU bf16 takes 0.50 of fp32's time") and precision.slower(CPU) is None


def test_the_slower_one_is_not(cpu, net):
    cpu(3.4)
    assert precision.choose(net, CPU) == ("fp32", "on this CPU bf16 takes 3.40 of fp32's time")
    assert precision.slower(CPU).startswith("bf16 takes 3.4 times as long as fp32")


def test_what_is_known_is_not_measured(cpu, net):
    measured = cpu(0.1, instructions=False)
    assert precision.choose(net, CPU) == ("fp32", "this CPU has no bf16 arithmetic")
    assert measured == []


def test_it_is_measured_once(cpu, net, tmp_path):
    measured = cpu(0.5)
    for _ in range(3):
        assert precision.bf16_time() == 0.5
    assert measured == [0.5]
    (file,) = (tmp_path / "cache" / "ucdir_plugin").glob("bf16_*.json")
    for content in ("", "[]", '{"bf16_over_fp32": -1}', '{"bf16_over_fp32": "x"}', '{"bf16_over_fp32": NaN}'):
        file.write_text(content)
        assert precision.bf16_time() == 0.5
        assert json.loads(file.read_text()) == {"bf16_over_fp32": 0.5}
    assert len(measured) == 6
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # another choice of instructions is another machine
    try:
        precision.bf16_time()
    finally:
        del os.environ["ONEDNN_MAX_CPU_ISA"]
    assert len(measured) == 7


def test_a_folder_that_cannot_be_written(cpu, monkeypatch, tmp_path):
    measured = cpu(0.5)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert [precision.bf16_time() for _ in range(2)] == [0.5, 0.5] and len(measured) == 2
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "read_only"))

    def refused(text, path):
        raise WriteError(f"{path} cannot be written")

    monkeypatch.setattr(precision, "write_text", refused)
    assert precision.bf16_time() == 0.5 and len(measured) == 3


def test_a_capability_set_low(cpu, net, monkeypatch):
    monkeypatch.setattr(precision, "_cpu", lambda: "x amx_bf16 avx512_bf16")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert precision.has_instructions()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not precision.has_instructions()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(precision, "_cpu", lambda: "x avx512f")
    assert not precision.has_instructions()


def test_gpus(net, monkeypatch):
    for capability, dtype in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert precision.choose(net, CUDA).dtype == dtype
    assert precision.slower(CUDA) is None


def test_networks_that_were_not_checked(cpu):
    cpu(0.1)
    edsr = build_arch({"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 1})
    assert precision.choose(edsr, CPU) == ("fp32", "bf16 was not checked with EDSR")
    mixed = merged(TINY["network_g"], {"predictor": {"width": None, "levels": None, "type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "num_grow_ch": 2}})  # fmt: skip
    assert precision.choose(build_arch(mixed), CPU) == ("fp32", "bf16 was not checked with RRDBNet")
    assert precision.choose(build_arch(TINY["network_g"]["predictor"]), CPU).dtype == "bf16"


def test_the_user_is_told(cpu, place):
    tiny = merged(TINY, {"train": None, "datasets": None, "val": {"metrics": None}})
    file = model_file(tiny, place.folder)
    cpu(0.5)
    model = ucdir_plugin.load_model(file, dtype="auto")
    assert model.options.amp == "bf16" and model.notes["dtype"].startswith("bf16: on this CPU")
    cpu(5.0)
    for ratio_file in place.folder.glob("cache/ucdir_plugin/bf16_*.json"):
        ratio_file.unlink()
    model = ucdir_plugin.load_model(file, dtype="auto")
    assert model.options.amp is None and "dtype" not in model.notes
    model = ucdir_plugin.load_model(file, dtype="bf16")
    assert model.options.amp == "bf16" and "5.0 times as long" in model.notes["warning"]
    assert "dtype" not in ucdir_plugin.load_model(file).notes  # the model's own, as ever
    assert "dtype" not in ucdir_plugin.load_model(file, dtype="fp32").notes
    with pytest.raises(UserError, match="take auto, fp32, bf16 or fp16"):
        ucdir_plugin.load_model(file, dtype="fp64")
    done = place.run("restore.py", "--model", file, "-i", "photos", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert ("tiny: dtype: bf16" in done.stderr) == (precision.choose(model.net, CPU).dtype == "bf16")
    done = place.run("restore.py", "--model", file, "-i", "photos", "-o", "half", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert json.loads((place.folder / "half" / "coffee.json").read_text())["settings"]["amp"] == "bf16"


def test_a_training_is_told(cpu, place):
    cpu(4.0)
    path = place.write(merged(TINY, {"train": {"total_iter": 1, "amp": "bf16"}}))
    done = place.run("train.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    slow = "option train:amp: bf16 takes" in done.stderr
    assert slow == (precision.slower(CPU) is not None) or not precision.has_instructions()


def test_bf16_changes_no_pixel_by_more_than_one(place):
    """jpeg_any's ten calls on a stored JPEG, in emulation where the CPU has nothing better."""
    crop = cv2.imread(str(PHOTOS / "coffee.png"))[60:124, 200:264]
    photo = cv2.imdecode(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 20])[1], 1)[..., ::-1]
    results = []
    for dtype in ("fp32", "bf16"):
        model = ucdir_plugin.load_model("jpeg_any", dtype=dtype)
        results.append(ucdir_plugin.restore(np.ascontiguousarray(photo), model, condition={"quality": 20}).image)
    difference = np.abs((results[0] * 255).round() - (results[1] * 255).round())
    assert difference.max() <= 1 and 0 < (difference > 0).mean() < 0.1


def test_options_of_a_file_are_its_own():
    """An option file says amp, not auto: what trains and tests must not depend on the machine."""
    with pytest.raises(UserError, match="val:sampling:amp"):
        check_options(merged(TINY, {"val": {"sampling": {"amp": "auto"}}}), True)
