"""LPIPS and ST-LPIPS, by their authors' packages."""

from __future__ import annotations

import functools
import os
from typing import Any, Optional

import numpy as np
import torch

from ucdir_plugin.metrics.images import described, device, exact, imported, package_folder, rgb, same_size
from ucdir_plugin.metrics.protocol import package_version
from ucdir_plugin.registry import register
from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.downloads import WeightsFile
from ucdir_plugin.utils.errors import NotAvailable, NotMeasurable, UserError
from ucdir_plugin.utils.files import sha256_of

BACKBONES = {
    "alex": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "vgg": WeightsFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
}
"""torchvision's ImageNet weights that LPIPS is defined with."""

INSTALL_ST = "pip install 'ucdir-plugin[metrics]' (stlpips-pytorch, with its weights)"
ST_SHA256 = {
    "alex": "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
    "vgg": "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
}
"""Of the weights in stlpips-pytorch 0.0.2."""

_NETWORKS = {"alex": "AlexNet", "vgg": "VGG-16"}
_SMALLEST = {"alex": 31, "vgg": 16}  # below, a pooling layer has nothing to pool


def _check(net: str) -> str:
    if net not in _NETWORKS:
        raise UserError(f"LPIPS: there is no net {net!r}; known: {', '.join(_NETWORKS)}")
    return net


def _lpips_protocol(crop_border: int, net: str, weights_dir: Optional[str]) -> dict[str, Any]:
    _, backbone = BACKBONES[_check(net)].find(weights_dir)
    heads = os.path.join(package_folder("lpips", "pip install lpips"), "weights", "v0.1", f"{net}.pth")
    return {
        "name": f"LPIPS ({_NETWORKS[net]})",
        "colour": "RGB",
        "range": "-1 to 1",
        "crop_border": crop_border,
        "network": f"{_NETWORKS[net]}, version 0.1",
        "weights": {BACKBONES[net].name: backbone, f"v0.1/{net}.pth": sha256_of(heads)},
        "package": package_version("lpips"),
    }


def _st_weights(net: str) -> str:
    folder = package_folder("stlpips_pytorch", INSTALL_ST)
    path = os.path.join(folder, "weights", "vST0.0", f"{_check(net)}_shift_tolerant.pth")
    if not os.path.isfile(path) or sha256_of(path) != ST_SHA256[net]:
        raise NotAvailable(f"{path} is not the file of stlpips-pytorch 0.0.2: install that version")
    return path


def _stlpips_protocol(crop_border: int, net: str) -> dict[str, Any]:
    path = _st_weights(net)
    return {
        "name": f"ST-LPIPS ({_NETWORKS[net]})",
        "colour": "RGB",
        "range": "-1 to 1",
        "crop_border": crop_border,
        "network": f"{_NETWORKS[net]}, shift-tolerant, version ST0.0",
        "weights": {f"vST0.0/{os.path.basename(path)}": sha256_of(path)},
        "package": package_version("stlpips-pytorch"),
    }


@functools.lru_cache(maxsize=4)
def lpips_network(net: str, backbone: str) -> torch.nn.Module:
    """The package's LPIPS with the backbone of a torchvision file in it (the package itself would download that).

    Args:
        net: alex or vgg.
        backbone: path of torchvision's weights of it.

    Raises:
        UserError: if the file is of another network.
    """
    import lpips

    module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = read_checkpoint(backbone)
    wanted = {key: f"features.{key.split('.', 1)[1]}" for key in module.net.state_dict()}  # slice1.0.weight
    missing = sorted(set(wanted.values()) - set(state))
    if missing:
        raise UserError(f"{backbone} is no {_NETWORKS[net]} of torchvision: it lacks {missing[0]}")
    module.net.load_state_dict({key: state[source] for key, source in wanted.items()})
    return module.requires_grad_(False).eval().to(device())


@functools.lru_cache(maxsize=4)
def stlpips_network(net: str) -> torch.nn.Module:
    """The package's ST-LPIPS, with its own weights."""
    _st_weights(net)  # the package loads what fits of any file, and says nothing of the rest
    module = imported("stlpips_pytorch.stlpips", INSTALL_ST).LPIPS(net=net, variant="shift_tolerant", verbose=False)
    return module.requires_grad_(False).eval().to(device())


def _distance(module: torch.nn.Module, net: str, img: np.ndarray, img2: np.ndarray, crop_border: int) -> float:
    same_size(img, img2)
    pair = [rgb(image, crop_border) for image in (img, img2)]
    if min(pair[0].shape[:2]) < _SMALLEST[net]:
        raise NotMeasurable(f"{_NETWORKS[net]} needs {_SMALLEST[net]} pixels on each side")
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None].to(device()) / 127.5 - 1 for image in pair]
    with exact():
        return float(module(*tensors))


@register("metric")
@described(_lpips_protocol)
def calculate_lpips(
    img: np.ndarray,
    img2: np.ndarray,
    crop_border: int = 0,
    net: str = "alex",
    weights_dir: Optional[str] = None,
    better: str = "lower",
) -> float:
    """LPIPS (Zhang et al., CVPR 2018, version 0.1) by the package ``lpips``; 0 for equal images, usually below 1.

    sum over layers l of mean over pixels of w_l . (y_l - z_l)^2, with y_l, z_l the unit-normalized features of both
    images and w_l the learned weights of the package.

    Args:
        img, img2: (H, W, 3) or (H, W) BGR uint8, of one size.
        crop_border: pixels left out on each side.
        net: alex (the papers') or vgg.
        weights_dir: where torchvision's weights of the net are looked for first (:meth:`WeightsFile.find`).
        better: for BasicSR, which hands it over; changes nothing.

    Raises:
        NotAvailable: if the weights are not there.
        NotMeasurable: for an image below 31 (alex) or 16 (vgg) pixels, or images of two sizes.
        UserError: for images that are not uint8.
    """
    module = lpips_network(_check(net), BACKBONES[net].find(weights_dir)[0])
    return _distance(module, net, img, img2, crop_border)


@register("metric")
@described(_stlpips_protocol)
def calculate_stlpips(
    img: np.ndarray, img2: np.ndarray, crop_border: int = 0, net: str = "alex", better: str = "lower"
) -> float:
    """ST-LPIPS (Ghildyal and Liu, ECCV 2022): LPIPS with networks that hardly notice a shift by a pixel.

    Its numbers are not LPIPS's: never compare the two. By the package ``stlpips-pytorch``, which has the weights.
    Arguments, formula and errors as :func:`calculate_lpips`.
    """
    return _distance(stlpips_network(_check(net)), net, img, img2, crop_border)
