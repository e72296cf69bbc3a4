"""Checking the section ``mmengine`` of option files: every ``type`` is a registered name, never a path to import."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, Mapping

import mmengine.hooks
import mmengine.model
import mmengine.optim
import mmengine.runner
import mmengine.visualization  # noqa: F401  (what they register is what is known)
import torch
from mmengine import registry as mm

from ucdir_plugin import registry as own
from ucdir_plugin.utils.errors import UserError, did_you_mean

_KINDS = {
    "hooks": mm.HOOKS,
    "default_hooks": mm.HOOKS,
    "visualizer": mm.VISUALIZERS,
    "vis_backends": mm.VISBACKENDS,
    "optim_wrapper": mm.OPTIM_WRAPPERS,
    "optimizer": mm.OPTIMIZERS,
    "param_scheduler": mm.PARAM_SCHEDULERS,
    "model_wrapper": mm.MODEL_WRAPPERS,
    "strategy": mm.STRATEGIES,
}


def known(registry: mm.Registry) -> dict[str, Any]:
    """Name -> class: those of MMEngine itself, and with their scope those of packages that have been imported."""
    names = dict(registry.module_dict)
    for scope, child in registry.children.items():
        if scope == own.SCOPE:
            child.import_from_location()
        names.update({f"{scope}.{name}": value for name, value in child.module_dict.items()})
    return names


def _check(node: Any, where: str, registry: Any) -> None:
    if isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            _check(value, f"{where}:{i}", registry)
    if not isinstance(node, Mapping):
        return
    kind = node.get("type")
    for key in ("type", "constructor") if registry is not None else ():
        name = node.get(key)
        table = known(mm.OPTIM_WRAPPER_CONSTRUCTORS if key == "constructor" else registry)
        if isinstance(name, str) and name not in table:
            raise UserError(f"option {where}:{key}: there is no {name!r}; {did_you_mean(name, table)}")
    if registry is None and isinstance(kind, str) and not any(kind in known(r) for r in _roots()):
        raise UserError(f"option {where}:type: {kind!r} is in none of MMEngine's registries")
    if registry is not None and isinstance(kind, str):
        _check_arguments(known(registry)[kind], node, where)
    for key, value in node.items():
        # MMEngine imports a dotted name that it does not know, wherever it builds by one (EMAHook's ema_type).
        dotted = key.endswith("_type") and isinstance(value, str) and "." in value
        if dotted and not any(value in known(r) for r in _roots()):
            raise UserError(f"option {where}:{key}: {value!r} is in none of MMEngine's registries")
        _check(value, f"{where}:{key}", _KINDS.get(key))


def _roots() -> list:
    return [value for value in vars(mm).values() if isinstance(value, mm.Registry)]


def _check_arguments(target: Any, node: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(target).parameters.values()
    names = [p.name for p in parameters]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    for key in node:
        if key not in (*names, "type", "constructor", "priority"):
            raise UserError(f"unknown option {where}:{key} for {target.__name__}; {did_you_mean(key, names)}")


def check_settings(section: Mapping[str, Any]) -> None:
    """Look at the section ``mmengine`` before MMEngine does.

    Raises:
        UserError: for an unknown hook, strategy, ..., or one that this machine cannot run.
    """
    for key, value in section.items():
        if key == "default_hooks":
            for name, hook in value.items():
                _check(hook, f"mmengine:{key}:{name}", mm.HOOKS)
        elif key != "custom_imports":
            _check(value, f"mmengine:{key}", _KINDS.get(key))
    wrapper = (section.get("optim_wrapper") or {}).get("type")
    if (section.get("strategy") or {}).get("type") == "DeepSpeedStrategy":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError("option mmengine:strategy: DeepSpeedStrategy needs: pip install -e '.[deepspeed]'")
        if wrapper != "DeepSpeedOptimWrapper":
            raise UserError(
                "option mmengine:strategy: DeepSpeedStrategy wants optim_wrapper: {type: DeepSpeedOptimWrapper}"
            )
    if torch.cuda.is_available():
        return
    kind = (section.get("strategy") or {}).get("type", "")
    if kind in ("FSDPStrategy", "DeepSpeedStrategy", "ColossalAIStrategy"):
        raise UserError(f"option mmengine:strategy: {kind} needs a CUDA device, and there is none here")
    wrapper = (section.get("model_wrapper") or {}).get("type", "")
    if wrapper == "MMFullyShardedDataParallel":
        raise UserError(f"option mmengine:model_wrapper: {wrapper} needs a CUDA device, and there is none here")
    optim = (section.get("optim_wrapper") or {}).get("type", "")
    if optim in ("AmpOptimWrapper", "ApexOptimWrapper"):
        raise UserError(
            f"option mmengine:optim_wrapper: {optim} needs a CUDA device, and there is none here; take train:amp: bf16"
        )
