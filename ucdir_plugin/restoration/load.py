"""Restorers from a name, an option file or a model file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from typing import Any, Dict, Mapping, Optional

import torch

from ucdir_plugin import zoo
from ucdir_plugin.archs import UCDIR
from ucdir_plugin.archs.sizing import check_network
from ucdir_plugin.archs.spandrel_arch import UnknownNetwork
from ucdir_plugin.diffusion.bird import solver
from ucdir_plugin.diffusion.bird.settings import ABOUT, ablation
from ucdir_plugin.diffusion.bird.tasks import preset, task_named
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.check import check_options, import_custom, load_options
from ucdir_plugin.options.reading import read_options
from ucdir_plugin.options.schema import (
    BirdOptions,
    FirstStageOptions,
    SamplingOptions,
    ScheduleOptions,
    sampling_options,
    sampling_schedule,
)
from ucdir_plugin.registry import build_arch
from ucdir_plugin.restoration import bird_options, precision
from ucdir_plugin.restoration.base import Restorer
from ucdir_plugin.restoration.bird import COLOUR_SIGMA, COLOUR_STEPS, BlindRestorer
from ucdir_plugin.restoration.bird_options import changed, known_kernel, other_solver
from ucdir_plugin.restoration.network import ONE_PASS, NetworkRestorer
from ucdir_plugin.utils import checkpoints, files
from ucdir_plugin.utils.devices import choose_device
from ucdir_plugin.utils.errors import NotAvailable, UserError, did_you_mean
from ucdir_plugin.zoo import model_files, priors


def _load_first(stage: FirstStageOptions, device: torch.device, trust: bool) -> Any:
    if stage.model.endswith((".yml", ".yaml")) and (read_options(stage.model).get("bird") or {}).get("first_stage"):
        raise UserError(f"option bird:first_stage:model: {stage.model} has a first stage itself; remove that")
    return load_model(stage.model, stage.weights, device=str(device), trust=trust)


def from_options(opt: Mapping[str, Any], device: torch.device, trust: bool = False) -> BlindRestorer:
    """A restorer of checked options.

    Args:
        trust: as of :func:`load_model`, for the option file of a first stage.

    Raises:
        UserError: if the prior cannot be loaded, or something does not fit it.
    """
    options = BirdOptions(**opt["bird"])
    task = task_named(options.task)
    settings = preset(options.preset, options.task)
    blur = None
    if options.blur is not None:
        if not task.simplex:
            raise UserError(f"option bird:blur has no meaning for task {options.task}; remove it")
        blur, settings = known_kernel(options.blur), settings.known()
    prior = priors.load_prior(options.prior, device, options.network)
    if options.preset == "default" and task.gray and prior.generates:
        much = min(COLOUR_SIGMA, prior.sigma_max)
        settings = dataclasses.replace(settings, sigma_start=much, steps=COLOUR_STEPS)
    if options.solver == "bird":
        settings = changed(settings, options.settings, "bird:settings")
    if options.noise is not None and options.solver == "bird":
        if not hasattr(settings.data, "noise"):
            raise UserError(
                f"option bird:noise has no meaning for a data step of gradients ({options.preset}); remove it"
            )
        settings = changed(settings, {"data": {"noise": options.noise / 255}}, "bird:settings")
    if options.ablation is not None and options.solver == "bird":
        settings = ablation(settings, options.ablation)
    method = None
    if options.solver != "bird":
        method = other_solver(options, task, blur)
    else:
        solver.reverse_schedule(prior, settings)
    stage = options.first_stage
    if stage is not None and stage.use != "start" and (blur is not None or options.observations):
        what = "blur" if blur is not None else "observations"
        raise UserError(f"option bird:first_stage: a target is restored instead of all else: remove bird:{what}")
    first = _load_first(stage, device, trust) if stage is not None and stage.model is not None else None
    about: Dict[str, Any] = {"model": opt["name"], "prior": options.prior}
    if prior.file is not None:
        about.update(weights=os.path.basename(prior.file), weights_sha256=files.sha256_of(prior.file))
    notes = {f"preset {options.preset}": ABOUT[options.preset]} if options.solver == "bird" else {}
    notes.update((f"prior {options.prior}: {name}", text) for name, text in prior.notes.items())
    return BlindRestorer(prior, task, settings, options, device, blur, method, first, opt["manual_seed"], about, notes)


STUDENT = "UCDIRStudentModel"
"""``model_type`` of what restores in one step, from the level that it was trained at."""

TILE = 1024
"""Longest side of a patch where nothing else is asked for (the paper's, section 4.1)."""


def load_model(
    model: str,
    weights_file: Optional[str] = None,
    *,
    device: str = "auto",
    dtype: Optional[str] = None,
    sampling: Optional[Mapping[str, Any]] = None,
    bird: Optional[Mapping[str, Any]] = None,
    trust: bool = False,
) -> Restorer:
    """Build a network and load its weights; or load the prior of BIR-D.

    Args:
        model: ``bird``, a model of the package (``jpeg_small``, see ucdir_plugin/zoo), an option file (.yml) of any
            model with a ``network_g``, a file (.safetensors) written by tools/convert_weights.py, which has its
            options in it, or one (.safetensors, .pth) of a network that spandrel recognises.
        weights_file: weights for an option file: .pth or .safetensors. Default: what the option file trained below
            the working directory, else its ``path: pretrain_network_g``.
        device: auto, cpu, cuda or cuda:N.
        dtype: fp32, bf16 or fp16 (CUDA only) for the networks; auto: the model's ``amp`` if it has one, else bf16 where
            it is faster and safe, which the notes then say, else fp32 (:mod:`ucdir_plugin.restoration.precision`).
            Default: the model's ``amp``, else fp32.
        sampling: replaces keys of the option file's ``val: sampling``, e.g. ``{"sampler": "ddim", "steps": 10, "tile":
            512, "overlap": 32}``. ``tile: 0`` takes images whole; 1024 if neither says anything. For BIR-D they are
            keys of ``bird: settings``.
        bird: for BIR-D, replaces keys of the option file's ``bird``, e.g. ``{"task": "deblur", "prior": "ffdnet"}``.
        trust: whether an option file may import the modules that it names (``imports``), which runs their code.

    Raises:
        UserError: one line that names what is wrong.
    """
    chosen, notes = choose_device(device), {}
    found = _blind(model, weights_file, dtype, sampling or {}, bird or {}, trust)
    if found is not None:
        return from_options(found, chosen, trust)
    if model in zoo.names("model"):
        model = zoo.find(model)
    state: Optional[Mapping[str, torch.Tensor]]
    if _is_foreign(model):
        opt, state, quality, key = _foreign(model), None, None, None
        if weights_file is not None:
            raise UserError(f"{model} has its weights in it: leave out {weights_file}")
        weights_file = model
    elif model.endswith(".safetensors"):
        if weights_file is not None:
            raise UserError(f"{model} has its weights in it: leave out {weights_file}")
        opt, state, notes = model_files.read_model(model)
        quality = model_files.jpeg_quality_of(model)
        if opt["model_type"] == model_files.PRIOR_MODEL:
            raise UserError(f"{model} is a prior, which restores nothing by itself: --model bird --prior {model}")
        weights_file, key = model, None
    else:
        if not model.endswith((".yml", ".yaml")):
            raise UserError(
                f"{model} is neither an option file (.yml) nor a model file (.safetensors), and none of the package's:"
                f" {did_you_mean(model, ['bird', *zoo.names('model')])}"
            )
        opt = load_options(model, is_train=False, trust=trust)
        quality = model_files.jpeg_quality(opt)
        opt["root_path"] = os.getcwd()
        if weights_file is None:
            model_files.find_weights(opt, [])
            weights_file = os.path.expanduser(opt["path"]["pretrain_network_g"])
            key = opt["path"].get("param_key_g", "params")
        else:
            key = "params_ema"
        state, key = checkpoints.choose_state(checkpoints.read_checkpoint(weights_file), weights_file, key)
    check_network(opt["network_g"], "network_g")
    about = {
        "weights": os.path.basename(weights_file),
        "weights_key": key,
        "weights_sha256": files.sha256_of(weights_file),
    }
    restorer = of_weights(opt, state, weights_file, chosen, dtype, sampling, about)
    return dataclasses.replace(restorer, notes={**notes, **restorer.notes}, jpeg_quality=quality)


def of_weights(
    opt: Mapping[str, Any],
    state: Optional[Mapping[str, torch.Tensor]],
    where: str,
    chosen: torch.device,
    dtype: Optional[str] = None,
    sampling: Optional[Mapping[str, Any]] = None,
    about: Optional[Mapping[str, Any]] = None,
) -> NetworkRestorer:
    """A restorer of checked options and weights.

    Args:
        state: None if the network has its weights by its options.
        where: the weights come from, for errors.
        dtype, sampling: as of :func:`load_model`.
        about: the weights, for the record.

    Raises:
        UserError: if they do not fit.
    """
    net = build_arch(opt["network_g"], "network_g")
    if state is not None:
        checkpoints.load_state_dict(net, state, where)
    net = net.eval().requires_grad_(False).to(chosen)
    if chosen.type == "cpu":
        net = net.to(memory_format=torch.channels_last)  # what the layers would convert in each pass
    if opt.get("compile"):
        net.compile_networks()
    diffusion = isinstance(net, UCDIR)
    training = ScheduleOptions(**opt.get("diffusion", {})).schedule()
    record = {
        "model": opt["name"],
        "network": getattr(net, "architecture", type(net).__name__),
        **(about or {}),
        "options_sha256": _digest([opt["network_g"], opt.get("diffusion"), opt["scale"]]),
        # The overlap from which on patches equal the whole image; None: the network looks at all of it.
        "receptive_field": getattr(net.denoise_fn if diffusion else net, "receptive_field", None),
    }
    notes = {}
    if dtype == "auto" and (opt["val"].get("sampling") or {}).get("amp"):
        dtype = None  # the option file says it
    elif dtype == "auto":
        dtype, reason = precision.choose(net, chosen)
        if dtype != "fp32":  # what always was is not worth a line
            notes["dtype"] = f"{dtype}: {reason}"
    elif dtype == "bf16" and (warning := precision.slower(chosen)):
        notes["warning"] = f"{warning}: --dtype auto or fp32"
    options = _sampling(opt, dict(sampling or {}), dtype, diffusion, training, type(net).__name__)
    schedule = training if diffusion else None
    return NetworkRestorer(net, schedule, options, chosen, opt["scale"], opt["manual_seed"], record, notes)


_FOREIGN = (".safetensors", ".pth", ".pt", ".ckpt")


def _is_foreign(model: str) -> bool:
    """Whether a file is of weights without this package's options in it: spandrel may know the network."""
    return model.endswith(_FOREIGN) and os.path.isfile(model) and not model_files.is_model_file(model)


def _foreign(path: str) -> dict:
    """Options of a network that spandrel recognises.

    Raises:
        UserError: if it does not.
    """
    network = {"type": "Spandrel", "path": path}
    try:
        scale = build_arch(network, path).scale
    except (NotAvailable, UnknownNetwork) as err:
        reason = "spandrel does not know the network" if isinstance(err, UnknownNetwork) else str(err)
        raise UserError(
            f"{path} holds weights without options ({reason}): use it as --weights beside its option file (-opt), or"
            " make a model file of both with tools/convert_weights.py"
        ) from err
    name = re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(path))[0])[:100].strip(".") or "foreign"
    options = {"name": name, "model_type": "SRModel", "scale": scale, "network_g": network}
    return check_options(options, is_train=False, where=path)


def _digest(options: Any) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def _blind(
    model: str,
    weights_file: Optional[str],
    dtype: Optional[str],
    sampling: Mapping[str, Any],
    bird: Mapping[str, Any],
    trust: bool,
) -> Optional[dict]:
    """The options of BIR-D, if it is what ``model`` names."""
    of_bird = model == "bird"
    if model.endswith((".yml", ".yaml")):
        of_bird = read_options(model).get("model_type") == "BIRDModel"
    if not of_bird:
        if bird:
            raise UserError(f"{next(iter(bird))} is for BIR-D, which {model} is not: take --model bird")
        return None
    if weights_file is not None or dtype not in (None, "auto"):
        what = "weights" if weights_file is not None else "dtype"
        raise UserError(
            f"{what} has no meaning for BIR-D: --prior names the network, bird:network says how it computes"
        )
    raw = {"name": model, "model_type": "BIRDModel"} if model == "bird" else read_options(model)
    base = raw.get("bird") or {}
    if not isinstance(base, Mapping) or not isinstance(base.get("settings") or {}, Mapping):
        what = "bird:settings" if isinstance(base, Mapping) else "bird"
        raise UserError(f"{os.path.basename(model)}: option {what}: a mapping is expected")
    if bird.get("task", base.get("task")) != base.get("task"):
        raw.pop("scale", None)
    raw["bird"] = bird_options.merged({**base, **bird}, sampling)
    import_custom(raw, trust, os.path.basename(model))
    return check_options(raw, is_train=False, where=os.path.basename(model))


def _sampling(
    opt: dict, given: Dict[str, Any], dtype: Optional[str], diffusion: bool, training: NoiseSchedule, name: str
) -> SamplingOptions:
    if dtype is not None:
        if dtype not in precision.DTYPES:
            raise UserError(f"dtype {dtype!r} is not known: take auto, fp32, bf16 or fp16")
        given["amp"] = None if dtype == "fp32" else dtype
    if not diffusion:
        for key in given:
            if key not in ONE_PASS and key in SamplingOptions.model_fields:
                raise UserError(f"{key} has no meaning for {name}, which restores in one pass")
    base = dict(opt["val"].get("sampling", {}))
    if base.get("tile") is None:
        base["tile"] = TILE
    if given.get("tile", 1) == 0:
        given["tile"] = None
    if "sampler" in given and given["sampler"] != base.get("sampler"):
        base.pop("eta", None)  # the option file's is for its own sampler
    options = sampling_options({**base, **given}, training)
    if opt.get("model_type") == STUDENT:
        own, used = (sampling_schedule(training, o).levels for o in (sampling_options(base, training), options))
        if len(used) != len(own) or used[-1] != own[-1] or options.sampler == "heun":
            raise UserError(
                f"{opt['name']} was distilled for its one step: leave out steps, spacing, start_timestep and heun"
            )
    return options
