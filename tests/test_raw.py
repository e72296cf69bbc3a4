"""SID from raw files to restored images, with Bayer DNGs that the test writes itself."""

import types

import cv2
import numpy as np
import pytest
import tifffile
from basicsr.data import build_dataset
from conftest import TINY, assert_one_line_error, merged

from ucdir_plugin.data import preparation
from ucdir_plugin.data import raw as raw_files
from ucdir_plugin.options.check import check_options
from ucdir_plugin.utils.errors import NotAvailable, UserError

pytest.importorskip("rawpy", reason="rawpy is not installed: pip install -e '.[raw]'")

BLACK, WHITE = 512, 16383
TO_SRGB = [3.2406, -1.5372, -0.4986, -0.9689, 1.8758, 0.0415, 0.0557, -0.2040, 1.0570]  # XYZ -> the camera's colours


def fractions(values):
    return [number for value in values for number in (round(value * 10000), 10000)]


def write_dng(path, pixels, pattern=(0, 1, 1, 2), side=2, neutral=(1, 1, 1), more=()):
    """A DNG of a camera whose colours are sRGB's, linear between BLACK and WHITE."""
    tags = [
        (33421, "H", 2, (side, side), True), (33422, "B", len(pattern), tuple(pattern), True),
        (50706, "B", 4, (1, 4, 0, 0), True), (50708, "s", 0, "Test Camera", True),
        (50714, "H", 1, BLACK, True), (50717, "H", 1, WHITE, True), (50721, "2i", 9, tuple(fractions(TO_SRGB)), True),
        (50728, "2I", 3, tuple(fractions(neutral)), True), (50778, "H", 1, 21, True),
        (271, "s", 0, "Test", True), (272, "s", 0, "Camera", True), *more,
    ]  # fmt: skip
    tifffile.imwrite(path, pixels, photometric="cfa", extratags=tags, metadata=None, subfiletype=0)


def mosaic(linear):
    """Half-size linear RGB (h, w, 3) in [0, 1] -> raw values (2 h, 2 w), RGGB."""
    pixels = np.empty((2 * linear.shape[0], 2 * linear.shape[1]), np.uint16)
    values = np.round(linear * (WHITE - BLACK) + BLACK)
    for (y, x), channel in {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}.items():
        pixels[y::2, x::2] = values[..., channel]
    return pixels


def bt709(linear):
    return np.where(linear < 0.018, 4.5 * linear, 1.099 * np.maximum(linear, 0.018) ** 0.45 - 0.099)


@pytest.fixture
def linear():
    steps = np.linspace(0.02, 0.9, 24)
    return np.stack((np.tile(steps, (20, 1)), np.tile(steps[::-1], (20, 1)), np.full((20, 24), 0.3)), 2)


def test_developing_is_black_level_curve_and_half_size(tmp_path, linear):
    write_dng(tmp_path / "a.dng", mosaic(linear))
    image = raw_files.develop(str(tmp_path / "a.dng"))
    assert image.shape == (20, 24, 3) and image.dtype == np.uint16
    np.testing.assert_allclose(image[..., ::-1] / 65535, bt709(linear), atol=0.01)
    assert raw_files.develop(str(tmp_path / "a.dng"), bits=8).dtype == np.uint8


def test_a_short_exposure_amplified_is_the_long_one(tmp_path):
    """Exactly, where its values are whole numbers times the ratio: so no brightness is chosen by the content."""
    stream = np.random.default_rng(0)
    signal = stream.integers(0, 120, (40, 48)).astype(np.uint16)
    write_dng(tmp_path / "short.dng", BLACK + signal)
    write_dng(tmp_path / "long.dng", BLACK + 100 * signal)
    short, long = (raw_files.develop(str(tmp_path / f"{n}.dng"), r) for n, r in (("short", 100.0), ("long", 1.0)))
    np.testing.assert_array_equal(short, long)
    saturated = raw_files.develop(str(tmp_path / "short.dng"), 10000.0)
    assert saturated.max() == 65535


def test_camera_white_balance(tmp_path):
    gray = np.full((20, 24, 3), 0.2)
    write_dng(tmp_path / "a.dng", mosaic(gray * np.array([0.5, 1.0, 0.8])), neutral=(0.5, 1.0, 0.8))
    image = raw_files.develop(str(tmp_path / "a.dng")).astype(float)
    assert np.ptp(image.mean((0, 1))) < 0.02 * image.mean()


def test_the_cameras_own_picture_is_cut_out_and_upright(tmp_path, linear):
    """As of SID's Sony, whose files hold 4256x2848 pixels of which the picture is 4240x2832: 2120x1416 at half size."""
    write_dng(tmp_path / "whole.dng", mosaic(linear))
    whole = raw_files.develop(str(tmp_path / "whole.dng"))
    crop = [(50719, "H", 2, (4, 6), True), (50720, "H", 2, (40, 28), True)]  # left, top; width, height
    for orientation, turns in ((1, 0), (3, 2), (6, 3), (8, 1)):
        write_dng(tmp_path / "a.dng", mosaic(linear), more=[*crop, (274, "H", 1, orientation, True)])
        image = raw_files.develop(str(tmp_path / "a.dng"))
        np.testing.assert_array_equal(image, np.rot90(whole[3:17, 2:22], turns))
    write_dng(tmp_path / "a.dng", mosaic(linear), more=[crop[0], (50720, "H", 2, (400, 28), True)])  # nonsense
    assert raw_files.develop(str(tmp_path / "a.dng")).shape == (20, 24, 3)


def test_an_old_rawpy_is_named():
    old = types.SimpleNamespace(sizes=types.SimpleNamespace(flip=0))
    with pytest.raises(NotAvailable, match="rawpy 0.25 or later"):
        raw_files._sizes(old)


def test_bad_raw_files(tmp_path, linear):
    write_dng(tmp_path / "a.dng", mosaic(linear))
    content = (tmp_path / "a.dng").read_bytes()
    for name, size in (("cut", len(content) - 200), ("half", len(content) // 2), ("head", 30)):
        (tmp_path / f"{name}.dng").write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"{name}.dng cannot be read: it is damaged, cut short"):
            raw_files.develop(str(tmp_path / f"{name}.dng"))
    with pytest.raises(UserError, match=r"none.dng cannot be read"):
        raw_files.develop(str(tmp_path / "none.dng"))
    xtrans = (
        1,
        1,
        0,
        1,
        1,
        2,
        1,
        1,
        2,
        1,
        1,
        0,
        2,
        0,
        1,
        0,
        2,
        1,
        1,
        1,
        2,
        1,
        1,
        0,
        1,
        1,
        0,
        1,
        1,
        2,
        0,
        2,
        1,
        2,
        0,
        1,
    )
    write_dng(tmp_path / "x.dng", mosaic(linear), xtrans, side=6)
    with pytest.raises(UserError, match=r"x.dng: its sensor has no Bayer pattern"):
        raw_files.develop(str(tmp_path / "x.dng"))


@pytest.fixture
def sid(workplace, linear):
    """Two scenes for training (the first with two short exposures), one for the test."""
    folder = workplace.folder / "SID" / "Sony"
    (folder / "short").mkdir(parents=True)
    (folder / "long").mkdir()
    stream = np.random.default_rng(0)
    lists = {"train": [("00001", "10s", ("0.1s", "0.04s")), ("00002", "30s", ("0.1s",))], "test": [("10003", "10s", ("0.033s",))]}  # fmt: skip
    for part, scenes in lists.items():
        lines = []
        for number, long, shorts in scenes:
            write_dng(folder / "long" / f"{number}_00_{long}.ARW", mosaic(linear))
            for short in shorts:
                dark = mosaic(linear * float(short[:-1]) / float(long[:-1])) + stream.integers(0, 3, (40, 48))
                write_dng(folder / "short" / f"{number}_00_{short}.ARW", dark.astype(np.uint16))
                lines.append(f"./Sony/short/{number}_00_{short}.ARW ./Sony/long/{number}_00_{long}.ARW ISO200 F8")
        (workplace.folder / "SID" / f"Sony_{part}_list.txt").write_text("\n".join(lines) + "\n")
    return workplace


def test_from_raw_to_restored(sid):
    """prepare_sid.py, two training steps with the ratio as a condition, a test that writes the restored image."""
    run = ("../datasets/prepare_sid.py", "--source", "SID", "--workers", "1", "--out", "out")
    done = sid.run(*run, "--crop", "16", "--step", "8")
    assert done.returncode == 0 and "train: 3 pairs (16x16, the official list has 1865)" in done.stdout, done.stderr
    assert "test: 1 pairs (24x20, " in done.stdout
    out = sid.folder / "out"
    assert len(list((out / "train" / "lq").iterdir())) == len(list((out / "train" / "gt").iterdir())) == 3 * 2 * 2
    assert "00001_00_0.04s_y0004x0008,250" in (out / "train" / "ratios.csv").read_text().splitlines()
    assert (out / "test" / "ratios.csv").read_text() == "name,ratio\n10003_00_0.033s,300\n"
    written = cv2.imread(str(out / "train" / "gt" / "00001_00_0.04s_y0004x0008.png"), cv2.IMREAD_UNCHANGED)
    image = raw_files.develop(str(sid.folder / "SID/Sony/long/00001_00_10s.ARW"))
    np.testing.assert_array_equal(written, image[4:20, 8:24])
    again = sid.run(*run, "--crop", "16", "--step", "8")
    assert "0 images written, 24 were there" in again.stdout
    other = sid.run(*run, "--crop", "16", "--step", "8", "--bits", "8")  # would mix 8 and 16 bits
    assert_one_line_error(other, "out was prepared with --bits 16, not --bits 8: name another --out")
    assert "0 images written, 24 were there" in sid.run(*run, "--crop", "16").stdout  # half is what it was
    pairs = {
        phase: {"name": phase, "type": "PairedRestorationDataset", "dataroot_lq": f"out/{part}/lq",
                "dataroot_gt": f"out/{part}/gt", "condition_file": f"out/{part}/ratios.csv", "quality": None}
        for phase, part in (("train", "train"), ("val", "test"))
    }  # fmt: skip
    network = {"denoiser": {"conditions": {"ratio": {"range": [1, 300]}}}}
    changes = {"network_g": network, "datasets": pairs, "train": {"total_iter": 2}}
    options = sid.write(merged(TINY, changes))
    for tool in ("train.py", "test.py"):
        done = sid.run(tool, "-opt", options)
        assert done.returncode == 0, done.stderr[-2000:]
    assert cv2.imread(str(sid.folder / "results/tiny/visualization/val/10003_00_0.033s_tiny.png")).shape == (20, 24, 3)


def test_the_raw_dataset_is_what_is_prepared(sid):
    sid.run("../datasets/prepare_sid.py", "--source", "SID", "--workers", "1", "--out", "out")
    opt = {"name": "r", "type": "RawPairDataset", "phase": "val", "dataroot_gt": str(sid.folder / "SID"),
           "meta_info_file": str(sid.folder / "SID/Sony_train_list.txt")}  # fmt: skip
    files = {"name": "p", "type": "PairedRestorationDataset", "phase": "val", "io_backend": {"type": "disk"},
             "filename_tmpl": "{}", **{f"dataroot_{k}": str(sid.folder / "out/train" / k) for k in ("lq", "gt")},
             "condition_file": str(sid.folder / "out/train/ratios.csv")}  # fmt: skip
    raw, prepared = build_dataset(opt), build_dataset(files)
    found = {sample["key"]: sample for sample in raw}
    assert len(found) == len(prepared) == 3
    for sample in prepared:
        other = found[sample["key"]]  # the same noise, and results of the same names
        assert (sample["lq"] == other["lq"]).all() and (sample["gt"] == other["gt"]).all()
        assert sample["condition"]["ratio"] == pytest.approx(other["condition"]["ratio"])
    assert len(build_dataset({**opt, "ratio": 100})) == 1 and len(build_dataset({**opt, "ratio": [200, 300]})) == 2
    train = build_dataset({**opt, "phase": "train", "gt_size": 16, "use_hflip": True, "use_rot": True})
    assert train[0]["lq"].shape == train[0]["gt"].shape == (3, 16, 16)
    with pytest.raises(UserError, match="of another size than the first"):
        preparation.developed(str(sid.folder / "SID/Sony/long/00002_00_30s.ARW"), 1.0, 8, 1, [(4, 0)], 16)
    with pytest.raises(UserError, match="smaller than the crop gt_size 32"):
        build_dataset({**opt, "phase": "train", "gt_size": 32, "use_hflip": True, "use_rot": True})[0]
    keys = {"quality": None, "dataroot_gt": "SID", "meta_info_file": "list.txt"}
    check_options(merged(TINY, {"datasets": {"train": {"type": "RawPairDataset", **keys}}}), True)


def test_faults_of_the_set(sid):
    run = ("../datasets/prepare_sid.py", "--source", "SID", "--workers", "1", "--out", "out")
    assert_one_line_error(sid.run(*run, "--ratio", "200"), "names no pair of exposure ratio 200")
    assert_one_line_error(sid.run(*run, "--crop", "64"), "--crop 64 is larger than the images, 24x20")
    short = sid.folder / "SID/Sony/short/00001_00_0.1s.ARW"
    content = short.read_bytes()
    short.write_bytes(content[: len(content) // 2])
    done = sid.run(*run)
    assert done.returncode == 1 and "00001_00_0.1s.ARW cannot be read: it is damaged, cut short" in done.stderr
    assert "3 pairs" in done.stdout and not (sid.folder / "out/train/lq/00001_00_0.1s.png").exists()
    (sid.folder / "SID/Sony/long/00002_00_30s.ARW").unlink()
    assert_one_line_error(
        sid.run(*run), "00002_00_30s.ARW is missing, of which", "00002_00_0.1s.ARW is the short exposure"
    )
