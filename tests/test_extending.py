"""A sampler, a task, a network, a loss, a metric and a data set are added in as many files as docs/architecture.md says."""

import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SAMPLER = """

def mine(denoise, schedule, noise, clip_x0=True, callback=None, **more):
    return ddim(denoise, schedule, noise, clip_x0, callback, **more)


SAMPLERS["mine"] = Sampler(mine, takes_eta=True)
"""
TASK = """

TASKS["mine"] = Task(gray=True, gdp_scale=7.0)
"""
NETWORK = """from torch import nn

from ucdir_plugin.registry import register


@register("arch")
class Mine(nn.Conv2d):
    def __init__(self, width: int = 3):
        super().__init__(3, width, 1)
"""
LOSS = """from torch import nn

from ucdir_plugin.registry import register


@register("loss")
class MyLoss(nn.L1Loss):
    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
"""
METRIC = """from ucdir_plugin.registry import register


@register("metric")
def calculate_mine(img, img2, power: float = 1.0):
    return float(abs(img - img2).mean() ** power)
"""
DATASET = """from typing import Any, ClassVar, Dict

from ucdir_plugin.data.clean_dataset import CleanImages
from ucdir_plugin.registry import register


@register("dataset")
class MyDataset(CleanImages):
    options: ClassVar[Dict[str, Any]] = {"my_key": float}
"""
ADDED = {
    "a sampler": {"diffusion/samplers.py": SAMPLER},
    "a task of BIR-D": {"diffusion/bird/tasks.py": TASK},
    "a network": {"archs/my_arch.py": NETWORK, "archs/__init__.py": "\nfrom ucdir_plugin.archs import my_arch\n"},
    "a loss": {"losses/my_loss.py": LOSS, "losses/__init__.py": "\nfrom ucdir_plugin.losses import my_loss\n"},
    "a metric": {"metrics/mine.py": METRIC, "metrics/__init__.py": "\nfrom ucdir_plugin.metrics import mine\n"},
    "a data set, with keys of its own": {"data/my_dataset.py": DATASET, "data/__init__.py": "\nfrom ucdir_plugin.data import my_dataset\n"},
}  # fmt: skip
USED = """
import pytest, sys
from conftest import TINY, merged
from ucdir_plugin.diffusion.bird.tasks import preset
from ucdir_plugin.options.check import check_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError

data = {"type": "MyDataset", "quality": None, "my_key": 2.0}
changes = {
    "datasets": {"train": data, "val": {"type": "MyDataset", "quality": None}},
    "train": {"initial_opt": {"type": "MyLoss"}},
    "val": {"sampling": {"sampler": "mine", "eta": 0.5}, "metrics": {"mine": {"type": "calculate_mine", "power": 2.0}}},
    "network_g": {"predictor": {"type": "Mine", "levels": None, "width": 3}},
}
opt = check_options(merged(TINY, changes), True)
assert opt["datasets"]["train"]["my_key"] == 2.0 and build_arch(opt["network_g"])
assert preset("gdp", "mine").data.scale.scale == 7.0
check_options({"name": "b", "model_type": "BIRDModel", "bird": {"task": "mine"}}, False)
for wrong, words in (({"my_key": "x"}, "my_key"), ({"my_keyy": 1.0}, "did you mean 'my_key'")):
    with pytest.raises(UserError, match=words):
        check_options(merged(TINY, merged(changes, {"datasets": {"train": wrong}})), True)
"""


def test_one_of_each_is_added_and_used(tmp_path):
    package = tmp_path / "ucdir_plugin"
    shutil.copytree(ROOT / "ucdir_plugin", package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for files in ADDED.values():
        for name, text in files.items():
            with open(package / name, "a", encoding="utf-8") as file:
                file.write(text)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'tests')!r}]\n{USED}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documentation_counts_these_files():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    counted = dict(re.findall(r"^\| (an? [^|]+) \| (\d) \|", text, re.MULTILINE))
    assert counted == {what: str(len(files)) for what, files in ADDED.items()}


def names_in_the_table() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"`(ucdir_plugin\.[\w.]+\.\w+)`", text)


@pytest.mark.parametrize("name", names_in_the_table())
def test_functions_of_the_formulas_are_there(name):
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[length:]:
        found = getattr(found, part)
    assert callable(found)


def test_files_of_the_two_ways_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w]+/)*\w+\.py):(\w+)`", text)
    assert len(named) > 15
    for file, name in named:
        path = ROOT / file if file.startswith("tools/") else ROOT / "ucdir_plugin" / file
        siblings = [path, *(ROOT / "ucdir_plugin").rglob(file)] if "/" not in file else [path]
        source = "".join(p.read_text(encoding="utf-8") for p in siblings if p.is_file())
        assert re.search(rf"^(def|class) {name}\b|^{name}\b", source, re.MULTILINE), (file, name)
