"""Weights that come with the package, model files of priors, and experts by noise."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import PHOTOS, assert_one_line_error
from test_adm import TINY, tiny

import ucdir_plugin
from ucdir_plugin import zoo
from ucdir_plugin.diffusion.prior import DenoiserPrior, ExpertsPrior, GaussianPrior, NetworkPrior
from ucdir_plugin.options.check import check_options
from ucdir_plugin.utils import files
from ucdir_plugin.utils.errors import NotAvailable, UserError
from ucdir_plugin.zoo import model_files, priors

OPTIONS = {
    "name": "mine",
    "model_type": "DiffusionPriorModel",
    "scale": 1,
    "network_g": {"type": "ADMUNet", **TINY},
    "diffusion": {"type": "cosine", "timesteps": 40},
    "val": {"sampling": {"steps": 2}},
}


@pytest.fixture
def trained(tmp_path):
    """A prior as a training leaves it, and the model file made of it."""
    net = tiny()
    averaged = {k: v / 2 for k, v in net.state_dict().items()}
    torch.save({"params": net.state_dict(), "params_ema": averaged}, tmp_path / "net_g_5.pth")
    options = check_options(OPTIONS, is_train=False)
    target = str(tmp_path / "mine.safetensors")
    model_files.write_model(str(tmp_path / "net_g_5.pth"), options, target, torch.float32, {"licence": "for research"})
    net.load_state_dict(averaged)
    return target, net


def test_a_model_file_of_a_prior_says_all(trained):
    path, net = trained
    prior = priors.load_prior(path)
    assert prior.notes == {"licence": "for research"} and prior.file == path
    assert len(prior.schedule) == 40 and prior.schedule.betas[-1] == 0.999  # the cosine one
    x, level = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    torch.testing.assert_close(prior(x, level), net(x, prior.timestep(level)))


def test_a_restorer_is_no_prior_and_a_prior_no_restorer(trained, place):
    ok = place.run("convert_weights.py", "--from", "training", "-opt", "options.yml", "net.pth", "net.safetensors")
    assert ok.returncode == 0, ok.stderr
    with pytest.raises(UserError, match="net.safetensors is no prior but a model that restores"):
        priors.load_prior("net.safetensors")
    done = place.run("restore.py", "--model", trained[0], "-i", "photos", "-o", "out")
    assert_one_line_error(done, "mine.safetensors", "--model bird --prior")


def test_what_is_shipped():
    for name, entry in zoo.index().items():
        path = zoo.find(name)
        assert files.sha256_of(path) == entry["sha256"] and os.path.getsize(path) < 10e6
        with open(path.replace(".safetensors", ".md"), encoding="utf-8") as card:
            assert entry["sha256"] in card.read()
        notes = model_files.read_prior(path).notes if entry["kind"] == "prior" else model_files.read_model(path)[2]
        assert notes["licence"]
        assert tuple(entry.get("jpeg_quality", ())) == (model_files.jpeg_quality_of(path) or ())


@pytest.mark.parametrize("name", zoo.names("model"))
def test_the_models_restore_a_jpeg_by_name(name, workplace):
    truth = cv2.imread(str(PHOTOS / "astronaut.png"))[:192, 128:320]
    cv2.imwrite(str(workplace.folder / "photo.jpg"), truth, [cv2.IMWRITE_JPEG_QUALITY, 10])
    done = workplace.run("restore.py", "--model", name, "-i", "photo.jpg", "-o", "out")
    assert done.returncode == 0, done.stderr
    licence, line = done.stdout.splitlines()
    assert licence.startswith(f"{name}: licence: ") and "non-commercial research" in licence and "photo.png" in line
    jpeg, restored = (cv2.imread(str(workplace.folder / file)) for file in ("photo.jpg", "out/photo.png"))
    assert cv2.PSNR(truth, restored) > cv2.PSNR(truth, jpeg) + 0.5
    done = workplace.run("restore.py", "--model", name.replace("jpeg", "jpg"), "-i", "photo.jpg", "-o", "out")
    assert_one_line_error(done, "did you mean", repr(name))


@pytest.mark.parametrize("name", ["jpeg_any", "jpeg_any_fast"])
@pytest.mark.parametrize("quality", [5, 30, 60])
def test_one_model_for_jpegs_of_all_qualities(quality, name, tmp_path):
    """It is told what the file shows, and is better than the JPEG with and without the residual."""
    truth = cv2.imread(str(PHOTOS / "astronaut.png"))[:192, 128:320]
    path = str(tmp_path / "photo.jpg")
    cv2.imwrite(path, truth, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert zoo.for_jpeg(quality) == "jpeg_any_fast" and zoo.for_jpeg(4) is None
    model = ucdir_plugin.load_model(name)
    done = ucdir_plugin.restore(path, model)
    assert done.info["condition"] == {"quality": quality} and "note" not in done.info
    jpeg, better, best = (
        cv2.PSNR(truth, (image[..., ::-1] * 255).round().astype(np.uint8))
        for image in (cv2.imread(path)[..., ::-1] / 255, done.image, done.initial)
    )
    assert best > better > jpeg + 0.1 and best > jpeg + 0.5
    other = ucdir_plugin.restore(path, model, condition={"quality": 95}).image
    assert np.abs(other - done.image).max() > 0.01  # it listens
    assert done.info["nfe"] == (1 if name == "jpeg_any_fast" else 10)


def test_the_student_gives_what_its_teacher_samples(tmp_path):
    """One call as ten, from the same noise: nearly all of the power of the teacher's residual."""
    path = str(tmp_path / "photo.jpg")
    cv2.imwrite(path, cv2.imread(str(PHOTOS / "coffee.png"))[:256, 100:356], [cv2.IMWRITE_JPEG_QUALITY, 15])
    one, ten = (ucdir_plugin.restore(path, ucdir_plugin.load_model(n)) for n in ("jpeg_any_fast", "jpeg_any"))
    assert np.array_equal(one.initial, ten.initial)
    residual = ten.image - ten.initial
    assert np.square(one.image - ten.image).mean() < 0.05 * np.square(residual).mean()


@pytest.fixture
def shelf(tmp_path, monkeypatch, trained):
    """A zoo of one prior, called small."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    shutil.copy(trained[0], folder / "small.safetensors")
    (folder / "small.md").write_text("what it is")
    digests = {"sha256": files.sha256_of(trained[0]), "card_sha256": files.sha256_of(folder / "small.md")}
    entry = {"kind": "prior", **digests, "size": 48}
    (folder / "index.json").write_text(json.dumps({"small": entry}))
    monkeypatch.setattr(zoo, "FOLDER", str(folder))
    return folder


def test_by_name(shelf, trained):
    x, level = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    torch.testing.assert_close(priors.load_prior("small")(x, level), priors.load_prior(trained[0])(x, level))
    assert (priors.load_prior("small").size, priors.load_prior(trained[0]).size) == (48, 16)
    with pytest.raises(UserError, match="did you mean 'small'"):
        priors.load_prior("smal")
    with pytest.raises(UserError, match="leave out bird: network"):
        priors.load_prior("small", network=TINY)


def test_missing_and_altered_weights(shelf):
    path = shelf / "small.safetensors"
    expected, content = zoo.index()["small"]["sha256"], bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"small.safetensors has SHA-256 .*, not {expected}: .*git checkout") as raised:
        priors.load_prior("small")
    assert files.sha256_of(path) in str(raised.value)
    path.unlink()
    with pytest.raises(NotAvailable, match=rf"small.safetensors \(SHA-256 {expected}\) is not there; install"):
        priors.load_prior("small")


def test_missing_and_altered_card(shelf):
    card, expected = shelf / "small.md", zoo.index()["small"]["card_sha256"]
    card.write_text("what it is not")
    with pytest.raises(UserError, match=rf"small.md has SHA-256 {files.sha256_of(card)}, not {expected}: .*git check"):
        priors.load_prior("small")
    card.unlink()
    with pytest.raises(NotAvailable, match=rf"small.md \(SHA-256 {expected}\) is not there; install"):
        priors.load_prior("small")


def test_experts_are_asked_for_the_noise_they_know():
    torch.manual_seed(0)
    net = tiny()
    high = NetworkPrior(net, learned_variance=True, size=16, stride=2)
    low = DenoiserPrior(lambda noisy, sigma: noisy * 0.9, 0.25)
    prior = ExpertsPrior(high, low)
    assert (prior.generates, prior.learned_variance, prior.size, prior.stride) == (True, False, 16, 2)
    assert prior.sigma_max == high.sigma_max
    x = torch.randn(4, 3, 16, 16)
    sigma = np.array([0.05, 0.25, 0.26, 3.0])
    level = torch.from_numpy((1 + 4 * sigma**2) ** -0.5).float()
    found = prior(x, level)
    torch.testing.assert_close(found[:2], low(x[:2], level[:2]))
    torch.testing.assert_close(found[2:], high(x[2:], level[2:])[:, :3])
    for part in (slice(0, 2), slice(2, 4)):  # as a solver asks: one level for all
        torch.testing.assert_close(prior(x[part], level[part]), found[part])
    with pytest.raises(UserError, match="change their order"):
        ExpertsPrior(low, high)
    with pytest.raises(UserError, match="channels"):
        ExpertsPrior(GaussianPrior.natural(16, 16, channels=1), low)
