"""Whether bfloat16 pays on this machine: known of GPUs, measured on CPUs.

A CPU without the instructions emulates bf16, and is slower with it than in float32 (docs/speed.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from typing import Any, Dict, NamedTuple, Optional

import torch

from ucdir_plugin.archs import UCDIR, SIDUNet, UCDIRDenoiser
from ucdir_plugin.archs.akgm import compiled
from ucdir_plugin.archs.ucdir_blocks import AKGBlock
from ucdir_plugin.utils.errors import WriteError
from ucdir_plugin.utils.files import write_text

DTYPES = ("auto", "fp32", "bf16", "fp16")
SAFE = (UCDIRDenoiser, SIDUNet)
"""Networks, and parts of UCDIR, whose images in bf16 are within 1 of 255 of those in float32.

``auto`` leaves others in float32.
"""

GAIN = 0.9
"""Largest time in bf16, of that in float32, with which ``auto`` takes it."""

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""As Linux names them for x86 and ARM; a CPU without one of them is not measured."""

CHANNELS, SIDE, REPEATS = 64, 64, 3
"""Of the block that is timed: as in the middle of the package's networks."""


class Choice(NamedTuple):
    """A type and the reason, in words for the user."""

    dtype: str
    reason: str


def choose(network: torch.nn.Module, device: torch.device) -> Choice:
    """The type that ``auto`` means: bf16 where it is faster and safe, else fp32."""
    parts = [network.denoise_fn, network.predictor] if isinstance(network, UCDIR) else [network]
    other = next((part for part in parts if part is not None and not isinstance(part, SAFE)), None)
    if other is not None:
        return Choice("fp32", f"bf16 was not checked with {type(other).__name__}")
    if device.type == "cuda":
        # Before compute capability 8 (Ampere) bf16 is emulated.
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return (
            Choice("bf16", "this GPU computes with it") if fast else Choice("fp32", "this GPU has no bf16 arithmetic")
        )
    if not has_instructions():
        return Choice("fp32", "this CPU has no bf16 arithmetic")
    ratio = bf16_time()
    text = f"on this CPU bf16 takes {ratio:.2f} of fp32's time"
    return Choice("bf16" if ratio <= GAIN else "fp32", text)


def slower(device: torch.device) -> Optional[str]:
    """A warning for who asks for bf16 where it is slower than float32; None where it is not, or nobody knows."""
    if device.type != "cpu":
        return None
    ratio = bf16_time()
    if ratio <= 1.1:
        return None
    return f"bf16 takes {ratio:.1f} times as long as fp32 on this CPU, which has no fast arithmetic for it"


def has_instructions() -> bool:
    """Whether the CPU says that it computes with bf16 (Linux), and torch was not told to leave that alone."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # or ATEN_CPU_CAPABILITY
        return False
    return bool(set(INSTRUCTIONS) & set(_cpu().split()))


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = file.read().split("\n\n")[0].splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features")
    return " ".join(line.partition(":")[2] for line in lines if line.startswith(wanted))


def bf16_time() -> float:
    """Time of an AKGM block in bf16 over that in float32 on this CPU; measured once, then read from a file.

    The file is beside the compiled AKGM, one for each CPU, torch, number of threads, and choice of instructions.
    """
    settings = [_cpu(), torch.__version__, torch.backends.cpu.get_cpu_capability(), compiled.available()]
    settings.append(torch.get_num_threads())
    settings += [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = compiled.folder() / f"bf16_{key}.json"
    known = _read(path)
    if known is not None:
        return known
    ratio = _measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps({"bf16_over_fp32": ratio}), str(path))
    except (OSError, WriteError):
        pass  # it is measured again next time
    return ratio


def _read(path: Any) -> Optional[float]:
    try:
        found: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ratio = float(found["bf16_over_fp32"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ratio if 0 < ratio < 1e6 else None


@torch.no_grad()
def _measure() -> float:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        block = AKGBlock(CHANNELS, CHANNELS, 32).eval().to(memory_format=torch.channels_last)
        x = torch.randn(1, CHANNELS, SIDE, SIDE).to(memory_format=torch.channels_last)
        emb, features = torch.randn(1, 32), block.guide_features(torch.randn(1, 3, SIDE, SIDE))
    times: Dict[bool, float] = {}
    for _ in range(REPEATS):
        for half in (False, True):  # in turns, so that a busy machine is so for both
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                start = time.perf_counter()
                block(x, emb, features)
                taken = time.perf_counter() - start
            times[half] = min(taken, times.get(half, taken))
    return times[True] / times[False]
