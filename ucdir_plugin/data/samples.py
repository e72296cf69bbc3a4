"""What the data sets share: reading options, checking crops, and the sample that a data set gives."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ucdir_plugin.compat import img2tensor
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import check_inside


def sample_key(data: dict[str, Any], dataset_opt: dict) -> str:
    """The image's relative path: its name in tables and the key of its noise."""
    if "key" in data:
        return data["key"][0]
    path, root = data["lq_path"][0], dataset_opt.get("dataroot_lq")
    if not os.path.exists(path):  # the key of an LMDB
        return check_inside(path, dataset_opt["name"])
    return check_inside(os.path.relpath(path, root), dataset_opt["name"]) if root else os.path.basename(path)


def option(opt: dict, key: str) -> Any:
    """A dataset option that must be there.

    Raises:
        UserError: if it is missing.
    """
    if opt.get(key) is None:
        raise UserError(f"option datasets: {opt['name']}: {key} is missing ({opt['type']} needs it)")
    return opt[key]


def some_of(items: list) -> list:
    """All items, or evenly spread ones of very many: what a look at each header at the start may cost.

    Each image is checked again when it is read.
    """
    return items[:: len(items) // 20000 + 1]


def flips(opt: dict) -> tuple[bool, bool]:
    """Whether a data set flips its crops, and whether it turns them: options ``use_hflip``, ``use_rot``."""
    return bool(opt.get("use_hflip")), bool(opt.get("use_rot"))


def constant(opt: dict) -> dict[str, tuple]:
    """The option ``condition``, as the data sets' ``tells`` have it."""
    return {name: (value,) for name, value in opt.get("condition", {}).items()}


def check_crop(size: tuple[int, int], crop: int, path: str) -> None:
    """Refuse an image that is smaller than the training crop.

    Raises:
        UserError: if an image of ``size`` (height, width) cannot give a square crop.
    """
    if min(size) < crop:
        raise UserError(
            f"image {path} ({size[1]}x{size[0]}) is smaller than the crop gt_size {crop}; remove it or lower gt_size"
        )


def to_sample(
    images: dict[str, np.ndarray], paths: dict[str, str], key: str, condition: dict[str, Any]
) -> dict[str, Any]:
    """BasicSR's sample: RGB tensors (3, H, W) in [0, 1] and paths, with the image's relative path as ``key``.

    And ``condition``, name -> value of what is known about the image beside it, if something is.
    """
    tensors = {
        name: img2tensor(np.ascontiguousarray(image), bgr2rgb=True, float32=True) for name, image in images.items()
    }
    extra = {"condition": condition} if condition else {}
    return {**tensors, **{f"{name}_path": path for name, path in paths.items()}, "key": key, **extra}
