"""Reading and converting weights, safely: tensors only, never code; one clear line when a file does not fit."""

from __future__ import annotations

import glob
import logging
import os
import pickle
import zipfile
from typing import Any, Mapping, Optional

import torch
from safetensors.torch import load_file
from torch import nn

from ucdir_plugin.utils import memory
from ucdir_plugin.utils.errors import UserError

OPTIONS = "ucdir_plugin.options"
"""Name of a tensor of bytes beside the weights in a model file: its options, for programs that read tensors alone."""


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Load a ``.pth`` or ``.safetensors`` file onto the CPU without running any code in it.

    Raises:
        UserError: if it is missing, cannot be read, is a pickle that wants more than tensors, or is made to take more
            memory than it is long.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist")
    try:
        size, free = os.path.getsize(path), memory.available()
        if free is not None and size > free:
            raise UserError(f"checkpoint {path} has {size / 2**30:.1f} GB, {free / 2**30:.1f} GB of memory are free")
        if path.endswith(".safetensors"):
            return load_file(path)
        _check_archive(path, size)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content, path, size)
        return content
    except UserError:
        raise
    except pickle.UnpicklingError as err:
        if "nsupported operand" not in str(err):  # an operand: not even a pickle
            raise UserError(
                f"checkpoint {path} is refused: it holds Python objects that could run code, not only tensors;"
                " save its state_dict alone"
            ) from err
        raise UserError(f"checkpoint {path} cannot be read: it is damaged or no PyTorch file") from err
    except Exception as err:  # torch and safetensors raise a dozen types for damaged files
        raise UserError(f"checkpoint {path} cannot be read: it is damaged or no PyTorch file") from err


def _check_archive(path: str, size: int) -> None:
    """Refuse zips that unpack to more than they are.

    Raises:
        UserError: if it is a zip that torch.save did not write: that stores as it is, and nothing twice.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)
    if unpacked > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UserError(
            f"checkpoint {path} is refused: it is packed, {unpacked / 2**20:.0f} MB in {size / 2**20:.1f} MB, as torch"
            " writes none"
        )


def _check_tensors(content: Any, path: str, size: int) -> None:
    """Refuse contents that are larger in memory than in the file.

    Raises:
        UserError: for tensors without numbers of their own (repeated, sparse, of no device), and for lists in lists
            that repeat each other.
    """
    stack, left = [content], 100_000
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            plain = item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized
            if not plain or item.is_nested or item.is_complex() or item.numel() * item.element_size() > size:
                raise UserError(
                    f"checkpoint {path} is refused: it holds a tensor of {tuple(item.size())} that is not stored number"
                    " by number; save its state_dict alone, of dense tensors"
                )
            continue
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple, set)) else ()
        found = [part for part in inner if isinstance(part, (torch.Tensor, dict, list, tuple, set))]
        left -= len(found)
        if left < 0:
            raise UserError(f"checkpoint {path} is refused: what it holds repeats itself without end")
        stack += found


def _first(names: list[str]) -> str:
    return f"{len(names)} ({names[0]}{', ...' if len(names) > 1 else ''})"


def not_finite(net: nn.Module, state: Optional[Mapping[str, torch.Tensor]] = None) -> str | None:
    """The first weight that holds NaN or infinity, or buffer that holds NaN (a mask may be infinite), if there is one.

    Args:
        state: these values instead of the network's own.
    """
    learned = {name for name, _ in net.named_parameters()}
    for name, value in (net.state_dict() if state is None else state).items():
        if torch.is_tensor(value) and value.is_floating_point():
            fine = value.isfinite() if name in learned else ~value.isnan()
            if not bool(fine.all()):
                return name
    return None


def fitting_state_dict(
    net: nn.Module, state: Mapping[str, torch.Tensor], path: str, strict: bool = True
) -> dict[str, torch.Tensor]:
    """What of ``state`` fits into ``net``: all of it if ``strict``.

    Raises:
        UserError: naming the first key that is missing, unexpected or of another shape, or that holds NaN.
    """
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} holds no weights: a mapping of names to tensors is expected")
    state = {str(key).removeprefix("module."): v for key, v in state.items()}
    own = net.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if strict and (missing or unexpected or misshapen):
        faults = []
        if missing:
            faults.append(f"lacks {_first(missing)}")
        if unexpected:
            faults.append(f"has unknown {_first(unexpected)}")
        if misshapen:
            k = misshapen[0]
            faults.append(
                f"has other shapes for {_first(misshapen)}: {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            )
        raise UserError(f"checkpoint {path} is of another architecture than {type(net).__name__}: {'; '.join(faults)}")
    fitting = {k: v for k, v in state.items() if k in own and k not in misshapen}
    damaged = not_finite(net, fitting)
    if damaged is not None:
        raise UserError(f"checkpoint {path} is damaged: {damaged} holds NaN or infinite values; take an earlier one")
    return fitting


def load_state_dict(net: nn.Module, state: Mapping[str, torch.Tensor], path: str, strict: bool = True) -> None:
    """Load ``state`` into ``net``; not strict leaves out what does not fit.

    Raises:
        UserError: as :func:`fitting_state_dict`.
    """
    net.load_state_dict(fitting_state_dict(net, state, path, strict), strict=False)


def _of_mmengine(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a model of mm/ under BasicSR's keys; those of any other model as they are."""
    found = {
        key: {name[len(prefix) :]: value for name, value in state.items() if str(name).startswith(prefix)}
        for key, prefix in (("params", "net_g."), ("params_ema", "net_g_ema."))
    }
    return {key: values for key, values in found.items() if values} or state


def choose_state(content: Any, path: str, param_key: str | None = "params") -> tuple[Any, str | None]:
    """The state dict in a checkpoint's content, and its key: ``param_key``, else 'params', else the content itself.

    Raises:
        UserError: if it is no mapping.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds no weights: a mapping of names to tensors is expected")
    if isinstance(content.get("state_dict"), Mapping):
        content = _of_mmengine(content["state_dict"])
    used = next((key for key in (param_key, "params", "params_ema") if key is not None and key in content), None)
    state = content if used is None else content[used]
    if isinstance(state, Mapping) and OPTIONS in state:
        state = {name: value for name, value in state.items() if name != OPTIONS}
    return state, used


def load_into(net: nn.Module, path: str, strict: bool = True, param_key: str | None = "params") -> str | None:
    """Load a checkpoint into ``net``; returns the key that it took (:func:`choose_state`).

    Raises:
        UserError: if it cannot be read or does not fit.
    """
    state, used = choose_state(read_checkpoint(path), path, param_key)
    load_state_dict(net, state, path, strict)
    return used


def load_network(self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params") -> None:
    """``BaseModel.load_network`` of BasicSR with a safe reader and one-line errors (a method; see compat.py).

    ``param_key`` falls back as in :func:`choose_state`.
    """
    net = self.get_bare_model(net)
    used = load_into(net, load_path, strict, param_key)
    logging.getLogger("basicsr").info(f"Loaded {type(net).__name__} from {load_path}, key {used}.")


def numbered(folder: str, prefix: str) -> dict[int, str]:
    """Iteration -> path of the checkpoints ``PREFIX<iteration>.pth`` in a folder."""
    return {
        int(stem): file
        for file in glob.glob(os.path.join(glob.escape(folder), f"{prefix}*.pth"))
        if (stem := os.path.basename(file)[len(prefix) : -len(".pth")]).isdigit()
    }
