"""What models may have besides what BasicSR's all have, and the rest of a training asks for.

A model of another package has none of it, and ``isinstance`` says so.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Protocol, runtime_checkable

import torch


@runtime_checkable
class Averaged(Protocol):
    """A model with an average of its network's weights, which predicts."""

    net_g_ema: torch.nn.Module


@runtime_checkable
class HasNetwork(Protocol):
    """A model with one network, ``net_g``; BasicSR's of several networks have others besides."""

    net_g: torch.nn.Module


@runtime_checkable
class NamesWeights(Protocol):
    """A model that says which file its weights are from."""

    weights: Optional[str]


@runtime_checkable
class HasRestorer(Protocol):
    """A model that restores by a restorer (:mod:`ucdir_plugin.restoration`), whose settings decide the result."""

    restorer: Any


@runtime_checkable
class GivesFiles(Protocol):
    """A model that gives files beside an image: what BIR-D learned."""

    def result_files(self) -> Dict[str, bytes]:
        """End of the file's name -> content, for the image that was restored last."""


@runtime_checkable
class Degrades(Protocol):
    """A data set that degrades its images itself."""

    @staticmethod
    def declared(opt: Dict[str, Any]) -> List[Dict[str, Any]]:
        """How, by its options: a list as of ``ucdir_plugin.utils.degradations.chain``."""


@runtime_checkable
class KeepsExtraState(Protocol):
    """A model whose training state has more than BasicSR's entries."""

    def extra_state(self) -> Dict[str, Any]:
        """Tensors and plain values, by name."""


@runtime_checkable
class LogsLosses(Protocol):
    """A model that keeps its last losses by name, as BasicSR's do after a step."""

    log_dict: Mapping[str, float]
