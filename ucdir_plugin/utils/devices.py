"""The device to compute on, and the type for autocast there."""

from __future__ import annotations

from typing import Optional

import torch

from ucdir_plugin.utils import ranks
from ucdir_plugin.utils.errors import UserError


def amp_dtype(device: torch.device, amp: Optional[str], option: str) -> Optional[torch.dtype]:
    """The type for autocast; None for float32.

    Raises:
        UserError: if the device cannot compute with it.
    """
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"{option}: fp16 needs a CUDA device; on the CPU use bf16 or leave it out")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[amp]


def choose_device(name: str = "auto") -> torch.device:
    """Find the device that a name means; ``auto`` is a GPU where there is one.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        return _own_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise UserError(f"device {name!r} is not known: take auto, cpu, cuda or cuda:N") from err
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} was never tried: take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here: {torch.cuda.device_count()} CUDA devices are; take cpu")
    return _own_gpu(device)


def _own_gpu(device: torch.device) -> torch.device:
    """Give each of several processes on a machine a GPU of its own, unless one was named."""
    share = ranks.own_share()
    if share.world == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", share.local % torch.cuda.device_count())
