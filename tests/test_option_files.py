"""Every file in options/ is checked, and trains a few steps and is tested on stand-in data with its sizes cut down."""

import json

import cv2
import pytest
import torch
import yaml
from basicsr.data import build_dataset
from basicsr.models import build_model
from conftest import PHOTOS, ROOT, merged
from torch.utils.data import default_collate

from ucdir_plugin.diffusion.bird.tasks import TASKS
from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import apply_overrides, option_text, read_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError

FILES = sorted(p.relative_to(ROOT / "options").as_posix() for p in (ROOT / "options").rglob("*.yml"))
FILES = [file for file in FILES if not file.startswith("mmengine/")]  # test_mmengine.py has those
FILES = [file for file in FILES if not file.startswith("basicsr/")]  # test_basicsr_commands.py
ALONE = [file for file in FILES if "/" not in file or file.startswith(("study/", "rivals/"))]
BIRD = [file for file in FILES if file.startswith("bird/")]
OF_OTHER_DATA = ("demo_", "hide")  # a task's file on other photographs
PRIORS = [file for file in FILES if file.startswith("prior/")]
VARIANTS = [file for file in FILES if file not in ALONE + BIRD + PRIORS]  # many, so without the tools

DENOISER = ["inner_channel=8", "channel_mults=[1,2]", "res_blocks=1"]
CUT = {
    "UCDIR": [
        *(f"network_g:denoiser:{change}" for change in DENOISER),
        "network_g:predictor:width=4",
        "network_g:predictor:levels=2",
        "val:sampling:steps=2",
    ],
    "UCDIRDenoiser": [f"network_g:{change}" for change in DENOISER],
    "NAFNet": [f"network_g:{change}" for change in ("width=8", "enc_blk_nums=[1]", "dec_blk_nums=[1]")],
    "Uformer": [f"network_g:{change}" for change in ("embed_dim=16", "depths=[1, 1, 1, 1, 1, 1, 1, 1, 1]")],
    "SwinIR": [f"network_g:{change}" for change in ("embed_dim=8", "depths=[1]", "num_heads=[2]")],
}


def test_there_are_option_files():
    assert {"demo_ucdir.yml", "demo_regression.yml", "sid_ucdir.yml", "gopro_ucdir.yml", "jpeg_ucdir.yml"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_loads_as_it_is(file):
    opt = load_options(str(ROOT / "options" / file), is_train=file not in BIRD)
    assert opt["name"] == file.rsplit("/", 1)[-1][: -len(".yml")]


@pytest.mark.parametrize("file", ["sid_ucdir.yml", "gopro_ucdir.yml", "jpeg_ucdir.yml"])
def test_paper_settings(file):
    opt = load_options(str(ROOT / "options" / file))
    train = opt["train"]
    assert opt["datasets"]["train"]["batch_size_total"] == 32
    assert train["total_iter"] == 500000
    assert train["optim_g"] == {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.01}
    assert (train["ema_decay"], train["ema_start"]) == (0.9999, 5000)
    assert opt["diffusion"] == {"type": "linear", "timesteps": 2000, "start": 1e-6, "end": 1e-2}
    assert (opt["val"]["sampling"]["steps"], opt["val"]["sampling"]["spacing"]) == (50, "respace")
    assert opt["datasets"]["train"]["gt_size"] == 256


# Of a rival on other data only the data are other: those of SID run here, the others with -m campaign.
MANY = [f for f in ALONE if f.startswith(("rivals/gopro", "rivals/jpeg"))]


@pytest.mark.parametrize("file", [pytest.param(f, marks=pytest.mark.campaign) if f in MANY else f for f in ALONE])
def test_trains_and_tests(file, workplace):
    raw = read_options(str(ROOT / "options" / file))
    network = raw["network_g"]
    changes = [
        # A student has its teacher's network, which is small.
        *([] if raw["train"].get("teacher") else CUT[network.get("arch", network["type"])]),
        "train:total_iter=2",
        "val:val_freq=2",
        "logger:print_freq=1",
    ]
    for phase, dataset in raw["datasets"].items():
        roots = [key for key in dataset if key.startswith("dataroot")]
        changes += [f"datasets:{phase}:{key}=photos" for key in roots]
        batch = "batch_size_total" if "batch_size_total" in dataset else "batch_size_per_gpu"
        changes += [f"datasets:{phase}:{key}={value}" for key, value in
                    ((batch, 2), ("num_worker_per_gpu", 1), ("gt_size", 16)) if phase == "train"]  # fmt: skip
    path = str(ROOT / "options" / file)
    apply_overrides(raw, changes)
    for tool, start in (
        ("train.py", ["path:pretrain_network_g=~"]),
        ("test.py", []),
    ):  # none: the networks are cut down
        done = workplace.run(tool, "-opt", path, "--force_yml", *changes, *start)
        assert done.returncode == 0, done.stderr[-3000:]
    mean = json.loads((workplace.folder / "results" / raw["name"]).glob("metrics_*.json").__next__().read_text())[
        "mean"
    ]
    assert set(mean) == (
        {"input", "initial", "restored"} if raw["network_g"]["type"] == "UCDIR" else {"input", "restored"}
    )


@pytest.mark.parametrize("file", PRIORS)
def test_priors_train_and_test(file, workplace):
    raw = yaml.safe_load((ROOT / "options" / file).read_text())
    changes = ["train:total_iter=2", "logger:print_freq=1", "network_g:channel_mult=[1, 1]", "network_g:image_size=16"]
    changes += ["val:samples=2", "val:sampling:steps=2", "datasets:train:batch_size_per_gpu=2"]
    changes += [f"datasets:{phase}:{key}" for phase in raw["datasets"] for key in ("dataroot_gt=photos", "gt_size=16")]
    for tool, folder, end in (("train.py", "experiments", 2), ("test.py", "results", raw["name"])):
        done = workplace.run(tool, "-opt", str(ROOT / "options" / file), "--force_yml", *changes)
        assert done.returncode == 0, done.stderr[-3000:]
        pictures = workplace.folder / folder / raw["name"] / "visualization" / raw["datasets"]["val"]["name"]
        assert [p.name for p in pictures.iterdir()] == [f"samples_{end}.png"]


@pytest.mark.parametrize("file", VARIANTS)
def test_variants_train_and_restore(file, workplace, monkeypatch):
    """Two steps of the model and one image restored, with the networks' sizes cut down."""
    monkeypatch.chdir(workplace.folder)
    small = dict(zip(("inner_channel", "channel_mults", "res_blocks"), (8, [1, 2], 1)))
    opt = load_options(str(ROOT / "options" / file))
    opt["network_g"]["denoiser"].update(small)
    if opt["network_g"]["predictor"] is not None:
        opt["network_g"]["predictor"].update(SMALL_PREDICTORS[opt["network_g"]["predictor"]["type"]])
    opt["val"]["sampling"]["steps"] = 2
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=True)
    for phase in ("train", "val"):
        roots = [key for key in opt["datasets"][phase] if key.startswith("dataroot")]
        opt["datasets"][phase].update(dict.fromkeys(roots, "photos"), phase=phase, scale=1, gt_size=16)
    weights = opt["path"]["pretrain_network_predictor"]
    if weights:
        (workplace.folder / "weights").mkdir()
        torch.manual_seed(3)
        state = build_arch(opt["network_g"]["predictor"]).state_dict()
        torch.save({opt["path"]["param_key_predictor"]: state}, weights)
    model = build_model(opt)
    for key, value in state.items() if weights else ():
        assert torch.equal(model.net_g.predictor.state_dict()[key], value)
    predictor = model.net_g.predictor
    weights_before = {} if predictor is None else {k: v.clone() for k, v in predictor.state_dict().items()}
    before = torch.cat([p.detach().flatten() for p in model.net_g.denoise_fn.parameters()])
    train, val = (build_dataset(opt["datasets"][phase]) for phase in ("train", "val"))
    for iteration in (1, 2):
        model.update_learning_rate(iteration)
        model.feed_data(default_collate([train[0], train[1]]))
        model.optimize_parameters(iteration)
    assert model.stepper.bad == 0
    after = torch.cat([p.detach().flatten() for p in model.net_g.denoise_fn.parameters()])
    assert after.isfinite().all() and not torch.equal(after, before)
    sample = val[0]
    model.feed_data({**default_collate([sample]), "key": [sample["key"]]})
    model.test()
    visuals = model.get_current_visuals()
    assert visuals["result"].shape == sample["lq"].unsqueeze(0).shape and visuals["result"].isfinite().all()
    assert ("initial" in visuals) == (opt["network_g"]["predictor"] is not None)
    trains = opt["train"]["predictor"]
    rates = [group["lr"] for group in model.optimizer_g.param_groups]
    assert rates == [1e-4, *([trains["lr"]] if trains and trains["lr"] else [])]
    if trains and trains["frozen"]:
        assert all(torch.equal(v, state[k]) for k, v in model.net_g.predictor.state_dict().items())
        assert model.net_g.training and not model.net_g.predictor.training
    elif trains:
        assert not all(torch.equal(v, weights_before[k]) for k, v in model.net_g.predictor.state_dict().items())


SMALL_PREDICTORS = {
    "SIDUNet": {"width": 4, "levels": 2},
    "SwinIR": {"embed_dim": 4, "depths": [1], "num_heads": [2]},
    "RRDBNet": {"num_feat": 4, "num_block": 1, "num_grow_ch": 2},
    "EDSR": {"num_feat": 4, "num_block": 1},
}


@pytest.mark.parametrize("file", BIRD)
def test_bird_files_restore_and_test(file, workplace):
    """A file for each task; observations, where there are several, are the image itself."""
    path, changes = str(ROOT / "options" / file), ["bird:settings:steps=2"]
    opt = load_options(path, is_train=False)
    assert opt["bird"]["task"] == opt["name"] or opt["name"].startswith(OF_OTHER_DATA)
    roots = [key for key in opt["datasets"]["val"] if key.startswith("dataroot")]
    changes += [f"datasets:val:{key}=photos" for key in roots]
    if opt["bird"]["observations"]:
        changes.append("bird:observations=[photos, photos]")
    done = workplace.run("test.py", "-opt", path, "--force_yml", *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = (workplace.folder / "results" / opt["name"]).glob("metrics_*.json")
    assert {"input", "restored"} <= set(json.loads(table.read_text())["mean"])
    learned = workplace.folder / "results" / opt["name"] / "visualization" / f"{opt['datasets']['val']['name']}_learned"
    assert (learned / "coffee.learned.npz").is_file() and (learned / "coffee.learned.png").is_file()


def test_rivals_are_on_the_data_of_ucdir():
    """For each of its three data sets the same systems, on the same data, measured in the same way."""
    for base in ("sid", "gopro", "jpeg"):
        ucdir = load_options(str(ROOT / "options" / f"{base}_ucdir.yml"))
        for kind in ("regression", "dvsr", "nafnet", "uformer", "swinir"):
            rival = load_options(str(ROOT / "options" / "rivals" / f"{base}_{kind}.yml"))
            crop = {"gt_size": 128} if kind == "swinir" else {}
            assert rival["datasets"] == merged(ucdir["datasets"], {"train": crop})
            assert rival["val"]["metrics"] == ucdir["val"]["metrics"]
            assert rival["train"]["total_iter"] == ucdir["train"]["total_iter"]


def test_rivals_have_the_size_of_their_authors():
    """Parameters as published: NAFNet-32 17.11 M (GoPro), Uformer-B 50.88 M, SwinIR 11.50 M (colour, without upsampling)."""
    for kind, millions in (("nafnet", 17.11), ("uformer", 50.88), ("swinir", 11.50)):
        opt = load_options(str(ROOT / "options" / "rivals" / f"gopro_{kind}.yml"))
        with torch.device("cpu"):
            count = sum(p.numel() for p in build_arch(opt["network_g"]).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_there_is_a_bird_file_for_each_task():
    names = {file[len("bird/") : -len(".yml")] for file in BIRD}
    assert {name for name in names if not name.startswith(OF_OTHER_DATA)} == set(TASKS)


def test_a_variant_is_its_base_but_for_what_it_says():
    base, variant = (load_options(str(ROOT / "options" / f)) for f in ("sid_ucdir.yml", "ablation/activation_relu.yml"))
    assert variant["network_g"]["denoiser"].pop("activation") == "relu"
    assert {**variant, "name": "sid_ucdir"} == base
    sr3 = load_options(str(ROOT / "options" / "ablation" / "sr3.yml"))
    assert sr3["network_g"]["predictor"] is None and sr3["network_g"]["denoiser"]["inner_channel"] == 64


def test_bases(tmp_path):
    """Merged key by key; another type replaces all; the nearest base first; faults name the file."""
    demo = ROOT / "options" / "demo_ucdir.yml"
    predictor = "{type: RRDBNet, num_in_ch: 3, num_out_ch: 3, scale: 1}"
    (tmp_path / "a.yml").write_text(f"_base_: {demo}\nname: a\nmanual_seed: 5\nnetwork_g:\n  predictor: {predictor}\n")
    (tmp_path / "b.yml").write_text("_base_: a.yml\nname: b\ntrain:\n  optim_g: {lr: 1e-5}\n")
    opt, base = load_options(str(tmp_path / "b.yml")), load_options(str(demo))
    assert (opt["name"], opt["manual_seed"]) == ("b", 5) and "_base_" not in opt
    alone = tmp_path / "elsewhere" / "b.yml"  # what an experiment's folder keeps
    alone.parent.mkdir()
    alone.write_text(option_text(str(tmp_path / "b.yml")))
    assert load_options(str(alone)) == opt
    assert option_text(str(demo)) == demo.read_text()
    assert set(opt["network_g"]["predictor"]) == {"type", "num_in_ch", "num_out_ch", "scale"}
    assert opt["train"] == {**base["train"], "optim_g": {**base["train"]["optim_g"], "lr": 1e-5}}
    assert load_options(str(tmp_path / "b.yml"), ["manual_seed=7"])["manual_seed"] == 7
    for text, message in (
        ("_base_: c.yml\nname: c", "c.yml: it is its own _base_"),
        ("_base_: none.yml", "none.yml cannot be read: No such file"),
        ("_base_: [a.yml]", "c.yml: _base_: the path of one option file is expected"),
        ("_base_: a.yml\nnetwork_g: {predictor: {num_fet: 3}}", "network_g:predictor:num_fet for RRDBNet"),
    ):
        (tmp_path / "c.yml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_options(str(tmp_path / "c.yml"))


def test_demo_data(workplace):
    done = workplace.run("../datasets/prepare_demo.py")
    assert done.returncode == 0, done.stderr
    demo = workplace.folder / "datasets" / "demo"
    train, test = ({p.name for p in (demo / part).iterdir()} for part in ("train", "test"))
    assert (len(train), len(test)) == (9, 2)
    assert not train & test
    assert (demo / "test" / "coffee.png").read_bytes() == (PHOTOS / "coffee.png").read_bytes()
    middle, whole = cv2.imread(str(demo / "bird" / "coffee.png")), cv2.imread(str(PHOTOS / "coffee.png"))
    assert (middle == whole[72:328, 172:428]).all()
