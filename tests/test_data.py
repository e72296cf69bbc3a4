"""Datasets: the images users have, faults that are named, and sampling that does not depend on workers or ranks."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader

from ucdir_plugin.data.loader import EndlessSampler, KeyedDataset
from ucdir_plugin.utils.degradations import jpeg
from ucdir_plugin.utils.errors import UserError


def photo(height=20, width=24, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def pairs(tmp_path):
    for part in ("gt", "lq"):
        (tmp_path / part).mkdir()
        for i in range(3):
            cv2.imwrite(str(tmp_path / part / f"{i}.png"), photo(seed=i) // (1 if part == "gt" else 2))
    options = {
        "name": "p", "type": "PairedRestorationDataset", "phase": "train", "scale": 1, "gt_size": 16,
        "dataroot_gt": str(tmp_path / "gt"), "dataroot_lq": str(tmp_path / "lq"), "io_backend": {"type": "disk"},
        "use_hflip": True, "use_rot": True, "filename_tmpl": "{}",
    }  # fmt: skip
    return tmp_path, options


def test_pairs_equal_basicsrs_dataset(pairs):
    _, options = pairs
    options["phase"] = "val"
    ours, upstream = build_dataset(options), build_dataset({**options, "type": "PairedImageDataset"})
    theirs = {sample["gt_path"]: sample for sample in upstream}
    assert len(ours) == len(theirs) == 3
    for sample in ours:
        for kind in ("lq", "gt"):
            torch.testing.assert_close(sample[kind], theirs[sample["gt_path"]][kind], rtol=0, atol=0)
    assert [sample["key"] for sample in ours] == ["0.png", "1.png", "2.png"]


def test_images_alone_in_a_test(pairs):
    folder, options = pairs
    alone = {k: v for k, v in options.items() if k != "dataroot_gt"}
    samples = list(build_dataset({**alone, "phase": "val"}))
    assert [sorted(s) for s in samples] == [["key", "lq", "lq_path"]] * 3
    with pytest.raises(UserError, match="dataroot_gt is missing"):
        build_dataset(alone)
    (folder / "lq" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="1.png is empty"):
        build_dataset({**alone, "phase": "val"})


def test_crops_and_flips_stay_paired(pairs):
    _, options = pairs
    dataset = KeyedDataset(build_dataset(options), 0)
    for number in range(20):
        sample = dataset[(number % 3, number)]
        assert sample["gt"].shape == (3, 16, 16)
        torch.testing.assert_close(sample["lq"], sample["gt"] / 2, rtol=0, atol=0.5 / 255 + 1e-6)


def spoil(folder, name, how):
    path = folder / name
    if how == "remove":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "resize":
        cv2.imwrite(str(path), photo(22, 24))
    elif how == "add":
        cv2.imwrite(str(path), photo())


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("lq/1.png", "remove", r"gt/1.png has no partner 1\.\* in .*lq"),
        ("lq/9.png", "add", r"lq/9.png has no partner in .*gt"),
        ("lq/1.jpg", "add", r"1.jpg and 1.png have the same name"),
        ("lq/1.png", "empty", r"lq/1.png is empty"),
        ("lq/1.png", "cut", r"lq/1.png cannot be decoded"),
        ("lq/1.png", "resize", r"lq/1.png \(24x22\) and .*gt/1.png \(24x20\) differs in size"),
    ],
)
def test_faulty_pairs_are_named_when_built(pairs, name, how, message):
    folder, options = pairs
    spoil(folder, name, how)
    with pytest.raises(UserError, match=message):
        build_dataset(options)


def test_crop_larger_than_an_image(pairs):
    _, options = pairs
    with pytest.raises(UserError, match=r"gt/0.png \(24x20\) is smaller than the crop gt_size 32"):
        build_dataset({**options, "gt_size": 32})
    jpegs = {**options, "type": "JPEGDataset", "quality": 10, "gt_size": 32}
    with pytest.raises(UserError, match=r"gt/0.png \(24x20\) is smaller than the crop"):
        build_dataset(jpegs)
    with pytest.raises(UserError, match=r"quality: a whole number or .* within 1 .. 100 is expected, got 0"):
        build_dataset({**jpegs, "quality": 0, "gt_size": 16})
    with pytest.raises(UserError, match=r"quality is missing"):
        build_dataset({k: v for k, v in jpegs.items() if k != "quality"})


def test_names_templates_lists_and_subfolders(pairs):
    folder, options = pairs
    for i in range(3):
        (folder / "lq" / f"{i}.png").rename(folder / "lq" / f"{i}_bad.png")
    (folder / "list.txt").write_text("2.png (20,24,3)\n0.png\n")
    dataset = build_dataset({**options, "filename_tmpl": "{}_bad", "meta_info_file": str(folder / "list.txt")})
    assert [pair[0] for pair in dataset.pairs] == ["2.png", "0.png"]
    for part in ("gt", "lq"):
        (folder / part / "s").mkdir()
        cv2.imwrite(str(folder / part / "s" / f"0{'_bad' if part == 'lq' else ''}.png"), photo())
    dataset = build_dataset({**options, "filename_tmpl": "{}_bad"})
    assert [pair[0] for pair in dataset.pairs] == ["0.png", "1.png", "2.png", "s/0.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename_tmpl": "{}_{}"}, r"filename_tmpl '\{\}_\{\}': one \{\} is expected"),
        ({"filename_tmpl": "{x}"}, "filename_tmpl"),
        ({"filename_tmpl": "{"}, "filename_tmpl"),
        ({"meta_info_file": "lq/0.png"}, "lq/0.png cannot be read: it is no text"),
        ({"io_backend": {"type": "disk", "path": 1}}, "io_backend: path; it has a type only"),
    ],
)
def test_wrong_options(pairs, change, message, monkeypatch):
    monkeypatch.chdir(pairs[0])
    with pytest.raises(UserError, match=message):
        build_dataset({**pairs[1], **change})


def test_lmdb_backend(pairs):
    lmdb = pytest.importorskip("lmdb")
    folder, options = pairs
    for part in ("gt", "lq"):
        path = folder / f"{part}.lmdb"
        with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as txn:
            for i in range(3):
                txn.put(str(i).encode(), (folder / part / f"{i}.png").read_bytes())
        (path / "meta_info.txt").write_text("".join(f"{i}.png (20,24,3) 1\n" for i in range(3)))
    options = {**options, "phase": "val"}
    stored = {**options, "io_backend": {"type": "lmdb"}}
    stored.update(dataroot_gt=str(folder / "gt.lmdb"), dataroot_lq=str(folder / "lq.lmdb"))
    for a, b in zip(build_dataset(options), build_dataset(stored)):
        torch.testing.assert_close(a["gt"], b["gt"], rtol=0, atol=0)


def test_jpeg_is_opencvs(pairs):
    _, options = pairs
    dataset = build_dataset({**options, "type": "JPEGDataset", "quality": 10, "phase": "val"})
    sample = dataset[1]
    expected = cv2.imdecode(cv2.imencode(".jpg", photo(seed=1), [cv2.IMWRITE_JPEG_QUALITY, 10])[1], cv2.IMREAD_COLOR)
    got = (sample["lq"].numpy().transpose(1, 2, 0)[..., ::-1] * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(got, expected)
    assert np.abs(jpeg(photo() / np.float32(255), 95) - photo() / 255).mean() < 0.03


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def test_sampler_visits_every_image_once_an_epoch():
    drawn = take(EndlessSampler(7, 2, 0, 1, seed=0), 21)
    assert [number for _, number in drawn] == list(range(21))
    epochs = [[index for index, _ in drawn[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(EndlessSampler(7, 2, 0, 1, seed=1), 7) != drawn[:7]


def test_sampler_resumes_and_splits():
    whole = take(EndlessSampler(7, 4, 0, 1, seed=0), 24)
    assert take(EndlessSampler(7, 4, 0, 1, seed=0, start=3), 12) == whole[12:]
    ranks = [take(EndlessSampler(7, 2, rank, 2, seed=0), 12) for rank in (0, 1)]
    merged = [item for i in range(6) for rank in (0, 1) for item in ranks[rank][2 * i : 2 * i + 2]]
    assert merged == whole


def test_samples_do_not_depend_on_workers_or_start(pairs):
    _, options = pairs
    dataset = KeyedDataset(build_dataset({**options, "type": "JPEGDataset", "quality": [5, 50]}), 3)

    def batches(workers, start, count):
        loader = DataLoader(dataset, 2, sampler=EndlessSampler(3, 2, 0, 1, 3, start), num_workers=workers)
        return [batch for batch, _ in zip(loader, range(count))]

    plain = batches(0, 0, 6)
    for other in (batches(2, 0, 6), plain[:3] + batches(1, 3, 3)):
        for a, b in zip(plain, other):
            assert a["sample_number"].tolist() == b["sample_number"].tolist()
            torch.testing.assert_close(a["lq"], b["lq"], rtol=0, atol=0)
            torch.testing.assert_close(a["gt"], b["gt"], rtol=0, atol=0)
    assert not torch.equal(plain[0]["gt"][0], plain[0]["gt"][1])
