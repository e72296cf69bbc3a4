"""The study of trained systems: what it measures, and that it goes on where it stopped."""

import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import RESTORING, ROOT, assert_one_line_error, merged
from ucdir_cli.studies.ucdir import study, tables
from ucdir_cli.studies.ucdir.plan import Run, read_plan

import ucdir_plugin
from ucdir_plugin.evaluation import tables as result_tables
from ucdir_plugin.options.check import load_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError

DATA = {"name": "photos", "type": "JPEGDataset", "dataroot_gt": "photos", "quality": 10}
OPTIONS = merged(
    RESTORING,
    {
        "datasets": {"val": DATA, "test_1": {**DATA, "name": "others", "quality": 30}},
        "val": {"metrics": {"niqe": None, "ssim": {"type": "calculate_ssim", "crop_border": 0}}},
    },
)
OPTIONS["datasets"]["val"] = DATA

PLAN = """
opt: options.yml
parts:
  main:
    title: Main
    sets: [photos]
    against: JPEG
    runs:
      - {name: JPEG, model: input}
      - {name: prediction, model: options.yml, blend: 0}
      - {name: fast, model: options.yml, seeds: 2}
  trend:
    title: Trend
    sets: [photos]
    images: 2
    runs:
      - {name: ours, model: options.yml, weights: net.pth, iteration: 1}
      - {name: ours, model: options.yml, weights: net.pth, iteration: 2, sampling: {steps: 1}}
"""


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # tables have seconds: equal tables, equal clocks
    place.write(OPTIONS)
    (place.folder / "plan.yaml").write_text(PLAN)
    return place


def run(**changes):
    lines = []
    path = study.study(read_plan("plan.yaml"), "out", say=lines.append, **{"parts": ["main"], **changes})
    return Path(path).read_text(), lines


def folder(name):
    (found,) = Path("out/photos").glob(f"{name}*")
    return found


def test_what_it_makes_is_what_the_tools_make(here):
    _, lines = run()
    assert [line.rsplit(": ", 1)[0] for line in lines] == [
        "photos: JPEG, seed 0",
        "photos: prediction, seed 0",
        "photos: fast, seed 0",
        "photos: fast, seed 1",
    ]
    model = ucdir_plugin.load_model("options.yml")
    jpeg = cv2.imread("out/photos/input/coffee.png")
    done = ucdir_plugin.restore(np.ascontiguousarray(jpeg[..., ::-1]), model, seed=1, key="coffee.png")
    expected = (done.image[..., ::-1] * 255).round().astype(np.uint8)
    by_seed = {result_tables.read_results(p / "metrics_3.json")[1]["seed"]: p for p in Path("out/photos").glob("fast*")}
    first, second = by_seed[0], by_seed[1]
    assert np.array_equal(cv2.imread(str(second / "coffee.png")), expected)
    assert not np.array_equal(cv2.imread(str(first / "coffee.png")), expected)
    assert np.array_equal(cv2.imread("out/photos/truth/coffee.png"), cv2.imread("photos/coffee.png"))
    ok = here.run("test.py", "-opt", "options.yml")
    assert ok.returncode == 0, ok.stderr
    tested, _ = result_tables.read_results(f"results/{OPTIONS['name']}/metrics_photos.json")
    for stage, of in (("input", "input"), ("initial", folder("prediction").name), ("restored", first.name)):
        found, about = result_tables.read_results(f"out/photos/{of}/metrics_3.json")
        for row, expected in zip(found.rows, tested.rows):
            assert row["image"] == expected["image"]
            assert row["metrics"]["restored"]["psnr"] == pytest.approx(expected["metrics"][stage]["psnr"], abs=1e-6)
        assert about["nfe"] == {"input": 0, "initial": 0, "restored": 2}[stage]


def test_it_goes_on_where_it_stopped(here):
    table, _ = run()
    (folder("prediction") / "coffee.png").unlink()
    again, lines = run()
    assert restored_now(lines) == [0, 1, 0, 0] and again == table
    net = torch.load("net.pth", weights_only=True)
    net["params_ema"]["predictor.conv1_1.bias"] += 1
    net["params"]["predictor.conv1_1.bias"] += 1
    torch.save(net, "net.pth")
    assert restored_now(run()[1]) == [0, 3, 3, 3]  # other weights: all again


def test_other_inputs_are_made_again(here):
    before = run()[0]
    here.write(merged(OPTIONS, {"datasets": {"val": {"quality": 40}}}))
    after, lines = run()
    assert restored_now(lines) == [0, 3, 3, 3] and after != before
    jpeg, better = cv2.imread("out/photos/input/coffee.png"), ucdir_plugin.utils.degradations.jpeg
    truth = cv2.imread("out/photos/truth/coffee.png").astype(np.float32) / 255
    assert np.array_equal(jpeg, (better(truth, 40) * 255).round().astype(np.uint8))


def restored_now(lines):
    return [int(line.split()[-3]) for line in lines]


def test_what_decides_a_result_is_noticed(here):
    run()
    photo = cv2.imread("photos/coffee.png")
    cv2.imwrite("photos/coffee.png", photo[::-1])  # another image of one name
    assert restored_now(run()[1]) == [0, 1, 1, 1]
    assert np.array_equal(cv2.imread("out/photos/truth/coffee.png"), photo[::-1])
    os.remove("out/photos/truth/coffee.png")
    assert restored_now(run()[1]) == [0, 0, 0, 0] and os.path.isfile("out/photos/truth/coffee.png")
    next(Path("out/photos").glob("fast*/metrics_3.json")).write_text("{")  # damaged: measured again
    assert restored_now(run()[1]) == [0, 0, 0, 0]
    here.write(merged(OPTIONS, {"diffusion": {"end": 2e-2}}))  # the weights stay the same
    assert restored_now(run()[1]) == [0, 3, 3, 3]


def test_the_network_is_told_what_the_dataset_tells(here):
    options = merged(
        OPTIONS, {"network_g": {"denoiser": {"conditions": {"quality": {"range": [1, 100], "drop": 0.1}}}}}
    )
    here.write(options)
    torch.manual_seed(2)
    net = build_arch(options["network_g"])
    for p in net.denoise_fn.condition_embedding.parameters():
        torch.nn.init.normal_(p)
    torch.save({"params": net.state_dict()}, "net.pth")
    run()
    jpeg = np.ascontiguousarray(cv2.imread("out/photos/input/coffee.png")[..., ::-1])
    model = ucdir_plugin.load_model("options.yml")
    results = [ucdir_plugin.restore(jpeg, model, seed=0, key="coffee.png", condition=c) for c in ({"quality": 10}, {})]
    told, untold = ((done.image[..., ::-1] * 255).round().astype(np.uint8) for done in results)
    made = [cv2.imread(str(p / "coffee.png")) for p in Path("out/photos").glob("fast*")]
    assert any(np.array_equal(image, told) for image in made) and not np.array_equal(told, untold)


def test_part_of_the_sets(here):
    Path("plan.yaml").write_text(PLAN.replace("    sets: [photos]\n", "", 1))
    both, _ = run()
    assert "### photos: 3" in both and "### others: 3" in both
    one, lines = run(sets=["others"])
    assert "### photos" not in one and "### others" in one and restored_now(lines) == [0, 0, 0, 0]
    assert Path("out/study_main.md").read_text() == both and Path("out/study_main_others.md").read_text() == one
    with pytest.raises(UserError, match="options.yml has no test set other; did you mean 'others'"):
        run(sets=["other"])
    Path("plan.yaml").write_text(PLAN)
    with pytest.raises(UserError, match="no part has a test set of others"):
        run(sets=["others"])


def test_faults_of_the_images(here):
    cv2.imwrite("photos/coffee.jpg", cv2.imread("photos/coffee.png"))
    with pytest.raises(UserError, match=r"coffee.(png|jpg) differs from another image in its extension only"):
        run()
    os.remove("photos/coffee.jpg")
    alone = {"name": "photos", "type": "PairedRestorationDataset", "dataroot_lq": "photos"}
    here.write({**OPTIONS, "datasets": {"val": alone}})
    with pytest.raises(UserError, match="test set photos has no gt images: name its dataroot_gt"):
        run()
    here.write(merged(OPTIONS, {"network_g": {"denoiser": {"norm": "layernorm2d"}}}))
    torch.manual_seed(1)
    state = build_arch(load_options("options.yml", is_train=False)["network_g"]).state_dict()
    torch.save({"params": {key: value * 1e20 for key, value in state.items()}}, "net.pth")
    with pytest.raises(UserError, match="photos: .*NaN or infinite"):
        run()


def measured(name, *seeds, without=None):
    """A run of which each seed gives image -> PSNR, and FID without each image."""
    results = [
        result_tables.Results(
            [{"image": key, "metrics": {"restored": {"psnr": value}}} for key, value in seed.items()],
            {
                "psnr": {"name": "PSNR", "type": "calculate_psnr", "better": "higher"},
                "fid": {"name": "FID", "type": "calculate_fid", "better": "lower"},
            },
            {
                "restored": {
                    "fid": {"value": 10.0 * (i + 1), "warnings": [], **({"without": without} if without else {})}
                }
            },
        )
        for i, seed in enumerate(seeds)
    ]
    return tables.Measured(Run(name, "m"), results, [{"seconds": 1.0, "nfe": 5} for _ in seeds])


def test_means_and_paired_differences():
    one = measured("one", dict(zip("abcde", (1.0, 2.0, 3.0, 4.0, 5.0))), dict(zip("abcde", (3.0, 4.0, 5.0, 6.0, 7.0))))
    other = measured("other", dict(zip("abcde", (1.5, 2.5, 3.5, 4.5, 5.5))))
    assert (
        one.mean("psnr") == 4.0 and one.deviation("psnr") == pytest.approx(2**0.5) and other.deviation("psnr") is None
    )
    mean, bounds = tables.difference(one, other, "psnr")
    assert mean == 0.5 and bounds == (0.5, 0.5)  # the same for each image: nothing varies
    assert tables.difference(one, other, "fid") == (5.0, None)
    assert "| one | 15.00 ± 7.07 | 4.00 ± 1.41 | 1.00 | 5 |" in tables.means_table([one, other])
    assert "+0.50 dB [+0.50, +0.50]" in "\n".join(tables.differences_table([other, one], "other"))
    same = measured("same", dict.fromkeys("abcde", float("inf")), dict.fromkeys("abcde", float("inf")))
    assert same.deviation("psnr") is None and tables.difference(same, one, "psnr") is None
    lower = measured("lower", {"a": 0.5, "z": 9.0})
    assert tables.difference(lower, one, "psnr")[0] == -1.5  # of the images that both have


def test_paired_differences_of_sets():
    """Of the FIDs without each image by hand: the one's minus the other's are 1, 2, 3, 4, 5, so sqrt(4 / 5 * 10)."""
    psnr = dict.fromkeys("abcde", 1.0)
    one = measured("one", psnr, psnr, without=dict(zip("abcde", (3.0, 5.0, 7.0, 9.0, 11.0))))
    other = measured("other", psnr, without=dict(zip("abcde", (2.0, 3.0, 4.0, 5.0, 6.0))))
    mean, (low, high) = tables.difference(one, other, "fid")
    assert mean == 5.0  # of the whole sets
    reach = 2.7764 * 8**0.5  # Student's t of 4 degrees of freedom
    assert (low, high) == pytest.approx((5 - reach, 5 + reach), abs=1e-3)
    assert f"+50.0 % [{10 * low:+.1f}, {10 * high:+.1f}]" in "\n".join(tables.differences_table([other, one], "other"))
    for lacking in (None, {**dict.fromkeys("abcd", 1.0), "e": None}, dict.fromkeys("abcdf", 1.0)):
        assert tables.difference(one, measured("another", psnr, without=lacking), "fid") == (5.0, None)


def test_no_percentage_of_what_may_be_zero():
    one, other = measured("one", {"a": 1.0}, {"a": 1.0}), measured("other", {"a": 1.0})
    for error, text in ((4.9, "+50.0 %"), (5.0, "+5.00")):  # FID 10 and 15
        other.results[0].sets["restored"]["fid"]["standard_error"] = error
        assert tables.differences_table([other, one], "other")[-1] == f"| one | {text} | +0.00 dB |"


def test_curves(here):
    table, lines = run(parts=["trend"])
    assert "ours, 1 iterations" in table and "photos: 2 images" in table
    assert lines[-1] == "curves: out/trend_photos.png" and cv2.imread("out/trend_photos.png") is not None
    assert Path("out/study_trend.md").is_file()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"parts": {"main": {"title": "t", "images": 0, "runs": [{"name": "a", "model": "input"}]}}}, "1 or more"),
        ({"parts": {"main": {"title": "t", "runs": [{"name": "a", "model": "input", "seeds": 2}]}}}, "nothing else"),
        ({"parts": {"../main": {"title": "t", "runs": [{"name": "a", "model": "input"}]}}}, "letters, digits"),
        ({"opt": "gone.yml", "parts": {"main": {"title": "t", "runs": [{"name": "a", "model": "m"}]}}}, "gone.yml"),
        ({"parts": {"main": {"title": "t", "runs": []}}}, "parts:main: no runs"),
        ({"parts": {"main": {"title": "t", "runs": [{"name": "a"}]}}}, "parts:main:runs:0:model"),
        ({"parts": {"main": {"title": "t", "runs": [{"name": "a", "model": "input", "step": 3}]}}}, "step"),
        ({"parts": {"main": {"title": "t", "runs": [{"name": "a", "model": "input"}] * 2}}}, "two runs are called a"),
        (
            {"parts": {"main": {"title": "t", "against": "b", "runs": [{"name": "a", "model": "input"}]}}},
            "against: known: a",
        ),
        ({"parts": {"main": {"title": "t", "runs": [{"name": "a", "model": "input", "seeds": 0}]}}}, "1 or more"),
        (
            {"parts": {"main": {"title": "t", "sets": ["photo"], "runs": [{"name": "a", "model": "input"}]}}},
            "did you mean 'photos'",
        ),
        (
            {"parts": {"main": {"title": "t", "runs": [{"name": "a", "model": "smal"}]}}},
            "parts:main: a: smal is neither",
        ),
    ],
)
def test_faults_of_a_plan(here, change, words):
    Path("plan.yaml").write_text(json.dumps({"opt": "options.yml", "parts": {}, **change}))
    with pytest.raises(UserError) as raised:
        run()
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_tool(here):
    done = here.run("study_ucdir.py", "plan.yaml", "-o", "out", "--parts", "man")
    assert_one_line_error(done, "there is no part 'man'", "did you mean 'main'")
    done = here.run("study_ucdir.py", "plan.yaml", "-o", "out", "--parts", "main", "--threads", "1")
    assert done.returncode == 0 and "tables: out/study_main.md" in done.stdout


def test_the_plans_that_come_with_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in Path("options/study").glob("*.yaml"):
        plan = read_plan(str(path))
        known = {data["name"] for data in load_options(plan.opt, is_train=False)["datasets"].values()}
        for part in plan.parts.values():
            assert set(part.sets or ()) <= known
