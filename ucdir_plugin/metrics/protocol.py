"""How a number was measured: a stamp that goes wherever the number goes, and that decides what may share a column.

A stamp is a mapping of plain values: ``name`` (for people), ``type`` (registered), ``better`` (higher or lower), and
what the number depends on: ``colour``, ``range``, ``crop_border``, ``network``, ``weights`` (file: SHA-256),
``package``, ``reference`` and a metric's own parameters. Counts and
warnings belong to a result, not to its protocol.
"""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Mapping

from ucdir_plugin import registry

COMMON = ("weights_dir", "better")
"""Keyword arguments of metrics that do not change the number."""

IMAGES = ("img", "img2", "lq", "known")
"""What a metric may be handed of an image: the result, its truth, its input, and where the input has no holes."""


def package_version(package: str) -> str:
    """Name and version of an installed package."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def arguments(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The metric's keyword arguments, defaults included, without images and :data:`COMMON`."""
    parameters = inspect.signature(registry.lookup("metric", cfg["type"])).parameters.values()
    plain = {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is not p.VAR_KEYWORD}
    plain.update({k: v for k, v in cfg.items() if k != "type"})
    return {k: v for k, v in plain.items() if k not in (*IMAGES, *COMMON)}


def better(cfg: Mapping[str, Any]) -> str:
    """'higher' or 'lower': what the option says, else what is known of the metric, else 'higher' as in BasicSR."""
    default = inspect.signature(registry.lookup("metric", cfg["type"])).parameters.get("better")
    known = default.default if default is not None else ("lower" if cfg["type"] == "calculate_niqe" else "higher")
    return cfg.get("better") or known


def _basicsr(cfg: Mapping[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stamp of a metric that does not describe itself; PSNR, SSIM and NIQE of BasicSR are known."""
    name = cfg["type"]
    stamp: dict[str, Any] = {"name": name, "crop_border": kwargs.pop("crop_border", 0)}
    if name in ("calculate_psnr", "calculate_ssim"):
        luma = kwargs.pop("test_y_channel", False)
        stamp.update(name=name[-4:].upper(), colour="Y of YCbCr (BT.601)" if luma else "RGB", range="0 to 255")
        if name == "calculate_ssim":
            stamp["window"] = "Gaussian 11x11, sigma 1.5, inner pixels, mean over channels"
    elif name == "calculate_niqe":
        luma = kwargs.pop("convert_to", "y") == "y"
        stamp.update(name="NIQE", colour="Y of YCbCr (BT.601)" if luma else "gray", range="0 to 255", blocks="96x96")
    kwargs.pop("input_order", None)  # how the array lies in memory
    package = registry.lookup("metric", name).__module__.split(".")[0]
    return {**stamp, "package": package_version(package), **kwargs}


def stamp(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of a metric as configured in ``val: metrics:``.

    Raises:
        NotAvailable: if a package or weights that it needs are not there.
        UserError: for arguments that make no sense.
    """
    metric = registry.lookup("metric", cfg["type"])
    own = getattr(metric, "protocol", None)
    if own is None:
        result = _basicsr(cfg, arguments(cfg))
    else:
        takes = inspect.signature(own).parameters
        kwargs = {**arguments(cfg), **({"weights_dir": cfg.get("weights_dir")} if "weights_dir" in takes else {})}
        result = own(**kwargs)
    return {"name": result["name"], "type": cfg["type"], "better": better(cfg), **result}


def describe(stamp: Mapping[str, Any]) -> str:
    """One line for people, of everything in the stamp that the number depends on."""
    parts = [str(stamp["name"])]
    for key, value in stamp.items():
        if key == "weights":
            parts += [f"{name} (SHA-256 {digest[:8]})" for name, digest in value.items()]
        elif key in ("colour", "package", "network", "window"):
            parts.append(str(value))
        elif key == "better":
            parts.append(f"{value} is better")
        elif key not in ("name", "type"):
            parts.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(parts)
