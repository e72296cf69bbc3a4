"""Measuring sets: rows, sets, protocols and tables; the same on several processes; what is not available goes missing alone."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_line_error, merged
from skimage import data
from test_metrics import needs
from test_tools import TORCHRUN

from ucdir_plugin.compat import get_root_logger
from ucdir_plugin.evaluation import tables as result_tables
from ucdir_plugin.evaluation.measure import Evaluation, for_basicsr_loop, measure
from ucdir_plugin.metrics import distances, features, perceptual, protocol
from ucdir_plugin.metrics.features import _NETWORKS, FeatureNetwork, feature_network
from ucdir_plugin.metrics.images import described
from ucdir_plugin.options.check import check_options
from ucdir_plugin.registry import METRIC_REGISTRY
from ucdir_plugin.utils.downloads import WeightsFile
from ucdir_plugin.utils.errors import NotAvailable, UserError
from ucdir_plugin.utils.files import sha256_of

METRICS = {
    "psnr": {"type": "calculate_psnr", "crop_border": 0},
    "niqe": {"type": "calculate_niqe", "crop_border": 0},
    "loe": {"type": "calculate_loe"},
    "fid": {"type": "calculate_fid", "network": "colours", "patch_size": 32},
    "kid": {"type": "calculate_kid", "network": "colours", "patch_size": 32},
}


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """A feature network of 4 x 4 mean colours, and how often it was asked."""
    monkeypatch.setattr(features, "_NETWORKS", dict(_NETWORKS))
    asked = []

    @feature_network("colours", lambda weights_dir: {"network": "Colours (48)", "weights": {}})
    def network(weights_dir=None):
        def forward(x):
            asked.append(len(x))
            return x.flatten(1)

        return FeatureNetwork(4, forward)

    return asked


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    monkeypatch.delenv("UCDIR_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def images():
    """Three of different sizes, the last smaller than a patch; worse ones."""
    whole = np.ascontiguousarray(data.astronaut()[..., ::-1])
    truths = {"b.png": whole[:100, :200], "a.png": whole[200:264, 100:164], "c.png": whole[:31, :200]}
    return {k: (cv2.GaussianBlur(v, (7, 7), 0), cv2.GaussianBlur(v, (3, 3), 0), v) for k, v in truths.items()}


def evaluated(images, metrics=METRICS):
    evaluation = Evaluation(metrics)
    for key, (lq, result, truth) in images.items():
        evaluation.add(key, {"input": lq, "restored": result}, truth, lq)
    return evaluation


def test_rows_sets_and_means(images, colours):
    results = evaluated(images).results()
    assert sum(colours) == (18 + 4) * 3  # patches of truth, input and result, once each: KID takes FID's
    assert [row["image"] for row in results.rows] == ["a.png", "b.png", "c.png"]
    row = results.rows[1]["metrics"]
    assert set(row["restored"]) == {"psnr", "niqe", "loe"}
    assert row["restored"]["psnr"] > row["input"]["psnr"]
    assert (row["input"]["loe"], row["restored"]["loe"] > 0) == (0, True)
    assert results.rows[0]["metrics"]["restored"]["niqe"] is None  # 64 pixels
    assert results.measured()["restored"] == {"psnr": 3, "niqe": 1, "loe": 3}
    pairs = [
        [distances.patch_features(images[k][i], "colours", 32, 0, None) for i in (1, 2)] for k in ("a.png", "b.png")
    ]
    whole = [np.concatenate(part) for part in zip(*pairs)]
    fid, kid = (results.sets["restored"][m] for m in ("fid", "kid"))
    assert fid["value"] == pytest.approx(distances.frechet_distance(*whole))
    assert kid["value"] == pytest.approx(distances.kernel_distance(*whole))
    assert kid["standard_error"] == pytest.approx(distances.kernel_distance_error(*whole, np.repeat([0, 1], [4, 18])))
    assert (fid["patches"], fid["images"], fid["left_out"]) == (22, 2, 1)
    assert results.sets["input"]["fid"]["value"] > fid["value"]
    summary = results.summary()["restored"]
    assert (summary["fid"], summary["psnr"]) == (fid["value"], result_tables.means(results.rows)["restored"]["psnr"])


def test_shares_of_several_processes_give_the_same(images, monkeypatch):
    # Of many patches KID takes subsets, whose draw must not depend on who had which image: neither may the order.
    monkeypatch.setattr(distances, "kernel_distance", lambda features, features2: float(features[0, 0]))
    whole = evaluated(images).results()
    parts = [evaluated({k: images[k] for k in keys}) for keys in (("a.png",), ("c.png",), ("b.png",))]
    parts[0].merge([part.share() for part in parts[1:]])
    assert result_tables.as_data(parts[0].results(), {}) == result_tables.as_data(whole, {})
    empty = Evaluation(METRICS)  # more processes than images
    empty.merge([evaluated(images).share()])
    assert result_tables.as_data(empty.results(), {}) == result_tables.as_data(whole, {})


def test_a_metric_that_one_process_lacks(images, monkeypatch):
    here = evaluated({"a.png": images["a.png"]})
    other = evaluated({"b.png": images["b.png"]}, {k: METRICS[k] for k in ("niqe", "loe")})
    other.unavailable.update(psnr="put it somewhere", fid="put it somewhere")
    here.merge([other.share()])
    results = here.results()
    assert results.unavailable == {"psnr": "put it somewhere", "fid": "put it somewhere"}
    assert set(results.rows[0]["metrics"]["restored"]) == {"niqe", "loe"}
    assert set(results.sets["restored"]) == {"kid"}
    assert set(results.protocols) == {"niqe", "loe", "kid"}


def test_what_is_not_available_goes_missing_alone(images, caplog, monkeypatch):
    """Weights that are not there at the start, and a package that fails at the first image."""
    monkeypatch.setattr(get_root_logger(), "propagate", True)  # made at the first call, which sets this
    metrics = {"lpips": {"type": "calculate_lpips"}, "fid": {"type": "calculate_fid"}, "broken": {"type": "breaks"}, **{"psnr": METRICS["psnr"]}}  # fmt: skip

    @described(lambda: {"name": "Broken"})
    def breaks(img):
        raise NotAvailable("its package is broken")

    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "breaks", breaks)
    results = evaluated(images, metrics).results()
    assert set(results.protocols) == {"psnr"}
    assert results.summary()["restored"].keys() == {"psnr"}
    assert "put alexnet-owt-7be5be79.pth" in results.unavailable["lpips"]
    assert "put inception-2015-12-05.pt" in results.unavailable["fid"]
    assert results.unavailable["broken"] == "its package is broken"
    assert "metric lpips is not available: put alexnet" in caplog.text
    table = result_tables.markdown_table(results)
    assert "- fid: not available: put inception-2015-12-05.pt" in table
    assert json.loads(json.dumps(result_tables.as_data(results, {})))["unavailable"] == results.unavailable


def test_downloads_only_what_is_asked_for(images, tmp_path, monkeypatch):
    source = tmp_path / "published.pth"
    source.write_bytes(b"weights")
    for name in perceptual.BACKBONES:
        known = WeightsFile(f"{name}.pth", source.as_uri(), sha256_of(source))
        monkeypatch.setitem(perceptual.BACKBONES, name, known)
    metrics = {"lpips": {"type": "calculate_lpips"}}
    folder = tmp_path / "weights"
    assert Evaluation(metrics, str(folder)).unavailable
    assert not folder.exists()
    evaluation = Evaluation(metrics, str(folder), download=True)
    assert (folder / "alex.pth").read_bytes() == b"weights"
    assert [p.name for p in folder.iterdir()] == ["alex.pth"]
    assert evaluation.protocols["lpips"]["weights"]["alex.pth"] == sha256_of(source)


def test_without_truths_and_at_other_sizes(images):
    lq, result, truth = images["b.png"]
    evaluation = Evaluation(METRICS)
    row = evaluation.add("b.png", {"restored": result}, None, lq)
    assert set(row["metrics"]["restored"]) == {"niqe", "loe"}
    assert evaluation.results().sets == {}
    evaluation = Evaluation(METRICS)
    row = evaluation.add("b.png", {"input": lq[::2, ::2], "restored": result}, truth, lq[::2, ::2])
    assert set(row["metrics"]["input"]) == {"niqe", "loe"}
    assert row["metrics"]["restored"]["loe"] is None  # of another size than the input
    assert set(evaluation.results().sets) == {"restored"}
    gray = Evaluation(METRICS)
    gray.add("g", {"restored": result[..., 0]}, truth[..., 0], lq[..., 0])
    assert gray.results().summary()["restored"]["fid"] > 0


def test_one_image_of_one_patch_and_equal_images(images):
    truth = images["b.png"][2]
    evaluation = Evaluation(METRICS)
    evaluation.add("one", {"restored": truth[:33, :40]}, truth[:33, :40], truth[:33, :40])
    results = evaluation.results()
    assert results.sets["restored"]["fid"]["value"] is None
    assert results.sets["restored"]["kid"]["reason"] == "KID needs two patches, there is 1"
    assert "not measurable" in result_tables.markdown_table(results)
    same = evaluated({"b.png": (truth, truth, truth)}).results()
    assert same.summary()["restored"]["psnr"] == float("inf")
    assert same.sets["restored"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert same.sets["restored"]["kid"]["value"] < 0  # unbiased: the other patches are farther than the equal one
    flat = np.full((200, 200, 3), 128, np.uint8)
    assert measure(flat, None, METRICS) == {"niqe": None}


def test_tables(images, tmp_path):
    truth = images["b.png"][2]
    results = evaluated({**images, "same.png": (truth, truth, truth)}).results()
    result_tables.write_tables(results, str(tmp_path / "m"), {"name": "run"})
    stored = json.loads(
        (tmp_path / "m.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    keys = {"about", "protocols", "mean", "interval", "measured", "sets", "unavailable", "failed", "images"}
    assert set(stored) == keys
    assert stored["mean"]["restored"]["psnr"] == "inf"
    assert stored["sets"]["restored"]["kid"]["standard_error"] > 0
    assert stored["protocols"]["fid"]["patches"].startswith("32x32")
    table = (tmp_path / "m.md").read_text()
    assert "| niqe | psnr | loe |" in table
    assert f"| kid | restored | {results.sets['restored']['kid']['value']:.4f} | " in table
    assert "niqe, restored: the mean is over 2 of 4 images." in table
    assert "FID on 40 patches is biased" in table
    assert table.count("fid: FID on 40 patches") == 1
    assert "- psnr: PSNR, higher is better, crop border 0, RGB" in table
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert [(r["image"], r["stage"]) for r in rows[-2:]] == [("*", "input"), ("*", "restored")]
    assert float(rows[-1]["fid"]) == results.sets["restored"]["fid"]["value"]
    assert (rows[-1]["psnr"], rows[0]["fid"]) == ("", "")


def test_stamps_tell_protocols_apart():
    def stamp(**cfg):
        return protocol.stamp(cfg)

    psnr = stamp(type="calculate_psnr", crop_border=0)
    assert psnr == {"name": "PSNR", "type": "calculate_psnr", "better": "higher", "crop_border": 0, "colour": "RGB",
                    "range": "0 to 255", "package": "basicsr 1.4.2"}  # fmt: skip
    luma = stamp(type="calculate_psnr", crop_border=4, test_y_channel=True)
    assert (luma["colour"], luma["crop_border"]) == ("Y of YCbCr (BT.601)", 4)
    niqe = stamp(type="calculate_niqe", crop_border=0)
    assert (niqe["better"], niqe["colour"]) == ("lower", "Y of YCbCr (BT.601)")
    assert stamp(type="calculate_niqe", crop_border=0, convert_to="gray")["colour"] == "gray"
    fid = [stamp(type="calculate_fid", network="colours", patch_size=p) for p in (32, 64)]
    assert fid[0] != fid[1]
    runs = [
        {"psnr": psnr, "fid": fid[0]},
        {"psnr": luma, "fidelity": fid[0], "niqe": niqe},
        {"quality": {**psnr, "better": "lower"}, "fid": fid[1]},
    ]
    assert result_tables.columns(runs) == [
        ("PSNR (crop_border 0, colour RGB)", ["psnr", None, "quality"]),
        (f"FID (Colours) (patches {fid[0]['patches']})", ["fid", "fidelity", None]),
        ("PSNR (crop_border 4, colour Y of YCbCr (BT.601))", [None, "psnr", None]),
        ("NIQE", [None, "niqe", None]),
        (f"FID (Colours) (patches {fid[1]['patches']})", [None, None, "fid"]),
    ]
    twice = result_tables.columns([{"psnr": psnr, "again": psnr}, {"psnr": psnr}])
    assert [names for _, names in twice] == [["psnr", "psnr"], ["again", None]]


def test_metrics_for_basicsrs_own_loop(caplog, monkeypatch):
    monkeypatch.setattr(get_root_logger(), "propagate", True)  # made at the first call, which sets this
    kept = for_basicsr_loop({**METRICS, "lpips": {"type": "calculate_lpips"}})
    assert set(kept) == {"psnr", "niqe"}
    for reason in ("fid is not measured in this model's own validation: it is of a set", "loe is not", "lpips is not"):
        assert reason in caplog.text
    assert for_basicsr_loop({"fid": METRICS["fid"]}) is None
    assert for_basicsr_loop(None) is None


def test_options_of_metrics():
    def checked(**metric):
        opt = merged(TINY, {"val": {"metrics": {"m": metric}}})
        return check_options(opt, True)["val"]["metrics"]["m"]

    assert checked(type="calculate_fid")["better"] == "lower"
    assert checked(type="calculate_psnr", crop_border=0)["better"] == "higher"
    assert checked(type="calculate_loe", better="higher")["better"] == "higher"


@pytest.mark.parametrize("change, words", [
    ("{type: calculate_fid, network: incepton}", ["val:metrics:m", "did you mean 'inception'"]),
    ("{type: calculate_fid, patchsize: 1}", ["unknown option val:metrics:m:patchsize", "did you mean 'patch_size'"]),
    ("{type: calculate_kid, patch_size: '256'}", ["val:metrics:m:patch_size", "valid integer"]),
    ("{type: calculate_kid, patch_size: 0}", ["val:metrics:m", "patch_size must be at least 1"]),
    ("{type: calculate_lpips, net: alexnet}", ["val:metrics:m", "no net 'alexnet'"]),
    ("{type: calculate_lpip}", ["did you mean 'calculate_lpips'"]),
    ("{type: calculate_consistency, degradation: jpeg}", ["needs quality"]),
    ("{type: calculate_loe, lq: x.png}", ["unknown option val:metrics:m:lq"]),
    ("{type: calculate_seam_score}", ["val:metrics:m:tile is missing"]),
])  # fmt: skip
def test_wrong_options_of_metrics_stop_at_the_start(change, words, workplace):
    done = workplace.run("train.py", "-opt", workplace.write(TINY), "--force_yml", f"val:metrics:m={change}")
    assert_one_line_error(done, *words)


@needs("efficientnet_lite_pytorch")
def test_tools_measure_sets_on_one_process_and_on_two(workplace):
    lite = {"network": "efficientnet_lite0", "patch_size": 32}
    metrics = {
        "fid": {"type": "calculate_fid", **lite},
        "kid": {"type": "calculate_kid", **lite},
        "loe": {"type": "calculate_loe"},
        "consistency": {"type": "calculate_consistency", "degradation": "jpeg", "quality": 10},
        "lpips": {"type": "calculate_lpips"},
    }
    (workplace.folder / "none").mkdir()
    options = merged(TINY, {"val": {"metrics": metrics, "weights_dir": "none"}, "train": {"total_iter": 1}})
    path = workplace.write(options)
    done = workplace.run("train.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    assert "# kid: input " in done.stderr  # the log, with the best so far
    done = workplace.run("test.py", "-opt", path)
    assert done.returncode == 0, done.stderr
    tables = [
        json.loads((workplace.folder / p / "tiny" / "metrics_val.json").read_text()) for p in ("experiments", "results")
    ]
    assert tables[0]["sets"] == tables[1]["sets"]
    found = tables[1]["sets"]["restored"]
    assert (found["kid"]["patches"], found["kid"]["images"]) == (3, 3)
    assert found["kid"]["standard_error"] > 0
    assert set(tables[1]["mean"]["restored"]) == {"psnr", "niqe", "loe", "consistency"}
    assert "none/alexnet-owt-7be5be79.pth" in tables[1]["unavailable"]["lpips"]
    assert "| kid | restored |" in done.stdout
    assert "lpips: not available: put alexnet" in done.stdout
    done = workplace.run("test.py", "-opt", path, "--launcher", "pytorch", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((workplace.folder / "results" / "tiny" / "metrics_val.json").read_text())
    assert two["images"] == tables[1]["images"]
    for stage, of_stage in two["sets"].items():
        for name, result in of_stage.items():
            other = tables[1]["sets"][stage][name]
            assert result["value"] == pytest.approx(other["value"], rel=1e-4, abs=1e-6)
            assert {**result, "value": 0, "standard_error": 0} == {**other, "value": 0, "standard_error": 0}


def test_in_mmengine(images):
    """Through MMEngine's own evaluator: the numbers of one evaluation."""
    from mmengine.evaluator import Evaluator

    def tensor(image):
        return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) / 255

    evaluator = Evaluator(
        {"type": "ucdir_plugin.RestorationMetrics", "metrics": {**METRICS, "lpips": {"type": "calculate_lpips"}}}
    )
    samples = [
        {"key": k, "lq": tensor(i[0]), "output": tensor(i[1])[None], "gt": tensor(i[2])} for k, i in images.items()
    ]
    evaluator.process(samples[:2])
    evaluator.process(samples[2:])
    found = evaluator.evaluate(3)
    whole = evaluated(images).results()
    expected = whole.summary()
    assert set(found) == {f"restoration/{p}{m}" for p in ("", "input/") for m in METRICS}
    for metric in METRICS:
        assert found[f"restoration/{metric}"] == pytest.approx(expected["restored"][metric])
        assert found[f"restoration/input/{metric}"] == pytest.approx(expected["input"][metric])
    measured = evaluator.metrics[0].measured
    assert measured.protocols == whole.protocols
    assert "put alexnet" in measured.unavailable["lpips"]
    with pytest.raises(UserError, match="metrics:m:type: there is no metric 'calculate_fidd'"):
        Evaluator({"type": "ucdir_plugin.RestorationMetrics", "metrics": {"m": {"type": "calculate_fidd"}}})


def test_a_reference_that_is_nobodys_truth(images, tmp_path, colours):
    """FID and KID of all results' patches against all of the reference's, whatever their number; the truths do not count."""
    paths = []
    for name, picture in (("x", data.chelsea()), ("y", data.coffee()[:200, :300])):
        paths.append(str(tmp_path / f"{name}.png"))
        cv2.imwrite(paths[-1], picture[..., ::-1])
    evaluation = Evaluation(METRICS, reference=paths)
    for key, (lq, result, truth) in images.items():
        evaluation.add(key, {"input": lq, "restored": result}, truth, lq)
    results = evaluation.results()

    def extract(pictures):
        return np.concatenate(
            [distances.patch_features(p, "colours", 32, 0, None) for p in pictures if min(p.shape[:2]) >= 32]
        )

    others = extract([cv2.imread(path) for path in paths])
    for stage, place in (("input", 0), ("restored", 1)):
        own = extract([images[key][place] for key in sorted(images)])
        found = results.sets[stage]
        assert found["fid"]["value"] == pytest.approx(distances.frechet_distance(own, others))
        assert found["kid"]["value"] == pytest.approx(distances.kernel_distance(own, others))
        assert (found["fid"]["images"], found["fid"]["left_out"]) == (2, 1)
    assert results.protocols["fid"]["reference"] == f"2 unpaired images of {tmp_path.name}"
    assert "reference" not in results.protocols["psnr"]
    paired = evaluated(images).results()
    both = [r.protocols for r in (results, paired)]
    assert [names for title, names in result_tables.columns(both) if "FID" in title] == [["fid", None], [None, "fid"]]
    assert paired.sets["restored"]["fid"]["value"] != results.sets["restored"]["fid"]["value"]
    shares = [Evaluation(METRICS, reference=paths) for _ in images]
    for share, (key, (lq, result, _)) in zip(shares, images.items()):
        share.add(key, {"input": lq, "restored": result}, None, lq)
    shares[0].merge([share.share() for share in shares[1:]])
    assert shares[0].results().sets == results.sets


def test_reference_by_the_command(workplace):
    (workplace.folder / "none").mkdir()
    (workplace.folder / "one").mkdir()
    (workplace.folder / "one" / "a.png").write_bytes((workplace.folder / "photos" / "coffee.png").read_bytes())
    for folder, words in (("none", "none"), ("one", "there is one image"), ("nowhere", "nowhere")):
        done = workplace.run(
            "evaluate.py", "photos", "--reference", folder, "--metrics", "fid:network=efficientnet_lite0"
        )
        assert_one_line_error(done, "--reference", words)
    metrics = ("--metrics", "niqe", "kid:network=efficientnet_lite0,patch_size=32")
    options = merged(TINY, {"val": {"metrics": {"fid": {"type": "calculate_fid"}}, "reference": "one"}})
    for tool in ("train.py", "test.py"):  # before anything is computed
        forced = ["--force_yml", "path:pretrain_network_g=x.pth"] if tool == "test.py" else []
        done = workplace.run(tool, "-opt", workplace.write(options), *forced)
        assert_one_line_error(done, "option val:reference one", "there is one image")
    done = workplace.run("evaluate.py", "photos", "--reference", "photos", *metrics, "-o", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    stored = json.loads((workplace.folder / "out" / "metrics.json").read_text())
    assert stored["protocols"]["kid"]["reference"] == "3 unpaired images of photos"
    assert stored["sets"]["restored"]["kid"]["value"] < 0.2  # unbiased: of the same few images it is below 0
    done = workplace.run("evaluate.py", "photos", "--metrics", "kid:network=efficientnet_lite0")
    assert_one_line_error(done, "give GT (or --reference)")
