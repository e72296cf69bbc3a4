"""Speed and memory as ratios: variants alternate in one run, medians are compared; what tools/benchmark.py prints."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Callable
from unittest import mock

import torch
import torch.nn.functional as F

from ucdir_plugin.archs import UCDIRDenoiser, ucdir_arch
from ucdir_plugin.errors import UserError


def released_formulation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """AKGM as the release computes it: one grouped convolution to C * N channels, view, multiply, sum."""
    batch, channels, height, width = x.shape
    z = F.conv2d(x, weight, bias, padding=1, groups=mix.shape[1])
    return (z.view(batch, channels, -1, height, width) * mix.unsqueeze(1)).sum(2)


VARIANTS = {"ucdir_plugin": None, "released formulation": released_formulation}


def _denoiser_forward(size: int) -> Callable[[], None]:
    torch.manual_seed(0)
    net = UCDIRDenoiser(released_padding=True).eval()
    x, level, guide = torch.randn(1, 6, size, size), torch.full((1,), 0.5), torch.randn(1, 3, size, size)

    @torch.no_grad()
    def call() -> None:
        net(x, level, guide)

    return call


def _with_variant(name: str, call: Callable[[], None]) -> None:
    function = VARIANTS[name]
    if function is None:
        call()
    else:
        with mock.patch.object(ucdir_arch, "adaptive_kernel_conv", function):
            call()


def alternate(call: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median seconds of each variant, one warm-up each, then in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(repeats + 1):
        for name, found in seconds.items():
            start = time.perf_counter()
            _with_variant(name, call)
            if turn:
                found.append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak_memory(name: str, size: int) -> float:
    """MB that one forward pass takes above the idle process with the network loaded, in a process of its own."""
    code = f"from ucdir_plugin import benchmark; benchmark._print_peak({name!r}, {size})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _print_peak(name: str, size: int) -> None:
    call = _denoiser_forward(size)
    with open("/proc/self/clear_refs", "w") as file:  # Linux: the peak starts anew
        file.write("5")
    before = _status("VmRSS")
    _with_variant(name, call)
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def forward(size: int, repeats: int) -> dict:
    """The released SID denoiser's forward, with the release's padding, against the released formulation of AKGM."""
    seconds = alternate(_denoiser_forward(size), repeats)
    if not sys.platform.startswith("linux"):
        raise UserError("peak memory is read from /proc: run this benchmark on Linux")
    memory = {name: peak_memory(name, size) for name in VARIANTS}
    return {
        "benchmark": f"forward of the released SID denoiser, one {size}x{size} image, release's padding",
        "threads": torch.get_num_threads(),
        "rows": [
            {
                "variant": name,
                "seconds": round(seconds[name], 3),
                "time ratio": round(seconds[name] / seconds["released formulation"], 3),
                "peak MB": round(memory[name]),
                "memory ratio": round(memory[name] / memory["released formulation"], 3),
            }
            for name in VARIANTS
        ],
    }


def table(result: dict) -> str:
    """A result as Markdown, its JSON below."""
    columns = list(result["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in result["rows"]]
    return f"{result['benchmark']}, {result['threads']} threads\n\n" + "\n".join(lines) + "\n\n" + json.dumps(result)
