"""Networks of the package spandrel: some forty architectures, recognised from a file of weights or built by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import warnings
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from torch import nn

from ucdir_plugin.registry import register
from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.errors import NotAvailable, UserError, did_you_mean

_TOLD_A_LEVEL = ("DRUNet",)
"""Architectures that take a map of the noise level beside the image."""


class UnknownNetwork(UserError):
    """spandrel knows no network with such weights."""


def _spandrel() -> Any:
    """The package, with the architectures of spandrel_extra_arches where that is installed.

    Raises:
        NotAvailable: if it is not there.
    """
    if importlib.util.find_spec("spandrel") is None:
        raise NotAvailable("arch Spandrel needs the package spandrel: pip install 'ucdir-plugin[spandrel]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.script, which some networks use
        import spandrel

        if importlib.util.find_spec("spandrel_extra_arches") is not None:
            import spandrel_extra_arches

            spandrel.MAIN_REGISTRY.add(*spandrel_extra_arches.EXTRA_REGISTRY, ignore_duplicates=True)
    return spandrel


def _class_of(arch: str) -> Type[nn.Module]:
    """The network that an architecture's name stands for.

    Raises:
        UserError: if spandrel has no architecture of that name, or several networks of it.
    """
    known = [support.architecture.id for support in _spandrel().MAIN_REGISTRY]
    if arch not in known:
        raise UserError(f"Spandrel: there is no architecture {arch!r}; {did_you_mean(arch, known)}")
    for package in ("spandrel", "spandrel_extra_arches"):
        try:
            module = importlib.import_module(f"{package}.architectures.{arch}")
        except ModuleNotFoundError:
            continue
        found = [getattr(module, name) for name in module.__all__]
        networks = [cls for cls in found if inspect.isclass(cls) and issubclass(cls, nn.Module)]
        if len(networks) == 1:
            return networks[0]
    raise UserError(f"Spandrel: {arch} is not one network, so that it needs a file of weights: path")


def _new(arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    cls = _class_of(arch)
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            raise UserError(f"Spandrel: {arch} takes no {name!r}; {did_you_mean(name, known)}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError, LookupError, AssertionError, RuntimeError, ArithmeticError, AttributeError) as err:
        if torch.get_default_device().type == "meta":  # some cannot be built there, which is no fault of theirs
            raise
        raise UserError(f"Spandrel: {arch} cannot be built: {type(err).__name__}: {err}") from err


def _weights(content: Any) -> Any:
    """A file's content, without the prefix that weights have which were trained here as an arch :class:`Spandrel`."""
    for key in ("params_ema", "params"):
        state = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(state, Mapping) and state and all(str(name).startswith("net.") for name in state):
            return {name[len("net.") :]: value for name, value in state.items()}
    return content


def _recognised(state: Any, what: str, arch: Optional[str] = None) -> Any:
    """spandrel's description of weights, the network in it.

    Raises:
        UserError: if it knows no such network, or one of another kind than image to image.
    """
    spandrel = _spandrel()
    try:
        if arch is None:
            found = spandrel.ModelLoader().load_from_state_dict(state)
        else:
            found = spandrel.MAIN_REGISTRY[arch].architecture.load(state)
    except spandrel.UnsupportedModelError as err:
        raise UnknownNetwork(f"{what}: it is of none of the architectures that spandrel knows") from err
    except Exception as err:  # whatever building a network from damaged or foreign weights raises
        raise UserError(f"{what}: spandrel cannot load it: {type(err).__name__}: {err}") from err
    if not isinstance(found, spandrel.ImageModelDescriptor):
        raise UserError(f"{what}: {found.architecture.id} does not turn one image into another (it needs a mask)")
    if found.input_channels not in (1, 3) or found.output_channels != found.input_channels:
        raise UserError(
            f"{what}: {found.architecture.id} turns {found.input_channels} channels into {found.output_channels}:"
            " RGB or gray images are needed, in and out"
        )
    return found


def recognises(state: Any) -> bool:
    """Whether spandrel knows a network by its weights."""
    try:
        _recognised(_weights(state), "weights")
    except UserError:
        return False
    return True


@register("arch")
class Spandrel(nn.Module):
    """A network of spandrel as any other arch: ``{type: Spandrel, path: FILE}``, or a new one, ``{..., arch: NAFNet}``.

    It stands wherever an arch may: one-pass restorer, predictor of UCDIR, first stage, prior of BIR-D. The licence of
    an architecture is its authors': spandrel's are permissive, those of spandrel_extra_arches are not all.

    Args:
        path: weights as their authors save them (.safetensors, or .pth, read as tensors only), which say what
            network it is.
        arch: the name of an architecture, instead of ``path``; ``arguments`` are those of its network.
        noise: the level that a network such as DRUNet is told, of 255, where nothing else is said.

    Attributes:
        architecture: its name in spandrel.
        scale: output size / input size.
        stride: what it pads the sides of images to multiples of.
        gray: the network has one channel; it is applied to each channel of an image.
        told: the network is told the noise level.

    Shape:
        (B, 3, H, W) RGB in [0, 1], and perhaps a noise level, a number or (B,) of [0, 1] -> (B, 3, scale * H,
        scale * W); any size.

    Raises:
        NotAvailable: if spandrel is not installed.
        UserError: for weights or arguments that it knows nothing of.
    """

    file_arguments: ClassVar[Tuple[str, ...]] = ("path",)

    def __init__(self, path: Optional[str] = None, arch: Optional[str] = None, noise: float = 15.0, **arguments: Any):
        super().__init__()
        if (path is None) == (arch is None):
            raise UserError("Spandrel: give path (a file of weights) or arch (the name of an architecture)")
        if path is not None and arguments:
            raise UserError(f"Spandrel: {next(iter(arguments))} has no meaning with path: the file says what it is")
        net = None if arch is None else _new(arch, arguments)
        if net is not None and next(net.parameters()).is_meta:  # only its size is asked for
            self.net = net
            return
        with torch.device("cpu"):  # what is loaded cannot be without numbers
            if net is None:
                found = _recognised(_weights(read_checkpoint(os.path.expanduser(path))), path)
            else:
                found = _recognised(net.state_dict(), f"Spandrel {arch}", arch)
        self.architecture = str(found.architecture.id)
        self.noise, self.told = noise, self.architecture in _TOLD_A_LEVEL
        self.scale, self.gray = found.scale, found.input_channels == 1
        self.stride = found.size_requirements.multiple_of
        self.net = found.model.requires_grad_(True).train()
        self._padding, self._call = found.size_requirements.get_padding, found._call_fn

    @classmethod
    def without_files(cls, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """A configuration of the same network that names no file, for model files."""
        if cfg.get("path") is None:
            return dict(cfg)
        kept = {key: value for key, value in cfg.items() if key != "path"}
        net = cls(**{key: value for key, value in cfg.items() if key != "type"})
        arguments: Dict[str, Any] = getattr(net.net, "hyperparameters", {})
        return {**kept, "arch": net.architecture, **{k: _plain(v) for k, v in arguments.items() if _is_plain(v)}}

    def forward(self, image: torch.Tensor, sigma: Union[float, torch.Tensor, None] = None) -> torch.Tensor:
        """Restore images; see the class."""
        batch, channels, height, width = image.shape
        x = image.reshape(batch * channels, 1, height, width) if self.gray else image
        right, bottom = self._padding(width, height)
        if right or bottom:  # as spandrel does
            mirrored = min(right, width - 1), min(bottom, height - 1)
            x = F.pad(x, (0, mirrored[0], 0, mirrored[1]), mode="reflect")
            x = F.pad(x, (0, right - mirrored[0], 0, bottom - mirrored[1]), mode="replicate")
        y = self._with_level(x, sigma) if self.told else self._call(self.net, x)
        y = y[..., : height * self.scale, : width * self.scale]
        return y.reshape(batch, channels, *y.shape[-2:]) if self.gray else y

    def _with_level(self, x: torch.Tensor, sigma: Union[float, torch.Tensor, None]) -> torch.Tensor:
        level = torch.as_tensor(self.noise / 255 if sigma is None else sigma, dtype=x.dtype, device=x.device)
        if level.dim():  # of each image; of gray networks its channels are images
            level = level.repeat_interleave(len(x) // len(level)).view(-1, 1, 1, 1)
        return self.net(torch.cat([x, level.expand(len(x), 1, *x.shape[-2:])], dim=1))


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold an argument; others, such as classes of layers, are never but their defaults."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """With lists for tuples."""
    if isinstance(value, (list, tuple)):
        plain: List[Any] = [_plain(item) for item in value]
        return plain
    return value
