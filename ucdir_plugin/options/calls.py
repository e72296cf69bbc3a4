"""Arguments of registered classes and functions, checked against their signatures."""

from __future__ import annotations

import inspect
import typing
from typing import Any, Dict, Literal, Mapping, Optional

from pydantic import TypeAdapter, ValidationError

from ucdir_plugin import registry
from ucdir_plugin.diffusion.conditions import declare
from ucdir_plugin.metrics import protocol
from ucdir_plugin.options.schema import missing, to_json
from ucdir_plugin.utils.errors import NotAvailable, UserError, did_you_mean


def check_call(target: Any, kwargs: Mapping[str, Any], where: str, given: int = 0, own: bool = False) -> None:
    """Check keyword arguments against a callable's signature, and their types for this package's own (``own``).

    Args:
        given: positional parameters that the caller supplies itself (after ``self``).

    Raises:
        UserError: for an unknown, missing or wrongly typed argument.
    """
    function = target.__init__ if inspect.isclass(target) else target
    parameters = list(inspect.signature(function).parameters.values())
    parameters = parameters[given + inspect.isclass(target) :]
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in kwargs:
        if key not in known and not open_ended:
            raise UserError(f"unknown option {where}:{key} for {target.__name__}; {did_you_mean(key, known)}")
    for p in parameters:
        if p.name in known and p.default is p.empty and p.name not in kwargs:
            raise UserError(f"option {where}:{p.name} is missing ({target.__name__} needs it)")
    if not own:
        return
    hints = typing.get_type_hints(function)
    check_values({key: value for key, value in kwargs.items() if key in hints}, hints, where)


def check_values(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> Dict[str, Any]:
    """Values of the given types; lists become tuples where those are asked for.

    Args:
        types: of each key in ``values``.

    Raises:
        UserError: for the first value of another type.
    """
    found = {}
    for key, value in values.items():
        try:
            found[key] = TypeAdapter(types[key]).validate_json(to_json(value, f"option {where}:{key}"), strict=True)
        except ValidationError as err:
            message = err.errors()[0]["msg"]
            hint = _near(value, types[key])
            raise UserError(f"option {where}:{key}: {message[0].lower()}{message[1:]}, got {value!r}{hint}") from err
    return found


def _near(value: Any, hint: Any) -> str:
    """The nearest of the names that an option may have, if it is one of names and one is near."""
    known = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    nearest = did_you_mean(value, known) if isinstance(value, str) else ""
    return f"; {nearest}" if nearest.startswith("did you mean") else ""


def is_own(target: Any) -> bool:
    """Whether a class or function is this package's."""
    return target.__module__.split(".")[0] == "ucdir_plugin"


def check_registered(kind: str, cfg: Any, where: str, given: int = 0) -> None:
    """Check ``{type: NAME, ...}`` against the registry and the signature; nested networks too."""
    misspelt = missing(f"{where}:type", cfg) if isinstance(cfg, Mapping) and "type" not in cfg else ""
    if misspelt.startswith("unknown"):
        raise UserError(misspelt)
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("type"), str):
        raise UserError(f"option {where}: a mapping with 'type: NAME' is expected, got {cfg!r}")
    target = registry.lookup(kind, cfg["type"], f"option {where}:type")
    kwargs = {k: v for k, v in cfg.items() if k != "type"}
    own = is_own(target)
    check_call(target, kwargs, where, given, own)
    if own and kind == "arch":
        for key, hint in typing.get_type_hints(target.__init__).items():
            if hint in (dict, Optional[dict]) and kwargs.get(key) is not None:
                check_registered("arch", kwargs[key], f"{where}:{key}")
        declare(kwargs.get("conditions"), f"{where}:conditions")


def check_metric(cfg: Mapping[str, Any], where: str) -> None:
    """A metric's keyword arguments, without the images and ``better``, which says which way is up."""
    target = registry.lookup("metric", cfg["type"], f"option {where}:type")
    parameters = inspect.signature(target).parameters
    known = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n not in protocol.IMAGES]
    for key in cfg:
        if key not in (*known, "type", "better"):
            raise UserError(f"unknown option {where}:{key}; {did_you_mean(key, [*known, 'better'])}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in cfg:
            raise UserError(f"option {where}:{name} is missing ({cfg['type']} needs it)")
    border = cfg.get("crop_border", 0)
    if isinstance(border, bool) or not isinstance(border, int) or border < 0:
        raise UserError(f"option {where}:crop_border: a whole number of pixels, 0 or more, is expected, got {border!r}")
    for key, choices in (("input_order", ("HWC", "CHW")), ("convert_to", ("y", "gray"))):  # of BasicSR's metrics
        if key in cfg and cfg[key] not in choices:
            raise UserError(f"option {where}:{key}: {cfg[key]!r} is not known: take {' or '.join(choices)}")
    if not is_own(target):
        return
    images = sum(name in protocol.IMAGES for name, p in parameters.items() if p.default is p.empty)
    check_call(target, {k: v for k, v in cfg.items() if k != "type"}, where, images, own=True)
    try:
        protocol.stamp(cfg)
    except NotAvailable:
        pass  # said when it is to be measured
    except UserError as err:
        raise UserError(f"option {where}: {err}") from err
