"""tools/tables.py: the tables of both papers, each by one command, on stand-in data with the networks cut down."""

import json
import os
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from conftest import PHOTOS, ROOT, assert_one_line_error
from test_option_files import CUT
from ucdir_cli import tables as tool

from ucdir_plugin.cli import tables
from ucdir_plugin.evaluation.plans import read_plan
from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import apply_overrides, read_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError

PLANS = sorted(path.name for path in (ROOT / "options" / "tables").iterdir())
LITE = "{type: calculate_fid, network: efficientnet_lite0, patch_size: 32}"


def every_run(plan):
    return [(name, part, run) for name, part in plan.parts.items() for run in part.runs]


def test_there_is_a_plan_for_each_table_of_both_papers():
    names = [f"bird_{n}.yaml" for n in range(1, 9)] + [f"ucdir_{n}.yaml" for n in range(1, 5)]
    assert names == PLANS


@pytest.mark.parametrize("name", PLANS)
def test_plans_fit_the_option_files(name):
    """Columns are metrics of every run, and the published rows come from the papers' tables."""
    plan = read_plan(str(ROOT / "options" / "tables" / name))
    assert plan.source
    for _, part, run in every_run(plan):
        opt = load_options(run.opt, [*plan.options, *part.options, *run.options], is_train=False)
        assert set(part.columns) <= set(opt["val"]["metrics"])
        assert part.published


@pytest.fixture
def standin(place):
    """Images wherever the plans look for them, and a way to run plans with the networks cut down."""
    photos = []
    for number, photo in enumerate(("astronaut.png", "coffee.png")):
        image = cv2.imread(str(PHOTOS / photo))
        photos.append((f"{number}.png", cv2.resize(image, (40, 32), interpolation=cv2.INTER_AREA)))

    def lay(folder):
        os.makedirs(folder, exist_ok=True)
        for file, image in photos:
            cv2.imwrite(os.path.join(folder, file), image)

    def cut(name):
        plan_path = ROOT / "options" / "tables" / name
        plan, raw = read_plan(str(plan_path)), yaml.safe_load(plan_path.read_text())
        for part_name, part, run in every_run(plan):
            options = [*plan.options, *part.options, *run.options]
            read = read_options(run.opt)
            apply_overrides(read, options)
            network = read.get("network_g")
            if network:
                changes = list(CUT[network.get("arch", network["type"])])
                if network.get("predictor", True) is None:
                    changes = [change for change in changes if "predictor" not in change]
                train(read, changes, run.opt)
            else:
                changes = ["bird:settings:steps=2"]
                if "first_stage" in str(run.options):
                    lay(run.options[0].split("images: ")[1].split(",")[0])
                for folder in read["bird"].get("observations") or ():
                    lay(folder)
            changes.append(f"val:metrics:fid={LITE}")
            for phase in ("val", "test"):
                for key, folder in read["datasets"].get(phase, {}).items():
                    if key.startswith("dataroot") and folder:
                        lay(folder)
            entry = next(e for e in raw["parts"][part_name]["runs"] if e["name"] == run.name)
            entry.update(opt=os.path.relpath(run.opt), options=[*run.options, *changes])
        lay("datasets/FFHQ")
        Path(name).write_text(yaml.safe_dump(raw, sort_keys=False))
        return raw

    def train(read, changes, file):
        """Weights as a training of the option file would have left them."""
        models = Path("experiments") / read["name"] / "models"
        if not models.exists():
            apply_overrides(read, changes)
            torch.manual_seed(0)
            models.mkdir(parents=True)
            torch.save({"params_ema": build_arch(read["network_g"]).state_dict()}, models / "net_g_2.pth")

    place.cut = cut
    return place


@pytest.fixture
def make(standin, monkeypatch):
    """Runs the command here, its runs in forked processes; returns exit code and what was started."""

    def command(*arguments):
        started = []

        def start(line):
            started.append(line)
            file = next(word for word in line if word.endswith(".py"))
            done = standin.run(os.path.basename(file), *line[line.index(file) + 1 :])
            if done.returncode:
                print(done.stderr[-1500:])
            return done.returncode

        monkeypatch.setattr("sys.argv", ["tables.py", *arguments])
        monkeypatch.setattr(tables, "_start", start)
        return tables.run(tool.parse_args()), started

    return command


LARGE = ("bird_2.yaml", "bird_5.yaml", "bird_6.yaml", "bird_7.yaml", "ucdir_2.yaml", "ucdir_4.yaml")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.campaign) if n in LARGE else n for n in PLANS])
def test_each_table_of_the_papers(name, standin, make, capsys):
    raw = standin.cut(name)
    code, started = make(name)
    out, err = capsys.readouterr()
    assert code == 0, (out, err)
    assert len(started) == sum(len(part["runs"]) for part in raw["parts"].values())
    folder = Path("results/tables") / name.removesuffix(".yaml")
    text = (folder / "table.md").read_text()
    assert raw["title"] in text and "left out" not in text
    for part_name, part in raw["parts"].items():
        (written,) = (folder / part_name).iterdir()
        found = json.loads((written / "comparison.json").read_text())
        assert found["runs"] == [run["name"] for run in part["runs"]] + list(part.get("stages", {}))
        assert len(found["images"]) == 2 and found["published"].keys() == part["published"].keys()
        titles = {cell["metric"] for column in found["columns"] for cell in column["cells"] if cell}
        measured = titles & set(part["columns"])
        assert measured >= set(part["columns"]) - {"niqe", "pi", "lpips", "kid"}  # weights; 40x32 are too few for NIQE
        latex = (written / "comparison.tex").read_text()
        for row, values in part["published"].items():
            assert row.split(" (")[0] in latex and row in text
            shown = dict(zip(part["columns"], values))
            names = [next((c["metric"] for c in column["cells"] if c), None) for column in found["columns"]]
            assert found["published"][row] == [shown.get(metric) for metric in names]
        assert (written / "comparison.png").exists()
    if name == "bird_1.yaml":
        assert "2 unpaired images of FFHQ" in text
    if name == "bird_2.yaml":
        assert "degradation blur (sigma 2.5)" in text and "pixels those not in holes" in text


def test_what_is_done_is_kept_and_what_changed_is_made_again(standin, make, capsys):
    standin.cut("ucdir_1.yaml")
    (code, started), before = make("ucdir_1.yaml"), Path("results/tables/ucdir_1/table.md")
    assert (code, len(started)) == (0, 6)
    text = before.read_text()
    before.unlink()
    assert make("ucdir_1.yaml") == (0, []) and before.read_text() == text
    assert capsys.readouterr().out.count("kept: results/tables_ucdir_1_SID_") == 6
    code, started = make("ucdir_1.yaml", "--force_yml", "manual_seed=1")
    assert (code, len(started)) == (0, 6)
    weights = Path("experiments/sid_nafnet/models/net_g_2.pth")
    state = torch.load(weights)
    torch.save({"params_ema": {k: v * 0.9 for k, v in state["params_ema"].items()}}, weights)
    code, started = make("ucdir_1.yaml", "--force_yml", "manual_seed=1")
    assert code == 0 and [line[-1] for line in started] == ["name=tables_ucdir_1_SID_NAFNet"]
    image = cv2.imread("datasets/SID/test/lq/0.png")
    cv2.imwrite("datasets/SID/test/lq/0.png", 255 - image)
    code, started = make("ucdir_1.yaml", "--force_yml", "manual_seed=1")
    assert (code, len(started)) == (0, 6)


def test_what_is_missing_is_said_first_and_left_out(standin, make, capsys, monkeypatch):
    standin.cut("ucdir_1.yaml")
    (Path("experiments/sid_nafnet/models") / "net_g_2.pth").unlink()
    code, started = make("ucdir_1.yaml")
    err = capsys.readouterr().err
    assert (code, len(started)) == (1, 5)
    words = "it is not trained: python tools/train.py -opt"
    assert "left out: SID: NAFNet" in err and words in err and "sid_nafnet.yml" in err
    assert words in Path("results/tables/ucdir_1/table.md").read_text()
    standin.cut("bird_4.yaml")
    os.rename("datasets/HIDE", "elsewhere")
    code, started = make("bird_4.yaml", "--parts", "HIDE", "HDR")
    assert (code, len(started)) == (1, 2)
    assert "datasets/HIDE/test/lq does not exist" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the runs can be done; HIDE: BIR-D: .*does not exist"):
        make("bird_4.yaml", "--parts", "HIDE")
    with pytest.raises(UserError, match="has no part 'HIDEE'; did you mean 'HIDE'"):
        make("bird_4.yaml", "--parts", "HIDEE")
    with pytest.raises(UserError, match="--processes"):
        make("bird_4.yaml", "--processes", "0")


def test_a_run_that_fails_does_not_take_the_others(standin, make, capsys, monkeypatch):
    standin.cut("bird_4.yaml")
    Path("datasets/HIDE/test/lq/0.png").write_bytes(b"no image")
    Path("datasets/HIDE/test/lq/1.png").write_bytes(b"no image")
    code, started = make("bird_4.yaml", "--parts", "HIDE", "GoPro")
    assert (code, len(started)) == (1, 4)
    text = Path("results/tables/bird_4/table.md").read_text()
    assert text.count("left out: tools/test.py ended with 2") == 2
    assert Path("results/tables/bird_4/GoPro/GoPro/comparison.tex").exists()
    Path("results/tables/bird_4/table.md").unlink()
    with pytest.raises(UserError, match="none of the runs can be done; HIDE: .*ended with 2"):
        make("bird_4.yaml", "--parts", "HIDE")
    assert not Path("results/tables/bird_4/table.md").exists()


def test_a_run_whose_images_fail_in_part_is_in_the_table_and_tried_again(standin, make, monkeypatch):
    standin.cut("bird_4.yaml")
    arguments = ["bird_4.yaml", "--parts", "HIDE"]
    assert make(*arguments)[0] == 0
    start = tables._start
    for file in Path("results").glob("tables_bird_4_HIDE_*/plan.json"):
        file.unlink()
    monkeypatch.setattr(tables, "_start", lambda line: start(line) or 1)  # as test.py ends where some images failed
    monkeypatch.setattr("sys.argv", ["tables.py", *arguments])
    assert tables.run(tool.parse_args()) == 1
    text = Path("results/tables/bird_4/table.md").read_text()
    assert text.count("some of its images failed") == 2 and "| BIR-D |" in text
    code, started = make(*arguments)
    assert (code, len(started)) == (0, 2)


def test_old_results_stand_in_no_new_table(standin, make, monkeypatch):
    """torchrun's exit code is 1 whatever its processes' is; what an earlier run left must not be taken for theirs."""
    standin.cut("ucdir_1.yaml")
    assert make("ucdir_1.yaml")[0] == 0
    start = tables._start
    monkeypatch.setattr(tables, "_start", lambda line: 1)
    monkeypatch.setattr("sys.argv", ["tables.py", "ucdir_1.yaml", "--force_yml", "manual_seed=1"])
    with pytest.raises(UserError, match="none of the runs can be done; .*ended with 1"):
        tables.run(tool.parse_args())
    monkeypatch.setattr(tables, "_start", start)


def test_what_decides_a_run(standin, monkeypatch):
    """Every file that the options name: a prior, a first stage, a reference; and metrics whose weights come later."""
    standin.cut("bird_8.yaml")
    standin.cut("bird_1.yaml")

    def job(plan, part, number, *more, **flags):
        read = read_plan(plan)
        monkeypatch.setattr("sys.argv", ["tables.py", plan, *(["--force_yml", *more] if more else [])])
        args = tool.parse_args()
        for key, value in flags.items():
            setattr(args, key, value)
        chosen = read.parts[part]
        return tables._job(chosen.runs[number], "x", [*read.options, *chosen.options], args)

    before = job("bird_8.yaml", "random", 0).made_of
    assert job("bird_8.yaml", "random", 0).made_of == before
    cv2.imwrite("datasets/ImageNet/first_stage/0.png", cv2.imread("datasets/ImageNet/first_stage/1.png"))
    assert job("bird_8.yaml", "random", 0).made_of != before
    before = job("bird_1.yaml", "LFW", 0).made_of
    cv2.imwrite("datasets/FFHQ/2.png", cv2.imread("datasets/FFHQ/1.png"))
    assert job("bird_1.yaml", "LFW", 0).made_of != before
    lpips = "val:metrics:lpips={type: calculate_lpips}"
    assert job("bird_1.yaml", "LFW", 0, lpips).made_of != job("bird_1.yaml", "LFW", 0, lpips, download=True).made_of
    for wrong, words in (
        ("bird:prior=gone.pt", "gone.pt does not exist"),
        ("val:reference=gone", "gone does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            job("bird_1.yaml", "LFW", 0, wrong)
    names = {job("bird_1.yaml", "LFW", n).name for n in (0, 1)}
    assert len(names) == 2
    os.makedirs("raw")
    Path("raw/a.ARW").write_bytes(b"x")
    before = tables._state("raw")
    Path("raw/a.ARW").write_bytes(b"xy")
    assert tables._state("raw") != before  # of no image format
    os.symlink("gone", "raw/b.ARW")
    assert tables._state("raw")  # a link to nothing


def test_images_that_another_program_restored(standin, make, capsys):
    raw = standin.cut("bird_3.yaml")
    runs = raw["parts"]["LOL"]["runs"]
    others = {"restored": "others", "truth": "datasets/LOL/eval15/high", "input": "datasets/LOL/eval15/low"}
    runs.append({"name": "Zero-DCE", "opt": runs[0]["opt"], "options": runs[0]["options"], **others})
    Path("bird_3.yaml").write_text(yaml.safe_dump(raw))
    code, started = make("bird_3.yaml", "--parts", "LOL")
    assert (code, len(started)) == (1, 3)
    assert "Zero-DCE: others does not exist" in capsys.readouterr().err
    os.mkdir("others")
    for file in os.listdir("datasets/LOL/eval15/low"):
        image = cv2.imread(f"datasets/LOL/eval15/high/{file}")
        cv2.imwrite(f"others/{file}", cv2.GaussianBlur(image, (3, 3), 1))
    code, started = make("bird_3.yaml", "--parts", "LOL")
    assert (code, len(started)) == (0, 1)
    (written,) = Path("results/tables/bird_3/LOL").iterdir()
    found = json.loads((written / "comparison.json").read_text())
    assert found["runs"][-2:] == ["Zero-DCE", "input"]
    cells = {column["type"]: column["cells"][-2] for column in found["columns"]}
    assert {"calculate_psnr", "calculate_ssim", "calculate_loe", "calculate_fid"} <= {k for k, v in cells.items() if v}


PLAN = {"title": "t", "parts": {"p": {"title": "p", "runs": [{"name": "a", "opt": "a.yml"}]}}}


@pytest.mark.parametrize("change, words", [
    ({"parts": {}}, "there are none"),
    ({"titel": "x"}, "titel"),
    ({"parts": {"a/b": PLAN["parts"]["p"]}}, "letters, digits"),
    ({"parts": {"p": {"title": "p", "runs": []}}}, "no runs"),
    ({"parts": {"p": {"title": "p", "runs": PLAN["parts"]["p"]["runs"] * 2}}}, "two rows are called a"),
    ({"parts": {"p": {**PLAN["parts"]["p"], "stages": {"a": "input"}}}}, "two rows are called a"),
    ({"parts": {"p": {**PLAN["parts"]["p"], "stages": {"b": "truth"}}}}, "take input or initial"),
    ({"parts": {"p": {**PLAN["parts"]["p"], "columns": ["psnr"], "published": {"b": [1, 2]}}}}, "2 values, 1 columns"),
    ({"parts": {"p": {"title": "p", "runs": [{"name": "a", "opt": "a.yml", "truth": "t"}]}}}, "belong to restored"),
    ({"parts": {"p": {"title": "p", "runs": [{"name": "a"}]}}}, "opt"),
    ({}, "a.yml"),
])  # fmt: skip
def test_wrong_plans_are_one_line(change, words, workplace):
    (workplace.folder / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **change}))
    assert_one_line_error(workplace.run("tables.py", "plan.yaml"), words)


def test_by_its_own_processes(standin):
    """As users run it: each run a process of its own."""
    standin.cut("bird_5.yaml")
    done = standin.run("tables.py", "bird_5.yaml", "--parts", "LoLi-Phone")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| Model A |" in done.stdout and "published (BIR-D, Table 5)" in done.stdout
    assert "table: results/tables/bird_5/table.md" in done.stdout
