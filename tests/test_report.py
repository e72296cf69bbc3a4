"""Intervals, the page, evaluate.py and compare.py."""

import base64
import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import PHOTOS, TINY, assert_one_line_error, merged

from ucdir_plugin.evaluation import compare, folders, formats, intervals, report
from ucdir_plugin.evaluation import tables as result_tables
from ucdir_plugin.evaluation.measure import Evaluation, measure
from ucdir_plugin.utils.errors import UserError

METRICS = {
    "psnr": {"type": "calculate_psnr", "crop_border": 0},
    "niqe": {"type": "calculate_niqe", "crop_border": 0},
    "loe": {"type": "calculate_loe"},
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def photos():
    """Name -> (input, restored, truth), BGR uint8; the last three are too small for NIQE."""
    found = {}
    sides = {"chelsea.png": 200, "coffee.png": 192, "astronaut.png": 64, "camera.png": 60, "page.png": 56}
    for number, (name, side) in enumerate(sides.items()):
        truth = cv2.imread(str(PHOTOS / name))[50 : 50 + side, 100 : 100 + side + 8]
        found[name] = (
            cv2.GaussianBlur(truth, (0, 0), 2 + number),
            cv2.GaussianBlur(truth, (0, 0), 0.6 + number / 2),
            truth,
        )
    return found


def evaluated(photos, metrics=METRICS, files=False):
    evaluation = Evaluation(metrics)
    for key, (lq, result, truth) in photos.items():
        evaluation.add(key, {"input": lq, "restored": result}, truth, lq, {"truth": f"/x/{key}"} if files else None)
    return evaluation.results()


def test_intervals():
    assert intervals.interval([]) is intervals.interval([1.0, 2.0, 3.0, 4.0, None]) is None  # too few
    assert intervals.interval([1.0] * 5 + [float("inf")]) is None
    assert intervals.interval([3.0, None, 3.0, 3.0, 3.0, 3.0]) == (3.0, 3.0)
    values = np.random.RandomState(0).randn(900)
    low, high = intervals.interval(list(values))
    half = 1.96 * values.std() / 30
    few = intervals.interval([0.0, 1.0, 2.0, 3.0, 4.0])  # Student's t, about: 2 +- 2.776 * 1.58 / sqrt(5)
    assert few == pytest.approx((2 - 1.96, 2 + 1.96), abs=0.6)
    assert low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert intervals.interval(list(values)) == (low, high)
    assert intervals.interval([*values, None]) == (low, high)


def test_tables_have_means_in_the_papers_order(photos):
    results = evaluated(photos, {k: METRICS[k] for k in ("loe", "psnr", "niqe")})
    assert results.metrics() == ["niqe", "psnr", "loe"]
    table = result_tables.markdown_table(results)
    assert "| image | stage | niqe | psnr | loe |" in table
    assert "| mean | niqe ↓ | psnr ↑ | loe ↓ |" in table
    low, high = results.intervals()["restored"]["psnr"]
    mean = results.summary()["restored"]["psnr"]
    assert f"| {mean:.4f} [{low:.4f}, {high:.4f}] |" in table
    data = result_tables.as_data(results, {})
    assert data["interval"]["restored"]["psnr"] == [low, high] or data["interval"]["restored"]["psnr"] == (low, high)
    assert result_tables.means([{"image": "x", "metrics": {"restored": {"psnr": 1.0}}}]) == {"restored": {"psnr": 1.0}}
    odd = result_tables.Results([{"image": "a|b*.png", "metrics": {"restored": {"psnr": 1.0}}}])
    assert "| a\\|b\\*.png | restored | 1.0000 |" in result_tables.markdown_table(odd)


def test_what_is_read_is_what_was_written(photos, tmp_path):
    truth = photos["chelsea.png"][2]
    results = evaluated({**photos, "same.png": (truth, truth, truth)}, files=True)
    result_tables.write_tables(results, str(tmp_path / "m"), {"name": "run"})
    found, about = result_tables.read_results(tmp_path / "m.json")
    assert (found, about) == (results, {"name": "run"})
    for content in ("", "[]", "{}", '{"images": 3}', "[" * 100000):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json is no metrics"):
            result_tables.read_results(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        result_tables.read_results(tmp_path / "none.json")


def test_the_part_shown_is_where_results_differ_most():
    truth = np.zeros((300, 500, 3), np.uint8)
    result = truth.copy()
    result[210:240, 300:350] = 200
    rows, columns = report.window({"restored": result, "truth": truth}, 64)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (64, 64)
    assert rows.start <= 210 and rows.stop >= 240 and columns.start <= 300 and columns.stop >= 350
    result[:] = 0
    result[290:, 490:] = 9  # in the corner that no whole step reaches
    rows, columns = report.window({"restored": result, "truth": truth}, 64)
    assert (rows, columns) == (slice(236, 300), slice(436, 500))
    assert report.window({"restored": result[:50], "truth": truth[:50]}, 64)[0] == slice(0, 50)
    parts = report.part({"input": truth[::2, ::2], "restored": result, "truth": truth}, 64)
    assert {p.shape for p in parts.values()} == {(64, 64, 3)}
    assert (parts["restored"] == result[236:, 436:]).all()
    gray = {name: image[..., 0] for name, image in {"restored": result, "truth": truth}.items()}
    assert report.window(gray, 64) == (rows, columns)
    assert report.window({"restored": gray["restored"], "truth": truth}, 64) == (rows, columns)


def test_a_store_gives_back_what_it_keeps(tmp_path, photos):
    store = report.Store(str(tmp_path / ".kept"))
    lq, result, truth = photos["chelsea.png"]
    store.keep("a/ü.png", {"input": lq, "truth": truth})
    store.keep("b", {"restored": np.tile(result[..., :1], (5, 5, 1))})
    images, size = store.part("a/ü.png")
    assert size == truth.shape[:2]
    assert list(images) == ["input", "truth"] and (images["input"] == lq).all() and (images["truth"] == truth).all()
    assert store.part("b")[1] == (1000, 1040) and store.part("b")[0]["restored"].shape == (768, 768)
    large = np.tile(result, (5, 5, 1))
    store.keep("b", {"restored": large}, {"_learned.bin": b"\0 1"}, "made from this")
    assert store.find("b") is store.find("b", "made from that") is store.find("c") is None
    images, files = store.find("b", "made from this")
    assert (images["restored"] == large).all() and files == {"_learned.bin": b"\0 1"}
    store.remove()
    assert not list(tmp_path.iterdir())


def test_extremes(photos):
    results = evaluated(photos)
    assert report.ranking(results) == ("restored", "psnr")
    values = {row["image"]: row["metrics"]["restored"]["psnr"] for row in results.rows}
    ranked = sorted(values, key=values.get)
    found = [(label, key) for label, key, _ in report.extremes(results)]
    assert found == [("worst", ranked[0]), ("median", ranked[2]), ("best", ranked[4])]
    lower = evaluated(photos, {"loe": METRICS["loe"]})
    values = {row["image"]: row["metrics"]["restored"]["loe"] for row in lower.rows}
    assert report.extremes(lower)[0][1:] == max(((k, v) for k, v in values.items()), key=lambda kv: kv[1])
    two = evaluated({k: photos[k] for k in list(photos)[:2]})
    assert [label for label, *_ in report.extremes(two)] == ["worst", "best"]
    one = evaluated({"chelsea.png": photos["chelsea.png"]})
    assert [label for label, *_ in report.extremes(one)] == ["the only one"]
    nothing = result_tables.Results([{"image": "x", "metrics": {"restored": {"psnr": None}}}])
    assert report.ranking(nothing) is None and report.extremes(nothing) == []


HOSTILE = "</script><img src=x onerror=document.title='no'>.png"


@pytest.fixture
def page(photos, tmp_path):
    photos = {**photos, HOSTILE: photos["chelsea.png"]}
    results = evaluated(photos)
    results.unavailable["lpips"] = "put it <b>somewhere</b>"
    path = tmp_path / "report.html"
    pictures = {key: dict(zip(("input", "restored", "truth"), images)) for key, images in photos.items()}
    report.write_report(results, path, {"name": "run", "dataset": "set", "weights": "w.pth"}, lambda key: (pictures[key], pictures[key]["truth"].shape[:2]))  # fmt: skip
    return path, results


def test_the_page_needs_nothing_else(page):
    text = page[0].read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text)
    assert "default-src 'none'" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert {row["image"] for row in data["rows"]} >= {HOSTILE, "coffee.png"}
    assert [p["label"] for p in data["pictures"]] == ["worst", "median", "best"]
    content = data["pictures"][0]["images"]["restored"].split(",", 1)[1]
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)
    row = next(row for row in page[1].rows if row["image"] == data["pictures"][0]["image"])
    truth = base64.b64decode(data["pictures"][0]["images"]["truth"].split(",", 1)[1])
    truth = cv2.imdecode(np.frombuffer(truth, np.uint8), cv2.IMREAD_COLOR)
    assert measure(shown, truth, {"psnr": METRICS["psnr"]})["psnr"] == row["metrics"]["restored"]["psnr"]  # lossless


PROBE = """
<script>
window.addEventListener("load", () => {
  const found = {title: document.title, best: [...document.querySelectorAll("#means td.best")].map(c => c.textContent)};
  found.loaded = [...document.querySelectorAll("img")].every(i => i.complete && i.naturalWidth > 0);
  const rows = () => [...document.querySelectorAll("#images tbody tr")].map(r => [...r.children].map(c => c.textContent));
  const heading = name => [...document.querySelectorAll("#images thead button")].find(b => b.textContent.startsWith(name));
  found.first = rows();
  heading("niqe").click(); found.up = rows().map(r => r[2]);
  heading("niqe").click(); found.down = rows().map(r => r[2]);
  found.sorted = heading("niqe").parentElement.getAttribute("aria-sort");
  const filter = document.getElementById("filter");
  filter.value = ""; filter.dispatchEvent(new Event("change")); found.all = rows().length;
  const viewer = document.querySelector(".viewer"), slider = viewer.querySelector("input"), images = viewer.querySelectorAll("img");
  slider.value = 25; slider.dispatchEvent(new Event("input"));
  found.clip = viewer.querySelectorAll(".layer")[1].style.clipPath;
  found.before = images[0].style.transform;
  viewer.querySelector("button[aria-label='zoom in']").click(); found.zoomed = images[0].style.transform;
  const select = viewer.querySelectorAll("select")[1];
  const other = images[1].src; select.value = "truth"; select.dispatchEvent(new Event("change"));
  found.changed = images[1].src !== other; found.viewers = document.querySelectorAll(".viewer").length;
  found.charts = document.querySelectorAll("#histograms svg").length; found.protocols = document.getElementById("protocols").textContent;
  document.body.innerHTML = ""; document.body.textContent = "FOUND" + JSON.stringify(found) + "DNUOF";
});
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")
def test_the_page_in_a_browser(page, tmp_path):
    path, results = page
    probe = tmp_path / "probe.html"
    probe.write_text(path.read_text().replace("</body>", PROBE))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search("FOUND(.*)DNUOF", dom, re.DOTALL).group(1)))
    assert found["title"] == "run on set"
    values = {row["image"]: row["metrics"]["restored"] for row in results.rows}
    assert [row[0] for row in found["first"]] == sorted(values)  # restored alone, by name
    assert {row[1] for row in found["first"]} == {"restored"}
    niqe = [f"{v['niqe']:.4f}" for v in values.values() if v["niqe"] is not None]
    assert found["up"] == [*sorted(niqe, key=float), *["not measurable"] * 3]
    assert found["down"] == [
        *sorted(niqe, key=float, reverse=True),
        *["not measurable"] * 3,
    ]  # what was not measured stays last
    assert (found["sorted"], found["all"]) == ("descending", 2 * len(values))
    assert found["clip"] == "inset(0px 0px 0px 25%)"
    scale = [float(re.search(r"scale\((.*)\)", found[k]).group(1)) for k in ("before", "zoomed")]
    assert scale[1] == pytest.approx(2 * scale[0], rel=1e-4)
    assert found["changed"] and found["loaded"] and found["viewers"] == 3 and found["charts"] == 3
    assert "put it <b>somewhere</b>" in found["protocols"]
    best = max(results.summary()[s]["psnr"] for s in ("input", "restored"))
    assert any(text.startswith(f"{best:.4f}") for text in found["best"])


@pytest.fixture
def sets(photos, tmp_path, monkeypatch):
    """Folders restored, truth and input."""
    for number, kind in enumerate(("input", "restored", "truth")):
        for key, images in photos.items():
            (tmp_path / kind / "deep").mkdir(parents=True, exist_ok=True)
            name = f"deep/{key}" if key == "coffee.png" else key
            cv2.imwrite(str(tmp_path / kind / name), images[number])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_evaluate(workplace, sets, photos):
    done = workplace.run("evaluate.py", "restored", "truth", "--input", "input", "--metrics", "psnr", "niqe", "loe", "psnr:crop_border=4,test_y_channel=true")  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads((sets / "results/evaluate_restored/metrics.json").read_text())
    expected = evaluated({("deep/" if k == "coffee.png" else "") + k: v for k, v in photos.items()})
    for row, other in zip(data["images"], expected.rows):
        assert row["image"] == other["image"]
        for stage, values in other["metrics"].items():
            for metric, value in values.items():
                assert row["metrics"][stage][metric] == value
    assert data["protocols"]["psnr_2"]["colour"] == "Y of YCbCr (BT.601)"
    assert data["images"][0]["files"]["truth"] == str(sets / "truth/astronaut.png")
    assert (sets / "results/evaluate_restored/report.html").is_file()
    assert "| mean | niqe ↓ | psnr ↑ | psnr_2 ↑ | loe ↓ |" in done.stdout
    done = workplace.run("evaluate.py", "restored/deep/coffee.png", "truth/deep/coffee.png", "--metrics", "psnr", "-o", "one", "--name", "mine")  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = json.loads((sets / "one/metrics.json").read_text())
    assert one["about"]["name"] == "mine" and one["mean"]["restored"]["psnr"] == expected.rows[-2]["metrics"]["restored"]["psnr"]  # fmt: skip
    done = workplace.run("evaluate.py", "restored", "-o", "alone")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((sets / "alone/metrics.json").read_text())["mean"]["restored"]) == {"niqe"}


def test_default_metrics_go_on_without_weights(workplace, sets):
    (sets / "empty").mkdir()
    done = workplace.run("evaluate.py", "restored", "truth", "--weights-dir", "empty", "-o", "out")
    assert done.returncode == 0, done.stderr
    data = json.loads((sets / "out/metrics.json").read_text())
    assert {"lpips", "fid", "kid"} <= set(data["unavailable"])
    assert "empty/alexnet-owt-7be5be79.pth" in data["unavailable"]["lpips"]
    assert {"psnr", "ssim", "niqe"} <= set(data["mean"]["restored"])
    done = workplace.run("evaluate.py", "restored", "truth", "--weights-dir", "empty", "--metrics", "lpips")
    assert_one_line_error(done, "none of the metrics is available")


def test_suffixes_records_and_extensions(sets, photos):
    truth = sets / "truth"
    for path in list((sets / "restored").rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_net.png"))
    with pytest.raises(UserError, match=r"restored: astronaut_net\.png, camera_net\.png.* have no partner in truth; give --suffix _net"):  # fmt: skip
        folders.find_items("restored", "truth")
    assert [item.key for item in folders.find_items("restored", "truth", suffix="_net")] == sorted(("deep/" * (k == "coffee.png")) + k for k in photos)  # fmt: skip
    # What tools/restore.py writes with --samples 2: of the four pictures the mean counts.
    samples = sets / "samples"
    samples.mkdir()
    image = cv2.imread(str(truth / "chelsea.png"))
    outputs = [f"chelsea_{kind}.png" for kind in ("sample1", "sample2", "mean", "spread")]
    for name in outputs:
        cv2.imwrite(str(samples / name), image)
    (samples / "chelsea.json").write_text(json.dumps({"input": "chelsea.jpg", "outputs": outputs, "settings": {}}))
    (samples / "notes.json").write_text("{}")
    one = sets / "one"
    one.mkdir()
    cv2.imwrite(str(one / "chelsea.bmp"), image)
    (item,) = folders.find_items("samples", "one")
    assert item.files["restored"] == "samples/chelsea_mean.png" and item.files["truth"] == "one/chelsea.bmp"


def test_two_results_of_one_name_and_records_of_no_use(sets):
    cv2.imwrite(str(sets / "restored/page_net.png"), np.zeros((56, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"restored: page\.png and page_net\.png are one without _net"):
        folders.find_items("restored", "truth", suffix="_net")
    (sets / "restored/page_net.png").unlink()
    (sets / "restored/page.json").write_text('{"input": "a", "outputs": [3], "settings": {}}')
    assert len(folders.find_items("restored", "truth")) == 5


def test_what_is_lacking_is_said_and_the_rest_measured(workplace, sets):
    done = workplace.run("evaluate.py", "restored", "truth", "--metrics", "psnr:crop_border=30", "loe", "-o", "out")
    assert done.returncode == 0, done.stderr
    data = json.loads((sets / "out/metrics.json").read_text())
    assert data["unavailable"] == {"loe": "it compares with the degraded images: give --input"}
    assert data["measured"]["restored"]["psnr"] == 3  # two have no more than 60 rows


@pytest.mark.skipif(os.name != "posix", reason="names of files are Unicode here")
def test_names_that_are_no_unicode(sets):
    name = os.fsdecode(b"\xff.png")
    (sets / "restored/page.png").rename(sets / "restored" / name)
    (sets / "truth/page.png").rename(sets / "truth" / name)
    results, failed = folders.evaluate(folders.find_items("restored", "truth"), Evaluation({"psnr": METRICS["psnr"]}), "out", {})  # fmt: skip
    assert not failed and result_tables.read_results("out/metrics.json")[0] == results
    store = report.Store("kept")
    store.keep(name, {"restored": np.zeros((4, 4, 3), np.uint8)})
    assert store.part(name)[1] == (4, 4)


def test_what_cannot_be_measured_is_named(workplace, sets):
    (sets / "restored/chelsea.png").write_bytes(b"no image")
    cv2.imwrite(str(sets / "restored/astronaut.png"), np.zeros((10, 12, 3), np.uint8))
    done = workplace.run("evaluate.py", "restored", "truth", "--metrics", "psnr", "-o", "out")
    assert done.returncode == 1
    assert "restored/astronaut.png (12x10) and truth/astronaut.png (72x64) differ in size" in done.stderr
    assert "restored/chelsea.png" in done.stderr and "Traceback" not in done.stderr
    measured = json.loads((sets / "out/metrics.json").read_text())["images"]
    assert [row["image"] for row in measured] == ["camera.png", "deep/coffee.png", "page.png"]
    (sets / "restored/deep/coffee.png").unlink()
    done = workplace.run("evaluate.py", "restored", "truth")
    assert_one_line_error(done, "truth: deep/coffee.png has no partner in restored")
    for name in ("deep/coffee.png", "camera.png", "page.png"):
        (sets / "truth" / name).unlink()
        (sets / "restored" / name).unlink(missing_ok=True)
    done = workplace.run("evaluate.py", "restored", "truth", "--metrics", "psnr")
    assert_one_line_error(done, "nothing could be measured")


@pytest.mark.parametrize("args, words", [
    (["nowhere", "truth"], ["nowhere does not exist"]),
    (["restored", "truth/chelsea.png"], ["either folders or single images"]),
    (["restored", "truth", "--metrics", "pnsr"], ["did you mean 'calculate_psnr'"]),
    (["restored", "truth", "--metrics", "psnr:crop=3"], ["unknown option", "crop"]),
    (["restored", "truth", "--metrics", "psnr:crop_border"], ["--metrics psnr"]),
    (["restored/nothing", "truth"], ["holds no image"]),
    (["restored", "--metrics", "psnr"], ["metric psnr", "give GT"]),
    (["restored", "truth", "--metrics", "loe"], ["metric loe", "give --input"]),
    (["restored", "truth", "--metrics", "psnr:crop_border=two"], ["crop_border", "whole number"]),
    (["restored", "truth", "--metrics", "psnr:crop_border=-3"], ["crop_border", "whole number"]),
    (["restored", "truth", "--metrics", "niqe:convert_to=rgb"], ["convert_to", "'rgb' is not known"]),
    (["restored", "truth", "-o", "restored/chelsea.png", "--metrics", "psnr"], ["cannot write"]),
])  # fmt: skip
def test_wrong_calls_of_evaluate(workplace, sets, args, words):
    (sets / "restored/nothing").mkdir()
    assert_one_line_error(workplace.run("evaluate.py", *args), *words)


def tables(sets, photos):
    """Runs a and b of the same images, b better; c of two of them, PSNR of another colour."""
    better = {k: (lq, truth // 2 + result // 2, truth) for k, (lq, result, truth) in photos.items()}
    runs = {"a": (photos, METRICS), "b": (better, METRICS)}
    runs["c"] = {k: photos[k] for k in list(photos)[:2]}, {"psnr": {**METRICS["psnr"], "test_y_channel": True}, "niqe": METRICS["niqe"]}  # fmt: skip
    for name, (images, metrics) in runs.items():
        evaluation = Evaluation(metrics)
        for key, (lq, result, truth) in images.items():
            path = sets / name / "pictures" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), result)
            files = {
                "restored": f"pictures/{key}",
                "truth": str(sets / "truth" / ("deep" * (key == "coffee.png")) / key),
            }
            evaluation.add(key, {"input": lq, "restored": result}, truth, lq, files)
        result_tables.write_tables(evaluation.results(), str(sets / name / "metrics_set"), {"name": name})
    return compare.read_runs([str(sets / name) for name in runs])


def test_differences_are_paired_and_of_one_protocol(sets, photos):
    a, b, c = tables(sets, photos)
    found = compare.compare([a, b])
    assert found["images"] == ["astronaut", "camera", "chelsea", "coffee", "page"]
    assert found["remarks"] == [f"NIQE, {run}: the mean is over 2 of 5 images." for run in "ab"]
    assert [column["title"] for column in found["columns"]] == ["NIQE", "PSNR", "LOE"]
    psnr = found["columns"][1]["cells"]
    pairs = [b.value(i, "restored", "psnr") - a.value(i, "restored", "psnr") for i in found["images"]]
    assert psnr[0]["difference"] is None and psnr[0]["interval"] == intervals.interval([a.value(i, "restored", "psnr") for i in found["images"]])  # fmt: skip
    assert psnr[1]["difference"] == {"from": "a", "mean": pytest.approx(np.mean(pairs)), "interval": intervals.interval(pairs), "images": 5}  # fmt: skip
    assert compare.verdict(psnr[1]["difference"], "higher") == "better"
    assert compare.verdict(psnr[1]["difference"], "lower") == "worse"
    assert compare.verdict({"mean": 1, "interval": (-1, 2)}, "higher") == compare.verdict({"mean": 1, "interval": None}, "higher") == ""  # fmt: skip
    assert found["columns"][0]["cells"][1]["difference"]["images"] == 2  # NIQE cannot measure three
    table = compare.markdown(found)
    assert f"{psnr[1]['difference']['mean']:+.4f} [" in table and "] better |" in table
    found = compare.compare([a, b, c])
    assert len(found["images"]) == 2
    assert "a: 3 of 5 images are not in all runs and are left out." in found["remarks"]
    titles = [column["title"] for column in found["columns"]]
    assert titles == ["NIQE", "PSNR (colour RGB)", "PSNR (colour Y of YCbCr (BT.601))", "LOE"]
    assert [cell is None for cell in found["columns"][1]["cells"]] == [False, False, True]
    assert compare.compare([a, b], "input")["columns"][1]["cells"][1]["difference"]["mean"] == 0
    a.results.protocols.pop("niqe")
    assert "No metric was measured in the same way in two runs." in compare.compare([a, c])["remarks"]


def made(tmp_path, name, values, metrics=("psnr",), sets=None):
    """A run of six images with these values of its metrics."""
    rows = [{"image": f"{i}.png", "metrics": {"restored": {m: values[m][i] for m in metrics}}} for i in range(6)]
    stamps = {m: {"name": m.upper(), "type": f"calculate_{m}", "better": "higher"} for m in (*metrics, *(sets or ()))}
    results = result_tables.Results(rows, stamps, {"restored": sets} if sets else {})
    result_tables.write_tables(results, str(tmp_path / name / "metrics"), {"name": name})
    return str(tmp_path / name)


def test_means_of_a_column_are_over_the_same_images(tmp_path):
    ten = [10.0, 10.0, 10.0, 10.0, 10.0, 50.0]
    runs = [made(tmp_path, "a", {"psnr": ten}), made(tmp_path, "b", {"psnr": [11.0] * 5 + [None]})]
    found = compare.compare(compare.read_runs(runs))
    assert [cell["value"] for cell in found["columns"][0]["cells"]] == [10.0, 11.0]
    assert found["remarks"] == [f"PSNR, {run}: the mean is over 5 of 6 images." for run in "ab"]
    runs[1] = made(tmp_path, "c", {"psnr": [11.0] * 5 + [float("inf")]})
    found = compare.compare(compare.read_runs(runs))
    assert found["columns"][0]["cells"][1]["difference"]["images"] == 5
    assert found["remarks"] == ["PSNR, c: the difference is over the 5 images with finite values."]
    runs[1] = made(tmp_path, "d", {"psnr": [None] * 6})
    assert [cell is None for cell in compare.compare(compare.read_runs(runs))["columns"][0]["cells"]] == [False, True]


def test_a_difference_says_from_which_run_it_is(tmp_path):
    values = {"psnr": [1.0] * 6, "ssim": [0.5] * 6}
    more = {"psnr": [2.0] * 6, "ssim": [0.25] * 6}
    runs = [made(tmp_path, "a", values), made(tmp_path, "b", values, ("psnr", "ssim")), made(tmp_path, "c", more, ("psnr", "ssim"))]  # fmt: skip
    table = compare.markdown(compare.compare(compare.read_runs(runs)))
    assert "| c | +1.0000 [+1.0000, +1.0000] better | -0.2500 [-0.2500, -0.2500] worse (minus b) |" in table
    assert "- SSIM: SSIM, higher is better" in table
    assert len({run.name for run in compare.read_runs([runs[0], runs[0], runs[0]])}) == 3


def test_a_table_of_sets_alone(tmp_path):
    kid = {"value": 0.5, "standard_error": 0.25, "patches": 9, "images": 6, "warnings": [], "left_out": 0}
    folder = made(tmp_path, "a", {}, (), {"kid": kid})
    results, _ = result_tables.read_results(f"{folder}/metrics.json")
    assert results.summary() == {"restored": {"kid": 0.5}} and results.metrics() == ["kid"]
    assert "| restored | 0.5000 |" in result_tables.markdown_table(results)
    other = made(tmp_path, "b", {}, (), {"kid": {**kid, "patches": 8}})
    found = compare.compare(compare.read_runs([folder, other]))
    assert not found["columns"] and "KID is of all images of a run, which differ: not comparable here." in found["remarks"]  # fmt: skip
    warned = made(tmp_path, "c", {}, (), {"kid": {**kid, "warnings": ["few"]}})
    found = compare.compare(compare.read_runs([folder, warned]))
    assert [cell["error"] for cell in found["columns"][0]["cells"]] == [0.25, 0.25] and "KID: few." in found["remarks"]


def test_damaged_tables_are_refused(tmp_path):
    path = Path(made(tmp_path, "a", {"psnr": [1.0] * 6}), "metrics.json")
    good = json.loads(path.read_text())
    stamp = good["protocols"]["psnr"]
    for change in (
        {"protocols": {"psnr": {}}},
        {"protocols": {"psnr": "PSNR"}},
        {"protocols": {"psnr": {**stamp, "better": None}}},
        {"images": [{"image": 3, "metrics": {}}]},
        {"images": [{"image": "a", "metrics": {}, "files": {"restored": ["x"]}}]},
        {"images": [{"image": "a", "metrics": {"restored": {"psnr": "much"}}}]},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=r"metrics\.json is no metrics_\*\.json .* or is damaged"):
            result_tables.read_results(path)
    path.write_text(json.dumps({**good, "images": [{"image": "a", "metrics": {"restored": {"psnr": float("nan")}}}]}))
    assert result_tables.read_results(path)[0].rows[0]["metrics"]["restored"] == {"psnr": None}


def test_sets_are_compared_only_whole(sets, photos):
    a, b, c = tables(sets, photos)
    stamp = {"name": "KID (X)", "type": "calculate_kid", "better": "lower"}
    for run, value in ((a, 0.5), (b, 0.25), (c, 0.1)):
        run.results.protocols["kid"] = stamp
        run.results.sets["restored"] = {"kid": {"value": value, "standard_error": 0.0625}}
    found = compare.compare([a, b])
    assert [cell["value"] for cell in found["columns"][1]["cells"]] == [0.5, 0.25]
    assert "| 0.5000 ± 0.0625 |" in compare.markdown(found)
    found = compare.compare([a, b, c])
    assert "KID (X) is of all images of a run, which differ: not comparable here." in found["remarks"]
    assert all(column["title"] != "KID (X)" for column in found["columns"])


def test_compare(workplace, sets, photos):
    tables(sets, photos)
    done = workplace.run("compare.py", "a", "b/metrics_set.json")
    assert done.returncode == 0, done.stderr
    data = json.loads((sets / "results/comparison/comparison.json").read_text())
    assert data["runs"] == ["a", "b"]
    assert "| minus a |" in done.stdout
    picture = cv2.imread(str(sets / "results/comparison/comparison.png"))
    assert picture.shape[1] == 3 * 320 + 2 * 6  # a, b, truth: inputs are no files here
    top = 18
    for image in compare.telling_images(compare.read_runs(["a", "b"]), data, 3):
        truth = cv2.imread(str(next((sets / "truth").rglob(f"{image}.png"))))
        h, w = truth.shape[:2]
        assert (picture[top : top + h, 652 : 652 + w] == truth).all()
        top += h + 24
    done = workplace.run("compare.py", "a", "b", "--images", "coffee.png", "-o", "two")
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(sets / "two/comparison.png")).shape[0] == 192 + 24 + 18
    for folder in ("a", "b"):
        shutil.rmtree(sets / folder / "pictures")
    shutil.rmtree(sets / "truth")
    done = workplace.run("compare.py", "a", "b", "-o", "three")
    assert done.returncode == 0 and "no pictures: none of the files is there" in done.stdout
    assert sorted(p.name for p in (sets / "three").iterdir()) == [
        f"comparison.{kind}" for kind in ("csv", "json", "md", "tex")
    ]


def test_a_comparison_for_papers_and_spreadsheets(sets, photos):
    """Values, intervals and differences are those of the JSON; the best of a column is bold; text is escaped."""
    a, b, _ = tables(sets, photos)
    b.name = "50%_of & #2"
    a.results.protocols["loe"] = b.results.protocols["loe"] = {
        "name": "LOE",
        "type": "calculate_loe",
        "better": "lower",
    }
    for run, value in ((a, 3.0), (b, 1.0)):
        for row in run.rows.values():
            row["metrics"]["restored"]["loe"] = value
    found = compare.compare([a, b])
    rows = list(csv.DictReader(io.StringIO(formats.comma_separated(found))))
    assert len(rows) == 2 * len(found["columns"])
    for row in rows:
        column = next(c for c in found["columns"] if c["title"] == row["metric"])
        cell = column["cells"][found["runs"].index(row["run"])]
        assert float(row["value"]) == cell["value"] and row["better"] == column["better"]
        assert [row["low"], row["high"]] == [str(bound) for bound in cell["interval"] or ("", "")]
        if row["run"] == "a":
            assert row["difference"] == ""
        else:
            assert float(row["difference"]) == cell["difference"]["mean"]
    text = formats.latex(found)
    body = [line for line in text.splitlines() if line.endswith(r"\\") and not line.startswith("%")]
    assert body[0] == r"Method & NIQE $\downarrow$ & PSNR $\uparrow$ & LOE $\downarrow$ \\"
    assert body[1].startswith("a & ") and body[2].startswith(r"50\%\_of \& \#2 & ")
    assert body[1].endswith(r"3.0000 \\") and body[2].endswith(r"\textbf{1.0000} \\")
    assert text.count(r"\textbf") == len(found["columns"])
    assert all(line.count(" & ") == len(found["columns"]) for line in body)


def test_wrong_calls_of_compare(workplace, sets, photos):
    tables(sets, photos)
    for args, words in (
        (["a"], ["two runs or more"]),
        (["a", "truth"], ["truth has no metrics*.json"]),
        (["a", "nowhere.json"], ["nowhere.json cannot be read"]),
        (["a", "b", "--stage", "restord"], ["did you mean 'restored'"]),
        (["a", "b", "--images", "cofee"], ["did you mean 'coffee'"]),
        (["a", "b", "--count", "0"], ["--count must be at least 1"]),
    ):
        assert_one_line_error(workplace.run("compare.py", *args), *words)
    shutil.copy("a/metrics_set.json", "a/metrics_other.json")
    assert_one_line_error(workplace.run("compare.py", "a", "b"), "metrics_other.json, metrics_set.json")
    data = json.loads((sets / "b/metrics_set.json").read_text())
    data["images"] = [{**row, "image": f"other_{row['image']}"} for row in data["images"]]
    (sets / "b/metrics_set.json").write_text(json.dumps(data))
    assert_one_line_error(workplace.run("compare.py", "a/metrics_set.json", "b"), "no image in common")


def test_the_tests_report(workplace):
    """tools/test.py writes the page, and tables that compare.py finds pictures with."""
    options = merged(TINY, {"train": {"total_iter": 1}})
    path = workplace.write(options)
    assert workplace.run("train.py", "-opt", path).returncode == 0
    done = workplace.run("test.py", "-opt", path, "--weights-dir", "none")
    assert done.returncode == 0, done.stderr
    folder = workplace.folder / "results/tiny"
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".log") == ["metrics_val.csv", "metrics_val.json", "metrics_val.md", "report_val.html", "visualization"]  # fmt: skip
    data = json.loads(
        re.search(r'id="data">(.*?)</script>', (folder / "report_val.html").read_text(), re.DOTALL).group(1)
    )
    assert data["stages"] == ["input", "initial", "restored"]
    assert set(data["pictures"][0]["images"]) == {"input", "initial", "restored", "truth"}
    rows = json.loads((folder / "metrics_val.json").read_text())["images"]
    assert rows[0]["files"] == {"truth": str(workplace.folder / "photos/astronaut.png"), "restored": "visualization/val/astronaut_tiny.png"}  # fmt: skip
    again = workplace.run("evaluate.py", "results/tiny/visualization/val", "photos", "--suffix", "_tiny", "--metrics", "psnr", "niqe", "-o", "again")  # fmt: skip
    assert again.returncode == 0, again.stderr
    found = json.loads((workplace.folder / "again/metrics.json").read_text())["images"]
    assert [r["metrics"]["restored"] for r in found] == [r["metrics"]["restored"] for r in rows]
    done = workplace.run("compare.py", "results/tiny", "again")
    assert done.returncode == 0, done.stderr
    assert "| val | +0.0000 |" in done.stdout
