"""Option files, checkpoints, training states and model files of commit 87dc1b5 still load and go on (tests/earlier)."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ucdir_plugin
from ucdir_plugin.utils.checkpoints import read_checkpoint

FILES = Path(__file__).parent / "earlier" / "87dc1b5.zip"
"""Of a tiny training, each engine's: its state at iteration 2, and its weights at 4. make.py in it made the option files;
that commit's tools/train.py and tools/convert_weights.py the others."""


@pytest.fixture
def earlier(workplace, monkeypatch):
    zipfile.ZipFile(FILES).extractall(workplace.folder)
    monkeypatch.chdir(workplace.folder)
    return workplace


def flat(state: dict) -> np.ndarray:
    """Weights and their average in one vector."""
    return np.concatenate([t.numpy().ravel() for key in ("params", "params_ema") for t in state[key].values()])


@pytest.mark.parametrize("engine", ["basicsr", "mmengine"])
def test_a_training_goes_on(earlier, engine):
    done = earlier.run("train.py", "-opt", f"{engine}.yml", "--auto_resume")
    assert done.returncode == 0, done.stderr
    if engine == "basicsr":
        assert "resuming basicsr at iteration 2" in done.stdout
        found = flat(torch.load("experiments/basicsr/models/net_g_4.pth", weights_only=True))
    else:
        assert "resum" in done.stdout.lower()
        state = torch.load("experiments/mmengine/iter_4.pth", weights_only=True)["state_dict"]
        names = ("net_g.", "net_g_ema.")
        found = np.concatenate([t.numpy().ravel() for n in names for k, t in state.items() if k.startswith(n)])
    expected = np.load("weights_4.npy")
    start = flat(read_checkpoint("experiments/basicsr/models/net_g_2.pth"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # other processors round otherwise
    assert np.abs(start - expected).max() > 5e-4


def test_a_model_file_and_an_option_file_with_a_checkpoint_restore(earlier):
    expected = np.load("weights_4.npy")
    model = ucdir_plugin.load_model("model.safetensors", device="cpu")
    found = np.concatenate([t.numpy().ravel() for t in model.net.state_dict().values()])
    np.testing.assert_array_equal(found, expected[len(expected) // 2 :])
    args = ("-opt", "basicsr.yml", "--weights", "experiments/basicsr/models/net_g_2.pth", "-i", "photos", "-o", "out")
    done = earlier.run("restore.py", *args)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("out").glob("*.png"))) == 3
