"""What the networks of option files cost, in sampling and in training; the paper's Table 4 for any of them."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Any, Callable, Iterator, Optional, Sequence
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from ucdir_cli.benchmarks import timing

from ucdir_plugin.archs import UCDIR, ucdir_blocks
from ucdir_plugin.archs.akgm import convolution
from ucdir_plugin.archs.padding import pad_for
from ucdir_plugin.options.check import load_options
from ucdir_plugin.registry import build_arch

SIZE = 256
"""Height and width that the costs are given for."""


@contextlib.contextmanager
def _counted_mixing() -> Iterator[list[int]]:
    """AKGM by its plain convolutions, which the counter sees, and in the list the sum over N, which it does not."""
    found: list[int] = []

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        found.append(mix.numel() * x.shape[1])
        return convolution.adaptive_kernel_conv_loop(x, weight, bias, mix)

    with mock.patch.object(ucdir_blocks, "adaptive_kernel_conv", counting):
        yield found


@torch.no_grad()
def macs(call: Callable[[], Any]) -> int:
    """Multiply-adds of convolutions, matrix products and AKGM's sum over N; other operations on elements are not in it.

    Args:
        call: runs networks; on the device ``meta`` nothing is computed.
    """
    with FlopCounterMode(display=False) as counter, _counted_mixing() as mixing:
        call()
    return counter.get_total_flops() // 2 + sum(mixing)


def parameters(net: Optional[nn.Module]) -> int:
    """Count a network's numbers; 0 without one."""
    return 0 if net is None else sum(p.numel() for p in net.parameters())


def network(file: str) -> nn.Module:
    """The network of an option file, with random weights.

    Raises:
        UserError: if the file has a fault.
    """
    return build_arch(load_options(file, is_train=False)["network_g"], "network_g").eval()


def _step(net: nn.Module, size: int, device: str, features: bool) -> Callable[[], Any]:
    """A sampling step of a UCDIR network, with the guide's features or without; a pass of another."""
    image = torch.rand(1, 3, size, size, device=device)
    if not isinstance(net, UCDIR):
        return lambda: net(pad_for(net, image))
    level = torch.full((1,), 0.5, device=device)
    with torch.no_grad():
        guide = image if features else net.prepare(image)
    return lambda: net.denoise(image, level, image, guide)


def _memory_case(file: str, size: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    return torch.no_grad()(_step(network(file), size, "cpu", features=False))


def costs(net: nn.Module, size: int = SIZE) -> dict[str, float]:
    """Parameters in millions and multiply-adds in thousands of millions.

    Returns:
        of the denoiser with what it takes from the guide (or of a network of another kind), and of the predictor.
    """
    pair = isinstance(net, UCDIR)
    predictor = net.predictor if pair else None
    shadow = net.to("meta")
    image = torch.empty(1, 3, size, size, device="meta")
    of_predictor = macs(lambda: shadow.predict(image)) if predictor is not None else 0
    return {
        "parameters M": round(parameters(net.denoise_fn if pair else net) / 1e6, 2),
        "GMACs": round(macs(_step(shadow, size, "meta", features=True)) / 1e9, 2),
        "predictor M": round(parameters(predictor) / 1e6, 2),
        "predictor GMACs": round(of_predictor / 1e9, 2),
    }


def table(files: Sequence[str], size: int = SIZE) -> list[dict]:
    """A row for each option file; memory is measured in a process of its own.

    Raises:
        UserError: if a file has a fault.
    """
    rows = []
    for file in files:
        row = {"option file": os.path.splitext(os.path.basename(file))[0], **costs(network(file), size)}
        row["peak MB of a step"] = round(timing.peak_memory(_memory_case, os.path.abspath(file), size))
        rows.append(row)
    return [timing.result(f"cost of a sampling step at {size}x{size}, and of the initial predictor", rows)]


def _training_case(file: str, batch: int, size: int) -> Callable[[], Any]:
    """Training steps of an option file's model on noise, in float32."""
    from basicsr.models import build_model

    opt = load_options(file)
    opt.update(dist=False, rank=0, world_size=1, num_gpu=0, is_train=True)
    torch.manual_seed(0)
    model, image, step = build_model(opt), torch.rand(batch, 3, size, size), itertools.count(1)

    def call() -> None:
        number = next(step)
        samples = torch.arange(batch) + number * batch
        model.feed_data({"lq": image, "gt": image, "sample_number": samples})
        model.optimize_parameters(number)
        for optimizer in model.optimizers:  # else the next step begins by freeing the last one's gradients
            optimizer.zero_grad(set_to_none=True)

    return call


def training_table(files: Sequence[str], batches: Sequence[int], size: int) -> list[dict]:
    """Memory of a training step in one process: a row for each option file and batch (docs/mmengine.md's worksheet).

    What stays between steps is 16 bytes a parameter: the weight, its average, two moments of Adam. A step adds the
    gradients, 4 bytes, and what grows with the pixels of a batch.

    Raises:
        UserError: if a file has a fault.
    """
    rows = []
    for file in files:
        count = parameters(network(file))
        for batch in batches:
            step = timing.peak_memory(_training_case, os.path.abspath(file), batch, size)
            rows.append(
                {
                    "option file": os.path.splitext(os.path.basename(file))[0],
                    "parameters M": round(count / 1e6, 2),
                    "batch": batch,
                    "size": size,
                    "16 bytes a parameter, MB": round(16 * count / 2**20),
                    "a step adds MB": round(step),
                    "KB a pixel": round((step - 4 * count / 2**20) * 1024 / (batch * size**2), 1),
                }
            )
    return [timing.result("memory of a training step, one process", rows)]
