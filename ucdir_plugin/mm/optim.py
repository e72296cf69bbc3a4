"""Optimizing under MMEngine by the same steps as under BasicSR."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import torch
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper

from ucdir_plugin.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from ucdir_plugin.training.steps import Stepper
from ucdir_plugin.utils.training_states import check_optimizers


@OPTIM_WRAPPERS.register_module()
class DiffusionOptimWrapper(OptimWrapper):
    """Scales, clips and skips as :class:`~ucdir_plugin.training.steps.Stepper` does.

    Args:
        optimizer: what steps.
        stepper: its stepper.
        accumulative_counts: as in MMEngine.
        losses: says those of the iteration by name, for messages.

    Attributes:
        stepped: whether the last iteration took a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stepper: Stepper,
        accumulative_counts: int = 1,
        losses: Callable[[], Mapping[str, Any]] = dict,
    ):
        super().__init__(optimizer, accumulative_counts)
        self.stepper, self.stepped, self.losses = stepper, False, losses
        self._part: Optional[Tuple[float, bool]] = None

    def part(self, share: float, last: bool) -> None:
        """The next loss is of this share of a batch; after the last part the step is taken."""
        self._part = (share, last)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return super().scale_loss(loss) if self._part is None else loss * self._part[0]

    def should_update(self) -> bool:
        return super().should_update() if self._part is None else self._part[1]

    def should_sync(self) -> bool:
        return super().should_sync() if self._part is None else self._part[1]

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute the gradients of a loss; no step is taken."""
        self.stepped = False
        self.stepper.backward(loss)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        iteration = self.message_hub.get_info("iter", 0) + 1
        self.stepped = self.stepper.step(iteration, self.losses(), MMLogger.get_current_instance())

    def state_dict(self) -> Dict[str, Any]:
        kinds = [type(self.optimizer).__name__]
        return {**super().state_dict(), "stepper": self.stepper.state_dict(), "optimizer_types": kinds}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        check_optimizers(state_dict, [self.optimizer])
        state_dict = {key: value for key, value in state_dict.items() if key != "optimizer_types"}
        self.stepper.load_state_dict(state_dict.pop("stepper", {}))
        super().load_state_dict(state_dict)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DiffusionOptimConstructor:
    """``optim_wrapper = dict(constructor="ucdir_plugin.DiffusionOptimConstructor")`` of a diffusion model.

    The optimizer, its parameters, clipping and precision are what the model's ``train`` says.
    """

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None):
        self.accumulate = optim_wrapper_cfg.get("accumulative_counts", 1)

    def __call__(self, model: torch.nn.Module) -> DiffusionOptimWrapper:
        bare = model.module if is_model_wrapper(model) else model
        optimizer = bare.task.optimizer(bare.net_g)
        # A sharded model (FSDP) knows the norm over all its shards.
        stepper = bare.task.stepper(optimizer, bare.net_g, getattr(model, "clip_grad_norm_", None))
        return DiffusionOptimWrapper(optimizer, stepper, self.accumulate, bare.losses)
