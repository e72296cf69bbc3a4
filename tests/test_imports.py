"""Archs, losses, data sets and metrics of other packages: ``--import``, ``imports:``, and what is said of wrong ones."""

import json
import sys

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import TINY, assert_one_line_error, merged

from ucdir_plugin import registry
from ucdir_plugin.options.check import load_options
from ucdir_plugin.utils.errors import UserError

THEIRS = """
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY

@ARCH_REGISTRY.register()
class TinyNAF(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.GELU(),
                                        torch.nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)

@LOSS_REGISTRY.register()
class HuberOfTheirs(torch.nn.HuberLoss):
    def __init__(self, loss_weight=1.0):
        super().__init__()

@DATASET_REGISTRY.register()
class PairsOfTheirs(PairedImageDataset):
    pass

@METRIC_REGISTRY.register()
def calculate_theirs(img, img2, power=1, **kwargs):
    return float((abs(img.astype(float) - img2) ** power).mean())
"""
PAIRS = {"type": "PairsOfTheirs", "dataroot_lq": "photos", "dataroot_gt": "photos", "quality": None}
USING = merged(
    TINY,
    {
        "network_g": {"predictor": {"type": "TinyNAF", "levels": None, "width": 3}},
        "datasets": {"train": PAIRS, "val": PAIRS},
        "train": {"total_iter": 2, "initial_opt": {"type": "HuberOfTheirs"}},
        "val": {"metrics": {"theirs": {"type": "calculate_theirs", "power": 2, "better": "lower"}, "niqe": None}},
    },
)
RIVAL = merged(
    USING,
    {
        "name": "rival",
        "model_type": "SRModel",
        "scale": 1,
        "diffusion": None,
        "train": dict.fromkeys(("diffusion_opt", "initial_opt", "grad_clip", "ema_start")),
        "val": {"sampling": None},
    },
)
RIVAL["network_g"] = {"type": "TinyNAF", "width": 3}
RIVAL["train"]["pixel_opt"] = {"type": "HuberOfTheirs"}


@pytest.fixture
def theirs(workplace):
    (workplace.folder / "their_archs.py").write_text(THEIRS)
    return workplace


@pytest.mark.parametrize(
    "options", [USING, merged(USING, {"engine": "mmengine"}), RIVAL], ids=["ucdir", "mmengine", "rival"]
)
def test_their_classes_train_test_restore_and_measure(theirs, options):
    """As predictor of UCDIR under both engines and as a network of its own; the module lies in the working directory."""
    path = theirs.write(options)
    asked = ("--import", "their_archs")
    for tool in ("train.py", "test.py"):
        done = theirs.run(tool, "-opt", path, *asked)
        assert done.returncode == 0, done.stderr[-3000:]
    (table,) = (theirs.folder / "results" / options["name"]).glob("metrics_*.json")
    assert json.loads(table.read_text())["mean"]["restored"]["theirs"] > 0
    done = theirs.run("restore.py", "-opt", path, "-i", "photos", "-o", "out", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    done = theirs.run("evaluate.py", "out", "photos", "--metrics", "theirs:power=2", *asked, "-o", "measured")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_model_file_with_their_network(theirs):
    path = theirs.write(RIVAL)
    assert theirs.run("train.py", "-opt", path, "--import", "their_archs").returncode == 0
    net = "experiments/rival/models/net_g_latest.pth"
    convert = ("convert_weights.py", "--from", "training", "-opt", path, net, "m.safetensors")
    assert_one_line_error(theirs.run(*convert), "there is no arch 'TinyNAF'", "--import ITS_MODULE")
    assert theirs.run(*convert, "--import", "their_archs").returncode == 0
    restore = ("restore.py", "--model", "m.safetensors", "-i", "photos", "-o", "out")
    assert_one_line_error(theirs.run(*restore), "there is no arch 'TinyNAF'", "--import ITS_MODULE")
    assert theirs.run(*restore, "--import", "their_archs").returncode == 0


def test_imports_of_an_option_file_need_trust(theirs):
    path = theirs.write(merged(USING, {"imports": ["their_archs"]}))
    refused = theirs.run("train.py", "-opt", path)
    assert_one_line_error(refused, "option imports", str(theirs.folder / "their_archs.py"), "--trust-config")
    assert not (theirs.folder / "experiments").exists()
    for more in (("--trust-config",), ("--import", "their_archs")):  # what is typed is trusted
        done = theirs.run("train.py", "-opt", path, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    for tool in ("test.py", "restore.py", "evaluate.py"):
        images = {"restore.py": ("-i", "photos", "-o", "out"), "evaluate.py": ("photos", "photos")}.get(tool, ())
        assert_one_line_error(theirs.run(tool, *images, "-opt", path), "option imports", "--trust-config")
        done = theirs.run(tool, *images, "-opt", path, "--trust-config")
        assert done.returncode == 0, done.stderr[-3000:]


WRONG = {
    "cannot.be.there": ("there is no module cannot", "PYTHONPATH"),
    "their_archs.py": ("the name of a module is expected", "mynet, not mynet.py"),
    "../their_archs": ("the name of a module is expected",),
    "raises": ("raises: RuntimeError: broken",),
    "leaves": ("leaves: SystemExit",),
    "lacks": ("it needs the package einopsies, which is not installed",),
    "nothing": ("registers nothing with BasicSR or MMEngine",),
    "twice": ("'EDSR' was already registered", "give it another name"),
}
MODULES = {
    "raises": "raise RuntimeError('broken')",
    "leaves": "raise SystemExit(3)",
    "lacks": "import einopsies",
    "nothing": "x = 1",
    "twice": "from basicsr.utils.registry import ARCH_REGISTRY\n@ARCH_REGISTRY.register()\nclass EDSR: pass",
}


@pytest.mark.parametrize("module", WRONG)
def test_wrong_modules_are_one_line(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError) as err:
        registry.import_modules([module], "--import")
    for words in ("--import", *WRONG[module]):
        assert words in str(err.value)
    (tmp_path / "o.yml").write_text(f"name: o\nmodel_type: SRModel\nimports: {module}\n")
    with pytest.raises(UserError, match=r"o.yml: option imports"):
        load_options(str(tmp_path / "o.yml"), trust=True)


def test_a_module_twice_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine_once.py").write_text(
        "from basicsr.utils.registry import ARCH_REGISTRY\n@ARCH_REGISTRY.register()\nclass Once: pass"
    )
    try:
        for _ in range(2):
            registry.import_modules(["mine_once"], "--import")
        assert registry.lookup("arch", "Once").__name__ == "Once"
        registry.import_modules(["basicsr.archs"], "--import")  # imported long ago, and it does register
    finally:
        del ARCH_REGISTRY._obj_map["Once"]


def test_looking_for_a_file_s_module_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "package").mkdir()
    for name in ("package/__init__.py", "package/part.py"):
        (tmp_path / name).write_text("raise RuntimeError('it ran')")
    assert registry.found_at("package.part") == str(tmp_path / "package" / "__init__.py")
    (tmp_path / "o.yml").write_text("name: o\nmodel_type: SRModel\nimports: [package.part]\n")
    with pytest.raises(UserError, match="--import package.part or --trust-config"):
        load_options(str(tmp_path / "o.yml"))


def test_near_names_of_all_registries():
    from mmengine.registry import MODELS, Registry

    other = Registry("model", parent=MODELS, scope="theirpackage")
    try:
        other.register_module(name="FlowNet", module=torch.nn.Identity)
        for name, words in (
            ("theirpackage.FlowNett", "did you mean 'theirpackage.FlowNet'"),
            ("EDSRR", "did you mean .*'EDSR'"),
            ("SRModel", "'SRModel' is registered as a model, not as an arch"),
            ("L1Loss", "'L1Loss' is registered as a loss, not as an arch"),
            ("Nobodys", "there is no arch 'Nobodys'.*--import ITS_MODULE"),
        ):
            with pytest.raises(UserError, match=words):
                registry.lookup("arch", name)
    finally:
        del MODELS.children["theirpackage"]
