"""Model files of this package in programs that load networks with spandrel: chaiNNer, ComfyUI and others.

import spandrel
import ucdir_plugin.interop.spandrel

ucdir_plugin.interop.spandrel.install()
model = spandrel.ModelLoader().load_from_file("mine.safetensors")  # of tools/convert_weights.py
"""

from __future__ import annotations

import importlib.util
from typing import Any, Mapping

import torch
from torch import nn

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.restoration.load import of_weights
from ucdir_plugin.utils.checkpoints import OPTIONS
from ucdir_plugin.utils.errors import NotAvailable
from ucdir_plugin.zoo.model_files import PRIOR_MODEL, options_among

ID = "ucdir_plugin"
"""The name of all model files of this package among spandrel's architectures."""


class Restoring(nn.Module):
    """What a model file restores, as one network: (1, 3, H, W) RGB in [0, 1] -> (1, 3, scale * H, scale * W).

    A UCDIR network samples as the file's options say, with their seed: one image always gives one result.

    Args:
        options: checked ones, as :func:`ucdir_plugin.zoo.model_files.options_among` gives them.
        state: the weights.
    """

    def __init__(self, options: Mapping[str, Any], state: Mapping[str, torch.Tensor]):
        super().__init__()
        weights = {name: value for name, value in state.items() if name != OPTIONS}
        self._restorer = of_weights(options, weights, ID, torch.device("cpu"))
        self.net = self._restorer.net

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Nothing: the weights are there; spandrel loads what it has handed over once more."""

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Restore images, one after the other."""
        self._restorer.device = image.device
        results = [next(iter(self._restorer.run(one.clone(), "").samples)) for one in image.split(1)]
        return torch.cat(results)


def install() -> None:
    """Register model files of this package with spandrel; a second call does nothing.

    Files of earlier versions hold their options in the header alone, which spandrel does not hand over: write them
    anew with tools/convert_weights.py.

    Raises:
        NotAvailable: if spandrel is not installed.
    """
    if importlib.util.find_spec("spandrel") is None:
        raise NotAvailable("ucdir_plugin.interop.spandrel needs the package: pip install 'ucdir-plugin[spandrel]'")
    import spandrel

    class Files(spandrel.Architecture[Restoring]):
        def __init__(self) -> None:
            super().__init__(id=ID, name="UCDIR plugin", detect=lambda state: OPTIONS in state)

        def load(self, state_dict: Mapping[str, Any]) -> spandrel.ImageModelDescriptor[Restoring]:
            options = options_among(state_dict, "model file")
            if options["model_type"] == PRIOR_MODEL:
                raise ValueError("it is a prior of BIR-D, which restores nothing by itself")
            model, scale = Restoring(options, state_dict), options["scale"]
            samples = isinstance(model.net, UCDIR)
            return spandrel.ImageModelDescriptor(
                model,
                dict(state_dict),
                architecture=self,
                purpose="Restoration" if scale == 1 else "SR",
                tags=[options["name"]],
                supports_half=False,
                supports_bfloat16=False,
                scale=scale,
                input_channels=3,
                output_channels=3,
                tiling=spandrel.ModelTiling.INTERNAL if samples else spandrel.ModelTiling.SUPPORTED,
            )

    registry = spandrel.MAIN_REGISTRY
    if ID not in registry:
        others = tuple(support.architecture.id for support in registry)
        registry.add(spandrel.ArchSupport.from_architecture(Files(), before=others))
