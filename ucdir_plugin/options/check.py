"""Option files: read safely, overridden from the command line, checked, and completed with defaults.

BasicSR's YAML loader executes python tags and its ``--force_yml`` uses exec and eval; here both are plain YAML.
What this package owns is checked strictly (unknown keys, types, ranges); the keyword arguments of a foreign network,
loss, metric or optimizer are checked against its signature and passed on.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Mapping, Optional

from pydantic import ValidationError

from ucdir_plugin import registry
from ucdir_plugin.options.reading import apply_overrides, check_plain, read_options
from ucdir_plugin.options.rules import BEFORE, FOREIGN, MODELS, RULES, Checked, ModelRules
from ucdir_plugin.options.schema import Options, explain, missing, to_json
from ucdir_plugin.utils.errors import UserError


def import_custom(raw: Mapping[str, Any], trust: bool, where: str) -> None:
    """Import the modules that ``imports`` names, and those of ``mmengine: custom_imports``, its older form.

    One that has been imported already, as by ``--import``, needs no trust.

    Args:
        where: the options come from, for errors.

    Raises:
        UserError: if the options are not trusted, or one cannot be imported.
    """
    section = raw.get("mmengine")
    older = section.get("custom_imports") if isinstance(section, dict) else None
    for option, modules in (("imports", raw.get("imports")), ("mmengine:custom_imports", older)):
        if modules is None:
            continue
        modules = [modules] if isinstance(modules, str) else modules
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise UserError(f"{where}: option {option}: names of modules are expected, got {modules!r}")
        new = next((module for module in modules if module not in sys.modules), None)
        if new is not None and not trust:
            place = registry.found_at(new) or "not installed here"
            raise UserError(
                f"{where}: option {option} runs the code of {new!r} ({place}); if you trust it, add --import {new} or"
                " --trust-config"
            )
        registry.import_modules(modules, f"{where}: option {option}")


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
    model = MODELS.get(model_type, FOREIGN)
    try:
        for rule in BEFORE:
            rule(Checked(raw, raw, is_train))
        checked = Checked(_typed(raw, model), raw, is_train)
        for rule in RULES:
            rule(checked)
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
    return checked.opt


def _typed(raw: Dict[str, Any], model: ModelRules) -> dict:
    """Options with the types of the schema and its defaults, which are the model's.

    Raises:
        UserError: for the first key that is unknown, missing or of another type.
    """
    diffusion = raw.get("diffusion", {})
    if isinstance(diffusion, dict):
        cosine = diffusion.get("type") == "cosine"
        for key in {"start", "end"} & diffusion.keys() if cosine else ():
            raise UserError(f"option diffusion:{key} has no meaning for type cosine; remove it")
        raw = {**raw, "diffusion": {**model.schedule().model_dump(), **diffusion}}
    known = raw
    for tried in (False, True):
        try:
            typed = Options.model_validate_json(to_json(known, "options")).model_dump()
            break
        except ValidationError as err:
            # Nothing (~) is how a file takes out what its base has; a foreign model has its own idea of what it needs.
            nothing = {tuple(e["loc"]) for e in err.errors() if e["input"] is None and e["type"] != "extra_forbidden"}
            unknown = set() if model.own else {tuple(e["loc"]) for e in err.errors() if e["type"] == "extra_forbidden"}
            faults = [e for e in err.errors() if tuple(e["loc"]) not in nothing | unknown]
            if faults or tried:
                raise UserError(explain((faults or err.errors())[0])) from err
            raw = _without(nothing, raw)
            known = _without(unknown, raw)
    opt = _merge(raw, typed)
    if opt["diffusion"]["type"] == "cosine":
        del opt["diffusion"]["start"], opt["diffusion"]["end"]
    if opt["manual_seed"] is None:
        opt["manual_seed"] = 0
    # BasicSR's datasets ask whether a key is there at all.
    opt["datasets"] = {p: {k: v for k, v in d.items() if v is not None} for p, d in opt["datasets"].items()}
    for dataset in opt["datasets"].values():
        if "batch_size_total" not in dataset:  # else share_batch says what is left for each
            dataset.setdefault("batch_size_per_gpu", 1)
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
        trust: whether it may import modules (``imports``).

    Raises:
        UserError: if it is missing, no plain YAML, or has a fault.
    """
    raw, name = read_options(path), os.path.basename(path)
    apply_overrides(raw, overrides)
    import_custom(raw, trust, name)
    return check_options(raw, is_train, name)
