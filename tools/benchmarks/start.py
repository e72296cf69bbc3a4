"""Seconds and memory until a command answers wrong arguments, and what importing the package adds."""

from __future__ import annotations

import statistics
import subprocess
import sys
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
    "a file that is not there": ["-opt", "missing.yml"],
}
WITHOUT_OPT = ("compare", "study_bird", "study_ucdir")
"""Commands without option file, for which the last call says something else."""

ECOSYSTEMS = """
import sys, torch, torchvision.transforms.functional as functional
sys.modules["torchvision.transforms.functional_tensor"] = functional  # BasicSR 1.4.2 asks for it
import basicsr, mmengine.registry, mmengine.fileio
"""
IMPORTS = {"torch": "import torch", "torch, BasicSR, MMEngine": ECOSYSTEMS, "ucdir_plugin": "import ucdir_plugin"}

# Linux counts what the parent held to a process's peak: a small interpreter starts it.
MEASURE = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
usage = os.wait4(process.pid, 0)[2]
print(time.perf_counter() - start, usage.ru_maxrss / 1024)
"""


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a process."""
    done = subprocess.run([sys.executable, "-S", "-c", MEASURE, *command], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


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
        if what != "a file that is not there" or command not in WITHOUT_OPT
    }
    measured = _medians(commands, repeats)
    rows = []
    for command in COMMANDS:
        row = {"command": command}
        for what in CALLS:
            seconds, megabytes = measured.get(f"{command} {what}", (None, None))
            row[what] = "" if seconds is None else f"{seconds:.2f} s, {megabytes:.0f} MB"
        rows.append(row)
    imports = _medians({name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}, repeats)
    more = [{"import": name, "seconds": round(s, 2), "MB": round(mb)} for name, (s, mb) in imports.items()]
    return [result("until a command answers, the interpreter's own start in it", rows), result("imports", more)]
