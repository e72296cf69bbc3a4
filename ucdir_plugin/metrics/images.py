"""What the metrics have in common: images as BasicSR hands them over, and computing that is the same everywhere."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from typing import Any, Callable, Iterator, TypeVar

import numpy as np
import torch

from ucdir_plugin.utils.errors import NotAvailable, NotMeasurable, UserError

F = TypeVar("F", bound=Callable)


def rgb(image: np.ndarray, crop_border: int = 0) -> np.ndarray:
    """The image as (H, W, 3) RGB uint8, without ``crop_border`` pixels on each side; gray becomes three equal channels.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) BGR, uint8.

    Raises:
        UserError: for another type or shape.
        NotMeasurable: if nothing is left.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise UserError(f"metrics take uint8 images, 0 to 255, got {image.dtype}: scale, round and convert it first")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(f"metrics take images of 1 or 3 channels, (H, W, C), got the shape {image.shape}")
    if crop_border < 0 or min(image.shape[:2]) <= 2 * crop_border:
        raise NotMeasurable(f"{image.shape[1]}x{image.shape[0]} pixels, crop_border {crop_border}: nothing is left")
    end = -crop_border or None
    image = image[crop_border:end, crop_border:end]
    return np.ascontiguousarray(np.broadcast_to(image[..., ::-1], (*image.shape[:2], 3)))


def same_size(image: np.ndarray, other: np.ndarray) -> None:
    """Refuse two images that cannot be compared pixel by pixel.

    Raises:
        NotMeasurable: if the images have different heights or widths.
    """
    if image.shape[:2] != other.shape[:2]:
        sizes = " and ".join(f"{i.shape[1]}x{i.shape[0]}" for i in (image, other))
        raise NotMeasurable(f"the images to compare have {sizes} pixels: they must be of one size")


def device() -> torch.device:
    """Where networks of metrics compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def exact() -> Iterator[None]:
    """Neither gradients nor the rounded multiplications (TF32) of GPUs: a metric's number should not depend on them."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def package_folder(package: str, install: str) -> str:
    """The folder of an installed package, which is not imported.

    Raises:
        NotAvailable: if it is not installed; ``install`` says how to.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotAvailable(f"the package {package} is not installed: {install}")
    return spec.submodule_search_locations[0]


def imported(module: str, install: str) -> Any:
    """A module of an optional package.

    Raises:
        NotAvailable: if it, or something that it needs itself, is not installed; ``install`` says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise NotAvailable(f"{module} cannot be imported ({err}): {install}") from err


def described(protocol: Callable[..., dict[str, Any]]) -> Callable[[F], F]:
    """Decorator: ``protocol`` takes the metric's keyword arguments and returns its stamp (:mod:`.protocol`)."""

    def decorate(metric: F) -> F:
        metric.protocol = protocol
        return metric

    return decorate
