"""Model files: weights with their options in one .safetensors file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Mapping, Optional

import torch
from safetensors import SafetensorError, safe_open

from ucdir_plugin.options.check import check_options
from ucdir_plugin.registry import build_arch, lookup
from ucdir_plugin.utils.checkpoints import OPTIONS, choose_state, fitting_state_dict, numbered, read_checkpoint
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import write_atomically

HEADER = "ucdir_plugin"
"""Key of a model file's options in its safetensors header."""

PRIOR_MODEL = "DiffusionPriorModel"
"""``model_type`` of what trains a prior."""


def find_weights(opt: dict, forced: list[str]) -> None:
    """Point ``path: pretrain_network_g`` at the last thing this option file trained, if it trained something.

    Else what the file names is tested, and always what ``--force_yml path:pretrain_network_g=...`` names.

    Raises:
        UserError: if there are no weights.
    """
    path = opt["path"]
    if any(entry.startswith("path:pretrain_network_g=") for entry in forced):
        return
    root = os.path.join(opt["root_path"], "experiments", opt["name"])
    models = os.path.join(root, "models")
    found = {**numbered(models, "net_g_"), **numbered(root, "iter_")}  # the latter: MMEngine's
    if found and opt.get("train"):
        path.update(pretrain_network_g=found[max(found)], param_key_g="params_ema")
    if not path.get("pretrain_network_g"):
        raise UserError(f"no weights: set path:pretrain_network_g, or train first (none found in {models})")


@dataclass(frozen=True)
class PriorFile:
    """Weights of a prior, averaged ones first, and what the file says of itself; None where it says nothing.

    Args:
        network: its arch and arguments.
        diffusion: the schedule it was trained with, as in option files.
        notes: for who uses it, such as ``licence``.
    """

    state: dict[str, torch.Tensor]
    network: Optional[dict] = None
    diffusion: Optional[dict] = None
    notes: Optional[dict[str, str]] = None


def _header(path: str) -> dict:
    """What this package wrote into a safetensors file beside the weights.

    Raises:
        UserError: if it is no mapping.
    """
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(HEADER)
    if header and len(header) > 2**20:
        raise UserError(f"{path}: its header is longer than options are")
    try:
        content = json.loads(header or "{}")
    except (ValueError, RecursionError) as err:
        raise UserError(f"{path}: its header cannot be read") from err
    if not isinstance(content, dict):
        raise UserError(f"{path}: its header cannot be read")
    return content


def read_prior(path: str) -> PriorFile:
    """A prior of OpenAI's kind: published, of :func:`convert_adm`, or of :func:`write_model` or a training here.

    Raises:
        UserError: if it is missing or damaged, or of a model that restores.
    """
    state, _ = choose_state(read_checkpoint(path), path, "params_ema")
    if not path.endswith(".safetensors"):
        return PriorFile(state)
    header = _header(path)
    if "options" not in header:
        network = header.get("network")
        return PriorFile(state, network if isinstance(network, dict) else None)
    options, _, notes = read_model(path)
    if options["model_type"] != PRIOR_MODEL:
        raise UserError(f"{path} is no prior but a model that restores: restore.py --model {path}")
    return PriorFile(state, options["network_g"], options["diffusion"], notes)


def write_safetensors(
    state: Mapping[str, torch.Tensor], target: str, dtype: torch.dtype, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Write tensors and a header; the file is there whole or not at all."""
    from safetensors.torch import save

    state = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    write_atomically(save(state, metadata={HEADER: json.dumps(header)}), target)
    return {"tensors": len(state), "parameters": sum(v.numel() for v in state.values())}


def write_model(
    source: str, options: dict, target: str, dtype: torch.dtype, notes: Mapping[str, str]
) -> dict[str, Any]:
    """Turn what an option file trained into one file that restores without it: averaged weights, options in the header.

    Args:
        source: ``net_g_ITER.pth``, of which the averaged weights are taken, or any of the option file's ``network_g``.
        options: checked ones, as of ``load_options``.
        target: a .safetensors file.
        dtype: that floating-point weights are stored in; networks compute in float32 all the same.
        notes: shown to whoever uses the file, such as ``licence``.

    Returns:
        ``{"tensors": number, "parameters": numbers in them}``.

    Raises:
        UserError: if the weights do not fit, or the file cannot be written.
    """
    state, _ = choose_state(read_checkpoint(source), source, "params_ema")
    net = build_arch(options["network_g"], "network_g")
    state = fitting_state_dict(net, state, source)
    kept = {
        k: options[k] for k in ("name", "model_type", "scale", "manual_seed", "network_g", "diffusion") if k in options
    }
    kept["network_g"] = _without_files(options["network_g"])
    if "sampling" in options["val"]:
        kept["val"] = {"sampling": dict(options["val"]["sampling"])}
        if options["model_type"] == PRIOR_MODEL:  # of its pictures in training; the others are not its own
            kept["val"]["sampling"] = {key: options["val"]["sampling"][key] for key in ("sampler", "steps")}
    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: a model file ends with .safetensors")
    header = {"options": kept, "notes": dict(notes), "jpeg_quality": jpeg_quality(options)}
    counts = {"tensors": len(state), "parameters": sum(value.numel() for value in state.values())}
    write_safetensors({**state, OPTIONS: _as_tensor(kept)}, target, dtype, header)
    return counts


def _as_tensor(options: Mapping[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(options).encode()), dtype=torch.uint8)


def options_among(state: Mapping[str, torch.Tensor], where: str) -> dict:
    """Options that :func:`write_model` put among the weights, checked; for programs that hand over these alone.

    Raises:
        UserError: if they cannot be read, or name a file to be read.
    """
    tensor = state[OPTIONS]
    try:
        if tensor.dtype != torch.uint8 or tensor.numel() > 2**20:
            raise ValueError
        options = json.loads(bytes(tensor.cpu().numpy().tobytes()))
    except (ValueError, RecursionError) as err:
        raise UserError(f"{where}: its options cannot be read") from err
    checked = check_options(options, is_train=False, where=where)
    _refuse_files(checked.get("network_g"), where)
    return checked


def jpeg_quality(options: Mapping[str, Any]) -> Optional[tuple[int, int]]:
    """Lowest and highest quality of the JPEGs that an option file trains on; None if on something else."""
    trained = (options.get("datasets") or {}).get("train") or {}
    return _quality_range(trained.get("quality")) if trained.get("type") == "JPEGDataset" else None


def jpeg_quality_of(path: str) -> Optional[tuple[int, int]]:
    """:func:`jpeg_quality` of what a model file was trained on."""
    return _quality_range(_header(path).get("jpeg_quality"))


def _quality_range(value: Any) -> Optional[tuple[int, int]]:
    low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
    fits = type(low) is int and type(high) is int and 1 <= low <= high <= 100
    return (low, high) if fits else None


def read_model(path: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    """Options, weights and notes of a file that :func:`write_model` wrote; the options are checked like any others.

    Raises:
        UserError: if it is missing, damaged, or holds no options.
    """
    state, content = choose_state(read_checkpoint(path), path, None)[0], _header(path)
    try:
        options, notes = content["options"], {str(k): str(v) for k, v in content["notes"].items()}
    except (KeyError, TypeError, AttributeError) as err:
        raise UserError(
            f"{path} holds weights without options: use it as --weights beside its option file,"
            " or make a model file of both with tools/convert_weights.py"
        ) from err
    checked = check_options(options, is_train=False, where=path)
    _refuse_files(checked.get("network_g"), path)
    return checked, state, notes


def is_model_file(path: str) -> bool:
    """Whether :func:`write_model` wrote it, as far as its name and header tell."""
    try:
        return path.endswith(".safetensors") and "options" in _header(path)
    except (OSError, SafetensorError):
        return False


def _without_files(cfg: Any) -> Any:
    """A network's configuration in which none names a file, so that its weights and options are all there is."""
    if not isinstance(cfg, Mapping):
        return cfg
    cfg = {key: _without_files(value) for key, value in cfg.items()}
    cls = lookup("arch", cfg["type"]) if isinstance(cfg.get("type"), str) else None
    return cls.without_files(cfg) if getattr(cls, "file_arguments", ()) else cfg


def _refuse_files(cfg: Any, path: str) -> None:
    """A model file chooses no other file to read.

    Raises:
        UserError: if a network in it wants one.
    """
    if not isinstance(cfg, Mapping):
        return
    kind = cfg.get("type")
    names = getattr(lookup("arch", kind), "file_arguments", ()) if isinstance(kind, str) else ()
    for name in names:
        if cfg.get(name) is not None:
            raise UserError(f"{path} is refused: its {kind} would read the file {cfg[name]}; a model file holds all")
    for value in cfg.values():
        _refuse_files(value, path)
