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

from ucdir_plugin.utils.errors import UserError, did_you_mean

SCOPE = "ucdir_plugin"


def _scoped(root: mm.Registry, module: str) -> mm.Registry:
    """A registry of ours below MMEngine's; ``module`` is imported when something is first built from it."""
    return mm.Registry(root.name, parent=root, scope=SCOPE, locations=[f"ucdir_plugin.mm.{module}"])


MODELS = _scoped(mm.MODELS, "models")
DATASETS = _scoped(mm.DATASETS, "data")
DATA_SAMPLERS = _scoped(mm.DATA_SAMPLERS, "data")
METRICS = _scoped(mm.METRICS, "metrics")
HOOKS = _scoped(mm.HOOKS, "hooks")
LOOPS = _scoped(mm.LOOPS, "loops")
OPTIM_WRAPPERS = _scoped(mm.OPTIM_WRAPPERS, "optim")
OPTIM_WRAPPER_CONSTRUCTORS = _scoped(mm.OPTIM_WRAPPER_CONSTRUCTORS, "optim")

BASICSR = {
    "arch": ARCH_REGISTRY,
    "loss": LOSS_REGISTRY,
    "dataset": DATASET_REGISTRY,
    "metric": METRIC_REGISTRY,
    "model": MODEL_REGISTRY,
}
# A BasicSR model is a training loop: mm/models.py has MMEngine's. Its metrics are functions: see _as_metric.
_MMENGINE = {"arch": MODELS, "loss": MODELS, "dataset": DATASETS, "metric": METRICS}

T = TypeVar("T")


def _identity(obj: Any) -> tuple[str, str]:
    return obj.__module__, obj.__qualname__


def _as_metric(name: str) -> Callable[..., Any]:
    """A metric of images as one of MMEngine's; its arguments are those of the function, which are checked."""

    def build(**arguments: Any) -> Any:
        metrics = {name.removeprefix("calculate_"): {"type": name, **arguments}}
        return METRICS.build({"type": f"{SCOPE}.RestorationMetrics", "metrics": metrics})

    return build


def _in_mmengine(kind: str, name: str, prefix: str) -> Any:
    """What MMEngine's registries hold as ``scope.Name`` or, in its own, as ``Name``; nothing is imported for it."""
    registry = {"arch": mm.MODELS, "loss": mm.MODELS, "dataset": mm.DATASETS}.get(kind)
    scope, _, own = name.rpartition(".")
    if registry is None or (scope and scope not in registry.children and scope != registry.scope):
        if scope:
            known = [] if registry is None else [registry.scope, *registry.children]
            raise UserError(
                f"{prefix}{name!r}: there is no scope {scope!r} among the packages that have been imported;"
                f" {did_you_mean(scope, known)} (others: mmengine:custom_imports)"
            )
        return None
    return registry.children.get(scope, registry).module_dict.get(own)


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
            module = _as_metric(name) if kind == "metric" else obj
            _MMENGINE[kind].register_module(name=name, module=module, force=True)
        return obj

    return decorate


def names(kind: str) -> list[str]:
    """All names registered as ``kind``, without BasicSR's own suffix."""
    return sorted(name.removesuffix("_basicsr") for name, _ in BASICSR[kind])


def lookup(kind: str, name: str, where: str = "") -> Any:
    """The class or function registered as ``name`` in BasicSR, else in MMEngine (``scope.Name``, or its own).

    Raises:
        UserError: for an unknown name or scope, with the nearest known ones; ``where`` names the option.
    """
    registry: Registry = BASICSR[kind]
    found = registry._obj_map.get(name, registry._obj_map.get(f"{name}_basicsr"))
    prefix = f"{where}: " if where else ""
    if found is None:
        found = _in_mmengine(kind, name, prefix)
    if found is None:
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
