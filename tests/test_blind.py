"""BIR-D as its users meet it: tools/restore.py, tools/test.py, the Python API; what is learned; what bad input gets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from conftest import LQ_ONLY, assert_one_line_error, merged
from scipy.ndimage import gaussian_filter
from test_restore import files, read

import ucdir_plugin
from ucdir_plugin.diffusion.bird import data_steps
from ucdir_plugin.diffusion.bird.data_steps import Observation
from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel
from ucdir_plugin.diffusion.bird.kernel_steps import Gradient, LeastSquares, gaussian_smooth
from ucdir_plugin.diffusion.bird.operators import BlockMean, ChannelMean, Compose, HoleMask, Operator
from ucdir_plugin.diffusion.bird.tasks import TASKS, exposure_gains, preset, unsaturated
from ucdir_plugin.diffusion.noise import normal
from ucdir_plugin.options.check import check_options
from ucdir_plugin.registry import build_arch
from ucdir_plugin.restoration import bird, bird_options, companions, load
from ucdir_plugin.utils import degradations, image_reading
from ucdir_plugin.utils.errors import UserError

TEST = {
    "name": "b",
    "model_type": "BIRDModel",
    "bird": {"settings": {"steps": 2}},
    "datasets": {"val": LQ_ONLY},
    "val": {"metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 0}}},
}
DARK = {"name": "val", "type": "MixedDegradationDataset", "dataroot_gt": "photos"}


def run(place, task: str, *args: str, source: str | None = "photos/coffee.png", target: str = "out"):
    given = () if source is None else ("-i", source)
    return place.run("restore.py", "--model", "bird", "--task", task, *given, "-o", target, "--steps", "2", *args)


def ok(done):
    assert done.returncode == 0, done.stderr
    return done


def write(path: str, image: np.ndarray) -> None:
    """RGB in [0, 1], (H, W, 3)."""
    assert cv2.imwrite(path, (image[..., ::-1].clip(0, 1) * 255).round().astype(np.uint8))


@pytest.fixture
def scene(place):
    """A photograph, and what the tasks see of it."""
    x = read("photos/coffee.png")[..., ::-1].astype(np.float64) / 255
    write("truth.png", x)
    write("dark.png", x * 0.2)
    for number, gain in enumerate((0.3, 1.0, 2.0)):
        write(f"e{number}.png", x * gain)
    holes = np.zeros_like(x)
    holes[10:16, 8:15] = 1
    write("holes.png", holes)
    write("holed.png", x * (1 - holes))
    return place


TASK_ARGS = {
    "inpaint": ("holed.png", ("--mask", "holes.png")),
    "lowlight": ("dark.png", ()),
    "hdr": (None, ("--observations", "e0.png", "e1.png", "e2.png")),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_from_the_command_line(scene, task):
    source, more = TASK_ARGS.get(task, ("photos/coffee.png", ()))
    ok(run(scene, task, *more, source=source))
    name = Path(source or "e0.png").stem
    seen = [f"{name}.degraded{n}.png" for n in (1, 2, 3)] if task == "hdr" else [f"{name}.degraded.png"]
    assert files("out") == sorted([f"{name}.{e}" for e in ("json", "png", "learned.npz", "learned.png")] + seen)
    record = json.loads(Path(f"out/{name}.json").read_text())
    assert record["outputs"][0] == f"{name}.png" and record["nfe"] == 2
    assert record["settings"]["task"] == task and record["settings"]["weights"] == "ffdnet_color.pth"
    result, scale = read(f"out/{name}.png"), 4 if task == "sr4" else 1
    truth = read("truth.png")
    assert result.shape == (truth.shape[0] * scale, truth.shape[1] * scale, 3)
    with np.load(f"out/{name}.learned.npz") as found:
        arrays = dict(found)
    observations = len(seen)
    size = 15 if TASKS[task].blind and TASKS[task].simplex else TASKS[task].kernel_size
    assert arrays["kernel"].shape == (observations, 3, 1, size, size)
    assert arrays["kernels"].shape == (2, *arrays["kernel"].shape)
    np.testing.assert_array_equal(arrays["kernels"][-1], arrays["kernel"])
    np.testing.assert_allclose(arrays["kernel_sum"], arrays["kernels"].sum((3, 4, 5)), rtol=1e-6)
    for key in ("loss", "scale", "mask_mean"):
        assert arrays[key].shape == (2, observations)
    assert arrays["sigma"].shape == (2,) and arrays["sigma"][0] > arrays["sigma"][1]
    assert ("mask" in arrays) == TASKS[task].mask
    # The re-degraded output is K * result + M, seen through A, up to the border that is cut off and rounding.
    image = image_reading.to_tensor(image_reading.read_photo(f"out/{name}.png", 10**6))
    known = None
    if task == "inpaint":
        known = companions.read_mask("holes.png", truth.shape[:2])
    half = size // 2
    for number, file in enumerate(seen):
        kernel = torch.from_numpy(arrays["kernel"][number])[None].flip(-1, -2)  # saved as a point spread function
        d = Degradation(kernel, None, TASKS[task].operator(known), "reflect")
        again = d(image)  # of an exposure also where it is white, and tells nothing
        if "mask" in arrays:
            again = again + torch.from_numpy(arrays["mask"][number])
        shown = image_reading.to_tensor(image_reading.read_photo(f"out/{file}", 10**6))
        assert shown.shape[-2:] == again.shape[-2:]
        inner = (..., slice(half, -half), slice(half, -half))
        error = (shown - again.clamp(0, 1).expand_as(shown))[inner].abs()
        assert float(error.max()) < 0.02 and float(error.mean()) < 4e-3
    assert read(f"out/{name}.learned.png").shape[2] in (3, 4)


def test_the_restored_image_is_better(place):
    """A blurred photograph, blind, in all 16 steps; and the kernel is what blurred it."""
    truth = skimage.data.astronaut()[40:200, 150:310].astype(np.float32) / 255
    rng = np.random.default_rng(0)
    write("blurred.png", degradations.noise(degradations.motion_blur(truth, 9, 0), 2, rng))
    ok(place.run("restore.py", "--model", "bird", "--task", "motion", "-i", "blurred.png", "-o", "out"))

    def psnr(path: str) -> float:
        image = read(path)[..., ::-1].astype(np.float64) / 255
        return -10 * math.log10(np.square(image - truth).mean())

    assert psnr("out/blurred.png") > psnr("blurred.png") + 2
    kernel = np.load("out/blurred.learned.npz")["kernel"][0, 0, 0]
    assert kernel[7].sum() > 0.6  # the row that the motion is along
    assert kernel[7, 3:12].min() > 0.02


def test_test_py_does_what_restore_py_does(place):
    path = place.write(merged(TEST, {"bird": {"task": "blind"}}))
    ok(place.run("test.py", "-opt", path))
    ok(run(place, "blind", source="photos"))
    for name in ("astronaut", "chelsea", "coffee"):
        tested = f"results/b/visualization/val/{name}_b.png"
        np.testing.assert_array_equal(read(f"out/{name}.png"), read(tested))
        with (
            np.load(f"out/{name}.learned.npz") as a,
            np.load(f"results/b/visualization/val_learned/{name}.learned.npz") as b,
        ):
            assert set(a) == set(b)
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("task", ["sr4", "inpaint", "colorize", "multi", "lowlight"])
def test_test_py_measures_made_degradations(place, task):
    chain = {
        "sr4": [{"type": "block_mean", "factor": 4}],
        "inpaint": [{"type": "noise", "sigma": 2}, {"type": "holes", "share": 0.2, "size": 4}],
        "colorize": [{"type": "channel_mean"}],
        "multi": [{"type": "blur", "sigma": 1.0}, {"type": "channel_mean"}],
        "lowlight": [{"type": "exposure", "gain": 0.2}],
    }[task]
    path = place.write(merged(TEST, {"bird": {"task": task}, "datasets": {"val": {**DARK, "degradations": chain}}}))
    path = place.write(
        {**TEST, "bird": {"task": task, "settings": {"steps": 2}}, "datasets": {"val": {**DARK, "degradations": chain}}}
    )
    ok(place.run("test.py", "-opt", path))
    mean = json.loads(Path("results/b/metrics_val.json").read_text())["mean"]
    guessed = task in ("sr4", "inpaint", "colorize", "multi")
    assert ("initial" in mean) == guessed
    if task in ("inpaint", "lowlight"):
        assert mean["restored"]["psnr"] > mean["input"]["psnr"] + 3


def test_two_processes_restore_as_one(place):
    path = place.write(TEST)
    ok(place.run("test.py", "-opt", path))
    table, path_of = Path("results/b/metrics_val.csv"), "results/b/visualization/val_learned/coffee.learned.npz"
    text, one = table.read_text(), dict(np.load(path_of))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533")
    done = place.run("test.py", "-opt", path, "--launcher", "pytorch", launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    two = dict(np.load(path_of))
    assert table.read_text() == text and set(two) == set(one)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


def test_one_bad_image_does_not_stop_the_others(place):
    cv2.imwrite("photos/black.png", np.zeros((40, 40, 3), np.uint8))
    done = run(place, "blind", source="photos")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "failed: black.png: " in done.stderr and "all pixels are equal" in done.stderr
    assert {"astronaut.png", "chelsea.png", "coffee.png"} <= set(files("out")) and "black.png" not in files("out")
    done = place.run("test.py", "-opt", place.write(TEST))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    table = json.loads(Path("results/b/metrics_val.json").read_text())
    assert [row["image"] for row in table["images"]] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert "all pixels are equal" in table["failed"]["black.png"] and "failed, in no mean: black.png" in done.stdout


def test_a_lost_scale_stops_its_image_alone(place):
    """Where numbers are lost, the image is named and no NaN is written; the others are kept."""
    kernel = {"type": "Gradient", "rate": 3e38, "simplex": False}
    options = place.write(merged(TEST, {"bird": {"settings": {"kernel": kernel}}}))
    done = place.run("restore.py", "-opt", options, "-i", "photos", "-o", "out")
    assert_one_line_error(done, "none of the 3 images")
    assert done.stderr.count("turned non-finite in step") == 3
    assert not files("out")
    assert_one_line_error(place.run("test.py", "-opt", options), "none of the 3 images")


def test_samples(place):
    ok(run(place, "blind", "--samples", "2"))
    names = {"coffee_sample1", "coffee_sample2"}
    expected = {f"{n}.{e}" for n in names for e in ("png", "learned.npz", "learned.png", "degraded.png")}
    assert set(files("out")) == expected | {"coffee_mean.png", "coffee_spread.png", "coffee.json"}
    assert not np.array_equal(read("out/coffee_sample1.png"), read("out/coffee_sample2.png"))
    one, two = (np.load(f"out/{n}.learned.npz")["loss"] for n in sorted(names))
    assert not np.array_equal(one, two)


def test_names_and_what_is_there_already(place):
    ok(run(place, "blind"))
    first = read("out/coffee.png")
    assert "1 finished before" in ok(run(place, "blind")).stdout
    Path("out/coffee.json").unlink()
    assert_one_line_error(run(place, "blind"), "coffee", "is there already", "--overwrite")
    ok(run(place, "blind", "--overwrite"))
    np.testing.assert_array_equal(read("out/coffee.png"), first)


def test_patches_equal_the_whole_image(place):
    """FFDNet is local and says how far it looks: everything but the prior sees the whole image anyway."""
    image = np.random.default_rng(0).integers(0, 256, (150, 131, 3))
    write("large.png", gaussian_filter(image, (2, 2, 0)) / 255)
    ok(run(place, "blind", "--tile", "0", source="large.png"))
    ok(run(place, "blind", "--tile", "96", source="large.png", target="tiled"))
    assert json.loads(Path("tiled/large.json").read_text())["patches"] > 1
    assert np.abs(read("tiled/large.png").astype(int) - read("out/large.png")).max() <= 1
    kernels = [np.load(f"{folder}/large.learned.npz")["kernel"] for folder in ("out", "tiled")]
    np.testing.assert_allclose(*kernels, atol=1e-4)


def test_a_gray_photograph_gets_colours_only_where_the_task_gives_them(place):
    gray = read("photos/coffee.png").mean(2).round().astype(np.uint8)
    cv2.imwrite("gray.png", gray)
    ok(run(place, "colorize", source="gray.png"))
    ok(run(place, "blind", source="gray.png", target="plain"))
    assert read("out/gray.png").shape == (*gray.shape, 3) and read("plain/gray.png").shape == gray.shape


def test_first_stage(place):
    """Images that are there already, or a model: as the start, and as what is restored."""
    Path("first").mkdir()
    truth = read("photos/coffee.png")
    cv2.imwrite("first/coffee.png", truth)
    cv2.imwrite("blurred.png", cv2.GaussianBlur(truth, (0, 0), 2.0))
    Path("blurred.png").rename("coffee.png")
    options = {**TEST, "bird": {"first_stage": {"images": "first", "use": "start"}, "settings": {"steps": 1}}}
    options["bird"]["settings"].update(sigma_start=0.002, sigma_end=0.002)

    def restored(use: str, **more) -> np.ndarray:
        stage = {"images": "first", "use": use, **more}
        opt = place.write(merged(options, {"bird": {"first_stage": stage}}), "b.yml")
        ok(place.run("restore.py", "-opt", opt, "-i", "coffee.png", "-o", use))
        return read(f"{use}/coffee.png").astype(float)

    def error(image: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(image - other)[4:-4, 4:-4].mean())

    blurred = read("coffee.png").astype(float)
    plain = merged(options, {"bird": {"first_stage": None}})
    ok(place.run("restore.py", "-opt", place.write(plain, "b.yml"), "-i", "coffee.png", "-o", "plain"))
    without = read("plain/coffee.png").astype(float)
    assert error(without, blurred) < 2 < error(truth, blurred)
    # t* is so small that hardly anything but the start and the data decide.
    assert error(restored("start"), truth) < error(without, truth)
    both = restored("both")
    assert error(both, truth) < 2 and error(restored("target"), truth) < 2  # K is a delta and y the truth
    model = merged(options, {"bird": {"first_stage": {"images": None, "model": "options.yml"}}})
    ok(place.run("restore.py", "-opt", place.write(model, "m.yml"), "-i", "coffee.png", "-o", "model"))
    assert error(read("model/coffee.png").astype(float), without) > 1  # random weights: another start
    small = merged(options, {"bird": {"first_stage": {"images": "small.png"}}})
    cv2.imwrite("small.png", truth[:20])
    assert_one_line_error(
        place.run("restore.py", "-opt", place.write(small, "b.yml"), "-i", "coffee.png", "-o", "o"),
        "first stage",
        "is needed",
    )


def test_the_python_api(place):
    model = ucdir_plugin.load_model("bird", bird={"task": "motion"}, sampling={"steps": 2, "kernel_size": 9})
    found = ucdir_plugin.restore("photos/coffee.png", model)
    assert found.learned.kernel[0].shape == (3, 1, 9, 9) and found.image.shape == read("photos/coffee.png").shape
    assert found.initial is None and found.info["nfe"] == 2
    array = image_reading.read_photo("photos/coffee.png", 10**6).pixels
    again = ucdir_plugin.restore(array, model, key="coffee.png")
    np.testing.assert_array_equal(again.image, found.image)
    assert ucdir_plugin.restore(array, model, key="other").image.tobytes() != found.image.tobytes()


def test_colours_start_from_much_noise_where_the_prior_generates(place):
    """A small random ADM as a file that says what it is: the prior of a network, by name, in patches of its size."""
    torch.manual_seed(0)
    network = {"type": "ADMUNet", "image_size": 32, "num_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1}
    network.update(attention_resolutions=[], num_head_channels=32, learn_sigma=True)
    torch.save(build_arch(network).state_dict(), "net.pt")
    place.write({k: v for k, v in network.items() if k != "type"}, "adm.yml")
    ok(place.run("convert_weights.py", "--from", "adm", "-opt", "adm.yml", "net.pt", "small.safetensors"))
    ok(run(place, "colorize", "--prior", "small.safetensors"))
    settings = json.loads(Path("out/coffee.json").read_text())["settings"]
    assert settings["settings"]["sigma_start"] == bird.COLOUR_SIGMA and settings["settings"]["steps"] == 2
    assert settings["tile"] == 32 and settings["weights"] == "small.safetensors"
    model = ucdir_plugin.load_model("bird", bird={"task": "colorize", "prior": "small.safetensors"})
    assert model.settings.sigma_start == bird.COLOUR_SIGMA and model.steps == bird.COLOUR_STEPS
    assert ucdir_plugin.load_model("bird", bird={"prior": "small.safetensors"}).settings.sigma_start is None
    ok(run(place, "blind", "--prior", "small.safetensors", "--preset", "guided", target="guided"))
    scales = np.load("guided/coffee.learned.npz")["scale"]
    assert np.isfinite(scales).all() and (scales > 0).all()


BAD = {
    "task": (["--task", "blindd"], "did you mean 'blind'"),
    "preset": (["--preset", "defaut"], "did you mean 'default'"),
    "prior": (["--prior", "ffdnett"], "did you mean 'ffdnet'"),
    "setting": (["--set", "stepz=3"], "did you mean 'steps'"),
    "value": (["--set", "inner=many"], "bird:settings:inner"),
    "kernel": (["--set", "kernel_size=8"], "odd size"),
    "class": (["--set", "data={type: Prox}"], "Proximal"),
    "nested": (["--set", "data={nois: 1}"], "did you mean 'noise'"),
    "no mapping": (["--set", "data=3"], "a mapping is expected"),
    "noise": (["--noise", "-1"], "noise"),
    "noise of gradient": (["--noise", "3", "--preset", "guided"], "no meaning"),
    "steps": (["--steps", "0"], "steps"),
    "steps of prior": (["--set", "levels=uniform", "--steps", "500"], "levels"),
    "start": (["--set", "start=noise"], "cannot start from pure noise"),
    "sigma": (["--set", "sigma_start=0.5"], "more than the prior's"),
    "mask": (["--mask", "photos/coffee.png"], "only the task inpaint"),
    "blend": (["--blend", "0.5"], "blend has no meaning"),
    "sampler": (["--sampler", "ddim"], "sampler has no meaning"),
    "condition": (["--condition", "quality=3"], "BIR-D is told nothing"),
    "dtype": (["--dtype", "bf16"], "dtype has no meaning"),
    "tile": (["--tile", "8"], "half the tile (8)"),
    "observation": (["--observations", "missing.png"], "missing.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_one_line(place, name):
    args, words = BAD[name]
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    cv2.imwrite("big.png", image)
    assert_one_line_error(run(place, "blind", *args, source="big.png"), words)
    assert not Path("out").exists() or not files("out")


def test_bad_companions_get_one_line(scene):
    cv2.imwrite("odd.png", np.zeros((5, 5, 3), np.uint8))
    cv2.imwrite("white.png", np.full(read("truth.png").shape, 255, np.uint8))
    assert_one_line_error(run(scene, "inpaint"), "--mask")
    assert_one_line_error(run(scene, "inpaint", "--mask", "odd.png"), "5x5", "one size")
    assert_one_line_error(run(scene, "inpaint", "--mask", "white.png"), "leaves nothing")
    assert_one_line_error(run(scene, "inpaint", "--mask", "nowhere"), "nowhere does not exist")
    assert_one_line_error(run(scene, "hdr", "--observations", "odd.png", source="e1.png"), "different sizes", "5x5")
    Path("masks").mkdir()
    cv2.imwrite("masks/else.png", read("holes.png"))
    assert_one_line_error(run(scene, "inpaint", "--mask", "masks", source="holed.png"), "holed.*", "masks")
    assert_one_line_error(scene.run("restore.py", "--model", "bird", "-o", "out"), "-i is missing")
    done = scene.run("restore.py", "-opt", "options.yml", "--task", "blind", "-i", "truth.png", "-o", "out")
    assert_one_line_error(done, "task", "--model bird")


WITHOUT_DEEPINV = "deepinv is not installed: pip install 'ucdir-plugin[deepinv]'"


@pytest.mark.parametrize("solver", ["ddnm", "ddrm", "dps", "diffpir"])
def test_other_solvers_beside_it(scene, solver):
    """The same prior, images and seeds in tools/test.py; tools/compare.py puts the tables side by side."""
    pytest.importorskip("deepinv", reason=WITHOUT_DEEPINV)
    chain = [{"type": "block_mean", "factor": 4}]
    options = merged(TEST, {"bird": {"task": "sr4", "settings": {"steps": 4}}})
    options["datasets"]["val"] = {**DARK, "degradations": chain}
    path = scene.write(options)
    for name, value in (("b", "bird"), ("other", solver)):
        ok(scene.run("test.py", "-opt", path, "--force_yml", f"name={name}", f"bird:solver={value}"))
    done = ok(scene.run("compare.py", "results/b", "results/other"))
    table = done.stdout
    assert "psnr" in table.lower() and "other" in table
    one, two = (json.loads(Path(f"results/{n}/metrics_val.json").read_text())["mean"] for n in ("b", "other"))
    assert one["initial"] == two["initial"] and one["restored"] != two["restored"]
    assert two["restored"]["psnr"] > 20


BAD_OPTIONS = {
    "network_g has no meaning": {"network_g": {"type": "UCDIRDenoiser"}},
    "train has no meaning": {"train": {"total_iter": 1}},
    "did you mean 'task'": {"bird": {"tusk": "blind"}},
    "a kernel is square": {"bird": {"blur": {"file": "wide.npy"}}},
    "cannot be read": {"bird": {"blur": {"file": "none.npy"}}},
    "there is no 'gauss'": {"bird": {"blur": {"type": "gauss"}}},
    "has the numbers sigma": {"bird": {"blur": {"type": "gaussian"}}},
    "makes images 4 times": {"bird": {"task": "sr4"}, "scale": 2},
    "give model": {"bird": {"first_stage": {"use": "start"}}},
    "go with model": {"bird": {"first_stage": {"images": "a", "weights": "b"}}},
    "bird:blur has no meaning": {"bird": {"task": "lowlight", "blur": {"type": "gaussian", "sigma": 2}}},
    "ablation models are of gradient": {"bird": {"ablation": "A"}},
    "did you mean 'steps'": {"bird": {"task": "sr4", "solver": "ddnm", "settings": {"step": 3}}},
    "needs a known degradation": {"bird": {"task": "deblur", "solver": "dps"}},
    "has no preset": {"bird": {"task": "sr4", "solver": "dps", "preset": "guided"}},
}


@pytest.mark.parametrize("words", BAD_OPTIONS)
def test_bad_options_get_one_line(place, words):
    if "solver" in BAD_OPTIONS[words].get("bird", {}):
        pytest.importorskip("deepinv", reason=WITHOUT_DEEPINV)
    np.save("wide.npy", np.ones((3, 5)))
    options = merged(TEST, BAD_OPTIONS[words])
    done = place.run("restore.py", "-opt", place.write(options), "-i", "photos/coffee.png", "-o", "out")
    assert_one_line_error(done, words)


def test_it_cannot_be_trained(place):
    train = {"name": "t", "type": "JPEGDataset", "dataroot_gt": "photos", "quality": 10, "gt_size": 16}
    options = merged(TEST, {"datasets": {"train": train}})
    assert_one_line_error(place.run("train.py", "-opt", place.write(options)), "train")


def test_settings_are_changed_by_name():
    base = preset("guided", "blind")
    new = bird_options.changed(
        base, {"steps": 7, "data": {"colour": 0.5, "scale": {"type": "FixedScale", "eta": 0.25}}}, "w"
    )
    assert new.steps == 7 and new.data.colour == 0.5 and new.data.scale == data_steps.FixedScale(None, 0.25)
    assert replace(new, steps=base.steps, data=base.data) == base
    assert bird_options.changed(
        preset("default"), {"kernel": {"type": "Gradient", "rate": 0.1}}, "w"
    ).kernel == Gradient(0.1)
    assert bird_options.changed(preset("default"), {"kernel": {"ridge": 0.1}}, "w").kernel == LeastSquares(ridge=0.1)
    with pytest.raises(UserError, match="w:data:scale:type"):
        bird_options.changed(base, {"data": {"scale": {"type": "Adaptive"}}}, "w")


def test_a_known_blur_is_what_it_says(tmp_path):
    kernel = bird_options.known_kernel({"type": "gaussian", "sigma": 1.5})
    expected = gaussian_filter(np.eye(1, 11 * 11, 60).reshape(11, 11), 1.5, truncate=5 / 1.5 + 0.01)[1:-1, 1:-1]
    assert kernel.shape[-1] == 2 * math.ceil(4.5) + 1
    image = torch.rand(1, 3, 20, 20)
    want = degradations.blur(image[0].permute(1, 2, 0).numpy(), 1.5)
    d = Degradation(kernel)
    np.testing.assert_allclose(d(image)[0].permute(1, 2, 0).numpy(), want, atol=1e-6)
    assert abs(float(kernel[0, 0, 0, 5, 5]) - expected.max()) < 0.01
    np.save(tmp_path / "k.npy", np.outer([1, 2, 1], [1, 2, 1]))
    found = bird_options.known_kernel({"file": str(tmp_path / "k.npy")})
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)


def test_kernels_of_files_are_point_spread_functions(place):
    """What a bright dot becomes, saved or given; and what was learned can be given back."""
    psf = np.zeros((5, 5))
    psf[2, 2], psf[0, 4] = 0.7, 0.3
    np.save("psf.npy", psf)
    dot = torch.zeros(1, 3, 9, 9)
    dot[..., 4, 4] = 1
    seen = Degradation(bird_options.known_kernel({"file": "psf.npy"}), padding="zeros")(dot)
    np.testing.assert_allclose(seen[0, 0, 2:7, 2:7], psf, atol=1e-6)
    model = ucdir_plugin.load_model("bird", bird={"task": "motion", "blur": {"file": "psf.npy"}}, sampling={"steps": 1})
    found = ucdir_plugin.restore("photos/coffee.png", model)
    np.testing.assert_allclose(found.learned.kernel[0][0, 0], psf, atol=1e-6)
    np.testing.assert_allclose(found.learned.kernels[-1, 0, 0, 0], psf, atol=1e-6)


def test_nothing_is_written_over_another(place):
    """A companion of one image has the name of another image, or of the input itself."""
    Path("f").mkdir()
    for name in ("a", "a.degraded"):
        cv2.imwrite(f"f/{name}.png", read(f"photos/{'coffee' if name == 'a' else 'chelsea'}.png"))
    for more in ((), ("--overwrite",)):
        done = run(place, "blind", *more, source="f")
        assert done.returncode == 1 and "written over a result of a.degraded.png" in done.stderr
        assert "a.png" not in files("out")
        restored = json.loads(Path("out/a.degraded.json").read_text())
        assert restored["input"] == "a.degraded.png"
        assert np.abs(read("out/a.degraded.png").astype(float) - read("f/a.degraded.png")).mean() < 20
    before = Path("f/a.degraded.png").read_bytes()
    done = run(place, "blind", "--overwrite", source="f/a.degraded.png", target="f/a.png")
    assert_one_line_error(done, "written over the input")
    assert Path("f/a.degraded.png").read_bytes() == before


def test_another_mask_is_another_setting(scene):
    ok(run(scene, "inpaint", "--mask", "holes.png", source="holed.png"))
    assert "with other settings" not in ok(run(scene, "inpaint", "--mask", "holes.png", source="holed.png")).stdout
    cv2.imwrite("holes.png", 255 - read("holes.png"))
    assert (
        "1 of them with other settings" in ok(run(scene, "inpaint", "--mask", "holes.png", source="holed.png")).stdout
    )


def test_what_lies_under_holes_does_not_count(scene):
    """A photograph with a mask, its holes not black: the figure compares what was observed."""
    learned = []
    for image in ("holed.png", "truth.png"):
        model = ucdir_plugin.load_model("bird", bird={"task": "inpaint", "mask": "holes.png"}, sampling={"steps": 2})
        learned.append(ucdir_plugin.restore(image, model, key="a").learned)
    torch.testing.assert_close(learned[0].y[0], learned[1].y[0])
    torch.testing.assert_close(learned[0].image, learned[1].image)


def test_an_exposure_that_tells_nothing_counts_for_nothing(scene):
    white, black = np.ones_like(read("truth.png")) * 255, np.zeros_like(read("truth.png"))
    white[..., 0] = read("truth.png")[..., 0]  # one channel is not constant
    cv2.imwrite("white.png", white)
    cv2.imwrite("black.png", black)
    ok(run(scene, "hdr", "--observations", "e0.png", "e1.png", "white.png", source=None))
    ok(run(scene, "hdr", "--observations", "e0.png", "e1.png", "black.png", source=None, target="dark"))
    assert_one_line_error(
        run(scene, "hdr", "--observations", "black.png", "black.png", source=None, target="x"), "all pixels are equal"
    )


def test_small_images_and_large_kernels_are_named(place):
    cv2.imwrite("tiny.png", read("photos/coffee.png")[:8, :9])
    assert_one_line_error(run(place, "blind", source="tiny.png"), "9x8", "smaller than its kernel of 15x15")
    ok(run(place, "blind", "--set", "kernel_size=5", source="tiny.png"))
    assert_one_line_error(run(place, "blind", "--set", "kernel_size=67"), "at most 65")


@pytest.mark.parametrize("text, words", [
    ("bird: [1]", "option bird: a mapping"),
    ("bird: blind", "option bird: a mapping"),
    ("bird: {settings: 5}", "option bird:settings: a mapping"),
    ("bird: {settings: [a]}", "option bird:settings: a mapping"),
    ("bird: {blur: {file: 3}}", "path of a file"),
    ("bird: {blur: {type: [1]}}", "there is no [1]"),
    ("bird: {blur: {type: gaussian, sigma: .inf}}", "no number to compute with"),
    ("bird: {blur: {file: empty.npy}}", "cannot be read"),
    ("bird: {blur: {file: complex.npy}}", "real numbers"),
    ("bird: {settings: {data: {type: [x]}}}", "there is no ['x']"),
    ("bird: {settings: {data: {weight: -1}}}", "weight must be"),
    ("bird: {settings: {kernel: {quantile: 2}}}", "quantile must be in [0, 1)"),
    ("bird: {settings: {kernel: {ridge: -5}}}", "ridge must be"),
    ("bird: {noise: 3, settings: {data: {type: Gradient}}}", "bird:noise has no meaning"),
    ("bird: {first_stage: {images: photos, use: target}, observations: [photos]}", "remove bird:observations"),
    ("bird: {first_stage: {model: y.yml}}", "has a first stage itself"),
])  # fmt: skip
def test_options_of_other_types_get_one_line(place, text, words):
    Path("empty.npy").write_bytes(b"")
    np.save("complex.npy", np.ones((3, 3), complex))
    Path("y.yml").write_text(f"name: y\nmodel_type: BIRDModel\n{text}\n")
    done = place.run("restore.py", "-opt", "y.yml", "-i", "photos/coffee.png", "-o", "out", "--steps", "2")
    assert_one_line_error(done, words)


def test_empty_settings_are_none(place):
    Path("y.yml").write_text("name: y\nmodel_type: BIRDModel\nbird: {settings: }\n")
    assert ucdir_plugin.load_model("y.yml").settings == preset("default", "blind")


def test_a_known_blur_restores_better_than_an_unknown_one():
    truth = torch.tanh(normal((1, 3, 48, 48), 3)) * 0.5 + 0.5
    truth = gaussian_smooth(truth, 1.0)
    blur = {"type": "motion", "length": 7, "angle": 0}
    options = {"name": "b", "model_type": "BIRDModel", "bird": {"blur": blur, "task": "motion"}}
    device = torch.device("cpu")
    y = Degradation(bird_options.known_kernel(blur))(truth)

    def error(changes: dict) -> float:
        opt = check_options(merged(options, {"bird": changes}), False)
        found = load.from_options(opt, device).solve([y], ["a"])
        return float(((found.image + 1) / 2 - truth)[..., 8:-8, 8:-8].square().mean() ** 0.5)

    assert error({}) < error({"blur": None})


@pytest.mark.parametrize("operator", ["identity", "blocks", "mean", "holes", "all"])
@pytest.mark.parametrize("padding", ["valid", "zeros", "reflect"])
@pytest.mark.parametrize("size", [3, 5, 9])
def test_blurs_by_fft_equal_direct_ones(size, padding, operator):
    """maps() against the convolution and its adjoint by automatic differentiation, an own kernel for each image."""
    kernel = torch.rand(2, 3, 1, size, size, dtype=torch.float64)
    side = (24, 36) if padding != "valid" else (24 + size - 1, 36 + size - 1)
    holes = HoleMask((torch.rand(2, 1, 24, 36) > 0.3).double())
    found = {
        "identity": Operator(),
        "blocks": BlockMean(2),
        "mean": ChannelMean(),
        "holes": holes,
        "all": Compose([ChannelMean(), holes]),
    }[operator]
    d = Degradation(kernel, torch.rand(2, 1, 24, 36).double(), found, padding)
    x = torch.rand(2, 3, *side, dtype=torch.float64)
    forward, adjoint = d.maps(x)
    y = d.linear()(x)
    torch.testing.assert_close(forward(x), y, rtol=0, atol=1e-9)
    v = torch.rand_like(y)
    torch.testing.assert_close(adjoint(v), d.adjoint(x)(v), rtol=0, atol=1e-9)
    torch.testing.assert_close((forward(x) * v).sum(), (x * adjoint(v)).sum(), rtol=1e-10, atol=0)


def test_a_dark_image_is_guided_as_a_bright_one():
    """K, M, y and their noise all times g: the data step must give the same image."""
    torch.manual_seed(0)
    x0, kernel = torch.rand(1, 3, 12, 12).double() * 2 - 1, start_kernel(1, 5, "gaussian").double()
    y = torch.rand(1, 3, 12, 12).double()
    level, found = data_steps.Level(0.1, 1.0, 10), []
    for gain in (1.0, 0.1):
        d = Degradation(kernel * gain)
        step = data_steps.Proximal(noise=0.01 * gain, kernel_error=0.3, iterations=40)
        found.append(step(x0, [Observation(y * gain * 2 - 1, d, x0, [y * gain])], level).x0)
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_masks_are_smooth():
    torch.manual_seed(0)
    x = torch.rand(2, 1, 20, 31)
    for sigma in (0.7, 3.0):
        expected = gaussian_filter(
            x.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
        )
        np.testing.assert_allclose(gaussian_smooth(x, sigma).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(gaussian_smooth(torch.full((1, 1, 4, 4), 0.3), 8.0), torch.full((1, 1, 4, 4), 0.3))
    y, image = torch.rand(1, 3, 24, 24), torch.rand(1, 3, 24, 24)
    d = Degradation(start_kernel(1, 5) * 0.2, torch.zeros(1, 1, 24, 24))
    rough = Gradient(mask_rate=0.05, simplex=False)(image, [y], d, 0.1, 0.1).mask
    smooth = Gradient(mask_rate=0.05, mask_sigma=4.0, simplex=False)(image, [y], d, 0.1, 0.1).mask
    torch.testing.assert_close(smooth, gaussian_smooth(rough, 4.0))


def test_exposures_are_seen_together():
    scene = torch.rand(1, 3, 40, 40).mul(0.9)
    gains = torch.tensor([0.25, 1.0, 2.5])
    images = [(scene * g).clamp(0, 1) for g in gains]
    found = exposure_gains(images)[:, 0]
    torch.testing.assert_close(found / found[1], gains / gains[1], rtol=1e-4, atol=0)
    told = unsaturated(images)
    assert told[0].all() and not told[2].all()
    torch.testing.assert_close(told[2].bool(), images[2].amax(1, keepdim=True) < 0.98)
    # Nothing is above the range once it is as bright as the middle one: its own brightness is the scene's.
    torch.testing.assert_close(found, gains, rtol=1e-4, atol=0)
    # A scene whose highlights only the darkest shows becomes darker, but to half at most.
    bright = [(scene * 1.8 * g).clamp(0, 1) for g in (0.1, 0.9)]
    assert 1 < float(exposure_gains(bright)[1, 0]) <= 2
    settings = preset("default", "hdr")
    made = TASKS["hdr"].degradations([i * 2 - 1 for i in images], settings)
    torch.testing.assert_close(torch.stack([d.kernel.sum((2, 3, 4))[0, 0] for d in made]), found)
    assert isinstance(made[2].operator, HoleMask) and made[2].padding == "valid"
    # One exposure of one image alone is low light.
    assert type(TASKS["hdr"].degradations([images[0] * 2 - 1], settings)[0].operator) is Operator


def test_holes_are_a_share_and_the_image_is_black_there():
    image = np.random.default_rng(0).random((64, 48, 3), dtype=np.float32)
    chain = degradations.chain([{"type": "holes", "share": 0.25, "size": 8}])
    rng = np.random.default_rng(1)
    holed, _ = degradations.degrade(chain, image, rng)
    hidden = np.isnan(holed)
    assert (hidden.all(2) == hidden.any(2)).all() and abs(hidden.mean() - 0.25) < 0.005
    np.testing.assert_array_equal(holed[~hidden], image[~hidden])
    again, _ = degradations.degrade(chain, image, np.random.default_rng(1))
    np.testing.assert_array_equal(again, holed)
    small = degradations.degrade(degradations.chain([{"type": "block_mean", "factor": 4}]), image[:, :46], rng)[0]
    np.testing.assert_allclose(small[0, 0], image[:4, :4].mean((0, 1)), rtol=1e-6)
    assert small.shape == (16, 11, 3)
    for bad in (
        [{"type": "holes", "share": 0.1, "size": 4}, {"type": "noise", "sigma": 1}],
        [{"type": "block_mean", "factor": [2, 4]}],
        [{"type": "block_mean", "factor": 2, "probability": 0.5}],
    ):
        with pytest.raises(UserError):
            degradations.chain(bad)
