"""One registration per class, seen by both ecosystems: BasicSR's registries and MMEngine's (scope ``ucdir_plugin``).

MMEngine imports a module of exactly this name when it meets the scope ``ucdir_plugin``.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any, Callable, Mapping, TypeVar

from ucdir_plugin import compat  # noqa: F401  (BasicSR can be imported only after it)

# isort: split
import mmengine.registry as mm
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
    Registry,
)

from ucdir_plugin.errors import UserError, did_you_mean

SCOPE = "ucdir_plugin"
MODELS = mm.Registry("model", parent=mm.MODELS, scope=SCOPE)
DATASETS = mm.Registry("dataset", parent=mm.DATASETS, scope=SCOPE)
METRICS = mm.Registry("metric", parent=mm.METRICS, scope=SCOPE)

BASICSR = {
    "arch": ARCH_REGISTRY,
    "loss": LOSS_REGISTRY,
    "dataset": DATASET_REGISTRY,
    "metric": METRIC_REGISTRY,
    "model": MODEL_REGISTRY,
}
# A BasicSR model is a training loop and its metrics are functions: MMEngine has other interfaces for both (mm/).
_MMENGINE = {"arch": MODELS, "loss": MODELS, "dataset": DATASETS}

T = TypeVar("T")


def _identity(obj: Any) -> tuple[str, str]:
    return obj.__module__, obj.__qualname__


def register(kind: str) -> Callable[[T], T]:
    """Class decorator: register under the class's name as ``kind`` ('arch', 'loss', 'dataset', 'metric' or 'model').

    Registering the same class again (a second import of its module) replaces it without harm.

    Raises:
        UserError: if the name belongs to something else.
    """

    def decorate(obj: T) -> T:
        name = obj.__name__
        basicsr_registry = BASICSR[kind]
        present = basicsr_registry._obj_map.get(name)
        if present is not None and _identity(present) != _identity(obj):
            raise UserError(f"{kind} {name!r} of {obj.__module__} is already registered by {present.__module__}")
        basicsr_registry._obj_map[name] = obj
        if kind in _MMENGINE:
            _MMENGINE[kind].register_module(name=name, module=obj, force=True)
        return obj

    return decorate


def names(kind: str) -> list[str]:
    """All names registered as ``kind``, without BasicSR's own suffix."""
    return sorted(name.removesuffix("_basicsr") for name, _ in BASICSR[kind])


def lookup(kind: str, name: str, where: str = "") -> Any:
    """The class or function registered as ``name``.

    Raises:
        UserError: for an unknown name, with the nearest known ones; ``where`` names the option.
    """
    registry: Registry = BASICSR[kind]
    found = registry._obj_map.get(name, registry._obj_map.get(f"{name}_basicsr"))
    if found is None:
        prefix = f"{where}: " if where else ""
        raise UserError(f"{prefix}there is no {kind} {name!r}; {did_you_mean(name, names(kind))}")
    return found


def build_arch(cfg: Mapping[str, Any], where: str = "network") -> Any:
    """Build a registered network from ``{type: NAME, ...keyword arguments}``; nested configurations build themselves.

    Raises:
        UserError: for a missing type, an unknown name, or arguments that the network does not take.
    """
    kwargs = deepcopy(dict(cfg))
    if "type" not in kwargs:
        raise UserError(f"{where}: the key 'type' (a registered arch) is missing")
    cls = lookup("arch", kwargs.pop("type"), where)
    try:
        inspect.signature(cls).bind(**kwargs)
    except TypeError as err:
        raise UserError(f"{where} ({cls.__name__}): {err}") from err
    return cls(**kwargs)
