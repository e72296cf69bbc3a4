"""Networks of spandrel wherever an arch may stand: restorer, predictor, first stage, prior; files and new ones."""

import json

import numpy as np
import pytest
import spandrel
import torch
from conftest import ROOT, TINY, assert_one_line_error, merged
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from spandrel.architectures.DnCNN import DnCNN
from spandrel.architectures.DRUNet import DRUNet
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.FBCNN import FBCNN
from spandrel.architectures.LaMa import LaMa
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.SCUNet import SCUNet
from spandrel.architectures.SwinIR import SwinIR
from spandrel.architectures.Uformer import Uformer
from test_faults_hostile import CANARY, Hostile

import ucdir_plugin
from ucdir_plugin.options.check import check_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import read_uint8
from ucdir_plugin.zoo import model_files, priors

SMALL = {"nc": [8, 8, 16, 16], "nb": 2}
NETWORKS = {
    "NAFNet": lambda: NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1]),
    "DRUNet": lambda: DRUNet(in_nc=4, out_nc=3, **SMALL),
    "DRUNet, gray": lambda: DRUNet(in_nc=2, out_nc=1, **SMALL),
    "SCUNet": lambda: SCUNet(in_nc=3, config=[1] * 7, dim=64),
    "FBCNN": lambda: FBCNN(in_nc=3, out_nc=3, nc=[8, 8, 16, 512], nb=2),
    "FBCNN, gray": lambda: FBCNN(in_nc=1, out_nc=1, nc=[8, 8, 16, 512], nb=2),
    "DnCNN": lambda: DnCNN(in_nc=3, out_nc=3, nc=8, nb=9, act_mode="R"),
    "SwinIR": lambda: SwinIR(upscale=1, in_chans=3, img_size=8, window_size=4, depths=[1], num_heads=[2], embed_dim=8,
                             mlp_ratio=2, upsampler="", resi_connection="1conv"),
    "Uformer": lambda: Uformer(embed_dim=16, depths=[1] * 9, modulator=True),
    "ESRGAN": lambda: ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4),
    "Compact": lambda: Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2),
}  # fmt: skip


def saved(name: str, folder, suffix=".pth") -> str:
    torch.manual_seed(0)
    net, path = NETWORKS[name](), str(folder / f"net{suffix}")
    with torch.no_grad():
        for value in net.parameters():  # some start as the identity
            value.add_(0.02 * torch.randn_like(value))
    if suffix == ".pth":
        torch.save({"params": net.state_dict()}, path)
    else:
        save_file(net.state_dict(), path)
    return path


def as_spandrel_calls_it(path: str, image: torch.Tensor) -> torch.Tensor:
    found = spandrel.ModelLoader().load_from_file(path).eval()
    if found.input_channels == 1:
        return torch.cat([torch.cat([found(channel) for channel in one.split(1, 1)], 1) for one in image.split(1)])
    return torch.cat([found(one) for one in image.split(1)])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_is_what_spandrel_makes_of_it(name, tmp_path):
    path = saved(name, tmp_path)
    net = build_arch({"type": "Spandrel", "path": path}).eval()
    image = torch.rand(2, 3, 45, 52)
    with torch.no_grad():
        ours = net(image)
    assert ours.shape == (2, 3, 45 * net.scale, 52 * net.scale)
    torch.testing.assert_close(ours.clamp(0, 1), as_spandrel_calls_it(path, image), atol=1e-5, rtol=0)
    assert net.architecture == name.split(",")[0] and net.gray == name.endswith("gray")
    ours = net.train()(image)  # it can be trained
    ours.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_file_needs_no_other(name, tmp_path):
    """The network's arguments stand in it instead of the path; small, and equal."""
    path = saved(name, tmp_path)
    cfg = {"type": "Spandrel", "path": path}
    net = build_arch(cfg).eval()
    options = check_options(
        {"name": "m", "model_type": "SRModel", "scale": net.scale, "network_g": cfg}, is_train=False
    )
    torch.save({"params": net.state_dict()}, tmp_path / "trained.pth")
    target = str(tmp_path / "m.safetensors")
    model_files.write_model(str(tmp_path / "trained.pth"), options, target, torch.float32, {})
    (tmp_path / "net.pth").unlink()
    kept = model_files.read_model(target)[0]["network_g"]
    assert "path" not in kept and kept["arch"] == net.architecture
    model = ucdir_plugin.load_model(target)
    image = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.net(image), net(image), atol=1e-5, rtol=0)  # channels last rounds otherwise


@pytest.mark.parametrize(("name", "suffix"), [("NAFNet", ".pth"), ("ESRGAN", ".safetensors"), ("FBCNN, gray", ".pth")])
def test_restore_takes_the_file_and_patches_are_the_whole(name, suffix, workplace):
    path = saved(name, workplace.folder, suffix)
    for out, more in (("whole", ("--tile", "0")), ("patches", ("--tile", "24", "--overlap", "8"))):
        done = workplace.run("restore.py", "--model", path, "-i", "photos/coffee.png", "-o", out, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, patches = (read_uint8(str(workplace.folder / out / "coffee.png")) for out in ("whole", "patches"))
    image = read_uint8(str(workplace.folder / "photos" / "coffee.png"))
    scale = 4 if name == "ESRGAN" else 1
    assert whole.shape == patches.shape == (image.shape[0] * scale, image.shape[1] * scale, 3)
    record = json.loads((workplace.folder / "whole" / "coffee.json").read_text())
    assert record["settings"]["network"] == name.split(",")[0] and record["nfe"] == 1
    assert json.loads((workplace.folder / "patches" / "coffee.json").read_text())["patches"] > 1
    expected = as_spandrel_calls_it(path, torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None] / 255)
    expected = (expected[0].permute(1, 2, 0).numpy()[..., ::-1] * 255).round()
    assert np.abs(expected - whole).max() <= 1
    if name == "ESRGAN":  # local: its receptive field is below the overlap
        assert np.abs(whole.astype(int) - patches).max() <= 1


NEW = {"type": "Spandrel", "arch": "NAFNet", "width": 8, "middle_blk_num": 1, "enc_blk_nums": [1], "dec_blk_nums": [1]}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_predictor_of_ucdir(workplace, frozen):
    """A new NAFNet trains with the denoiser, a file's may be frozen; either restores from a model file alone."""
    predictor = NEW if not frozen else {"type": "Spandrel", "path": saved("NAFNet", workplace.folder)}
    changes = {"train": {"total_iter": 2}}
    if frozen:
        changes["train"].update(initial_opt=None, predictor={"frozen": True})
    options = merged(TINY, changes)
    options["network_g"]["predictor"] = predictor
    path = workplace.write(options)
    for tool in ("train.py", "test.py"):
        done = workplace.run(tool, "-opt", path)
        assert done.returncode == 0, done.stderr[-3000:]
    net = "experiments/tiny/models/net_g_latest.pth"
    done = workplace.run("convert_weights.py", "--from", "training", "-opt", path, net, "m.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    if frozen:
        state = torch.load(predictor["path"], weights_only=True)["params"]
        trained = torch.load(workplace.folder / net, weights_only=True)["params"]
        assert all(torch.equal(trained[f"predictor.net.{key}"], value) for key, value in state.items())
    (workplace.folder / "net.pth").unlink(missing_ok=True)
    done = workplace.run("restore.py", "--model", "m.safetensors", "-i", "photos/coffee.png", "-o", "out")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rival_under_srmodel_and_mmengine_s_registry(workplace):
    rival = merged(
        TINY,
        {
            "model_type": "SRModel",
            "scale": 1,
            "train": dict.fromkeys(("diffusion_opt", "initial_opt", "grad_clip", "ema_start")),
            "val": {"sampling": None},
        },
    )
    rival["network_g"], rival["train"]["pixel_opt"] = NEW, {"type": "L1Loss"}
    done = workplace.run("train.py", "-opt", workplace.write(rival))
    assert done.returncode == 0, done.stderr[-3000:]
    done = workplace.run("restore.py", "-opt", workplace.write(rival), "-i", "photos/coffee.png", "-o", "out")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_first_stage_and_a_prior_of_bir_d(workplace):
    """DRUNet is told the noise level, a blind denoiser is not; both are priors of BIR-D."""
    drunet = saved("DRUNet", workplace.folder)
    steps = ("--set", "steps=2")
    done = workplace.run(
        "restore.py", "--model", "bird", "--prior", drunet, "-i", "photos/coffee.png", "-o", "a", *steps
    )
    assert done.returncode == 0, done.stderr[-3000:]
    options = {"name": "b", "model_type": "BIRDModel", "bird": {"first_stage": {"model": drunet}}}
    path = workplace.write(options)
    done = workplace.run("restore.py", "-opt", path, "-i", "photos/coffee.png", "-o", "b", *steps)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_was_trained_here_is_recognised_too(tmp_path):
    """Weights of a training have the arch's prefix; averages go before the others."""
    path = saved("DRUNet", tmp_path)
    net = build_arch({"type": "Spandrel", "path": path}).eval()
    first = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    torch.save({"params": first, "params_ema": net.state_dict()}, tmp_path / "net_g_2.pth")
    again = build_arch({"type": "Spandrel", "path": str(tmp_path / "net_g_2.pth")}).eval()
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(image), net(image))
    assert priors.load_prior(str(tmp_path / "net_g_2.pth")).denoise(image, torch.tensor([0.1])).shape == image.shape


def test_the_noise_level_is_handed_over(tmp_path):
    path = saved("DRUNet", tmp_path)
    prior = priors.load_prior(path)
    x0, levels = torch.rand(2, 3, 16, 16), torch.tensor([10.0, 40.0]) / 255
    net = spandrel.ModelLoader().load_from_file(path).model.eval()
    with torch.no_grad():
        ours = prior.denoise(x0, levels)
        for i in range(2):
            level = levels[i].expand(1, 1, 16, 16)
            torch.testing.assert_close(ours[i : i + 1], net(torch.cat([x0[i : i + 1], level], 1)), atol=1e-6, rtol=0)
        fixed = build_arch({"type": "Spandrel", "path": path, "noise": 40.0}).eval()
        torch.testing.assert_close(fixed(x0)[1], ours[1], atol=1e-6, rtol=0)
    gray = build_arch({"type": "Spandrel", "path": saved("DRUNet, gray", tmp_path)}).eval()
    with torch.no_grad():
        each = [gray(x0[i : i + 1], levels[i]) for i in range(2)]
        torch.testing.assert_close(gray(x0, levels), torch.cat(each), atol=1e-6, rtol=0)
    blind = priors.load_prior(saved("SCUNet", tmp_path))
    assert blind.denoise(x0, levels).shape == x0.shape


WRONG = {
    "neither": ({}, "give path .* or arch"),
    "both": ({"path": "a.pth", "arch": "NAFNet"}, "give path .* or arch"),
    "no such arch": ({"arch": "NAFNett"}, "no architecture 'NAFNett'; did you mean .*'NAFNet'"),
    "a module": ({"arch": "NAFNet.__arch"}, "there is no architecture"),
    "argument": ({"arch": "NAFNet", "widht": 8}, "NAFNet takes no 'widht'; did you mean .*'width'"),
    "value": ({"arch": "NAFNet", "width": -8}, "NAFNet cannot be built"),
    "mask": ({"arch": "LaMa"}, "it needs a mask"),
    "channels": ({"arch": "DnCNN", "in_nc": 4, "out_nc": 4}, "turns 4 channels into 4"),
    "path and more": ({"path": "a.pth", "width": 3}, "width has no meaning with path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configurations_are_one_line(case):
    arguments, words = WRONG[case]
    with pytest.raises(UserError, match=words) as err:
        build_arch({"type": "Spandrel", **arguments})
    assert len(str(err.value).splitlines()) == 1


def test_wrong_files_are_one_line(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    torch.save({"a.weight": torch.zeros(3)}, "unknown.pth")
    torch.save(Hostile("os.system"), "pickle.pth")
    torch.save(LaMa().state_dict(), "mask.pth")
    (workplace.folder / "text.pth").write_text("no weights")
    for file, words in (
        ("unknown.pth", "spandrel does not know the network"),
        ("pickle.pth", "could run code"),
        ("mask.pth", "it needs a mask"),
        ("text.pth", "damaged or no PyTorch file"),
    ):
        done = workplace.run("restore.py", "--model", file, "-i", "photos", "-o", "out")
        assert_one_line_error(done, file, words)
    done = workplace.run(
        "restore.py", "--model", "bird", "--prior", saved("ESRGAN", workplace.folder), "-i", "photos", "-o", "out"
    )
    assert_one_line_error(done, "enlarges images 4 times")
    assert not (workplace.folder / CANARY).exists() and not (workplace.folder / "out").exists()
    opt = {"name": "u", "model_type": "SRModel", "scale": 1, "network_g": {"type": "Spandrel", "path": "net.pth"}}
    done = workplace.run(
        "restore.py", "-opt", workplace.write(opt), "--weights", "net.pth", "-i", "photos", "-o", "out"
    )
    assert done.returncode == 2


def test_a_model_file_reads_no_other_file(tmp_path):
    """Options in a file from outside choose no path, nested or not."""
    from ucdir_plugin.zoo.model_files import write_safetensors

    secret = saved("NAFNet", tmp_path)
    for network in (
        {"type": "Spandrel", "path": secret},
        merged(TINY["network_g"], {}) | {"predictor": {"type": "Spandrel", "path": secret}},
    ):
        options = {
            "name": "m",
            "model_type": "UCDIRModel" if "denoiser" in network else "SRModel",
            "network_g": network,
        }
        path = str(tmp_path / "m.safetensors")
        write_safetensors({"a": torch.zeros(1)}, path, torch.float32, {"options": options, "notes": {}})
        with pytest.raises(UserError, match="is refused: its Spandrel would read the file"):
            ucdir_plugin.load_model(path)


def test_without_the_package(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "spandrel" else real(name, *a))
    path = saved("NAFNet", tmp_path)
    with pytest.raises(UserError, match=r"pip install .*\[spandrel\]"):
        build_arch({"type": "Spandrel", "arch": "NAFNet"})
    with pytest.raises(UserError, match=r"pip install .*\[spandrel\].*tools/convert_weights.py"):
        ucdir_plugin.load_model(path)


def test_the_extra_is_declared():
    assert '"spandrel": [SPANDREL]' in (ROOT / "setup.py").read_text()


# The way back: our model files in spandrel


def model_file(options: dict, folder) -> str:
    """A model file of random weights, as tools/convert_weights.py writes it."""
    torch.manual_seed(0)
    net = build_arch(options["network_g"])
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.02 * torch.randn_like(value))
    torch.save({"params_ema": net.state_dict()}, folder / "net.pth")
    target = str(folder / f"{options['name']}.safetensors")
    checked = check_options(options, is_train=False)
    model_files.write_model(str(folder / "net.pth"), checked, target, torch.float32, {})
    return target


OURS = {
    "ucdir": merged(TINY, {"train": None, "datasets": None, "val": {"metrics": None, "sampling": {"steps": 2, "tile": 32, "overlap": 8}}}),
    "regression": {"name": "r", "model_type": "SRModel", "scale": 1, "network_g": merged(TINY["network_g"]["denoiser"], {"in_channel": 3})},
    "predictor": {"name": "p", "model_type": "SRModel", "scale": 1, "network_g": TINY["network_g"]["predictor"]},
    "twice as large": {"name": "e", "model_type": "SRModel", "scale": 2, "network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}},
    "spandrel's own": {"name": "n", "model_type": "SRModel", "scale": 1, "network_g": NEW},
}  # fmt: skip


@pytest.mark.parametrize("kind", OURS)
def test_our_files_load_in_spandrel(kind, tmp_path):
    from ucdir_plugin.interop import spandrel as interop

    path = model_file(OURS[kind], tmp_path)
    before = len(spandrel.MAIN_REGISTRY)
    try:
        interop.install()
        interop.install()
        assert len(spandrel.MAIN_REGISTRY) == before + 1
        found = spandrel.ModelLoader().load_from_file(path)
        assert (found.architecture.id, found.scale) == ("ucdir_plugin", OURS[kind].get("scale", 1))
        image = torch.rand(1, 3, 40, 52)
        theirs = found(image)
        ours = next(iter(ucdir_plugin.load_model(path).run(image.clone(), "").samples))
        assert torch.equal(theirs, ours) and torch.equal(found(image), theirs)
        assert theirs.shape == (1, 3, 40 * found.scale, 52 * found.scale)
        expected = spandrel.ModelTiling.INTERNAL if kind == "ucdir" else spandrel.ModelTiling.SUPPORTED
        assert found.tiling is expected and found.eval().device.type == "cpu"
        other = saved("NAFNet", tmp_path)  # what was known before still is
        assert spandrel.ModelLoader().load_from_file(other).architecture.id == "NAFNet"
    finally:
        remove_from(spandrel.MAIN_REGISTRY, interop.ID)


def remove_from(registry, name):
    """spandrel has no way to take an architecture back."""
    left = [support for support in registry if support.architecture.id != name]
    registry.__init__()
    registry.add(*left)


def test_our_files_in_spandrel_are_checked_too(tmp_path):
    from safetensors.torch import load_file

    from ucdir_plugin.interop import spandrel as interop

    path = model_file(OURS["predictor"], tmp_path)
    state = load_file(path)
    hostile = {
        "name": "x",
        "model_type": "SRModel",
        "network_g": {"type": "Spandrel", "path": saved("NAFNet", tmp_path)},
    }
    try:
        interop.install()
        for options, words in (
            (json.dumps(hostile), "would read the file"),
            ("{", "its options cannot be read"),
            ("[1]", "a mapping of options is expected"),
            (json.dumps({**OURS["predictor"], "nett": 1, "model_type": "UCDIRModel"}), "unknown option nett"),
        ):
            state["ucdir_plugin.options"] = torch.frombuffer(bytearray(options.encode()), dtype=torch.uint8)
            with pytest.raises(UserError, match=words):
                spandrel.ModelLoader().load_from_state_dict(dict(state))
    finally:
        remove_from(spandrel.MAIN_REGISTRY, interop.ID)
