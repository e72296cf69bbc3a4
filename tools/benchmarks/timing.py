"""Alternated timing, peak memory and Markdown tables, which the benchmarks share."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Optional

import torch

from ucdir_plugin.utils import memory
from ucdir_plugin.utils.errors import UserError


def alternate(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, one warm-up each, then in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


# Memory: each measurement in a process of its own


def peak_memory(case: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MB that the second of two calls takes at its peak, above the idle process with the network loaded.

    Args:
        case: a function of a module that returns the call; ``arguments`` are its own.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("peak memory is read from /proc: run this benchmark on Linux")
    where, name = case.__module__, case.__name__
    code = f"import {where}, {__name__} as timing; timing._print_peak({where}.{name}(*{arguments!r}))"
    # Freed memory goes back at once, else what an earlier call left behind would hide a part of the peak.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode:
        raise UserError(f"measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def _print_peak(call: Callable[[], Any]) -> None:
    call()
    before = memory.status("VmRSS")
    memory.reset_peak(torch.device("cpu"))
    call()
    print((memory.status("VmHWM") - before) / 2**20)


def result(title: str, rows: list[dict]) -> dict:
    """A table and where it was measured."""
    return {
        "benchmark": title,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "rows": rows,
    }


@functools.cache
def _cpu() -> str:
    name: Optional[str] = platform.processor()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def table(result: dict) -> str:
    """A result as Markdown, its JSON below."""
    columns = list(result["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in result["rows"]]
    head = f"{result['benchmark']} ({result['threads']} threads, torch {result['torch']}, {result['cpu']})"
    return head + "\n\n" + "\n".join(lines) + "\n\n" + json.dumps(result) + "\n"
