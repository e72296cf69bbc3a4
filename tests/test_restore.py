"""tools/restore.py and the Python API: what comes out, what is kept, and what bad input gets."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import EDSR, RESTORING, assert_one_line_error, merged
from PIL import Image

import ucdir_plugin
from ucdir_plugin.archs import UCDIR
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.registry import build_arch
from ucdir_plugin.restoration import folder as restore_folder
from ucdir_plugin.restoration import jobs, load, restore
from ucdir_plugin.restoration import network as network_restorer
from ucdir_plugin.utils import image_reading, image_writing
from ucdir_plugin.utils.errors import UserError, WriteError
from ucdir_plugin.zoo import model_files


def run(place, *args: str, source: str = "photos", target: str = "out", opt: str = "options.yml"):
    which = () if "--model" in args else ("-opt", opt)
    return place.run("restore.py", *which, "-i", source, "-o", target, *args)


def read(path: str | Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    return image


def files(folder: str) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def test_a_folder_is_restored_as_test_py_does(place):
    done = run(place)
    assert done.returncode == 0, done.stderr
    assert files("out") == sorted(f"{n}.{e}" for n in ("astronaut", "chelsea", "coffee") for e in ("json", "png"))
    # Off a terminal: a line for each image and nothing else.
    lines = done.stdout.splitlines()
    assert [line.split(" -> ")[0] for line in lines] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert done.stderr == ""
    assert place.run("test.py", "-opt", "options.yml").returncode == 0
    for name in ("astronaut", "chelsea", "coffee"):
        tested = read(f"results/tiny/visualization/val/{name}_tiny.png")
        np.testing.assert_array_equal(read(f"out/{name}.png"), tested)
        assert np.abs(tested.astype(int) - read(f"photos/{name}.png")).max() > 0


@pytest.mark.parametrize(
    "network",
    [
        {"type": "SIDUNet", "width": 4, "levels": 2, "residual": True},
        {"type": "UCDIRDenoiser", "in_channel": 3, "inner_channel": 8, "channel_mults": [1, 2], "res_blocks": 1},
    ],
    ids=lambda network: network["type"],
)
def test_a_network_of_one_pass_restores_as_test_py_does(place, network):
    """Under BasicSR's own model it sees [0, 1], not the [-1, 1] that UCDIR would give it."""
    options = merged(EDSR, {"name": "one", "scale": 1, "network_g": None, "path": {"pretrain_network_g": "one.pth"}})
    place.write({**options, "network_g": network, "val": {"save_img": True}}, "one.yml")
    torch.save({"params": build_arch(network).state_dict()}, "one.pth")
    assert run(place, opt="one.yml").returncode == 0
    done = place.run("test.py", "-opt", "one.yml")
    assert done.returncode == 0, done.stderr
    for name in ("astronaut", "chelsea", "coffee"):
        np.testing.assert_array_equal(read(f"out/{name}.png"), read(f"results/one/visualization/val/{name}_one.png"))


def test_patches_of_a_local_network_equal_the_whole_image(place):
    local = {"attn_res": [], "mid_attn": False, "norm": "layernorm2d"}
    options = merged(RESTORING, {"network_g": {"denoiser": local}, "path": {"pretrain_network_g": "local.pth"}})
    torch.save({"params": build_arch(options["network_g"]).state_dict()}, "local.pth")
    opt = place.write(options, "local.yml")
    cv2.imwrite("large.png", np.random.default_rng(0).integers(0, 256, (150, 131, 3)))
    assert run(place, "--tile", "0", source="large.png", opt=opt).returncode == 0
    record = json.loads(Path("out/large.json").read_text())
    radius = record["settings"]["receptive_field"]
    tiles = ("--overlap", str(radius), "--tile", str(2 * radius + 16))
    assert run(place, *tiles, source="large.png", target="tiled", opt=opt).returncode == 0
    assert json.loads(Path("tiled/large.json").read_text())["patches"] > 1
    assert np.abs(read("tiled/large.png").astype(int) - read("out/large.png")).max() <= 1
    assert (read("tiled/large.png") == read("out/large.png")).mean() > 0.999
    assert run(place, source="photos/coffee.png", target="other").returncode == 0
    assert json.loads(Path("other/coffee.json").read_text())["settings"]["receptive_field"] is None


def test_the_record_says_how_it_was_made(place):
    arguments = ("--sampler", "heun", "--steps", "3", "--seed", "7", "--tile", "24", "--overlap", "4", "--set", "border=0")  # fmt: skip
    assert run(place, *arguments, source="photos/coffee.png").returncode == 0
    record = json.loads(Path("out/coffee.json").read_text())
    settings = record["settings"]
    assert record["input"] == "coffee.png" and record["outputs"] == ["coffee.png"]
    assert settings["weights_sha256"] == hashlib.sha256(Path("net.pth").read_bytes()).hexdigest()
    expected = {"sampler": "heun", "steps": 3, "seed": 7, "tile": 24, "overlap": 4, "samples": 1, "blend": 1.0}
    assert expected.items() <= settings.items()
    assert record["nfe"] == 5 and record["size"] == [36, 44]
    # 44 x 36 in patches of at most 24, 4 dropped at each inner border, on a grid of 2: 3 x 2, computed_ratio by hand.
    assert record["patches"] == 6
    assert record["computed_ratio"] == pytest.approx(3 * 20 * 2 * 22 / (44 * 36), abs=1e-4)
    assert record["seconds"] > 0 and record["peak_memory"] > 1e6
    assert record["versions"]["torch"] == torch.__version__


def test_finished_images_are_kept(place):
    assert run(place, source="photos/coffee.png").returncode == 0
    before = Path("out/coffee.png").stat().st_mtime_ns
    done = run(place)
    assert done.returncode == 0
    assert "1 finished before: kept (--overwrite" in done.stdout
    assert Path("out/coffee.png").stat().st_mtime_ns == before
    assert len(files("out")) == 6
    done = run(place, "--seed", "5")
    assert "3 finished before, 3 of them with other settings: kept" in done.stdout
    seed_0 = read("out/coffee.png")
    assert run(place, "--seed", "5", "--overwrite").returncode == 0
    assert (read("out/coffee.png") != seed_0).any()
    # What an interrupted run left is restored again.
    Path("out/coffee.png").unlink()
    done = run(place, "--seed", "5")
    assert "coffee.png ->" in done.stdout and "2 finished before: kept" in done.stdout


def test_one_bad_file_does_not_stop_the_rest(place):
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    Path("photos/empty.png").write_bytes(b"")
    done = run(place)
    assert done.returncode == 1
    failures = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 2 and len(done.stderr.splitlines()) == 2
    assert "broken.jpg cannot be decoded" in done.stderr and "empty.png is empty" in done.stderr
    assert len(files("out")) == 6
    # An option that fails for every image is no success either.
    done = run(place, "--scratch", "nowhere", target="out2")
    assert_one_line_error(done, "none of the 5 images", "photos")
    assert "scratch folder nowhere" in done.stderr and files("out2") == []


def test_what_is_kept_of_a_file(place):
    os.mkdir("kinds")
    rgb = read("photos/coffee.png")
    cv2.imwrite("kinds/deep.png", rgb.astype(np.uint16) * 257)
    cv2.imwrite("kinds/gray.png", cv2.cvtColor(rgb, cv2.COLOR_BGR2GRAY))
    alpha = np.arange(rgb.shape[0] * rgb.shape[1]).reshape(rgb.shape[:2]) % 251
    cv2.imwrite("kinds/alpha.png", np.dstack([rgb, alpha.astype(np.uint8)]))
    turned = Image.fromarray(rgb[:, :, ::-1])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    turned.save("kinds/turned.jpg", exif=exif, quality=95)
    done = run(place, source="kinds")
    assert done.returncode == 0, done.stderr
    assert read("out/deep.png").dtype == np.uint16 and len(np.unique(read("out/deep.png") % 257)) > 1
    assert read("out/gray.png").ndim == 2
    np.testing.assert_array_equal(read("out/alpha.png")[:, :, 3], alpha)
    assert read("out/turned.png").shape == (36, 44, 3)
    with Image.open("out/turned.png") as image:
        assert image.getexif().get(0x0112, 1) == 1 and image.getexif()[0x010F] == "a camera"


def test_samples_their_mean_and_spread(place):
    assert run(place, "--samples", "3", source="photos/coffee.png").returncode == 0
    names = ["_mean.png", "_sample1.png", "_sample2.png", "_sample3.png", "_spread.png", ".json"]
    assert files("out") == sorted(f"coffee{name}" for name in names)
    model = ucdir_plugin.load_model("options.yml")
    result = ucdir_plugin.restore("photos/coffee.png", model, samples=3)
    stack = np.stack(result.samples)
    np.testing.assert_allclose(result.image, stack.mean(0), atol=1e-6)
    for i in range(3):
        written = read(f"out/coffee_sample{i + 1}.png")[:, :, ::-1]
        np.testing.assert_array_equal(written, (stack[i] * 255).round().astype(np.uint8))
    assert (stack[0] != stack[1]).any()
    single = ucdir_plugin.restore("photos/coffee.png", model)
    assert not np.shares_memory(single.image, single.samples[0]) and np.array_equal(single.image, single.samples[0])
    np.testing.assert_array_equal(single.image, stack[0])
    record = json.loads(Path("out/coffee.json").read_text())
    assert record["nfe"] == 6
    spread = result.spread
    assert record["spread_white"] == pytest.approx(spread.max(), rel=1e-5)
    np.testing.assert_array_equal(read("out/coffee_spread.png"), (spread / spread.max() * 255).round().astype(np.uint8))
    # Fewer samples leave nothing of the earlier ones.
    assert run(place, "--samples", "2", "--overwrite", source="photos/coffee.png").returncode == 0
    assert "coffee_sample3.png" not in files("out")


def test_moments_are_mean_and_standard_deviation():
    x = torch.randn(5, 1, 3, 4, 6, dtype=torch.float64)
    moments = restore.Moments()
    for sample in x:
        moments.add(sample)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.spread, x.var(0).mean(1, keepdim=True).sqrt())


def test_blend_runs_from_the_prediction_to_the_sample(place):
    model = ucdir_plugin.load_model("options.yml")
    photo = np.full((20, 24, 3), 0.5, np.float32)
    sample, half, none = (ucdir_plugin.restore(photo, model, blend=b) for b in (1.0, 0.5, 0.0))
    np.testing.assert_array_equal(none.image, sample.initial)
    assert none.info["nfe"] == 0 and sample.info["nfe"] == 2
    assert np.abs(sample.image - sample.initial).max() > 0.01
    inside = (sample.image > 0) & (sample.image < 1)  # not clipped
    assert inside.mean() > 0.2
    np.testing.assert_allclose(half.image[inside], (sample.image + sample.initial)[inside] / 2, atol=1e-6)


def test_arrays_and_files_of_every_depth_give_the_same(place):
    model = ucdir_plugin.load_model("options.yml")
    rgb = read("photos/coffee.png")[:, :, ::-1]
    from_file = ucdir_plugin.restore(Path("photos/coffee.png"), model)
    assert from_file.image.dtype == np.float32 and from_file.image.shape == rgb.shape
    assert from_file.samples[0].min() >= 0 and from_file.samples[0].max() <= 1
    for array in (rgb, rgb.astype(np.uint16) * 257, rgb / 255, (rgb / 255).astype(np.float32)):
        result = ucdir_plugin.restore(array, model, key="coffee.png")
        np.testing.assert_allclose(result.image, from_file.image, atol=1e-5)
    other_key = ucdir_plugin.restore(rgb, model)
    assert (other_key.image != from_file.image).any()
    gray = ucdir_plugin.restore(rgb[:, :, 0], model)
    assert gray.image.shape == rgb.shape[:2] == gray.initial.shape
    for bad in (rgb.astype(np.int32), rgb[None], rgb[:0], rgb / 1.0, np.full((4, 4), np.nan)):
        with pytest.raises(UserError):
            ucdir_plugin.restore(bad, model)


def test_state_in_files_changes_nothing(place):
    os.mkdir("scratch")
    arguments = ("--tile", "24", "--overlap", "4")
    assert run(place, *arguments).returncode == 0
    assert run(place, *arguments, "--scratch", "scratch", target="filed").returncode == 0
    for name in ("astronaut", "chelsea", "coffee"):
        np.testing.assert_array_equal(read(f"filed/{name}.png"), read(f"out/{name}.png"))
    assert files("scratch") == []


def test_any_registered_arch_in_one_pass_and_in_patches(place):
    done = run(place, "--tile", "0", opt="edsr.yml")
    assert done.returncode == 0, done.stderr
    whole = read("out/coffee.png")
    assert whole.shape == (2 * 44, 2 * 36, 3)
    assert run(place, "--tile", "32", "--overlap", "12", opt="edsr.yml", target="tiled").returncode == 0
    tiled = read("tiled/coffee.png")
    assert np.abs(tiled.astype(int) - whole).max() <= 1  # it looks 7 pixels far
    record = json.loads(Path("tiled/coffee.json").read_text())
    assert record["patches"] > 1 and record["nfe"] == 1 and "sampler" not in record["settings"]
    for argument, value in (("--steps", "5"), ("--sampler", "ddim"), ("--samples", "2"), ("--blend", "0.5")):
        assert_one_line_error(run(place, argument, value, opt="edsr.yml"), argument[2:], "EDSR", "one pass")
    wrong = place.write(merged(EDSR, {"scale": 1}), "wrong.yml")
    assert_one_line_error(run(place, opt=wrong, target="wrong"), "none of the 3")


WANTS_MULTIPLES = {
    "SwinIR": {"img_size": 16, "window_size": 8, "depths": [1], "num_heads": [1], "embed_dim": 4, "mlp_ratio": 1},
    "RRDBNet": {"num_in_ch": 3, "num_out_ch": 3, "scale": 1, "num_feat": 4, "num_block": 1, "num_grow_ch": 2},
}


@pytest.mark.parametrize("tile", [0, 32])
@pytest.mark.parametrize("name", WANTS_MULTIPLES)
def test_archs_that_do_not_pad_themselves_take_any_size(name, tile):
    net = build_arch({"type": name, **WANTS_MULTIPLES[name]}).eval()
    options = SamplingOptions(tile=tile or None, overlap=4)
    model = network_restorer.NetworkRestorer(net, None, options, torch.device("cpu"))
    image = np.random.default_rng(0).random((43, 37, 3))
    padded = np.pad(image, ((0, 5), (0, 3), (0, 0)), "reflect")  # to multiples of 4 and 8
    result = ucdir_plugin.restore(image, model).image
    assert result.shape == image.shape
    if not tile and name == "SwinIR":
        np.testing.assert_allclose(result, ucdir_plugin.restore(padded, model).image[:43, :37], atol=1e-6)
    pair = UCDIR(
        {"type": "UCDIRDenoiser", "inner_channel": 8, "channel_mults": [1]}, {"type": name, **WANTS_MULTIPLES[name]}
    )
    assert pair.eval().predict(torch.rand(1, 3, 43, 37)).shape == (1, 3, 43, 37)


def test_a_model_file_restores_by_itself(place):
    convert = ("--from", "training", "-opt", "options.yml", "net.pth")
    done = place.run("convert_weights.py", *convert, "net.safetensors", "--licence", "for research only")
    assert done.returncode == 0, done.stderr
    assert run(place).returncode == 0
    for name in ("options.yml", "net.pth"):
        os.rename(name, f"away_{name}")
    done = run(place, "--model", "net.safetensors", target="again")
    assert done.returncode == 0, done.stderr
    assert "licence: for research only" in done.stdout
    for name in ("astronaut", "chelsea", "coffee"):
        np.testing.assert_array_equal(read(f"again/{name}.png"), read(f"out/{name}.png"))
    for name in ("options.yml", "net.pth"):
        os.rename(f"away_{name}", name)
    done = place.run("convert_weights.py", *convert, "half.safetensors", "--dtype", "fp16")
    assert Path("half.safetensors").stat().st_size < 0.6 * Path("net.safetensors").stat().st_size
    full, half = (
        ucdir_plugin.restore("photos/coffee.png", ucdir_plugin.load_model(f"{n}.safetensors")) for n in ("net", "half")
    )
    np.testing.assert_allclose(full.image, half.image, atol=0.02)
    # What is no model file says so.
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, "bare.safetensors")
    assert_one_line_error(run(place, "--model", "bare.safetensors"), "bare.safetensors holds weights without options")
    content = Path("net.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[: len(content) // 2])
    assert_one_line_error(run(place, "--model", "cut.safetensors"), "cut.safetensors cannot be read")
    done = place.run("convert_weights.py", *convert, "net.pth.bin")
    assert_one_line_error(done, "net.pth.bin", "ends with .safetensors")


def test_photos_of_another_kind_are_restored_with_a_note(place, monkeypatch):
    trained = {"name": "jpegs", "type": "JPEGDataset", "dataroot_gt": "photos", "quality": [10, 30], "gt_size": 16}
    place.write(merged(RESTORING, {"datasets": {"train": trained}}))
    done = place.run("convert_weights.py", "--from", "training", "-opt", "options.yml", "net.pth", "net.safetensors")
    assert done.returncode == 0, done.stderr
    os.mkdir("mixed")
    for name, quality in (("a_png", None), ("b_5", 5), ("c_35", 35), ("d_90", 90)):
        path = f"mixed/{name}.{'png' if quality is None else 'jpg'}"
        Image.open("photos/coffee.png").save(path, **({} if quality is None else {"quality": quality}))
    for number, which in enumerate((("--model", "net.safetensors"), ())):
        done = run(place, *which, source="mixed", target=f"out{number}")
        assert done.returncode == 0, done.stderr
        notes = [line for line in done.stdout.splitlines() if "trained" in line]
        said = "tiny was trained on JPEG of quality 10 to 30: restored all the same"
        assert notes == [
            f"a_png.png: it is no JPEG, and {said}",
            f"d_90.jpg: it is a JPEG of quality 90, and {said}, detail may be lost (--model jpeg_any_fast is for it)",
        ]
        records = {
            name: json.loads(Path(f"out{number}/{name}.json").read_text()) for name in ("a_png", "b_5", "c_35", "d_90")
        }
        assert [name for name, record in records.items() if "note" in record] == ["a_png", "d_90"]
    for quality in (None, 0, [40, 10], [1, 2, 3], "10"):  # what trains nothing is no reason not to restore
        assert model_files.jpeg_quality({"datasets": {"train": {"type": "JPEGDataset", "quality": quality}}}) is None
    monkeypatch.setattr(network_restorer, "QUALITY_MARGIN", 4)
    model = ucdir_plugin.load_model("options.yml")
    assert model.warning(image_reading.read_photo("mixed/b_5.jpg", 10**6)).endswith(
        "left (--model jpeg_any_fast is for it)"
    )
    assert model.warning(image_reading.read_photo("mixed/c_35.jpg", 10**6)).endswith(
        "lost (--model jpeg_any_fast is for it)"
    )
    Image.open("photos/coffee.png").save("mixed/b_4.jpg", quality=4)  # which no model is for
    assert model.warning(image_reading.read_photo("mixed/b_4.jpg", 10**6)).endswith(
        "restored all the same, blocks may be left"
    )


def test_names(place):
    os.makedirs("twins/below")
    photo = Image.open("photos/coffee.png")
    for name in ("twins/a.png", "twins/a.jpg", "twins/below/a.png"):
        photo.save(name)
    assert run(place, source="twins", target="twins/out").returncode == 0
    names = ["a_jpg", "a_png", "below/a"]
    assert files("twins/out") == sorted(f"{n}.{e}" for n in names for e in ("json", "png"))
    done = run(place, source="twins", target="twins/out")  # results in the input folder are no input
    assert "3 finished before" in done.stdout and len(files("twins/out")) == 6
    assert run(place, source="twins/a.png", target="one/b.jpg").returncode == 0
    assert files("one") == ["b.jpg", "b.json"]
    assert run(place, source="twins/a.png", target="one").returncode == 0
    assert files("one") == ["a.json", "a.png", "b.jpg", "b.json"]


def test_nothing_of_the_user_is_overwritten(place):
    os.mkdir("out")
    Path("out/coffee.png").write_bytes(b"mine")
    done = run(place)
    assert done.returncode == 1
    assert "coffee.png is there already" in done.stderr and Path("out/coffee.png").read_bytes() == b"mine"
    Path("out/chelsea.json").write_text('{"my": "notes"}')
    Path("out/chelsea.png").unlink()
    assert "chelsea.json is there already" in run(place).stderr
    assert_one_line_error(run(place, target="photos"), "photos is the folder of the input")
    assert_one_line_error(run(place, source="photos/coffee.png", target="photos"), "would overwrite the input")
    assert_one_line_error(
        run(place, source="photos/coffee.png", target="photos/coffee.png"), "would overwrite the input"
    )
    assert run(place, "--overwrite").returncode == 0
    assert read("out/coffee.png").shape == (44, 36, 3)


def test_nothing_half_written_is_left(place, monkeypatch, capsys):
    model = ucdir_plugin.load_model("options.yml")

    def disk_full(text, path):
        raise WriteError("cannot write out: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_text", disk_full)
        with pytest.raises(WriteError, match="No space left"):
            restore_folder.restore_files(model, "photos", "out")
    assert files("out") == []
    # A result that is none is the failure of its own image, and the others are restored.
    photo = image_writing.encode_result

    def damaged(image, like, extension):
        return photo(image * float("nan") if like.pixels.shape[:2] == (44, 36) else image, like, extension)

    monkeypatch.setattr(restore_folder.image_writing, "encode_result", damaged)
    assert restore_folder.restore_files(model, "photos", "out") == 1
    assert files("out") == sorted(f"{n}.{e}" for n in ("astronaut", "chelsea") for e in ("json", "png"))
    assert "failed: coffee.png: the result holds NaN" in capsys.readouterr().err


SMALL = {"1x1": (1, 1), "1x7": (1, 7), "prime": (31, 37), "narrow": (2, 61)}


@pytest.mark.parametrize("tile", ["0", "16"])
def test_any_size(place, tile):
    os.mkdir("sizes")
    for name, (height, width) in SMALL.items():
        cv2.imwrite(f"sizes/{name}.png", np.arange(height * width * 3).reshape(height, width, 3) % 256)
    done = run(place, "--tile", tile, "--overlap", "4", source="sizes")
    assert done.returncode == 0, done.stderr
    for name, (height, width) in SMALL.items():
        assert read(f"out/{name}.png").shape == (height, width, 3)


BAD = {
    "tile too small": (["--tile", "1", "--overlap", "0"], ["tile 1 is smaller than the network's stride", "at least 2"]),
    "overlap too large": (["--tile", "32", "--overlap", "16"], ["overlap", "16", "smaller than half the tile (32)", "15"]),
    "tile without room": (["--tile", "9", "--overlap", "4"], ["tile 9 is too small for overlap 4"]),
    "zero steps": (["--steps", "0"], ["steps", "greater than 0", "got 0"]),
    "too many steps": (["--steps", "2001"], ["steps", "2001 is more than the schedule's 2000"]),
    "negative overlap": (["--overlap", "-1"], ["overlap", "-1"]),
    "no samples": (["--samples", "0"], ["samples must be at least 1, got 0"]),
    "blend": (["--blend", "1.5"], ["blend must be between 0", "1.5"]),
    "sampler": (["--sampler", "dpm"], ["sampler", "dpm"]),
    "other key": (["--set", "stpes=5"], ["stpes", "'steps'"]),
    "no assignment": (["--set", "eta"], ["--set 'eta'", "key"]),
    "eta": (["--set", "eta=0.5"], ["eta", "no meaning for ddpm"]),
    "first of two --set": (["--set", "eta=0.5", "--set", "border=0"], ["eta", "no meaning for ddpm"]),
    "device": (["--device", "tpu"], ["device 'tpu'"]),
    "no cuda": (["--device", "cuda"], ["device 'cuda' is not here", "take cpu"]),
    "fp16": (["--dtype", "fp16"], ["fp16 needs a CUDA device"]),
    "weights": (["--weights", "none.pth"], ["none.pth does not exist"]),
    "other weights": (["--weights", "edsr.pth"], ["edsr.pth is of another architecture"]),
    "pixels": (["--max-pixels", "1000"], ["none of the 3 images"]),
    "scratch": (["--scratch", "nowhere"], ["none of the 3 images"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_one_line(place, name):
    arguments, words = BAD[name]
    assert_one_line_error(run(place, *arguments), *words)
    assert not Path("out").exists() or files("out") == []


def test_bad_places_get_one_line(place):
    assert_one_line_error(run(place, source="nowhere"), "-i nowhere does not exist")
    os.mkdir("bare")
    assert_one_line_error(run(place, source="bare"), "the folder bare holds no image")
    assert_one_line_error(run(place, target="net.pth"), "-o: cannot write in net.pth")
    assert_one_line_error(run(place, source="photos/coffee.png", target="a.gif"), "written as .gif", ".png")
    assert_one_line_error(run(place, source="net.pth"), "net.pth")
    assert_one_line_error(
        run(place, "--max-pixels", "1000", source="photos/coffee.png"), "coffee.png", "36x44", "--max-pixels"
    )
    assert_one_line_error(run(place, "--model", "nothing"), "nothing is neither an option file", "bird")
    assert_one_line_error(run(place, "--model", "nothing.safetensors"), "nothing.safetensors does not exist")
    assert_one_line_error(run(place, "--model", "x.safetensors", "--weights", "net.pth"), "--weights goes with -opt")
    place.write(merged(RESTORING, {"path": None}), "options.yml")
    assert_one_line_error(run(place), "no weights", "none found in")


def test_too_little_memory_is_said_before(place, monkeypatch):
    model = ucdir_plugin.load_model("options.yml")
    monkeypatch.setattr(restore_folder.memory, "available", lambda: 10_000)
    with pytest.raises(UserError, match="36x44 pixels need .* add --scratch DIR"):
        restore_folder.restore_files(model, "photos/coffee.png", "out")
    os.mkdir("scratch")
    assert restore_folder.restore_files(model, "photos/coffee.png", "out", scratch="scratch") == 0


def test_the_api_is_imported_late_and_nothing_else_is_there():
    assert ucdir_plugin.load_model is load.load_model and ucdir_plugin.restore is restore.restore
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ucdir_plugin.nothing  # noqa: B018
