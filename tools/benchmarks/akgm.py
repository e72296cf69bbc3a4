"""Speed and memory as ratios: variants alternate in one run, medians are compared; what tools/benchmark.py prints.

The variants of a network differ in how AKGM is computed and, for the release, in what the package does besides:

- released formulation: one grouped convolution to C * N channels, view, multiply, sum; contiguous tensors, the guide's
  features in every step, nothing in place, no fused optimizer.
- plain convolution: a 3x3 convolution C -> C in AKGM's place, which has the same number of multiplications.
- loop, tiled, compiled: the implementations of ucdir_plugin.archs.akgm.convolution.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from ucdir_cli.benchmarks.timing import alternate, peak_memory, result

from ucdir_plugin.archs import SIDUNet, UCDIRDenoiser, ucdir_arch, ucdir_blocks
from ucdir_plugin.archs.akgm import compiled as akgm_compiled
from ucdir_plugin.archs.akgm import convolution
from ucdir_plugin.archs.akgm import tiled as akgm_tiled

SMALL = {"inner_channel": 24, "channel_mults": (1, 2, 4, 4), "res_blocks": 1, "attn_res": (), "dropout": 0.0}
"""A UCDIR denoiser of 2.24 M parameters."""


def released_formulation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """AKGM as the release computes it."""
    batch, channels, height, width = x.shape
    z = F.conv2d(x, weight, bias, padding=1, groups=mix.shape[1])
    return (z.view(batch, channels, -1, height, width) * mix.unsqueeze(1)).sum(2)


def plain_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """C -> C with as many weights as AKGM's."""
    channels = x.shape[1]
    return F.conv2d(x, weight.view(channels, channels, 3, 3), bias[:channels], padding=1)


REPLACED = {"plain convolution": plain_convolution, "released formulation": released_formulation}
CHOSEN = {"loop": None, "tiled": akgm_tiled, "compiled": akgm_compiled}


def _variants(*names: str) -> list[str]:
    return [name for name in names if name != "compiled" or akgm_compiled.available()]


@contextlib.contextmanager
def _as(variant: str) -> Iterator[None]:
    """AKGM and networks are run, forward and backward, as this variant."""
    with contextlib.ExitStack() as stack:
        if variant in CHOSEN:
            stack.enter_context(mock.patch.object(convolution, "choose", lambda x, bases: CHOSEN[variant]))
        else:
            stack.enter_context(mock.patch.object(ucdir_blocks, "adaptive_kernel_conv", REPLACED[variant]))
        if variant == "released formulation":
            stack.enter_context(mock.patch.object(ucdir_arch, "fast_layout", lambda x: x.contiguous()))
            stack.enter_context(mock.patch.object(ucdir_blocks, "_activate", lambda x, _: F.silu(x)))
        yield


# akgm


def _akgm_call(
    variant: str, batch: int, channels: int, size: int, train: bool, channels_last: bool, bases: int = 8
) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    per_group = channels // bases

    def tensor(*shape: int) -> torch.Tensor:
        t = torch.randn(shape, generator=generator)
        return t.contiguous(memory_format=layout) if t.dim() == 4 and shape[0] == batch else t

    x, mix, grad_y = (tensor(batch, c, size, size) for c in (channels, bases, channels))
    weight, bias = tensor(channels * bases, per_group, 3, 3) * (9 * per_group) ** -0.5, tensor(channels * bases)
    function = REPLACED.get(variant, convolution.adaptive_kernel_conv)
    if variant == "plain convolution":
        weight, bias = weight.view(channels, channels, 3, 3).contiguous(memory_format=layout), bias[:channels].clone()
        inputs = [x, weight, bias]

        def function(x, weight, bias):
            return F.conv2d(x, weight, bias, padding=1)
    else:
        inputs = [x, weight, bias, mix]

    def call() -> None:
        with _as(variant), torch.set_grad_enabled(train):
            y = function(*inputs)
            if train:
                torch.autograd.grad(y, inputs, grad_y)

    for t in inputs:
        t.requires_grad_(train)
    return call


SHAPES = {
    False: [(1, 64, 256), (1, 128, 128), (1, 256, 64), (1, 32, 256), (16, 16, 64)],
    True: [(16, 16, 64), (16, 32, 32), (1, 64, 128), (1, 128, 128)],
}


def akgm_alone(repeats: int) -> list[dict]:
    """AKGM against the plain convolution of its width, in both memory formats; extra memory of the forward pass."""
    names = _variants("plain convolution", "released formulation", "loop", "tiled", "compiled")
    tables = []
    for train in (False, True):
        rows = []
        for batch, channels, size in SHAPES[train]:
            arguments = [(name, last) for last in (False, True) for name in names]
            calls = {f"{name} {last}": _akgm_call(name, batch, channels, size, train, last) for name, last in arguments}
            seconds = alternate(calls, repeats)
            for last in (False, True):
                plain = seconds[f"plain convolution {last}"]
                rows.append(
                    {
                        "B, C, size": f"{batch}, {channels}, {size}",
                        "layout": "channels-last" if last else "contiguous",
                        "plain ms": round(plain * 1e3, 2),
                        **{name: round(seconds[f"{name} {last}"] / plain, 2) for name in names[1:]},
                    }
                )
        what = "forward and backward" if train else "forward"
        tables.append(result(f"AKGM {what}, N = 8: times of a plain 3x3 convolution of the same layout", rows))
    rows = []
    for batch, channels, size in SHAPES[False][:3]:
        megabytes = 4 * batch * channels * size * size / 2**20
        peaks = {name: peak_memory(_akgm_call, name, batch, channels, size, False, True) / megabytes for name in names}
        rows.append({"B, C, size": f"{batch}, {channels}, {size}", **{n: round(p - 1, 2) for n, p in peaks.items()}})
    tables.append(result("AKGM forward: memory besides the inputs and the result, in tensors of C * H * W", rows))
    return tables


# forward


def _step_call(variant: str, size: int) -> Callable[[], Any]:
    """One sampling step of the released SID denoiser."""
    torch.manual_seed(0)
    return _step_of(variant, UCDIRDenoiser().eval(), 1, size)


def _step_of(variant: str, net: UCDIRDenoiser, batch: int, size: int) -> Callable[[], Any]:
    x, level, guide = torch.randn(batch, 6, size, size), torch.full((batch,), 0.5), torch.randn(batch, 3, size, size)
    with torch.no_grad():
        if variant != "released formulation":
            guide = net.guide_features(guide)

    @torch.no_grad()
    def call() -> None:
        with _as(variant):
            net(x, level, guide)

    return call


def _fixed_call(variant: str, size: int) -> Callable[[], Any]:
    """What is computed once for an image: the prediction, and the guide's features but in the release."""
    torch.manual_seed(0)
    net, predictor, image = UCDIRDenoiser().eval(), SIDUNet().eval(), torch.randn(1, 3, size, size)

    @torch.no_grad()
    def call() -> None:
        guide = predictor(image)
        if variant != "released formulation":
            net.guide_features(guide)

    return call


def forward(size: int, repeats: int) -> list[dict]:
    """50 sampling steps with the released SID network: median step, times 50, plus what is computed once."""
    names = _variants("released formulation", "plain convolution", "tiled", "compiled")
    torch.manual_seed(0)
    net = UCDIRDenoiser().eval()
    steps = alternate({name: _step_of(name, net, 1, size) for name in names}, repeats)
    fixed = alternate({name: _fixed_call(name, size) for name in ("released formulation", "tiled")}, 3)
    total = {n: 50 * steps[n] + fixed["tiled" if n != "released formulation" else n] for n in names}
    memory = {name: peak_memory(_step_call, name, size) for name in names}
    base = "released formulation"
    rows = [
        {
            "variant": name,
            "step s": round(steps[name], 3),
            "50 steps s": round(total[name], 1),
            "time ratio": round(total[name] / total[base], 3),
            "peak MB": round(memory[name]),
            "memory ratio": round(memory[name] / memory[base], 3),
        }
        for name in names
    ]
    return [result(f"50-step sampling with the released SID network, one {size}x{size} image, no padding", rows)]


# train


def _train_call(variant: str, batch: int = 16, size: int = 64, use_checkpoint: bool = False) -> Callable[[], Any]:
    """One training step of the small denoiser."""
    torch.manual_seed(0)
    net = UCDIRDenoiser(**SMALL, use_checkpoint=use_checkpoint).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=variant != "released formulation")
    x, guide, noise = (torch.randn(batch, c, size, size) for c in (6, 3, 3))
    level = torch.rand(batch)

    def call() -> None:
        with _as(variant):
            optimizer.zero_grad(set_to_none=True)
            F.l1_loss(net(x, level, guide), noise).backward()
            optimizer.step()

    return call


def train(repeats: int) -> list[dict]:
    """A training step, also with the released formulation and with plain convolutions; the loader's share."""
    names = _variants("plain convolution", "released formulation", "loop", "tiled", "compiled")
    cases = {name: (name, False) for name in names}
    default = _variants("compiled", "tiled")[0]
    cases[f"{default}, use_checkpoint"] = (default, True)
    seconds = alternate({n: _train_call(v, use_checkpoint=c) for n, (v, c) in cases.items()}, repeats)
    memory = {n: peak_memory(_train_call, v, 16, 64, c) for n, (v, c) in cases.items()}
    plain, released = "plain convolution", "released formulation"
    rows = [
        {
            "variant": name,
            "step s": round(seconds[name], 3),
            "to plain": round(seconds[name] / seconds[plain], 2),
            "to release": round(seconds[name] / seconds[released], 2),
            "peak MB": round(memory[name]),
            "memory to release": round(memory[name] / memory[released], 2),
        }
        for name in cases
    ]
    return [result("training step of a 2.24 M-parameter denoiser, 16 crops of 64x64", rows), _loader(repeats)]


def _loader(repeats: int) -> dict:
    """Seconds in which the demo's loader makes a batch, against those of its training step."""
    from skimage import data

    from ucdir_plugin.utils.degradations import jpeg

    image = data.astronaut()[:, :, ::-1].astype("float32") / 255
    batch, crop = 4, 64

    def load() -> None:
        for i in range(batch):  # what JPEGDataset does to a crop
            jpeg(image[i : i + crop, i : i + crop], 10)

    step = _train_call(_variants("compiled", "tiled")[0], batch, crop)
    seconds = alternate({"loading a batch": load, "training step": step}, repeats)
    rows = [{"what": n, "s": round(s, 5), "ratio": round(s / seconds["training step"], 4)} for n, s in seconds.items()]
    return result("crop and JPEG of 4 x 64x64 against a training step on them, one process", rows)


# complexity


def complexity(repeats: int) -> list[dict]:
    """How the cost of a sampling step grows: image size, batch, steps, bases, width."""
    default = _variants("compiled", "tiled")[0]
    names = _variants("released formulation", "plain convolution", "tiled", "compiled")
    base = {"size": 128, "batch": 1, "steps": 1, "bases": 8, "width": 32}
    grid: dict[str, Sequence[int]] = {
        "size": (32, 64, 128, 256, 384),
        "batch": (1, 2, 4, 8),
        "steps": (1, 2, 4, 8),
        "bases": (1, 2, 4, 8, 16),
        "width": (16, 32, 64, 96),
    }
    rows = []
    for what, values in grid.items():
        for value in values:
            at = {**base, what: value}
            torch.manual_seed(0)
            net = UCDIRDenoiser(
                inner_channel=at["width"], channel_mults=(1, 2, 4), res_blocks=1, attn_res=(), num_bases=at["bases"]
            ).eval()

            def steps(call: Callable[[], Any], count: int = at["steps"]) -> Callable[[], Any]:
                return lambda: [call() for _ in range(count)]

            calls = {name: steps(_step_of(name, net, at["batch"], at["size"])) for name in names}
            seconds = alternate(calls, repeats)
            rows.append({"grows": what, "value": value, **{n: round(s, 4) for n, s in seconds.items()}})
    title = "seconds of sampling steps, small denoiser, at " + ", ".join(f"{k} {v}" for k, v in base.items())
    return [{**result(title, rows), "default": default}]


def draw_complexity(result: dict, path: str) -> None:
    """The growth curves as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["grows"] for row in result["rows"]))
    names = [name for name in result["rows"][0] if name not in ("grows", "value")]
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3), layout="constrained")
    for axis, kind in zip(axes, kinds):
        rows = [row for row in result["rows"] if row["grows"] == kind]
        for name in names:
            axis.plot([row["value"] for row in rows], [row[name] for row in rows], marker="o", markersize=3, label=name)
        axis.set(xlabel=kind, xscale="log", yscale="log", xticks=[row["value"] for row in rows])
        axis.set_xticklabels([str(row["value"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
