"""Option files: read safely, overridden from the command line, checked, and completed with defaults.

BasicSR's YAML loader executes python tags and its ``--force_yml`` uses exec and eval; here both are plain YAML.
What this package owns is checked strictly (unknown keys, types, ranges); the keyword arguments of a foreign network,
loss, metric or optimizer are checked against its signature and passed on.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from typing import Any, Dict, List, Mapping, Optional

import torch
from pydantic import ValidationError

from ucdir_plugin import registry
from ucdir_plugin.compat import lr_scheduler
from ucdir_plugin.data.degradations import chain
from ucdir_plugin.diffusion.bird.tasks import preset, task_named
from ucdir_plugin.diffusion.conditions import check_told, declare
from ucdir_plugin.metrics import protocol
from ucdir_plugin.options.calls import check_call, check_metric, check_registered
from ucdir_plugin.options.reading import apply_overrides, check_plain, read_options
from ucdir_plugin.options.schema import (
    BirdOptions,
    MMEngineOptions,
    Options,
    PriorScheduleOptions,
    SamplingOptions,
    ScheduleOptions,
    check_sampling,
    explain,
    missing,
    to_json,
)
from ucdir_plugin.utils.errors import UserError, did_you_mean

# Of the keys in DatasetOptions, those that one of this package's datasets alone has, and by it those without meaning.
_ONLY = {
    "CleanImageDataset": {"view_scale", "seed"},
    "PairedRestorationDataset": {"dataroot_lq", "meta_info_file", "filename_tmpl", "io_backend", "condition_file"},
    "JPEGDataset": {"quality"},
    "LowLightDataset": {"ratio", "electrons", "read", "row", "bits", "seed"},
    "MixedDegradationDataset": {"degradations", "seed"},
    "RawPairDataset": {"meta_info_file", "ratio"},
}
_MEANINGLESS = {name: {"color", "mean", "std"}.union(*_ONLY.values()) - own for name, own in _ONLY.items()}
_KNOWN_MODELS = {"UCDIRModel", "DiffusionPriorModel", "BIRDModel"}
# What the other of the two has.
_FOREIGN = {
    "UCDIRModel": ("train:variance_opt", "val:samples"),
    "DiffusionPriorModel": (
        "train:initial_opt", "train:predictor", "path:pretrain_network_predictor", "val:metrics",
        *(f"val:sampling:{key}" for key in ("start_timestep", "border", "tile", "overlap", "tile_batch", "grid",
                                            "merge", "split", "cache_mb")),
    ),
}  # fmt: skip


def _check_train(train: Mapping[str, Any], network: Mapping[str, Any], own_model: bool) -> None:
    optim = train["optim_g"]
    optimizer = getattr(torch.optim, optim["type"], None)
    if not (inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)):
        known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c)]
        raise UserError(
            f"option train:optim_g:type: there is no {optim['type']!r}; {did_you_mean(optim['type'], known)}"
        )
    check_call(optimizer, {k: v for k, v in optim.items() if k != "type"}, "train:optim_g", given=1)
    scheduler = train.get("scheduler")
    if scheduler is not None:
        known = ("MultiStepLR", "MultiStepRestartLR", "CosineAnnealingRestartLR")
        if scheduler["type"] not in known:
            hint = did_you_mean(scheduler["type"], known)
            raise UserError(f"option train:scheduler:type: there is no {scheduler['type']!r}; {hint}")
        name = scheduler["type"].replace("MultiStepLR", "MultiStepRestartLR")
        check_call(
            getattr(lr_scheduler, name), {k: v for k, v in scheduler.items() if k != "type"}, "train:scheduler", given=1
        )
    for key, value in train.items():
        if key.endswith("_opt") and value is not None:
            check_registered("loss", value, f"train:{key}")
    predictor = train.get("predictor") or {}
    for key in ("lr", "frozen"):
        if predictor.get(key) and own_model and network.get("predictor", {}) is None:
            raise UserError(f"option train:predictor:{key}: network_g has no predictor; remove it")
    if predictor.get("frozen") and (predictor.get("lr") or train.get("initial_opt")):
        other = "predictor:lr" if predictor.get("lr") else "initial_opt"
        raise UserError(f"option train:{other} has no meaning for a predictor that is frozen; remove one of them")
    if own_model and not train.get("diffusion_opt"):
        raise UserError("option train:diffusion_opt is missing (the loss on the predicted noise)")
    if not own_model and scheduler is None:
        raise UserError("option train:scheduler is missing")


def _check_conditions(opt: Mapping[str, Any]) -> None:
    """What the network is to be told against what the data sets tell, as far as they say."""
    denoiser = opt["network_g"].get("denoiser")
    declared = declare(denoiser.get("conditions")) if isinstance(denoiser, Mapping) else ()
    for phase, dataset in opt["datasets"].items() if declared else ():
        tells = getattr(registry.lookup("dataset", dataset["type"]), "tells", None)
        if tells is not None and phase.split("_")[0] != "test":
            check_told(declared, tells(dataset), phase == "train", f"option datasets:{phase}")


_OWN_TRAIN = (
    "ema_start", "diffusion_opt", "initial_opt", "variance_opt", "predictor", "grad_clip", "accumulate", "amp",
    "max_bad_steps",
)  # fmt: skip


def _drop_own(train: dict, given: Mapping[str, Any], model_type: str) -> None:
    """Keep what only UCDIRModel understands away from other models; BasicSR's own would ignore it."""
    of_basicsr = registry.lookup("model", model_type).__module__.startswith("basicsr.")
    for key in _OWN_TRAIN:
        if of_basicsr and given.get(key) is not None:
            own = "DiffusionPriorModel" if key == "variance_opt" else "UCDIRModel"
            raise UserError(f"option train:{key} is for {own}; {model_type} would ignore it")
        if key not in given:
            del train[key]


def _check_bird(opt: dict, raw: Mapping[str, Any]) -> None:
    """What BIRDModel has no use for, and what the keys of ``bird`` say together; sets ``scale`` to the task's."""
    if (raw.get("val") or {}).get("sampling"):
        raise UserError("option val:sampling has no meaning for BIRDModel: bird:settings says how it samples")
    del opt["network_g"]
    opt["bird"] = opt["bird"] or BirdOptions().model_dump()
    bird = opt["bird"]
    try:
        task = task_named(bird["task"])
        preset(bird["preset"])
    except UserError as err:
        raise UserError(f"option bird: {err}") from err
    if bird["mask"] is not None and not task.holes:
        raise UserError(f"option bird:mask: only the task inpaint has holes, not {bird['task']}; remove it")
    if bird["network"] is not None:
        check_registered("arch", {"type": "ADMUNet", **bird["network"]}, "bird:network")
    stage = bird["first_stage"]
    if stage is not None and (stage["model"] is None) == (stage["images"] is None):
        raise UserError("option bird:first_stage: give model (an option or model file) or images (a folder)")
    if stage is not None and stage["weights"] is not None and stage["model"] is None:
        raise UserError("option bird:first_stage:weights go with model")
    if raw.get("scale", task.factor) != task.factor:
        raise UserError(f"option scale: {bird['task']} makes images {task.factor} times as large; remove scale")
    opt["scale"] = task.factor


def _check_engine(opt: dict) -> None:
    """What the engine cannot run, and the section ``mmengine``."""
    if opt["engine"] == "basicsr":
        if opt.pop("mmengine") is not None:
            raise UserError("option mmengine has no meaning for engine: basicsr; set engine: mmengine, or remove it")
        return
    if opt["model_type"] not in _KNOWN_MODELS:
        known = ", ".join(sorted(_KNOWN_MODELS))
        raise UserError(f"engine: mmengine runs {known}; {opt['model_type']} is a loop of BasicSR: remove engine")
    opt["mmengine"] = opt["mmengine"] or MMEngineOptions().model_dump()
    own, train = opt["mmengine"], opt.get("train") or {}
    if any(own.values()):
        from ucdir_plugin.options.mmengine import check_settings  # it needs MMEngine's runner

        check_settings(own)
    if own["optim_wrapper"]:
        for key, instead in (("accumulate", "accumulative_counts"), ("amp", "its own precision")):
            if train.get(key) not in (None, 1):
                raise UserError(f"option train:{key} has no meaning for mmengine:optim_wrapper, which has {instead}")
    if own["param_scheduler"] and (train.get("scheduler") or train.get("warmup_iter", -1) > 0):
        raise UserError("option mmengine:param_scheduler: remove train:scheduler and train:warmup_iter")


def import_custom(raw: Mapping[str, Any], trust: bool) -> None:
    """Import the packages that ``mmengine: custom_imports`` names.

    Raises:
        UserError: if the options are not trusted, or one cannot be imported.
    """
    section = raw.get("mmengine")
    for name in (section.get("custom_imports") or ()) if isinstance(section, dict) else ():
        if not trust:
            raise UserError(
                f"option mmengine:custom_imports runs the code of {name!r}; if you trust it, add --trust-config"
                " (tools/train.py, tools/test.py)"
            )
        try:
            importlib.import_module(str(name))
        except Exception as err:  # whatever the module does
            raise UserError(f"option mmengine:custom_imports: {name}: {type(err).__name__}: {err}") from err


def _merge(given: Mapping, checked: Mapping) -> dict:
    """The checked values and defaults, and beside them what a foreign model or dataset has of its own."""
    merged = dict(given)
    for key, value in checked.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def check_options(raw: Any, is_train: bool, where: str = "options") -> dict:
    """Check an option mapping and complete it with defaults.

    Raises:
        UserError: one line that names the first fault and its cure.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a mapping of options is expected")
    check_plain(raw, where)
    raw = {key: value for key, value in raw.items() if value is not None}  # a section left empty
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        wrong = f"option model_type: a model's name is expected, got {model_type!r}"
        raise UserError(f"{where}: {missing('model_type', raw) if model_type is None else wrong}")
    for key in ("network_g", "diffusion", "train", "compile"):
        if model_type == "BIRDModel" and raw.get(key):
            raise UserError(
                f"{where}: option {key} has no meaning for BIRDModel, which restores without training; remove it"
            )
    blind = model_type == "BIRDModel"
    own_model = model_type in _FOREIGN
    prior = model_type == "DiffusionPriorModel"
    diffusion = raw.get("diffusion", {})
    if isinstance(diffusion, dict):
        cosine = diffusion.get("type") == "cosine"
        for key in {"start", "end"} & diffusion.keys() if cosine else ():
            raise UserError(f"{where}: option diffusion:{key} has no meaning for type cosine; remove it")
        if prior:
            raw["diffusion"] = {**PriorScheduleOptions().model_dump(), **diffusion}
    datasets = raw.get("datasets") if isinstance(raw.get("datasets"), dict) else {}
    try:
        checked = Options.model_validate_json(to_json(raw, where)).model_dump()
    except ValidationError as err:

        def foreign(error: dict) -> bool:
            """An option of a foreign model or dataset, which has its own idea of what it needs."""
            if error["type"] != "extra_forbidden":
                return False
            loc = error["loc"]
            if loc[0] == "datasets" and len(loc) > 2:
                kind = datasets[loc[1]].get("type") if isinstance(datasets.get(loc[1]), dict) else None
                return isinstance(kind, str) and kind not in _MEANINGLESS
            return model_type not in _KNOWN_MODELS

        faults = [e for e in err.errors() if not foreign(e)]
        if faults:
            raise UserError(f"{where}: {explain(faults[0])}") from err
        known = _without({tuple(e["loc"]) for e in err.errors()}, raw)
        checked = Options.model_validate_json(to_json(known, where)).model_dump()
    opt = _merge(raw, checked)
    if opt["diffusion"]["type"] == "cosine":
        del opt["diffusion"]["start"], opt["diffusion"]["end"]
    if opt["manual_seed"] is None:
        opt["manual_seed"] = 0
    # BasicSR's datasets ask whether a key is there at all.
    opt["datasets"] = {p: {k: v for k, v in d.items() if v is not None} for p, d in opt["datasets"].items()}
    for dataset in opt["datasets"].values():
        if "batch_size_total" not in dataset:  # else share_batch says what is left for each
            dataset.setdefault("batch_size_per_gpu", 1)
    try:
        registry.lookup("model", opt["model_type"], "option model_type")
        if blind:
            _check_bird(opt, raw)
        else:
            for key, absent in (("network_g", True), ("bird", False)):
                if (opt[key] is None) == absent:
                    fault = "is absent" if absent else f"is for BIRDModel, not for {opt['model_type']}"
                    raise UserError(f"option {key} {fault}")
            del opt["bird"]
        _check_engine(opt)
        for key, cfg in opt.items():
            if key.startswith("network_"):
                check_registered("arch", cfg, key)
        for phase, dataset in opt["datasets"].items():
            if not re.fullmatch(r"(train|val|test)(_\w+)?", phase):
                raise UserError(f"option datasets:{phase}: the phases are train, val, val_2, ..., test, test_2, ...")
            registry.lookup("dataset", dataset["type"], f"option datasets:{phase}:type")
            for key in sorted(_MEANINGLESS.get(dataset["type"], set()) & {k for k, v in datasets[phase].items() if v}):
                raise UserError(f"option datasets:{phase}:{key} has no meaning for {dataset['type']}; remove it")
            if dataset.get("batch_size_total") is not None:
                total = f"option datasets:{phase}:batch_size_total"
                if phase.split("_")[0] != "train":
                    raise UserError(f"{total} is for training: images of {phase} are restored one by one; remove it")
                if datasets[phase].get("batch_size_per_gpu") is not None:
                    raise UserError(
                        f"{total} and batch_size_per_gpu exclude each other: remove one, or give it as ~ (nothing)"
                    )
            if dataset.get("degradations") is not None:
                chain(dataset["degradations"], f"datasets:{phase}:degradations")
        if is_train and own_model:
            _check_conditions(opt)
        for name, metric in (opt["val"].get("metrics") or {}).items():
            check_metric(metric, f"val:metrics:{name}")
            metric.setdefault("better", protocol.better(metric))
        if is_train:
            if "train" not in opt["datasets"]:
                raise UserError("option datasets:train is missing")
            if not opt.get("train"):
                raise UserError("option train is missing")
        if opt.get("train"):
            _check_train(opt["train"], opt["network_g"], own_model)
            path = opt["path"]
            if path["pretrain_network_predictor"] and opt["network_g"].get("predictor") is None:
                raise UserError("option path:pretrain_network_predictor: network_g has no predictor; remove it")
            if path["pretrain_network_predictor"] and path["pretrain_network_g"] and is_train:
                raise UserError(
                    "option path:pretrain_network_predictor: pretrain_network_g holds the predictor too; remove one"
                )
            if not own_model:
                _drop_own(opt["train"], raw["train"], opt["model_type"])
        for path in _FOREIGN.get(opt["model_type"], ()):
            place: Any = raw
            for key in path.split(":"):
                place = place.get(key) if isinstance(place, dict) else None
            if place is not None:
                raise UserError(f"option {path} has no meaning for {opt['model_type']}; remove it")
        if not prior:
            del opt["val"]["samples"]
        training = (PriorScheduleOptions if prior else ScheduleOptions)(**opt["diffusion"]).schedule()
        check_sampling(SamplingOptions(**opt["val"]["sampling"]), training)
        if blind:
            del opt["diffusion"], opt["val"]["sampling"], opt["compile"]
        elif not own_model:
            if opt["network_g"].get("conditions"):
                raise UserError(f"option network_g:conditions is for UCDIRModel; {opt['model_type']} gives none")
            if opt["compile"]:
                raise UserError(f"option compile is for UCDIRModel; {opt['model_type']} would ignore it")
            del opt["diffusion"], opt["val"]["sampling"], opt["compile"]
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
    return opt


def share_batch(dataset: Dict[str, Any], processes: int) -> None:
    """Set ``batch_size_per_gpu`` of a training set in place, where ``batch_size_total`` is given.

    Args:
        processes: that train together, or GPUs of one process.

    Raises:
        UserError: if the total is no multiple of ``processes``.
    """
    total = dataset.get("batch_size_total")
    if total is None:
        return
    if total % processes:
        near = next(n for n in range(processes, 0, -1) if total % n == 0)
        below, above = total // processes * processes, (total // processes + 1) * processes
        totals = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"option datasets:train:batch_size_total: {total} is no multiple of the {processes} processes: take {near}"
            f" of them, or a total of {totals}"
        )
    dataset["batch_size_per_gpu"] = total // processes


def _without(paths: set, node: Any, here: tuple = ()) -> Any:
    if not isinstance(node, dict):
        return node
    return {k: _without(paths, v, (*here, k)) for k, v in node.items() if (*here, k) not in paths}


def load_options(path: str, overrides: Optional[List[str]] = None, is_train: bool = True, trust: bool = False) -> dict:
    """Read, override and check an option file; its ``_base_`` is the option file that it changes.

    Args:
        trust: whether it may import packages.

    Raises:
        UserError: if it is missing, no plain YAML, or has a fault.
    """
    raw, name = read_options(path), os.path.basename(path)
    apply_overrides(raw, overrides)
    try:
        import_custom(raw, trust)
    except UserError as err:
        raise UserError(f"{name}: {err}") from err
    return check_options(raw, is_train, name)
