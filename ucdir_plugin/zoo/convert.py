"""Released weights of UCDIR and of OpenAI's diffusion U-Net, converted to this package's networks."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import torch

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.checkpoints import choose_state, fitting_state_dict, read_checkpoint
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.training_states import atomic_save
from ucdir_plugin.zoo.model_files import write_safetensors

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


def convert_ucdir(source: str, target: str) -> dict[str, Any]:
    """Turn a released UCDIR checkpoint (``*_gen_ema.pth`` or ``*_gen.pth``) into a BasicSR one.

    Schedule buffers are dropped by name; everything else must load strictly into the released architecture.

    Returns:
        ``{"tensors": number kept, "parameters": numbers in them, "dropped": names}``.

    Raises:
        UserError: if the file cannot be read or is of another architecture.
    """
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
    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: a prior's file ends with .safetensors")
    config = {"type": "ADMUNet", **(network or {})}
    state, _ = choose_state(read_checkpoint(source), source, "params_ema")
    with torch.device("meta"):
        net = build_arch(config, "network")
    state = fitting_state_dict(net, state, source)
    return write_safetensors(state, target, dtype, {"network": config})
