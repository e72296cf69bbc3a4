"""Reading and converting weights, safely: tensors only, never code; one clear line when a file does not fit."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import dataclass
from typing import Any, Mapping, Optional

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ucdir_plugin import memory
from ucdir_plugin.errors import NotAvailable, UserError

# What the released ``*_gen.pth`` of UCDIR holds beside the weights: constants of its noise schedule.
SCHEDULE_BUFFERS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    }
)

HEADER = "ucdir_plugin"
"""Key of a model file's options in its safetensors header."""

PRIOR_MODEL = "DiffusionPriorModel"
"""``model_type`` of what trains a prior."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that others publish.

    Args:
        name: of the file.
        url: where it can be had.
        sha256: of its content, 64 hexadecimal digits; None if its publishers' is not known.
    """

    name: str
    url: str
    sha256: str | None = None

    def find(self, weights_dir: str | None = None) -> tuple[str, str]:
        """Path and SHA-256 of the first such file in ``weights_dir``, ``$UCDIR_WEIGHTS`` and the torch hub cache.

        Raises:
            NotAvailable: if there is none, or only ones of other content; says which file to put where.
        """
        folders = [weights_dir, os.environ.get("UCDIR_WEIGHTS"), os.path.join(torch.hub.get_dir(), "checkpoints")]
        paths = [os.path.join(os.path.expanduser(folder), self.name) for folder in folders if folder]
        wrong = []
        for path in filter(os.path.isfile, paths):
            found = sha256_of(path)
            if self.sha256 in (None, found):
                return path, found
            wrong.append(f"{path} has SHA-256 {found}, not {self.sha256}: it is damaged or another file")
        raise NotAvailable(wrong[0] if wrong else f"put {self.name} ({self.url}) at {' or '.join(paths)}", self)

    def download(self, weights_dir: str | None = None) -> str:
        """Download the file into the first of the folders that :meth:`find` looks in; returns its path.

        Raises:
            UserError: if it cannot be had or written, or is not what was expected.
        """
        folder = weights_dir or os.environ.get("UCDIR_WEIGHTS") or os.path.join(torch.hub.get_dir(), "checkpoints")
        path = os.path.join(os.path.expanduser(folder), self.name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(self.url, path, hash_prefix=self.sha256)
        except (OSError, RuntimeError) as err:  # RuntimeError: another hash
            raise UserError(f"cannot download {self.url} to {path}: {err}") from err
        return path


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; computed again only when the file has changed."""
    status = os.stat(path)
    return _sha256(os.path.abspath(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, _modified: int, _size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


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
    """
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
    """
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
    return (content if used is None else content[used]), used


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
    from basicsr.utils import get_root_logger

    net = self.get_bare_model(net)
    used = load_into(net, load_path, strict, param_key)
    get_root_logger().info(f"Loaded {type(net).__name__} from {load_path}, key {used}.")


def numbered(folder: str, prefix: str) -> dict[int, str]:
    """Iteration -> path of the checkpoints ``PREFIX<iteration>.pth`` in a folder."""
    return {
        int(stem): file
        for file in glob.glob(os.path.join(glob.escape(folder), f"{prefix}*.pth"))
        if (stem := os.path.basename(file)[len(prefix) : -len(".pth")]).isdigit()
    }


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


def convert_ucdir(source: str, target: str) -> dict[str, Any]:
    """Turn a released UCDIR checkpoint (``*_gen_ema.pth`` or ``*_gen.pth``) into a BasicSR one.

    Schedule buffers are dropped by name; everything else must load strictly into the released architecture.

    Returns:
        ``{"tensors": number kept, "parameters": numbers in them, "dropped": names}``.

    Raises:
        UserError: if the file cannot be read or is of another architecture.
    """
    from ucdir_plugin.archs import UCDIR
    from ucdir_plugin.checkpoint import atomic_save

    state = read_checkpoint(source)
    if isinstance(state, Mapping) and isinstance(state.get("params"), Mapping):
        state = state["params"]
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {source} holds no weights: a mapping of names to tensors is expected")
    dropped = sorted(key for key in state if key in SCHEDULE_BUFFERS)
    state = {key: value for key, value in state.items() if key not in SCHEDULE_BUFFERS}
    with torch.device("meta"):
        net = UCDIR(denoiser={"type": "UCDIRDenoiser"}, predictor={"type": "SIDUNet"})
    state = fitting_state_dict(net, state, source)
    # One set of tensors under both of BasicSR's keys: torch.save stores shared memory once.
    atomic_save({"params": state, "params_ema": state}, target)
    return {"tensors": len(state), "parameters": sum(v.numel() for v in state.values()), "dropped": dropped}


def convert_adm(
    source: str, target: str, network: Optional[Mapping[str, Any]] = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Turn a checkpoint of OpenAI's guided-diffusion into a prior: one file, its network's configuration in the header.

    Args:
        source: such as ``256x256_diffusion_uncond.pt``, or what DiffusionPriorModel trained (the average is taken).
        target: a .safetensors file.
        network: the arguments of :class:`ADMUNet`. Default: the unconditional 256x256 model.
        dtype: that floating-point weights are stored in.

    Returns:
        ``{"tensors": number, "parameters": numbers in them}``.

    Raises:
        UserError: if the file cannot be read or written, or is of another architecture.
    """
    from ucdir_plugin.registry import build_arch

    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: a prior's file ends with .safetensors")
    config = {"type": "ADMUNet", **(network or {})}
    state, _ = choose_state(read_checkpoint(source), source, "params_ema")
    with torch.device("meta"):
        net = build_arch(config, "network")
    state = fitting_state_dict(net, state, source)
    return _write_safetensors(state, target, dtype, {"network": config})


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


def _write_safetensors(
    state: Mapping[str, torch.Tensor], target: str, dtype: torch.dtype, header: Mapping[str, Any]
) -> dict[str, Any]:
    from safetensors.torch import save

    from ucdir_plugin.files import write_atomically

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
    from ucdir_plugin.registry import build_arch

    state, _ = choose_state(read_checkpoint(source), source, "params_ema")
    with torch.device("meta"):
        net = build_arch(options["network_g"], "network_g")
    state = fitting_state_dict(net, state, source)
    kept = {
        k: options[k] for k in ("name", "model_type", "scale", "manual_seed", "network_g", "diffusion") if k in options
    }
    if "sampling" in options["val"]:
        kept["val"] = {"sampling": dict(options["val"]["sampling"])}
        if options["model_type"] == PRIOR_MODEL:  # of its pictures in training; the others are not its own
            kept["val"]["sampling"] = {key: options["val"]["sampling"][key] for key in ("sampler", "steps")}
    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: a model file ends with .safetensors")
    header = {"options": kept, "notes": dict(notes), "jpeg_quality": jpeg_quality(options)}
    return _write_safetensors(state, target, dtype, header)


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
    from ucdir_plugin.options import check_options

    state, content = read_checkpoint(path), _header(path)
    try:
        options, notes = content["options"], {str(k): str(v) for k, v in content["notes"].items()}
    except (KeyError, TypeError, AttributeError) as err:
        raise UserError(
            f"{path} holds weights without options: use it as --weights beside its option file,"
            " or make a model file of both with tools/convert_weights.py"
        ) from err
    return check_options(options, is_train=False, where=path), state, notes
