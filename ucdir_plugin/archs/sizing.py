"""Whether a network or a batch fits into memory, asked before any is taken."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, Mapping, Optional

import torch
from torch.nn.modules import module as hooks

from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils import memory
from ucdir_plugin.utils.errors import UserError

_MODULES = 8_000  # building more takes long; large published networks have some thousands


class _Stop(Exception):
    """Enough has been counted."""


def count_parameters(cfg: Mapping[str, Any], where: str, most: int) -> Optional[int]:
    """Numbers that a network holds, with its buffers.

    It is built on torch's meta device, which takes no memory; the few archs that cannot be (SwinIR, RIDNet) are built
    as they are, as far as ``most``.

    Args:
        most: from here on it does not matter how many more there are.

    Returns:
        the number; None if the network cannot be built alone.

    Raises:
        UserError: for a network of too many layers, or that :func:`build_arch` refuses.
    """
    count, modules, limit = 0, 0, math.inf

    def tensor(_module: Any, _name: str, value: Optional[torch.Tensor]) -> None:
        nonlocal count
        count += 0 if value is None else value.numel()
        if count > limit:
            raise _Stop

    def module(*_: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > _MODULES:
            raise UserError(f"option {where}: a network of more than {_MODULES} layers is asked for; make it smaller")

    with ExitStack() as stack:
        for handle in (
            hooks.register_module_parameter_registration_hook(tensor),
            hooks.register_module_buffer_registration_hook(tensor),
            hooks.register_module_module_registration_hook(module),
        ):
            stack.callback(handle.remove)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in ("meta", "cpu"):
            count, modules, limit = 0, 0, math.inf if device == "meta" else most
            try:
                with torch.device(device):
                    build_arch(cfg, where)
                return count
            except _Stop:
                return count
            except UserError:
                raise
            except (MemoryError, OverflowError):
                return most + 1
            except Exception as err:  # whatever an arch does; where it is built in earnest it is told
                if "allocate memory" in str(err) or "overflow" in str(err):
                    return most + 1
    return None


def check_network(cfg: Mapping[str, Any], where: str, tensors: int = 1) -> None:
    """Refuse a network whose weights do not fit into the memory.

    Args:
        cfg: as of :func:`build_arch`.
        where: the option, for the message.
        tensors: of the weights' size that are held beside each other: 1, in training more.

    Raises:
        UserError: with the estimate, if a network does not fit into the memory that is free.
    """
    free = memory.available()
    if free is None:
        return
    most = free // (4 * tensors)
    count = count_parameters(cfg, where, most)
    if count is not None and count > most:
        what = "weights" if tensors == 1 else "weights, gradients, optimizer and average"
        at_least = "at least " * (count == most + 1)
        raise UserError(
            f"option {where}: {cfg.get('type')} would have {at_least}{count:.3g} parameters, {at_least}"
            f"{4 * tensors * count / 2**30:.3g} GB of {what}; {free / 2**30:.1f} GB of memory are free: make it smaller"
        )
