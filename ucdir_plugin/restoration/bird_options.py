"""From BIR-D's options to the solver's settings, a known kernel, and another method."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Dict, Mapping, Optional

import numpy as np
import torch

from ucdir_plugin.diffusion.bird.degradation import check_kernel_size
from ucdir_plugin.diffusion.bird.tasks import Task
from ucdir_plugin.options.calls import check_call
from ucdir_plugin.options.schema import BirdOptions
from ucdir_plugin.restoration import deepinv_methods
from ucdir_plugin.utils import image_reading
from ucdir_plugin.utils.degradations import gaussian_kernel, motion_kernel
from ucdir_plugin.utils.errors import UserError, did_you_mean


def changed(base: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass of settings with some of its fields changed, as options say.

    A field that is such a class itself takes a mapping: of its fields, or with ``type`` one of the other classes that
    it may be, as in ``{data: {type: Gradient, scale: {type: FixedScale, eta: 0.5}}}``.

    Raises:
        UserError: for an unknown name, or a value of another type.
    """
    kind = type(base)
    hints = typing.get_type_hints(kind)
    values: Dict[str, Any] = {}
    for key, value in changes.items():
        known = {k.__name__: k for k in typing.get_args(hints.get(key)) if dataclasses.is_dataclass(k)}
        if not known:
            values[key] = value
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"option {where}:{key}: a mapping is expected, with 'type: {' or '.join(known)}' or fields")
        inner, here = dict(value), f"{where}:{key}"
        name = inner.pop("type", None)
        old = getattr(base, key)
        if name is not None and (not isinstance(name, str) or name not in known):
            raise UserError(f"option {here}:type: there is no {name!r}; {did_you_mean(str(name), known)}")
        new = old if name is None or type(old) is known[name] else known[name]()
        values[key] = changed(new, inner, here)
    plain = {k: v for k, v in values.items() if not dataclasses.is_dataclass(v)}
    check_call(kind, plain, where, own=True)
    try:
        return dataclasses.replace(base, **values)
    except UserError as err:
        raise UserError(f"option {where}: {err}") from err


def known_kernel(blur: Mapping[str, Any], channels: int = 3) -> torch.Tensor:
    """A known blur: ``{type: gaussian, sigma: 2.5}``, ``{type: motion, length: 9, angle: 45}`` or ``{file: K.npy}``.

    A file holds a point spread function, what a bright dot becomes, as ``learned.npz`` does too.

    Returns:
        (1, channels, 1, k, k) of sum 1, k odd; as :class:`Degradation` has it, mirrored.

    Raises:
        UserError: if it is none of these.
    """
    blur = dict(blur)
    kinds = {"gaussian": (gaussian_kernel, ("sigma",)), "motion": (motion_kernel, ("length", "angle"))}
    path = blur.pop("file", None)
    if path is not None:
        if blur:
            raise UserError(f"option bird:blur: file goes without {', '.join(blur)}")
        if not isinstance(path, str):
            raise UserError(f"option bird:blur:file: the path of a file is expected, got {path!r}")
        kernel = _kernel_file(path)[::-1, ::-1]
    else:
        kind = blur.pop("type", None)
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"option bird:blur:type: there is no {kind!r}; {did_you_mean(str(kind), kinds)}")
        function, names = kinds[kind]
        if set(blur) != set(names) or not all(isinstance(v, (int, float)) and 0 <= v <= 360 for v in blur.values()):
            raise UserError(f"option bird:blur: {kind} has the numbers {' and '.join(names)}, 0 to 360, got {blur}")
        kernel = function(**blur)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise UserError(f"option bird:blur: a kernel is square, got {' x '.join(map(str, kernel.shape))}")
    check_kernel_size(kernel.shape[0])
    total = float(kernel.sum())
    if not np.isfinite(kernel).all() or total <= 0:
        raise UserError("option bird:blur: a kernel has finite taps with a positive sum")
    plane = torch.from_numpy(np.ascontiguousarray(kernel / total)).float()
    return plane.expand(1, channels, 1, *plane.shape).clone()


def _kernel_file(path: str) -> np.ndarray:
    try:
        if path.endswith(".npy"):
            found = np.load(path, allow_pickle=False)
            if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
                raise UserError(f"option bird:blur:file: {path}: one array (k, k) of real numbers is expected")
            return found.astype(np.float64)
        return image_reading.read_photo(path, image_reading.MAX_PIXELS).pixels[..., 0].astype(np.float64)
    except UserError:
        raise
    except Exception as err:  # numpy raises a dozen types for damaged files
        raise UserError(f"option bird:blur:file: {path} cannot be read: {err}") from err


_PATCHES = ("tile", "overlap", "tile_batch", "merge")


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> Dict[str, Any]:
    """``bird:`` with what the command line says: keys of the patches, and of the settings."""
    result = dict(values)
    settings = dict(result.get("settings") or {})
    for key, value in more.items():
        if key in _PATCHES:
            result[key] = value
        elif key in ("sampler", "spacing"):
            raise UserError(
                f"{key} has no meaning for BIR-D: its own are --set transition=... levels=... (docs/bird.md)"
            )
        elif isinstance(value, Mapping) and isinstance(settings.get(key), Mapping):
            settings[key] = {**settings[key], **value}
        else:
            settings[key] = value
    if settings:
        result["settings"] = settings
    return result


def other_solver(options: BirdOptions, task: Task, blur: Optional[torch.Tensor]) -> deepinv_methods.Method:
    """Another solver, for a known operator.

    Raises:
        NotAvailable: if deepinv is not installed.
        UserError: if the operator is not known, or a key of its settings is not.
    """
    deepinv_methods.deepinv()
    if not task.simplex or (task.blind and blur is None):
        cure = "say which blur it is (bird:blur)" if task.simplex else "take the solver bird"
        raise UserError(
            f"option bird:solver: {options.solver} needs a known degradation, {options.task} has none: {cure}"
        )
    if options.preset != "default" or options.ablation is not None:
        raise UserError(f"option bird:solver: {options.solver} has no preset and no ablation; remove them")
    method = deepinv_methods.METHODS[options.solver]()
    if options.noise is not None:
        method = dataclasses.replace(method, noise=options.noise / 255)
    return changed(method, options.settings, "bird:settings")
