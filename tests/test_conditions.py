"""Auxiliary scalar conditions: declared, supplied, embedded, left out."""

import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.models import build_model
from conftest import RESTORING, TINY, TINY_DENOISER, TINY_PREDICTOR, assert_one_line_error, merged
from torch.utils.data import default_collate

import ucdir_plugin
from ucdir_plugin.archs import UCDIR, UCDIRDenoiser
from ucdir_plugin.diffusion import conditions
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.check import check_options
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.restoration import sampling
from ucdir_plugin.utils.errors import UserError

DECLARED = {
    "quality": {"range": [1, 101], "drop": 0.25},
    "blur": {"encoding": "class", "classes": ["none", "motion", "defocus"]},
}
OF_TINY = {k: v for k, v in TINY_DENOISER.items() if k != "type"}


def denoiser(declared=DECLARED, trained=True):
    torch.manual_seed(0)
    net = UCDIRDenoiser(**OF_TINY, conditions=declared).eval()
    if trained and declared:
        for parameter in net.condition_embedding.parameters():
            torch.nn.init.normal_(parameter)
    return net


def inputs(batch=2, size=12):
    torch.manual_seed(1)
    return torch.randn(batch, 6, size, size), torch.linspace(0.2, 0.9, batch), torch.randn(batch, 3, size, size)


@torch.no_grad()
def test_without_conditions_nothing_changes_and_left_out_ones_add_nothing():
    plain, told = denoiser(None), denoiser()
    assert set(told.state_dict()) - set(plain.state_dict()) == {
        "condition_embedding.blur_mlp.weight",
        *(f"condition_embedding.quality_mlp.{i}.{part}" for i in (1, 3) for part in ("weight", "bias")),
    }
    for name, weight in plain.state_dict().items():  # the same draws: conditions are made last
        assert torch.equal(told.state_dict()[name], weight)
    x = inputs()
    assert torch.equal(told(*x, torch.full((2, 2), math.nan)), plain(*x))
    assert torch.equal(told(*x), plain(*x))
    assert torch.equal(denoiser(trained=False)(*x, torch.tensor([[50.0, 1.0]] * 2)), plain(*x))


@torch.no_grad()
def test_every_value_of_every_image_counts_alone():
    net, (x, level, guide) = denoiser(), inputs()
    values = torch.tensor([[10.0, 1.0], [math.nan, 2.0]])
    together = net(x, level, guide, values)
    for i in range(2):
        alone = net(x[i : i + 1], level[i : i + 1], guide[i : i + 1], values[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    for change in ([[11.0, 1.0], [math.nan, 2.0]], [[10.0, 0.0], [math.nan, 2.0]], [[math.nan, 1.0], [math.nan, 2.0]]):
        out = net(x, level, guide, torch.tensor(change))
        assert (out[0] - together[0]).abs().max() > 1e-5
        torch.testing.assert_close(out[1], together[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_continuous_condition_is_encoded_over_its_range():
    """As the noise level, from 0 to 1: the network's own embedding, with the level's weights, says the same."""
    net = denoiser({"level": {"range": [-2, 2]}})
    net.condition_embedding.level_mlp.load_state_dict(net.noise_level_mlp.state_dict())
    found = net.condition_embedding(torch.tensor([[-1.0], [2.0]]))
    torch.testing.assert_close(found, net.noise_level_mlp(torch.tensor([0.25, 1.0])))


def test_it_reaches_every_block_and_trains():
    net, x = denoiser().train(), inputs()
    net(*x, torch.tensor([[10.0, 1.0], [math.nan, 2.0]])).square().mean().backward()
    grads = {name: p.grad for name, p in net.condition_embedding.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads.values())
    assert grads["blur_mlp.weight"][0].abs().sum() == 0  # of the class that no image has
    seen = []
    for name, module in net.named_modules():
        if name.endswith("noise_func"):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        net(*x, torch.tensor([[10.0, 1.0], [10.0, 2.0]]))
        emb = net.noise_level_mlp(x[1]) + net.condition_embedding(torch.tensor([[10.0, 1.0], [10.0, 2.0]]))
    assert len(seen) == sum(name.endswith("res_block") for name, _ in net.named_modules()) > 5
    assert all(torch.equal(found, emb) for found in seen)


def test_encoding_of_a_batch():
    declared = conditions.declare(DECLARED)
    values = {"blur": ["motion", "none"], "quality": torch.tensor([10, 20]), "other": [1, 2]}
    assert conditions.encode(declared, values, 2).tolist() == [[10, 1], [20, 0]]
    encoded = conditions.encode(declared, {"blur": ["motion", "none"], "quality": [math.nan, 7]}, 2)
    assert encoded[0, 0].isnan() and encoded[1].tolist() == [7, 0]
    assert conditions.encode((), values, 2) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quality": [10], "blur": ["mtion"]}, "condition blur: there is no class 'mtion'; did you mean 'motion'"),
        ({"quality": [102], "blur": ["none"]}, r"condition quality is 102, outside of its range: give 1 to 101"),
        ({"quality": ["high"], "blur": ["none"]}, "condition quality is 'high', outside of its range"),
        ({"quality": [10]}, "condition blur is missing, and was not left out in training: give one of none, motion"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(UserError, match=message):
        conditions.encode(conditions.declare(DECLARED), values, 1)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"q": {"rnge": [1, 2]}}, "conditions:q:rnge; did you mean 'range'"),
        ({"q": {}}, "conditions:q:range is missing"),
        ({"q": [1, 2]}, "conditions:q: a mapping such as"),
        ({"q": {"range": [2, 2]}}, r"conditions:q:range: \[smallest, largest\] value .* got \[2, 2\]"),
        ({"q": {"range": [1, 2], "drop": 1}}, "conditions:q:drop: a share .* got 1"),
        ({"q": {"range": [1, 2], "encoding": "clas"}}, "conditions:q:encoding: .*did you mean 'class'"),
        ({"q": {"encoding": "class", "range": [1, 2]}}, "conditions:q:range has no meaning for encoding: class"),
        ({"q": {"encoding": "class", "classes": ["a", "a"]}}, "conditions:q:classes: two or more different names"),
        ({"a-b": {"range": [1, 2]}}, "conditions:a-b: a condition's name is made of"),
    ],
)
def test_wrong_declarations_are_named_by_the_options(declared, message):
    with pytest.raises(UserError, match=f"option network_g:denoiser:{message}"):
        check_options(merged(TINY, {"network_g": {"denoiser": {"conditions": declared}}}), True)


def test_other_models_give_no_conditions():
    network = {"type": "UCDIRDenoiser", "in_channel": 3, "conditions": DECLARED, "denoiser": None, "predictor": None}
    changes = {"model_type": "SRModel", "network_g": network, "train": {"diffusion_opt": None, "initial_opt": None,
               "ema_start": None, "grad_clip": None}, "val": {"sampling": None}}  # fmt: skip
    with pytest.raises(UserError, match="network_g:conditions is for UCDIRModel; SRModel gives none"):
        check_options(merged(TINY, changes), True)


def test_left_out_at_training_by_seed_and_sample_number():
    declared = conditions.declare(DECLARED)
    encoded = torch.tensor([[10.0, 1.0]]).expand(400, -1)
    dropped = conditions.leave_out(declared, encoded, 0, range(400))
    assert 0.18 < dropped[:, 0].isnan().float().mean() < 0.32
    assert not dropped[:, 1].isnan().any()  # drop 0
    part = conditions.leave_out(declared, encoded[:7], 0, range(100, 107))
    assert torch.equal(part.isnan(), dropped[100:107].isnan())
    other = conditions.leave_out(declared, encoded, 1, range(400))
    assert not torch.equal(other.isnan(), dropped.isnan())


def make(declared, is_train=True):
    opt = check_options(merged(TINY, {"network_g": {"denoiser": {"conditions": declared}}}), True)
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=is_train)
    torch.manual_seed(0)
    return build_model(opt)


def batch(**condition):
    torch.manual_seed(1)
    gt = torch.rand(4, 3, 16, 16)
    return {"lq": gt * 0.9, "gt": gt, "sample_number": torch.arange(4), "condition": condition}


def test_a_training_step_hears_them(monkeypatch):
    model = make({"quality": {"range": [1, 100], "drop": 0.555}})
    seen = []
    model.net_g.register_forward_pre_hook(lambda net, args: seen.append(args[4]))
    for accumulate in (1, 2):
        model.opt["train"]["accumulate"] = accumulate
        model.feed_data(batch(quality=torch.tensor([10, 20, 30, 40])))
        model.optimize_parameters(1)
    expected = conditions.leave_out(model.task.declared, torch.tensor([[10.0], [20.0], [30.0], [40.0]]), 0, range(4))
    assert expected.isnan().any() and not expected.isnan().all()
    for found in (seen[0], torch.cat(seen[1:])):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    with pytest.raises(UserError, match="quality is 200, outside"):
        model.feed_data(batch(quality=torch.tensor([10, 20, 30, 200])))
    with pytest.raises(UserError, match="quality is missing"):
        make({"quality": {"range": [1, 100]}}).feed_data(batch())


@pytest.mark.parametrize(
    "tiles",
    [{}, {"tile": 16, "overlap": 4, "tile_batch": 3}, {"tile": 16, "overlap": 4, "split": "per_patch"}],
    ids=str,
)
def test_sampling_hears_them(tiles):
    """The tiny network is not local: only that each way hears the value, and each image its own."""
    net = UCDIR({**TINY_DENOISER, "conditions": {"quality": {"range": [1, 100]}}}, TINY_PREDICTOR).eval()
    for parameter in net.denoise_fn.condition_embedding.parameters():
        torch.nn.init.normal_(parameter)
    schedule, options = NoiseSchedule.linear(2000, 1e-6, 1e-2), SamplingOptions(steps=2, **tiles)
    lq = torch.rand(1, 3, 24, 20).expand(2, -1, -1, -1).contiguous()

    def run(*values):
        count = len(values)
        noise = image_noise(0, ["a"] * count)
        told = torch.tensor(values).unsqueeze(1)
        return sampling.restore(net, lq[:count], schedule, options, noise, condition=told)[1]

    low, high = run(10.0), run(90.0)
    assert (low - high).abs().max() > 1e-4
    if tiles.get("split") != "per_patch":
        torch.testing.assert_close(run(10.0, 90.0), torch.cat((low, high)), rtol=1e-4, atol=1e-4)


CONDITIONED = merged(RESTORING, {"network_g": {"denoiser": {"conditions": {"quality": {"range": [1, 100]}}}}})


@pytest.fixture
def told(place):
    """The options of ``place`` with a condition that must be given."""
    torch.manual_seed(1)
    net = ucdir_plugin.registry.build_arch(CONDITIONED["network_g"])
    for parameter in net.denoise_fn.condition_embedding.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"params": net.state_dict()}, "told.pth")
    return place.write(merged(CONDITIONED, {"path": {"pretrain_network_g": "told.pth"}}), "told.yml")


def test_restore_takes_them_from_the_command_line(place, told):
    for value in (10, 90):
        done = place.run("restore.py", "-opt", told, "-i", "photos/chelsea.png", "-o", f"out{value}", "--condition", f"quality={value}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads((place.folder / f"out{value}" / "chelsea.json").read_text())
        assert record["settings"]["condition"] == {"quality": value}
    results = [cv2.imread(f"out{value}/chelsea.png").astype(int) for value in (10, 90)]
    assert np.abs(results[0] - results[1]).max() > 0
    model = ucdir_plugin.load_model(told)
    same = ucdir_plugin.restore("photos/chelsea.png", model, condition={"quality": 10}).image
    np.testing.assert_array_equal((same[..., ::-1] * 255).round().astype(int), results[0])
    for arguments, message in (
        ([], "condition quality is missing, and was not left out in training: give 1 to 100"),
        (["--condition", "quality=0"], "condition quality is 0, outside of its range: give 1 to 100"),
        (["--condition", "qualty=10"], "there is no condition 'qualty'; did you mean 'quality'"),
    ):
        done = place.run("restore.py", "-opt", told, "-i", "photos", "-o", "none", *arguments)
        assert_one_line_error(done, message)
    done = place.run("restore.py", "-opt", "edsr.yml", "-i", "photos", "-o", "none", "--condition", "quality=10")
    assert_one_line_error(done, "there is no condition 'quality'; this network declares none")


def test_a_jpeg_tells_its_quality(place, told):
    trained = {"name": "jpegs", "type": "JPEGDataset", "dataroot_gt": "photos", "quality": [5, 95], "gt_size": 16}
    options = merged(CONDITIONED, {"path": {"pretrain_network_g": "told.pth"}, "datasets": {"train": trained}})
    place.write(options, "told.yml")
    os.mkdir("mixed")
    photo = cv2.imread("photos/coffee.png")
    for quality in (10, 60):
        cv2.imwrite(f"mixed/{quality}.jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, quality])
    cv2.imwrite("mixed/plain.png", photo)
    done = place.run("restore.py", "-opt", told, "-i", "mixed", "-o", "out")
    assert done.returncode == 1 and "plain.png: condition quality is missing" in done.stderr  # of this one alone
    done = place.run("restore.py", "-opt", told, "-i", "mixed", "-o", "all", "--condition", "quality=10")
    assert done.returncode == 0, done.stderr
    model = ucdir_plugin.load_model(told)
    for quality in (10, 60):
        records = [json.loads(Path(folder, f"{quality}.json").read_text()) for folder in ("out", "all")]
        used = [record["condition"] for record in records]
        assert used == [{"quality": quality}, {"quality": 10}]  # what the user says goes first
        assert [record["settings"]["condition"] for record in records] == [{}, {"quality": 10}]
        same = ucdir_plugin.restore(f"mixed/{quality}.jpg", model)
        assert same.info["condition"] == {"quality": quality}
        said = ucdir_plugin.restore(f"mixed/{quality}.jpg", model, condition={"quality": 70 - quality})
        assert said.info["condition"] == {"quality": 70 - quality} and np.abs(said.image - same.image).max() > 0
        made = [cv2.imread(f"{folder}/{quality}.png")[..., ::-1].astype(int) for folder in ("out", "all")]
        np.testing.assert_array_equal((same.image * 255).round().astype(int), made[0])
        assert np.array_equal(*made) == (quality == 10)
    with pytest.raises(UserError, match="condition quality is missing"):
        ucdir_plugin.restore(cv2.imread("mixed/10.jpg"), model)  # of an array nobody knows
    narrow = {"network_g": {"denoiser": {"conditions": {"quality": {"range": [5, 50]}}}}}
    place.write(merged(options, {**narrow, "datasets": {"train": {**trained, "quality": [5, 50]}}}), "told.yml")
    done = ucdir_plugin.restore("mixed/60.jpg", ucdir_plugin.load_model(told))
    assert done.info["condition"] == {"quality": 50}  # the nearest that it knows
    other = {**trained, **MIXED, "degradations": [{"type": "noise", "sigma": 5}]}
    place.write(merged(options, {"datasets": {"train": {**other, "condition": {"quality": 3}}}}), "told.yml")
    with pytest.raises(UserError, match="condition quality is missing"):
        # It was not trained on JPEGs: a quality of something else, for all it knows.
        ucdir_plugin.restore("mixed/60.jpg", ucdir_plugin.load_model(told))


def test_from_a_file_beside_the_pairs(workplace):
    (workplace.folder / "c.csv").write_text("name,ratio,blur\nastronaut,100,motion\nchelsea,,none\ncoffee,300,\n")
    options = {
        "name": "p", "type": "PairedRestorationDataset", "phase": "val", "dataroot_lq": str(workplace.folder / "photos"),
        "io_backend": {"type": "disk"}, "filename_tmpl": "{}", "condition": {"iso": 200},
        "condition_file": str(workplace.folder / "c.csv"),
    }  # fmt: skip
    dataset = build_dataset(options)
    told = [dataset[i]["condition"] for i in range(3)]
    assert [t["blur"] for t in told] == ["motion", "none", ""] and [t["iso"] for t in told] == [200] * 3
    together = default_collate(told)
    declared = conditions.declare({
        "ratio": {"range": [50, 300], "drop": 0.1},
        "blur": {"encoding": "class", "classes": ["none", "motion"], "drop": 0.1},
        "iso": {"range": [100, 400]},
    })  # fmt: skip
    expected = torch.tensor([[100, 1, 200], [math.nan, 0, 200], [300, math.nan, 200]])
    found = conditions.encode(declared, together, 3)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    (workplace.folder / "c.csv").write_text("name,ratio\nastronaut,100\ncofee,3\n")
    with pytest.raises(UserError, match=r"c.csv has no line chelsea"):
        build_dataset(options)
    (workplace.folder / "c.csv").write_text("nme,ratio\nastronaut,100\n")
    with pytest.raises(UserError, match=r"c.csv: a first line such as name,ratio is expected"):
        build_dataset(options)
    (workplace.folder / "c.csv").write_text("name,ratio\nastronaut,100\nchelsea,3,4\ncoffee,5\n")
    with pytest.raises(
        UserError, match=r"c.csv: a first line such as name,ratio is expected, and lines of its columns"
    ):
        build_dataset(options)
    (workplace.folder / "c.csv").write_text("name,ratio\nastronaut,100\nchelsea,3\ncoffee,5\nchelsea,4\n")
    with pytest.raises(UserError, match=r"c.csv: chelsea has 2 lines"):
        build_dataset(options)
    (workplace.folder / "c.csv").write_text("\ufeffname,ratio\nastronaut,100\nchelsea,3\ncoffee,5\n")  # Excel's
    assert build_dataset(options)[1]["condition"]["ratio"] == 3


MIXED = {"type": "MixedDegradationDataset", "quality": None}
PAIRS = {"type": "PairedRestorationDataset", "quality": None, "dataroot_lq": "photos"}


@pytest.mark.parametrize(
    ("declared", "phase", "dataset", "message"),
    [
        ({"qualty": {"range": [1, 100], "drop": 0.1}}, "train", {}, "it does not tell qualty, .* did you mean 'quality'"),
        ({"quality": {"range": [10, 100]}}, "train", {}, "quality is 5, outside of its range: give 10 to 100"),
        ({"quality": {"range": [1, 20]}}, "train", {}, "quality is 30, outside of its range: give 1 to 20"),
        ({"quality": {"range": [5, 30]}}, "val", {"quality": 90}, "quality is 90, outside of its range"),
        ({"quality": {"range": [5, 30]}}, "val", PAIRS, "it does not tell quality, .* it tells none"),
        ({"quality": {"range": [5, 30]}}, "val", {**PAIRS, "condition": {"quality": 31}}, "quality is 31.0, outside"),
        ({"ratio": {"range": [1, 200]}}, "train", {"type": "LowLightDataset", "quality": None}, "ratio is 300"),
        ({"noise_sigma": {"range": [0, 5]}}, "train", {**MIXED, "degradations": [{"type": "noise", "sigma": 6}]}, "noise_sigma is 6"),
        ({"noise_sigma": {"range": [0, 9]}}, "train",
         {**MIXED, "degradations": [{"type": "noise", "sigma": 6, "probability": 0.5}]}, "some samples lack noise_sigma: .* drop above 0"),
        ({"ratio": {"range": [1, 300]}}, "train", {**PAIRS, "condition_file": "c.csv"}, "some samples lack ratio"),
        ({"ratio": {"range": [1, 200], "drop": 0.1}}, "train", {**PAIRS, "condition_file": "c.csv"}, "ratio is 300"),
    ],
)  # fmt: skip
def test_what_the_data_tell_is_checked_before_training(declared, phase, dataset, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.csv").write_text("name,ratio\na,100\nb,\nc,300\n")
    changes = {"network_g": {"denoiser": {"conditions": declared}}, "datasets": {phase: dataset}}
    with pytest.raises(UserError, match=f"option datasets:{phase}: .*{message}"):
        check_options(merged(TINY, changes), True)
    check_options(merged(TINY, changes), False)  # to restore with, the data need not be there
    if phase == "train":  # another one knows what to say
        foreign = {
            "type": "PairedImageDataset",
            "quality": None,
            "dataroot_lq": "lq",
            "degradations": None,
            "condition_file": None,
        }
        changes = merged(changes, {"datasets": {"val": None}})
        check_options(merged(TINY, {**changes, "datasets": {"train": foreign, "val": None}}), True)


def test_numbers_of_numpy_and_classes_that_look_like_numbers():
    quality, kind = conditions.declare(
        {"q": {"range": [1, 100], "drop": 0.1}, "k": {"encoding": "class", "classes": ["1", "2"]}}
    )
    assert quality.number(np.int64(10)) == 10 and quality.number(np.float32(2.5)) == 2.5
    assert math.isnan(quality.number(np.float32("nan")))
    assert kind.number(2.0) == kind.number(2) == kind.number("2") == 1  # 2.0: as a table's column gives it
