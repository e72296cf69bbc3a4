"""Adaptive kernel convolution in C++ for CPUs with AVX2 or AVX-512: akgm.cpp, built by the machine's compiler.

Built once, at first use, with torch.utils.cpp_extension, into torch's directory of extensions
(``TORCH_EXTENSIONS_DIR``, default ``~/.cache/torch_extensions``). Without a compiler, on other machines, or with
``UCDIR_COMPILE=0`` in the environment it is not available, and akgm_tiled does the same in plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch

from ucdir_plugin.archs.akgm.tiled import memory_format
from ucdir_plugin.compat import get_root_logger

SOURCE = Path(__file__).with_name("akgm.cpp")
FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}


def available() -> bool:
    """Whether the library is there; builds it at the first call."""
    return _library() is not None


@functools.cache
def _library() -> Optional[ctypes.CDLL]:
    if os.environ.get("UCDIR_COMPILE") == "0":
        return None
    # What this CPU can do, or what ATEN_CPU_CAPABILITY says: the choice of torch for its own kernels.
    flags = FLAGS.get(torch.backends.cpu.get_cpu_capability())
    reason = f"it needs Linux and one of {', '.join(FLAGS)}"
    if flags and sys.platform == "linux":
        try:
            return _load(flags)
        except Exception as error:  # whatever it is: there is another way
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0])
    get_root_logger().warning(f"AKGM in plain PyTorch, which is slower: the compiled one is not available ({reason})")
    return None


def folder() -> Path:
    """Where what is built and measured for this machine is kept."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser() / "ucdir_plugin"


def _load(flags: Sequence[str]) -> ctypes.CDLL:
    flags = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fopenmp", *flags]
    key = hashlib.sha256(repr((torch.__version__, flags)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = folder() / f"akgm_{key}.so"
    if not path.exists():
        _build(flags, path)
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    for suffix in ("f32", "f64"):
        getattr(library, f"akgm_forward_{suffix}").argtypes = [number] * 5 + [pointer] * 5 + [ctypes.c_int] * 2
        getattr(library, f"akgm_backward_{suffix}").argtypes = (
            [number] * 5 + [pointer] * 10 + [number] * 2 + [ctypes.c_int] * 2
        )
    library.akgm_splits.argtypes = [number] * 5 + [ctypes.POINTER(number)] * 2
    return library


def _build(flags: Sequence[str], path: Path) -> None:
    from torch.utils import cpp_extension

    get_root_logger().info("Building the compiled AKGM for this CPU, once; this takes some seconds.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A directory of its own, then a rename: no lock to be left behind, and several processes may build at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        cpp_extension.load(
            "akgm",
            [str(SOURCE)],
            extra_cflags=list(flags),
            extra_ldflags=["-fopenmp"],
            build_directory=directory,
            is_python_module=False,
        )
        os.replace(Path(directory) / "akgm.so", path)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Compute :func:`ucdir_plugin.archs.akgm.convolution.adaptive_kernel_conv`, in float32 or float64.

    Raises:
        ValueError: for shapes that do not fit, or tensors that are not on the CPU.
    """
    _check(x, weight, bias, mix)
    x, mix, weight, bias = _dense(x), _dense(mix), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    _call("forward", x, mix, [x, weight, bias, mix, y])
    return y


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mix: torch.Tensor,
    needs: Sequence[bool],
) -> Tuple[Optional[torch.Tensor], ...]:
    """Gradients of x, weight, bias and mix; those that ``needs`` leaves out may be None."""
    x, mix, weight, bias = _dense(x), _dense(mix), weight.contiguous(), bias.contiguous()
    grad_y = grad_y.contiguous(memory_format=memory_format(x))
    mix_splits, weight_splits = ctypes.c_long(), ctypes.c_long()
    _library().akgm_splits(*_shape(x, mix), ctypes.byref(mix_splits), ctypes.byref(weight_splits))
    grad_x = grad_mix = partial_mix = grad_weight = grad_bias = None
    if needs[0] or needs[3]:
        grad_x, grad_mix = torch.empty_like(x), torch.empty_like(mix)
        partial_mix = mix.new_empty(mix_splits.value - 1, mix.numel())
    if needs[1] or needs[2]:
        grad_weight = weight.new_zeros(weight_splits.value, *weight.shape)
        grad_bias = bias.new_zeros(weight_splits.value, *bias.shape)
    arguments = [x, weight, bias, mix, grad_y, grad_x, grad_weight, grad_bias, grad_mix, partial_mix]
    _call("backward", x, mix, arguments, mix_splits, weight_splits)
    if partial_mix is not None and len(partial_mix):
        in_memory_order = grad_mix if grad_mix.is_contiguous() else grad_mix.permute(0, 2, 3, 1)
        in_memory_order.view(-1).add_(partial_mix.sum(0))
    if grad_weight is not None:
        grad_weight, grad_bias = grad_weight.sum(0), grad_bias.sum(0)
    return grad_x, grad_weight, grad_bias, grad_mix


def _call(name, x, mix, tensors, *numbers):
    function = getattr(_library(), f"akgm_{name}_{'f64' if x.dtype == torch.float64 else 'f32'}")
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    if function(*_shape(x, mix), *pointers, *numbers, not x.is_contiguous(), not mix.is_contiguous()):
        raise MemoryError("not enough memory for the compiled AKGM")


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> None:
    """The library goes where the sizes say: past the end of a tensor that has others."""
    (batch, channels, *size), bases = x.shape, mix.shape[1]
    shapes = [(channels * bases, channels // bases, 3, 3), (channels * bases,), (batch, bases, *size)]
    tensors = (weight, bias, mix)
    if channels % bases or any(t.shape != s for t, s in zip(tensors, shapes)):
        found = ", ".join(str(tuple(t.shape)) for t in (x, *tensors))
        raise ValueError(f"x, weight, bias and mix do not fit together: {found}")
    if any(t.device.type != "cpu" or t.dtype != x.dtype for t in (x, *tensors)):
        raise ValueError("x, weight, bias and mix must be on the CPU and of one dtype")


def _shape(x: torch.Tensor, mix: torch.Tensor) -> Tuple[int, ...]:
    """Sizes B, C, N, H, W."""
    return (*x.shape[:2], mix.shape[1], *x.shape[2:])


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=memory_format(x))
