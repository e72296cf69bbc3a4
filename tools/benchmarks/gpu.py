"""Everything that a GPU should be asked, by one command of at most four minutes; what fails does not stop the rest.

On the CPU the same sections run at small sizes: a dry run of the command, whose numbers say nothing of a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ucdir_cli.benchmarks.timing import result

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.archs.akgm import convolution
from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel
from ucdir_plugin.diffusion.bird.settings import PRESETS
from ucdir_plugin.diffusion.bird.solver import Solver
from ucdir_plugin.diffusion.noise import image_noise, normal
from ucdir_plugin.diffusion.prior import GaussianPrior
from ucdir_plugin.diffusion.samplers import SAMPLERS
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.utils.devices import choose_device

Rows = List[Dict[str, Any]]

RELEASED = {
    "denoiser": {
        "type": "UCDIRDenoiser",
        "inner_channel": 64,
        "channel_mults": [1, 2, 4, 8, 8],
        "res_blocks": 2,
        "attn_res": [16],
        "image_size": 128,
        "dropout": 0.1,
    },
    "predictor": {"type": "SIDUNet", "width": 32, "levels": 5},
}
"""The network of options/sid_ucdir.yml."""

DRY = {
    "denoiser": {
        "type": "UCDIRDenoiser",
        "inner_channel": 16,
        "channel_mults": [1, 2],
        "res_blocks": 1,
        "attn_res": [],
        "dropout": 0.0,
    },
    "predictor": {"type": "SIDUNet", "width": 4, "levels": 2},
}
"""One for the dry run on the CPU."""

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MINUTES = 4.0
"""After which no further section is started."""


class Bench:
    """A device and the sizes for it."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.network = RELEASED if self.cuda else DRY
        self.repeats = 10 if self.cuda else 2

    def seconds(self, call: Callable[[], Any], warm: int = 3) -> float:
        """Median time of a call, the device's work included."""
        found = []
        for turn in range(warm + self.repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if turn >= warm:
                found.append(time.perf_counter() - start)
        return sorted(found)[len(found) // 2]

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def memory(self, call: Callable[[], Any]) -> Optional[float]:
        """Peak of a call in MB, above what is there before it; None on the CPU."""
        if not self.cuda:
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return round((torch.cuda.max_memory_allocated(self.device) - before) / 2**20, 1)

    def net(self) -> UCDIR:
        """The network with random weights, not trained, the same each time."""
        torch.manual_seed(0)
        return UCDIR(**self.network).to(self.device)

    def autocast(self, dtype: str) -> torch.autocast:
        """Autocast to fp32 (none), bf16 or fp16."""
        enabled = dtype != "fp32"
        return torch.autocast(self.device.type, TYPES[dtype] if enabled else None, enabled=enabled)

    @property
    def dtypes(self) -> Tuple[str, ...]:
        """That the device computes with."""
        return ("fp32", "bf16", "fp16") if self.cuda else ("fp32", "bf16")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float().cpu() - b.float().cpu()).abs().max() / b.float().abs().max().clamp(min=1e-12))


def _operands(batch: int, channels: int, size: int, device: torch.device, bases: int = 8) -> List[torch.Tensor]:
    shapes = ((batch, channels, size, size), (channels * bases, channels // bases, 3, 3), (channels * bases,))
    named = [normal(shape, "gpu", i) for i, shape in enumerate((*shapes, (batch, bases, size, size)))]
    named[1] *= (9 * channels / bases) ** -0.5
    return [t.to(device) for t in named]


def agreement(bench: Bench) -> Rows:
    """Ops, networks and samplers on the device against the CPU: largest difference over the largest value."""
    rows: Rows = []

    def row(what: str, found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
        off = _difference(found, expected)
        rows.append({"what": what, "difference": f"{off:.1e}", "bound": f"{bound:.0e}", "ok": off <= bound})

    cpu = torch.device("cpu")
    for channels in (16, 64):
        there = [t.requires_grad_() for t in _operands(1, channels, 24, bench.device)]
        here = [t.requires_grad_() for t in _operands(1, channels, 24, cpu)]
        pairs = [(convolution.adaptive_kernel_conv(*t), t) for t in (there, here)]
        row(f"AKGM, {channels} channels", pairs[0][0].detach(), pairs[1][0].detach(), 1e-3)
        gradients = [torch.autograd.grad(y.square().sum(), t) for y, t in pairs]
        for name, a, b in zip(("x", "weight", "bias", "mix"), *gradients):
            row(f"AKGM, {channels} channels, gradient of {name}", a, b, 1e-2)
    torch.manual_seed(0)
    net = UCDIR(**DRY).eval()
    lq, level, noise = normal((1, 3, 32, 32), "lq").tanh(), torch.tensor([0.7]), normal((1, 3, 32, 32), "n")
    with torch.no_grad():
        expected = net(lq, lq, level, noise)
        moved = net.to(bench.device)
        found = moved(*(t.to(bench.device) for t in (lq, lq, level, noise)))
    for name, a, b in zip(("UCDIR, noise", "UCDIR, prediction"), found, expected):
        row(name, a, b, 1e-3)
    schedule = NoiseSchedule.linear(100, 1e-4, 2e-2).respace(6, "trailing")
    prior = GaussianPrior.natural(16, 16, 0.3)
    for name, sampler in SAMPLERS.items():
        images = []
        for device in (bench.device, cpu):
            noises = image_noise(0, ["a"], device)
            images.append(sampler.sample(prior, schedule, lambda draw, n=noises: n((1, 3, 16, 16), draw), True))
        row(f"sampler {name}", images[0], images[1], 1e-3)
    images = []
    for device in (bench.device, cpu):
        y = normal((1, 3, 24, 24), "y").tanh().to(device)
        one = Degradation(start_kernel(1, 5).to(device), padding="valid")
        blurred, noises = GaussianPrior.natural(28, 28, 0.3), image_noise(0, ["a"], device)
        images.append(Solver(blurred, [(y, one)], PRESETS["default"], noises, names=["a"]).run().image)
    row("BIR-D, default", images[0], images[1], 1e-2)
    return rows


def akgm(bench: Bench) -> Rows:
    """AKGM as chosen against the loop, and against the plain convolution of equal multiplications (channels-last)."""
    rows: Rows = []
    shapes = ((16, 256), (32, 256), (64, 128), (128, 128), (256, 64), (512, 32)) if bench.cuda else ((16, 16), (64, 8))
    for channels, size in shapes:
        for dtype in bench.dtypes:
            x, weight, bias, mix = _operands(4 if bench.cuda else 1, channels, size, bench.device)
            x, weight, bias, mix = (t.to(TYPES[dtype]) for t in (x, weight, bias, mix))
            x = x.contiguous(memory_format=torch.channels_last)
            plain_weight = weight.reshape(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
            calls: Dict[str, Callable[..., torch.Tensor]] = {
                "plain": lambda x, w=plain_weight, b=bias[:channels]: F.conv2d(x, w, b, padding=1),
                "loop": lambda x, w=weight, b=bias, m=mix: convolution.adaptive_kernel_conv_loop(x, w, b, m),
                "chosen": lambda x, w=weight, b=bias, m=mix: convolution.adaptive_kernel_conv(x, w, b, m),
            }
            row: Dict[str, Any] = {"C, size": f"{channels}, {size}", "dtype": dtype}
            module = convolution.choose(x, 8)
            row["chosen is"] = "loop" if module is None else module.__name__.rsplit(".", 1)[-1]
            with torch.no_grad():
                off = _difference(calls["chosen"](x), calls["loop"](x))
            row["from the loop"] = f"{off:.1e}"
            for direction in ("forward", "with gradients"):
                times = {}
                for name, call in calls.items():
                    leaf = x.detach().requires_grad_(direction != "forward")

                    def one(call: Callable[..., torch.Tensor] = call, leaf: torch.Tensor = leaf) -> None:
                        y = call(leaf)
                        if leaf.requires_grad:
                            torch.autograd.grad(y.sum(), leaf)

                    with torch.set_grad_enabled(direction != "forward"):
                        times[name] = bench.seconds(one)
                row[f"{direction}: plain ms"] = round(times["plain"] * 1e3, 3)
                row[f"{direction}: chosen / plain"] = round(times["chosen"] / times["plain"], 2)
                row[f"{direction}: loop / plain"] = round(times["loop"] / times["plain"], 2)
            rows.append(row)
    return rows


def sampling_step(bench: Bench) -> Rows:
    """A call of the denoiser: types, torch.compile, CUDA graphs; memory above the weights."""
    rows: Rows = []
    net = bench.net().eval().requires_grad_(False)
    if not bench.cuda:
        net = net.to(memory_format=torch.channels_last)
    for size in (256, 1024) if bench.cuda else (32,):
        lq = normal((1, 3, size, size), "lq").tanh().to(bench.device)
        x, level = normal((1, 3, size, size), "x").to(bench.device), torch.tensor([0.7], device=bench.device)
        for dtype in bench.dtypes:
            for how in ("eager", "compile", "CUDA graph") if bench.cuda and size == 256 else ("eager",):
                row: Dict[str, Any] = {"size": size, "dtype": dtype, "how": how}
                rows.append(row)
                try:
                    with torch.no_grad(), bench.autocast(dtype):
                        guide = net.prepare(lq)
                        denoise = torch.compile(net.denoise) if how == "compile" else net.denoise

                        call = functools.partial(denoise, x, level, lq, guide)
                        expected = net.denoise(x, level, lq, guide)
                        run = _graph(call) if how == "CUDA graph" else call
                        row["ms"] = round(bench.seconds(run) * 1e3, 2)
                        row["MB"] = bench.memory(call)
                        row["from eager"] = f"{_difference(call(), expected):.1e}"
                except Exception as error:
                    row.update({"ms": _words(error), "MB": "", "from eager": ""})
    return rows


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def training_step(bench: Bench) -> Rows:
    """A training step of sid_ucdir at batch 32, crops of 256, alone and in DistributedDataParallel of one process."""
    rows: Rows = []
    batch, size = (32, 256) if bench.cuda else (2, 16)
    lq = normal((batch, 3, size, size), "lq").tanh().to(bench.device)
    noise, level = normal(lq.shape, "noise").to(bench.device), torch.full((batch,), 0.7, device=bench.device)
    for dtype in bench.dtypes[:2]:
        for how in ("alone", "DDP of one"):
            row: Dict[str, Any] = {"dtype": dtype, "how": how, "batch": batch, "size": size}
            rows.append(row)
            with contextlib.ExitStack() as stack:
                try:
                    net: torch.nn.Module = bench.net().train()
                    if how != "alone":
                        stack.enter_context(_one_process(bench))
                        ids = [bench.device.index or 0] if bench.cuda else None
                        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)
                    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)

                    def step(net: torch.nn.Module = net, optimizer: Any = optimizer, dtype: str = dtype) -> None:
                        optimizer.zero_grad(set_to_none=True)
                        with bench.autocast(dtype):
                            eps, _ = net(lq, lq, level, noise)
                        (eps.float() - noise).abs().mean().backward()
                        optimizer.step()

                    step()
                    row["MB"] = bench.memory(step)
                    row["step s"] = round(bench.seconds(step, warm=1), 4)
                except Exception as error:
                    row.update({"MB": "", "step s": _words(error)})
                    if bench.cuda:
                        torch.cuda.empty_cache()
    return rows


@contextlib.contextmanager
def _one_process(bench: Bench) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if bench.cuda else "gloo",
            init_method=f"file://{os.path.join(folder, 'store')}",
            rank=0,
            world_size=1,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def _words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:200]


SECTIONS: Dict[str, Callable[[Bench], Rows]] = {
    "agreement with the CPU": agreement,
    "AKGM, batch of 4, channels-last, N = 8": akgm,
    "a call of the denoiser of options/sid_ucdir.yml": sampling_step,
    "a training step of options/sid_ucdir.yml": training_step,
}


def tables(device_name: str) -> List[dict]:
    """All sections, each a table; of one that fails, a table of its error."""
    bench, found, start = Bench(choose_device(device_name)), [], time.perf_counter()
    where = torch.cuda.get_device_name(bench.device) if bench.cuda else "dry run on the CPU: small sizes"
    for title, section in SECTIONS.items():
        begun = time.perf_counter()
        if begun - start > MINUTES * 60:
            rows: Rows = [{"left out": f"{MINUTES:g} minutes are over"}]
        else:
            try:
                rows = section(bench)
            except Exception as error:
                rows = [{"failed": _words(error)}]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        rows = [{name: row.get(name, "") for name in columns} for row in rows]
        found.append(
            {**result(f"{title} ({where})", rows), "seconds": round(time.perf_counter() - begun, 1), "device": where}
        )
    return found


def failed(found: List[dict]) -> bool:
    """Whether something did not work, or disagrees with the CPU."""
    values = [value for table in found for row in table["rows"] for value in (*row, *row.values())]
    return any(value is False or str(value).startswith("failed") for value in values)
