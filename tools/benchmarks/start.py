"""Seconds and memory until a command answers wrong arguments, and what importing the package adds."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ucdir_cli.benchmarks.timing import result

TOOLS = Path(__file__).resolve().parent.parent
COMMANDS = (
    "train",
    "test",
    "restore",
    "evaluate",
    "compare",
    "convert_weights",
    "benchmark",
    "study_bird",
    "study_ucdir",
)
CALLS = {
    "-h": ["-h"],
    "a misspelt argument": ["--ouptut", "x"],
    "no argument": [],
    "an option file that is not there": ["-opt", "missing.yml"],
}
IMPORTS = {
    "torch": "import torch",
    "torch, BasicSR, MMEngine": "import mmengine.registry, torch; from ucdir_plugin import compat",
    "ucdir_plugin": "import ucdir_plugin",
}
"""BasicSR cannot be imported beside a current torchvision without this package's compat.py."""


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def _medians(commands: dict[str, list[str]], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians over turns, after one that fills the caches."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            measured = _run(command)
            if turn:
                found[name].append(measured)
    return {name: tuple(statistics.median(values) for values in zip(*runs)) for name, runs in found.items()}


def table(repeats: int) -> list[dict]:
    """Two tables: each command with wrong arguments, and imports."""
    commands = {
        f"{command} {what}": [sys.executable, str(TOOLS / f"{command}.py"), *args]
        for command in COMMANDS
        for what, args in CALLS.items()
    }
    measured = _medians(commands, repeats)
    rows = []
    for command in COMMANDS:
        row = {"command": command}
        for what in CALLS:
            seconds, megabytes = measured[f"{command} {what}"]
            row[what] = f"{seconds:.2f} s, {megabytes:.0f} MB"
        rows.append(row)
    imports = _medians({name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}, repeats)
    more = [{"import": name, "seconds": round(s, 2), "MB": round(mb)} for name, (s, mb) in imports.items()]
    return [result("until a command answers, beside the interpreter's own start", rows), result("imports", more)]
