"""One registration reaches both ecosystems, twice without harm, and takes no network."""

import importlib
import subprocess
import sys

import pytest
from basicsr.utils.registry import ARCH_REGISTRY
from mmengine.registry import MODELS

import ucdir_plugin.archs.predictor_arch as module
from ucdir_plugin import registry
from ucdir_plugin.utils.errors import UserError, did_you_mean


def test_both_registries_know_the_classes():
    assert ARCH_REGISTRY.get("SIDUNet") is module.SIDUNet
    net = MODELS.build({"type": "ucdir_plugin.SIDUNet", "width": 2, "levels": 2})
    assert type(net) is module.SIDUNet
    loss = MODELS.build({"type": "ucdir_plugin.NoisePredictionLoss"})
    assert loss.criterion == "l1"


def test_registering_twice_is_harmless():
    again = importlib.reload(module)
    assert ARCH_REGISTRY.get("SIDUNet") is again.SIDUNet
    assert type(MODELS.build({"type": "ucdir_plugin.SIDUNet", "levels": 1})) is again.SIDUNet


def test_a_name_of_somebody_else_is_not_taken():
    with pytest.raises(UserError, match=r"'EDSR' of .* is already registered by basicsr"):
        registry.register("arch")(type("EDSR", (), {}))


def test_import_registers_everything_and_opens_no_connection():
    code = """
import socket, sys
def refuse(*args): raise AssertionError("network")
socket.socket.connect = refuse
import ucdir_plugin
import ucdir_plugin
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
for r, names in ((ARCH_REGISTRY, ("UCDIR", "UCDIRDenoiser", "SIDUNet")), (LOSS_REGISTRY, ("NoisePredictionLoss",)),
                 (DATASET_REGISTRY, ("JPEGDataset", "PairedRestorationDataset")), (MODEL_REGISTRY, ("UCDIRModel",))):
    for name in names:
        assert name in r, name
assert "mmengine.runner" not in sys.modules and "ucdir_plugin.mm.models" not in sys.modules  # it takes a while
from mmengine.registry import MODELS
assert MODELS.get("ucdir_plugin.UCDIRModel").__module__ == "ucdir_plugin.mm.models"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_near_names():
    assert did_you_mean("Ucdir", ["UCDIR", "EDSR"]) == "did you mean 'UCDIR'?"
    assert did_you_mean("zzz", ["a", "b"]) == "known: a, b"
    assert did_you_mean("zzzzzz", [f"name{i}" for i in range(20)]) == "none of the 20 known names is near"
