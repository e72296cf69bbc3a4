"""The benchmark compares what it says: variants that compute the same, and ratios of them."""

import json

import cv2
import pytest
import torch
from conftest import RESTORING, ROOT, TINY, assert_one_line_error, merged
from ucdir_cli.benchmarks import akgm, gpu, timing
from ucdir_cli.benchmarks import networks as benchmark_networks
from ucdir_cli.benchmarks import restore as benchmark_restore

from ucdir_plugin.archs import UCDIRDenoiser
from ucdir_plugin.archs.akgm import compiled as akgm_compiled
from ucdir_plugin.archs.ucdir_blocks import AKGBlock
from ucdir_plugin.registry import build_arch

NAMES = akgm._variants(*akgm.REPLACED, *akgm.CHOSEN)
SMALL = {"inner_channel": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_res": (), "dropout": 0.0}


def test_variants_of_the_network_differ_in_speed_only():
    """All but the plain convolution; each is really taken, forward and backward."""
    torch.manual_seed(0)
    net = UCDIRDenoiser(**SMALL)
    x, level, guide = torch.randn(1, 6, 12, 12), torch.tensor([0.5]), torch.randn(1, 3, 12, 12)
    results = {}
    for name in NAMES:
        with akgm._as(name):
            out = net(x, level, guide)
            results[name] = (out, *torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True))
    expected = results.pop("released formulation")
    plain = results.pop("plain convolution")
    assert (plain[0] - expected[0]).abs().max() > 1e-3
    for found in results.values():
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["tiled", "compiled"])
def test_a_variant_is_the_implementation_of_its_name(name, monkeypatch):
    if name not in NAMES:
        pytest.skip("the compiled AKGM cannot be built here: no compiler, or neither AVX2 nor AVX-512")
    module = akgm.CHOSEN[name]
    calls = []
    for direction in ("forward", "backward"):
        function = getattr(module, direction)
        monkeypatch.setattr(module, direction, lambda *a, f=function, d=direction: calls.append(d) or f(*a))
    akgm._akgm_call(name, 1, 8, 6, True, False)()
    assert calls == ["forward", "backward"]
    calls.clear()
    with akgm._as(name):
        UCDIRDenoiser(**SMALL)(torch.randn(1, 6, 8, 8)[:, :6], torch.ones(1), torch.randn(1, 3, 8, 8)).sum().backward()
    assert calls.count("forward") == calls.count("backward") > 0


def test_medians_of_alternating_calls(monkeypatch):
    clock, order = [0.0], []
    cost = {"a": iter([9, 1, 2, 3]), "b": iter([9, 6, 4, 5])}  # the first is the warm-up

    def call(name):
        order.append(name)
        clock[0] += next(cost[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.alternate({n: lambda n=n: call(n) for n in "ab"}, 3) == {"a": 2, "b": 5}
    assert "".join(order) == "abababab"


def test_peak_memory_sees_what_the_release_holds():
    """C * N channels and their product with the mix: 16 tensors of C * H * W; the compiled one needs none."""
    size = 4 * 64 * 128 * 128 / 2**20
    peak = timing.peak_memory(akgm._akgm_call, "released formulation", 1, 64, 128, False, False)
    assert 14 * size < peak < 20 * size
    if akgm_compiled.available():
        assert timing.peak_memory(akgm._akgm_call, "compiled", 1, 64, 128, False, True) < 2.5 * size  # with the result


def test_a_table_and_its_picture(tmp_path):
    rows = [{"grows": g, "value": v, "tiled": v / 10, "compiled": v / 20} for g in ("size", "batch") for v in (1, 2)]
    result = timing.result("growth", rows)
    text = timing.table(result)
    assert "| size | 2 | 0.2 | 0.1 |" in text
    assert json.loads(text.strip().splitlines()[-1])["rows"] == rows
    akgm.draw_complexity(result, str(tmp_path / "growth.png"))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forward", "--size", "0"], "must be at least 1"),
        (["complexity", "--figure", "no/such/folder/a.png"], "no such folder"),
    ],
)
def test_bad_arguments(arguments, message, workplace):
    assert_one_line_error(workplace.run("benchmark.py", *arguments), message)


def test_multiply_adds_are_those_of_the_layers():
    conv, linear = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5)
    x = torch.randn(1, 3, 10, 12)
    found = benchmark_networks.macs(lambda: linear(conv(x).movedim(1, -1)))
    assert found == 120 * (9 * 3 * 8 + 8 * 5)
    block = AKGBlock(8, 16, emb_dim=6, num_bases=4)
    h, emb, features = torch.randn(1, 8, 10, 12), torch.randn(1, 6), torch.randn(1, 4, 10, 12)
    plain = 120 * (9 * 8 * 16 + 8 * 16) + 6 * 4 + 4 * 4  # first convolution, shortcut, scalars
    assert benchmark_networks.macs(lambda: block(h, emb, features)) == plain + 120 * (9 * 16 * 16 + 16 * 4)


def test_the_released_network_costs_what_its_authors_say_and_akgm_what_a_plain_convolution_does():
    """189 and 12 GMACs at 256x256, 97.35 and 7.76 M parameters; AKGM, its guide included, within 2 % (paper, 3.2)."""
    options = ROOT / "options"
    ours = benchmark_networks.costs(benchmark_networks.network(str(options / "sid_ucdir.yml")))
    assert (ours["parameters M"], ours["predictor M"]) == (97.35, 7.76)
    assert round(ours["predictor GMACs"]) == 12 and abs(ours["GMACs"] - 189) < 0.02 * 189
    plain = benchmark_networks.costs(benchmark_networks.network(str(options / "ablation" / "dvsr.yml")))
    assert 1 < ours["GMACs"] / plain["GMACs"] < 1.02
    sr3 = benchmark_networks.costs(benchmark_networks.network(str(options / "ablation" / "sr3.yml")))
    assert sr3["predictor M"] == sr3["predictor GMACs"] == 0 and sr3["GMACs"] == plain["GMACs"]


def test_costs_of_option_files_are_a_table(place, measured):
    done = place.run("benchmark.py", "complexity", "-opt", measured, "edsr.yml", "--size", "32")
    assert done.returncode == 0, done.stderr
    pair, edsr = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert pair["option file"] == "pairs" and pair["predictor GMACs"] >= 0 and pair["peak MB of a step"] >= 0
    assert edsr["predictor M"] == 0
    done = place.run("benchmark.py", "complexity", "-opt", measured, "none.yml")
    assert_one_line_error(done, "none.yml cannot be read")


PAIRS = {**TINY["datasets"]["val"], "name": "pairs"}


@pytest.fixture
def measured(place):
    """The options of :func:`place` with true images to measure against."""
    return place.write({**RESTORING, "datasets": {"val": PAIRS}}, "pairs.yml")


def test_quality_is_what_test_py_measures(place, measured, monkeypatch):
    monkeypatch.setattr(benchmark_restore, "STEPS", (1, 2))
    (table,) = benchmark_restore.quality(measured, None, ["ddpm", "heun:trailing"], 1)
    rows = {(row["sampler"], row["steps"]): row for row in table["rows"]}
    assert rows["heun:trailing", 2]["NFE"] == 3 and rows["ddpm", 2]["NFE"] == 2
    assert place.run("test.py", "-opt", measured).returncode == 0
    means = json.loads((place.folder / "results/tiny/metrics_pairs.json").read_text())["mean"]
    for stage, key in (("input", ("input", "")), ("initial", ("initial prediction", "")), ("restored", ("ddpm", 2))):
        assert rows[key]["psnr"] == round(means[stage]["psnr"], 3)


def test_networks_with_conditions_are_told_them(place, monkeypatch):
    """As test.py tells them; one that was never left out in training must be."""
    declared = {"network_g": {"denoiser": {"conditions": {"quality": {"range": [1, 100]}}}}}
    options = merged({**RESTORING, "datasets": {"val": PAIRS}}, declared)
    net = build_arch(options["network_g"])
    for parameter in net.denoise_fn.condition_embedding.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"params": net.state_dict()}, "told.pth")
    told = place.write(merged(options, {"path": {"pretrain_network_g": "told.pth"}}), "told.yml")
    monkeypatch.setattr(benchmark_restore, "STEPS", (2,))
    monkeypatch.setattr(benchmark_restore, "SIZES", ((32, 32),))
    (table,) = benchmark_restore.quality(told, None, ["ddpm"], 1)
    assert place.run("test.py", "-opt", told).returncode == 0
    means = json.loads((place.folder / "results/tiny/metrics_pairs.json").read_text())["mean"]
    assert table["rows"][-1]["psnr"] == round(means["restored"]["psnr"], 3)
    assert benchmark_restore.growth(told, None, 64, 8, 1) and benchmark_restore.seams(told, None, 24, 2, None)


def test_growth_counts_patches_and_state(place, measured, monkeypatch):
    monkeypatch.setattr(benchmark_restore, "SIZES", ((64, 64), (128, 96)))
    (table,) = benchmark_restore.growth(measured, None, 64, 8, 1)
    small, large = table["rows"]
    assert small["patches"] == 1 and small["computed / image"] == 1
    # 128 in three patches of 48 + 2 * 8 at most: 54 rows each with overlaps; 96 in two of 56
    assert large["patches"] == 6
    assert all(row["seconds"] > 0 and row["peak MB"] >= 0 for row in table["rows"])


def test_seams_are_scored_and_drawn(place, measured):
    (table,) = benchmark_restore.seams(measured, None, 24, 2, "seams.png")
    assert [row["way"] for row in table["rows"]] == ["truth", "per patch", "inter-step", "whole"]
    picture = cv2.imread("seams.png")
    assert picture.shape == (2 * 48, 3 * 72 + 2 * 8, 3) and (picture[:, :72] != picture[:, 80:152]).any()


def test_the_tool_asks_for_what_it_needs(place, measured):
    done = place.run("benchmark.py", "restore", "-opt", measured, "--only", "seams", "--tile", "24", "--overlap", "2")
    assert done.returncode == 0 and "| inter-step |" in done.stdout
    assert_one_line_error(
        place.run("benchmark.py", "restore", "-opt", measured, "--seeds", "0"), "seeds must be at least 1"
    )
    assert_one_line_error(
        place.run("benchmark.py", "restore", "-opt", "edsr.yml", "--only", "growth"), "EDSR, which restores in one pass"
    )


def test_memory_of_training_is_what_stays_and_what_a_step_adds(workplace, monkeypatch):
    path = workplace.write(TINY)
    monkeypatch.chdir(workplace.folder)
    call = benchmark_networks._training_case(path, 2, 16)
    call()
    call()  # samples and iterations go on
    asked = []
    monkeypatch.setattr(timing, "peak_memory", lambda *args: asked.append(args[2:]) or 10.0)
    (result,) = benchmark_networks.training_table([path], [2, 4], 16)
    count = benchmark_networks.parameters(benchmark_networks.network(path))
    assert asked == [(2, 16), (4, 16)]
    first, second = result["rows"]
    assert first["KB a pixel"] == round((10 - 4 * count / 2**20) * 1024 / 512, 1) == 2 * second["KB a pixel"]


@pytest.mark.parametrize("part", ["quality", "seams"])
def test_a_data_set_without_truths_is_named(place, part):
    done = place.run("benchmark.py", "restore", "-opt", "options.yml", "--only", part, "--tile", "24", "--overlap", "2")
    assert_one_line_error(done, "datasets:val", "has no true images")


# gpu, dry


def json_of(done):
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_what_a_gpu_is_asked(workplace):
    """A dry run on the CPU: all sections, and JSON of each; what is compared with the CPU is the CPU."""
    done = workplace.run("benchmark.py", "gpu", "--device", "cpu", "--threads", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json_of(done)
    assert [table["benchmark"].split(" (dry")[0] for table in found] == list(gpu.SECTIONS)
    agreement, op, step, training = (table["rows"] for table in found)
    assert all(row["ok"] is True and float(row["difference"]) == 0 for row in agreement)
    named = {row["what"] for row in agreement}
    assert {"AKGM, 64 channels, gradient of mix", "sampler heun", "BIR-D, default", "UCDIR, noise"} <= named
    assert all(float(row["from the loop"]) < 0.02 for row in op) and {row["dtype"] for row in op} == {"fp32", "bf16"}
    assert all(row["ms"] > 0 for row in step)
    assert {row["how"] for row in training} == {"alone", "DDP of one"} and all(row["step s"] > 0 for row in training)
    assert_one_line_error(workplace.run("benchmark.py", "gpu", "--device", "cuda"), "cuda")


def test_what_fails_does_not_stop_the_rest(monkeypatch):
    def broken(bench):
        raise RuntimeError("no kernel image\nis available")

    def one(bench):
        return [{"what": "x", "ok": True}]

    monkeypatch.setattr(gpu, "SECTIONS", {"a": one, "b": broken, "c": one})
    found = gpu.tables("cpu")
    assert [table["rows"] for table in found] == [one(0), [{"failed": "failed: RuntimeError: no kernel image"}], one(0)]
    assert gpu.failed(found) and not gpu.failed(found[:1])
    assert gpu.failed([{"rows": [{"what": "x", "ok": False}]}])
    monkeypatch.setattr(gpu, "MINUTES", -1)
    assert all("left out" in table["rows"][0] for table in gpu.tables("cpu"))


def test_a_device_that_disagrees_is_found(monkeypatch):
    """Every second result is off by a hundredth, as if the device computed the first of each pair wrongly."""
    calls, exact = [], gpu.convolution.adaptive_kernel_conv
    monkeypatch.setattr(
        gpu.convolution,
        "adaptive_kernel_conv",
        lambda *t: exact(*t) * (1.01 if calls.append(0) or len(calls) % 2 else 1),
    )
    rows = gpu.agreement(gpu.Bench(torch.device("cpu")))
    assert [row["ok"] for row in rows if row["what"] == "AKGM, 64 channels"] == [False]
    assert all(row["ok"] for row in rows if row["what"].startswith("sampler"))
