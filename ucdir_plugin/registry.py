"""One registration per class, seen by both ecosystems: BasicSR's registries and MMEngine's (scope ``ucdir_plugin``).

MMEngine imports a module of exactly this name when it meets the scope ``ucdir_plugin``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from copy import deepcopy
from importlib.machinery import PathFinder
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar

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
EVALUATORS = _scoped(mm.EVALUATOR, "metrics")
for _root in [value for value in vars(mm).values() if isinstance(value, mm.Registry)]:
    if SCOPE not in _root.children:  # MMEngine warns of each that lacks a configuration's default_scope
        mm.Registry(_root.name, parent=_root, scope=SCOPE)

BASICSR = {
    "arch": ARCH_REGISTRY,
    "loss": LOSS_REGISTRY,
    "dataset": DATASET_REGISTRY,
    "metric": METRIC_REGISTRY,
    "model": MODEL_REGISTRY,
}
# A BasicSR model is a training loop: mm/models.py has MMEngine's. Its metrics are functions: see _as_metric.
_MMENGINE = {"arch": MODELS, "loss": MODELS, "dataset": DATASETS, "metric": METRICS}
_OTHERS = {"arch": mm.MODELS, "loss": mm.MODELS, "dataset": mm.DATASETS}
"""MMEngine's own, where names of other packages are looked up too."""

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
    registry = _OTHERS.get(kind)
    scope, _, own = name.rpartition(".")
    if registry is None or (scope and scope not in registry.children and scope != registry.scope):
        if scope:
            known = [] if registry is None else [registry.scope, *registry.children]
            raise UserError(
                f"{prefix}{name!r}: there is no scope {scope!r} among the packages that have been imported;"
                f" {did_you_mean(scope, known)} (others: --import, or imports: in an option file)"
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


def _unknown(kind: str, name: str) -> str:
    """What to say of a name that is not registered: one of another kind, one that is near, or nobody's."""
    other = next((k for k in BASICSR if k != kind and name in names(k)), None)
    if other is not None:
        return f"{name!r} is registered as {_article(other)}, not as {_article(kind)}"
    elsewhere = _OTHERS.get(kind)
    known = names(kind) + ([] if elsewhere is None else [n for n, _ in _of_mmengine(elsewhere)])
    hint = did_you_mean(name, known)
    other_package = "" if hint.startswith("did you mean") else "; one of another package: --import ITS_MODULE"
    return f"there is no {kind} {name!r}; {hint}{other_package}"


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _of_mmengine(registry: mm.Registry) -> Iterator[Tuple[str, Any]]:
    """Names, with the scope of another package, and objects; without this package's, which BasicSR's have."""
    yield from registry.module_dict.items()
    for scope, child in registry.children.items():
        if scope != SCOPE:
            yield from ((f"{scope}.{name}", obj) for name, obj in child.module_dict.items())


def _registered() -> Dict[Tuple[str, str], Any]:
    """All that is registered, in both ecosystems, by kind and name."""
    found = {(kind, name): obj for kind, registry in BASICSR.items() for name, obj in registry._obj_map.items()}
    for registry in vars(mm).values():
        if isinstance(registry, mm.Registry):
            found.update(((registry.name, name), obj) for name, obj in _of_mmengine(registry))
    return found


def found_at(module: str) -> Optional[str]:
    """Where a module would be imported from, without running it; None if it is nowhere.

    Of ``a.b`` it is where ``a`` is: to find ``b``, ``a`` would have to run.
    """
    spec = PathFinder.find_spec(module.partition(".")[0], [*sys.path, os.getcwd()])
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def import_modules(modules: List[str], where: str) -> None:
    """Import modules so that the archs, losses, data sets, metrics and models that they register are known.

    They are looked for as Python does, then in the working directory.

    Args:
        modules: such as ``mynet`` or ``mypackage.archs``.
        where: they were named, for errors: ``--import``, ``option imports``.

    Raises:
        UserError: for one that cannot be imported, registers nothing, or registers a name that is taken.
    """
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script has its own folder there instead
    for module in modules:
        _import(module, where)


def _import(module: str, where: str) -> None:
    if module.endswith(".py") or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module):
        raise UserError(
            f"{where} {module}: the name of a module is expected, as after Python's import (mynet, not mynet.py; its"
            " folder in PYTHONPATH, unless it is the working directory)"
        )
    before = _registered()
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or not f"{module}.".startswith(f"{err.name}."):
            raise UserError(f"{where} {module}: it needs the package {err.name}, which is not installed") from err
        raise UserError(
            f"{where} {module}: there is no module {err.name}; install its package, or add its folder to PYTHONPATH"
        ) from err
    except (Exception, SystemExit) as err:  # whatever the module does
        taken = "already registered" in str(err)
        cure = "; give it another name, or register it with a suffix" if taken else ""
        raise UserError(f"{where} {module}: {type(err).__name__}: {err}{cure}") from err
    after = _registered()
    new = any(before.get(key) is not obj for key, obj in after.items())
    if not new and not any(f"{obj.__module__}.".startswith(f"{module}.") for obj in after.values()):
        raise UserError(
            f"{where} {module}: it registers nothing with BasicSR or MMEngine: name the module that has the"
            " @ARCH_REGISTRY.register() or the like"
        )


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
        raise UserError(f"{prefix}{_unknown(kind, name)}")
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
