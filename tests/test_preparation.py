"""Preparing data sets: layouts, resuming, faults; nothing half-written is taken for finished."""

import shutil
import signal

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.data import build_dataset
from conftest import assert_one_line_error
from PIL import Image
from torchvision import transforms

from ucdir_plugin.data import preparation
from ucdir_plugin.utils.errors import UserError, WriteError


def test_crops_cover_the_axis():
    assert preparation.crop_positions(720, 512, 256) == [0, 208]
    assert preparation.crop_positions(1280, 512, 256) == [0, 256, 512, 768]
    assert preparation.crop_positions(512, 512, 256) == [0] and preparation.crop_positions(511, 512, 256) == []


def ramp(path):
    if path == "bad":
        raise UserError("bad cannot be read")
    return [np.full((4, 5, 3), len(path), np.uint8)] * 2


def test_a_second_run_goes_on(tmp_path, monkeypatch, capsys):
    tasks = [
        preparation.Task(s, tuple(str(tmp_path / f"{s}{i}.png") for i in (0, 1)), ramp) for s in ("a", "bb", "bad")
    ]
    written = []
    write = preparation.write_atomically

    def full_disk(content, path):
        if len(written) == 3:
            raise WriteError(f"cannot write {path}: No space left on device")
        written.append(path)
        write(content, path)

    monkeypatch.setattr(preparation, "write_atomically", full_disk)
    with pytest.raises(WriteError, match="bb1.png: No space left"):
        preparation.prepare(tasks, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0.png", "a1.png", "bb0.png"]
    monkeypatch.setattr(preparation, "write_atomically", write)
    (tmp_path / "a0.png").write_bytes(b"mine")  # finished: not touched again
    capsys.readouterr()
    assert preparation.prepare(tasks, 1) == 1
    out = capsys.readouterr()
    assert "2 images written, 2 were there, 1 sources failed" in out.out and "failed: bad cannot be read" in out.err
    assert (tmp_path / "a0.png").read_bytes() == b"mine" and cv2.imread(str(tmp_path / "bb1.png"))[0, 0, 0] == 2


def test_a_killed_process_is_one_line(tmp_path):
    tasks = [preparation.Task(signal.SIGKILL, (str(tmp_path / f"{i}.png"),), signal.raise_signal) for i in range(2)]
    with pytest.raises(UserError, match="a process ended before its work was done, .* with fewer --workers than 2"):
        preparation.prepare(tasks, 2)


def test_two_sources_of_one_file_and_other_settings(tmp_path):
    tasks = [preparation.Task(source, (str(tmp_path / "a_x.png"),), ramp) for source in ("a/x.png", "a_x.png")]
    with pytest.raises(UserError, match=r"a/x.png and a_x.png would both become .*a_x.png: rename one"):
        preparation.prepare(tasks, 1)
    with pytest.raises(UserError, match="--workers must be 0 .* got -1"):
        preparation.prepare([], -1)
    preparation.same_settings(str(tmp_path), crop=None, bits=16)
    preparation.same_settings(str(tmp_path), crop=None, bits=16)
    with pytest.raises(UserError, match="was prepared with no --crop, not --crop 512: name another --out"):
        preparation.same_settings(str(tmp_path), crop=512, bits=16)


def test_the_middle_square_is_that_of_dgp_and_ddrm(tmp_path):
    """Their transforms: CenterCropLongEdge, Resize, of a Pillow image; also where the middle is half a pixel off."""
    for size in ((61, 40), (40, 63), (21, 24)):
        path = str(tmp_path / "a.png")
        cv2.imwrite(path, np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
        image = Image.open(path)
        expected = transforms.Resize(32)(transforms.functional.center_crop(image, min(image.size)))
        np.testing.assert_array_equal(preparation.middle_square(path, 32)[0][..., ::-1], np.asarray(expected))


def test_lists_name_paths_and_files(workplace):
    photo = (workplace.folder / "photos" / "coffee.png").read_bytes()
    for name in ("a/x.png", "b b/x.png", "b b/\u00fc y.png", "c/ILSVRC2012_val_00000293.png", "0.1s.png"):
        (workplace.folder / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace.folder / "many" / name).write_bytes(photo)
    run = ("../datasets/prepare_jpeg.py", "--source", "many", "--size", "8", "--workers", "1", "--list", "list.txt")
    (workplace.folder / "list.txt").write_text(
        "./a/x\nb b/x.png\n\u00fc y\nILSVRC2012_val_00000293.JPEG 5\n0.1s\na/x.png\n"
    )
    done = workplace.run(*run, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (workplace.folder / "out").glob("*.png")) == [
        "0.1s.png", "a_x.png", "b b_x.png", "b b_\u00fc y.png", "c_ILSVRC2012_val_00000293.png"
    ]  # fmt: skip
    (workplace.folder / "list.txt").write_text("x\n")
    assert_one_line_error(workplace.run(*run, "--out", "out"), "x may be a/x.png or b b/x.png: give its path")
    (workplace.folder / "list.txt").write_text("n01440764/0.1s.JPEG\n")  # the class's folder is not there
    assert workplace.run(*run, "--out", "flat").returncode == 0
    assert_one_line_error(workplace.run(*run[:3], "--out", "none", "--size", "0"), "--size must be at least 1, got 0")


def test_links_follow_the_images(workplace):
    run = ("../datasets/prepare_jpeg.py", "--out", "linked", "--least", "8", "--source")
    assert workplace.run(*run, "photos").returncode == 0
    (workplace.folder / "photos").rename(workplace.folder / "moved")
    done = workplace.run(*run, "moved")
    assert "3 images linked" in done.stdout and (workplace.folder / "linked" / "coffee.png").is_file(), done.stdout


def test_jpeg_list_and_links(workplace):
    (workplace.folder / "list.txt").write_text("coffee.JPEG 12\nastronaut\n")
    done = workplace.run("../datasets/prepare_jpeg.py", "--source", "photos", "--out", "val", "--size", "32", "--list", "list.txt", "--workers", "2")  # fmt: skip
    assert done.returncode == 0 and "2 images written" in done.stdout, done.stderr
    found = cv2.imread(str(workplace.folder / "val" / "astronaut.png"))
    photo = cv2.imread(str(workplace.folder / "photos" / "astronaut.png"))  # 48x36: the middle 36 rows
    assert np.abs(found.astype(int) - cv2.resize(photo[6:42], (32, 32), interpolation=cv2.INTER_AREA)).mean() < 3
    assert sorted(p.name for p in (workplace.folder / "val").glob("*.png")) == ["astronaut.png", "coffee.png"]
    cv2.imwrite(str(workplace.folder / "photos" / "small.png"), photo[:20])
    (workplace.folder / "photos" / "cut.png").write_bytes(b"\x89PNG")
    done = workplace.run("../datasets/prepare_jpeg.py", "--source", "photos", "--out", "train", "--least", "36")
    assert done.returncode == 1 and "3 images linked, 1 below 36 pixels a side left out, 1 failed" in done.stdout
    assert "cut.png cannot be decoded" in done.stderr
    opt = {"name": "j", "type": "JPEGDataset", "phase": "train", "dataroot_gt": str(workplace.folder / "train"),
           "quality": 10, "gt_size": 36, "use_hflip": False, "use_rot": False}  # fmt: skip
    assert len(build_dataset(opt)) == 3
    (workplace.folder / "list.txt").write_text("cofee\n")
    done = workplace.run("../datasets/prepare_jpeg.py", "--source", "photos", "--out", "val", "--size", "32", "--list", "list.txt")  # fmt: skip
    assert_one_line_error(done, "cofee is not below photos; did you mean 'coffee'")


@pytest.fixture
def gopro(workplace):
    """Two scenes for training, one for the test, 40x56."""
    stream = np.random.default_rng(0)
    for part, scene in (("train", "GOPR1_00"), ("train", "GOPR2_00"), ("test", "GOPR3_00")):
        for kind in ("blur", "blur_gamma", "sharp"):
            folder = workplace.folder / "GOPRO_Large" / part / scene / kind
            folder.mkdir(parents=True)
            for i in (1, 2):
                cv2.imwrite(str(folder / f"{i:06}.png"), stream.integers(0, 256, (40, 56, 3)).astype(np.uint8))
    return workplace


def test_gopro(gopro):
    run = ("../datasets/prepare_gopro.py", "--source", "GOPRO_Large", "--workers", "1")
    done = gopro.run(*run, "--out", "whole")
    assert done.returncode == 0, done.stderr
    assert "train: 4 pairs (the official set has 2103)" in done.stdout and "test: 2 pairs" in done.stdout
    for part, scene in (("train", "GOPR2_00"), ("test", "GOPR3_00")):
        for kind, source in (("lq", "blur"), ("gt", "sharp")):
            found = cv2.imread(str(gopro.folder / "whole" / part / kind / f"{scene}_000002.png"))
            true = cv2.imread(str(gopro.folder / "GOPRO_Large" / part / scene / source / "000002.png"))
            np.testing.assert_array_equal(found, true)
    done = gopro.run(*run, "--out", "gamma", "--blur", "blur_gamma")
    assert done.returncode == 0, done.stderr
    found, true = (cv2.imread(str(gopro.folder / path)) for path in
                   ("gamma/test/lq/GOPR3_00_000002.png", "GOPRO_Large/test/GOPR3_00/blur_gamma/000002.png"))  # fmt: skip
    np.testing.assert_array_equal(found, true)
    assert_one_line_error(gopro.run(*run, "--out", "gamma"), "was prepared with --blur blur_gamma, not --blur blur")
    done = gopro.run(*run, "--out", "cut", "--crop", "32", "--step", "16", "--lmdb")
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (gopro.folder / "cut" / "train" / "lq").iterdir())
    assert len(names) == 4 * 2 * 3 and names[1] == "GOPR1_00_000001_y0000x0016.png"
    true = cv2.imread(str(gopro.folder / "GOPRO_Large/train/GOPR1_00/blur/000001.png"))
    found = cv2.imread(str(gopro.folder / "cut/train/lq" / names[5]))
    np.testing.assert_array_equal(found, true[8:40, 24:56])
    assert len(list((gopro.folder / "cut" / "test" / "gt").iterdir())) == 2
    with lmdb.open(str(gopro.folder / "cut/train/gt.lmdb"), readonly=True) as base:
        assert base.stat()["entries"] == 24
    opt = {"name": "g", "type": "PairedRestorationDataset", "phase": "train", "scale": 1, "gt_size": 32,
           "use_hflip": False, "use_rot": False, "filename_tmpl": "{}"}  # fmt: skip
    roots = [{"io_backend": {"type": kind}, **{f"dataroot_{k}": str(gopro.folder / f"cut/train/{k}{end}") for k in ("lq", "gt")}}
             for kind, end in (("disk", ""), ("lmdb", ".lmdb"))]  # fmt: skip
    disk, base = (build_dataset({**opt, **root}) for root in roots)
    assert len(disk) == len(base) == 24
    for sample, other in zip(disk, base):
        assert np.array_equal(sample["lq"], other["lq"]) and np.array_equal(sample["gt"], other["gt"])
    shutil.rmtree(gopro.folder / "cut/train/gt.lmdb")  # stopped between the two
    again = gopro.run(*run, "--out", "cut", "--crop", "32", "--step", "16", "--lmdb")
    assert again.returncode == 0 and "lq.lmdb was there" in again.stdout, again.stderr
    assert (gopro.folder / "cut/train/gt.lmdb").is_dir()
    bad = {"io_backend": {"type": "lmdb"}}
    for kind in ("lq", "gt"):  # both name an image that neither has
        bad[f"dataroot_{kind}"] = shutil.copytree(
            gopro.folder / f"cut/train/{kind}.lmdb", gopro.folder / f"{kind}.lmdb"
        )
        with open(bad[f"dataroot_{kind}"] / "meta_info.txt", "a") as meta:
            meta.write("GOPR9_00_000001.png (32,32,3) 1\n")
    bad = {**opt, **{key: value if isinstance(value, dict) else str(value) for key, value in bad.items()}}
    with pytest.raises(UserError, match=r"lq.lmdb has no image GOPR9_00_000001, which its meta_info.txt names"):
        build_dataset(bad)
    (gopro.folder / "lq.lmdb" / "data.mdb").write_bytes(b"no")
    with pytest.raises(UserError, match=r"lq.lmdb cannot be read: .*; make it again"):
        build_dataset(bad)


def lmdb_of(folder, images):
    """Images by name, as an LMDB beside their folder; and the dataset's options for the folder and for the LMDB."""
    for kind in ("lq", "gt"):
        (folder / kind).mkdir(parents=True)
        for name, image in images.items():
            cv2.imwrite(str(folder / kind / name), image)
        preparation.make_lmdb(str(folder / kind))
    opt = {"name": "p", "type": "PairedRestorationDataset", "phase": "val", "filename_tmpl": "{}"}
    return [{**opt, "io_backend": {"type": kind}, **{f"dataroot_{k}": str(folder / f"{k}{end}") for k in ("lq", "gt")}}
            for kind, end in (("disk", ""), ("lmdb", ".lmdb"))]  # fmt: skip


def test_lmdb_of_names_with_dots_and_of_a_dark_first_image(tmp_path):
    """SID's names have the exposure time in them; BasicSR's guess of the size is ten times the first image."""
    stream = np.random.default_rng(0)
    images = {"00001_00_0.04s.png": np.zeros((64, 64, 3), np.uint8)}
    for i in range(30):
        images[f"00001_{i:02}_0.1s.png"] = stream.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    (tmp_path / "c.csv").write_text("name,ratio\n" + "".join(f"{n[:-4]},{i}\n" for i, n in enumerate(images)))
    opts = [{**opt, "condition_file": str(tmp_path / "c.csv")} for opt in lmdb_of(tmp_path / "a", images)]
    disk, base = (build_dataset(opt) for opt in opts)
    assert len(disk) == len(base) == 31
    for sample, other in zip(disk, base):
        assert sample["key"] == other["key"] and sample["condition"] == other["condition"]
        assert np.array_equal(sample["lq"], other["lq"])


def test_an_lmdb_of_other_images(tmp_path):
    images = {f"{i}.png": np.full((20, 24 + i, 3), i, np.uint8) for i in range(3)}
    _, opt = lmdb_of(tmp_path / "a", images)
    lmdb_of(tmp_path / "b", {f"{i}.png": np.full((20, 25 + i, 3), i, np.uint8) for i in range(3)})
    build_dataset(opt)
    with pytest.raises(UserError, match=r"gt.lmdb/0 \(24x20\) is smaller than the crop gt_size 32"):
        build_dataset({**opt, "phase": "train", "gt_size": 32})
    with pytest.raises(UserError, match=r"a/lq.lmdb/\d \(2.x20\) and .*b/gt.lmdb/\d \(2.x20\) differs in size"):
        build_dataset({**opt, "dataroot_gt": str(tmp_path / "b/gt.lmdb")})
    meta = tmp_path / "a/lq.lmdb/meta_info.txt"
    text = meta.read_text()
    for changed, message in (
        (text.replace("(20,25,3)", "(20,99,3)"), "lq.lmdb: 1 is 25x20, and 99x20 by meta_info.txt: it was made from"),
        ("".join(text.splitlines(True)[:2]), "gt.lmdb: 2 has no partner in .*lq.lmdb"),
        ("", "meta_info.txt names no image"),
    ):
        meta.write_text(changed)
        with pytest.raises(UserError, match=message):
            build_dataset(opt)
    for kind in ("lq", "gt"):
        (tmp_path / f"a/{kind}.lmdb/meta_info.txt").write_text("".join(text.splitlines(True)[:2]))
    with pytest.raises(UserError, match="lq.lmdb holds 3 images, and its meta_info.txt names 2"):
        build_dataset(opt)
    with pytest.raises(UserError, match="lq.lmdb is there already, and of other images"):
        preparation.make_lmdb(str(tmp_path / "a/lq"))
    with pytest.raises(UserError, match=r"meta_info.txt cannot be read: No such file or directory; io_backend lmdb"):
        build_dataset({**opt, "dataroot_lq": str(tmp_path / "a/lq")})


def test_an_lmdb_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "lq").mkdir()
    cv2.imwrite(str(tmp_path / "lq" / "a.png"), np.zeros((8, 8, 3), np.uint8))

    def full_disk(folder, target, *args, **kwargs):
        (tmp_path / "lq.unfinished.lmdb").mkdir()
        raise lmdb.DiskError("mdb_put: No space left on device")

    monkeypatch.setattr(preparation, "make_lmdb_from_imgs", full_disk)
    with pytest.raises(WriteError, match=r"cannot write .*lq.lmdb: mdb_put: No space left on device \(\d+ MB free\)"):
        preparation.make_lmdb(str(tmp_path / "lq"))
    monkeypatch.undo()
    assert not (tmp_path / "lq.lmdb").exists()
    preparation.make_lmdb(str(tmp_path / "lq"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lq", "lq.lmdb"]
    cv2.imwrite(str(tmp_path / "lq" / "\u00fc.png"), np.zeros((8, 8, 3), np.uint8))
    shutil.rmtree(tmp_path / "lq.lmdb")
    with pytest.raises(UserError, match="\u00fc.png: BasicSR's LMDBs take ASCII names only"):
        preparation.make_lmdb(str(tmp_path / "lq"))


def test_gopro_faults(gopro):
    run = ("../datasets/prepare_gopro.py", "--source", "GOPRO_Large", "--out", "out", "--workers", "1")
    assert_one_line_error(gopro.run(*run, "--crop", "64"), "--crop 64 is larger than the images, 56x40")
    assert_one_line_error(gopro.run(*run, "--step", "64"), "--step goes with --crop")
    (gopro.folder / "GOPRO_Large/train/GOPR1_00/sharp/000002.png").unlink()
    assert_one_line_error(gopro.run(*run), "GOPR1_00/blur/000002.png has no partner of the same name in blur and sharp")


def test_polyu_halves_share_no_scene(workplace):
    source, counts = workplace.folder / "cropped", {"toy": 3, "desk": 2, "door": 1, "wall": 1, "plant": 1}
    source.mkdir()
    for scene, count in counts.items():
        for i in range(count):
            for kind, value in (("real", 100), ("mean", 200)):
                camera = ("Sony_4-5", "NikonD800_5")[i % 2]
                image = np.full((8, 8, 3), value, np.uint8)
                cv2.imwrite(str(source / f"{camera}_125_1600_{scene}_{i}_{kind}.JPG"), image)
    run = ("../datasets/prepare_polyu.py", "--source", "cropped", "--out", "polyu")
    for _ in range(2):  # again: nothing changes
        done = workplace.run(*run)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a: 4 pairs of 2 scenes (plant, toy)",
        "b: 4 pairs of 3 scenes (desk, door, wall)",
    ]
    for half in "ab":
        pairs = build_dataset(
            {
                "name": half,
                "type": "PairedRestorationDataset",
                "phase": "val",
                "filename_tmpl": "{}",
                "io_backend": {"type": "disk"},
                "dataroot_lq": str(workplace.folder / "polyu" / half / "lq"),
                "dataroot_gt": str(workplace.folder / "polyu" / half / "gt"),
            }
        )
        assert len(pairs) == 4
        for i in range(4):
            assert pairs[i]["lq"].mean() < 0.5 < pairs[i]["gt"].mean()
    for i in range(2, 6):  # now desk is the largest scene: halves change
        for kind in ("real", "mean"):
            shutil.copy(source / f"NikonD800_5_125_1600_desk_1_{kind}.JPG", source / f"Sony_1_1_1_desk_{i}_{kind}.JPG")
    assert_one_line_error(workplace.run(*run), "is of other pairs: remove polyu")
    (source / "Sony_4-5_125_1600_toy_0_mean.JPG").unlink()
    assert_one_line_error(workplace.run(*run), "Sony_4-5_125_1600_toy_0 has no mean image")
    cv2.imwrite(str(source / "holiday.jpg"), np.zeros((8, 8, 3), np.uint8))
    assert_one_line_error(workplace.run(*run), "holiday.jpg is not called CAMERA_APERTURE")
